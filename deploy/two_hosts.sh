#!/usr/bin/env bash
# Two machines, one run: a master and two workers with keys, seen, paused, and stopped from a third shell.
#
#     sudo deploy/two_hosts.sh [FOLDER]
#
# The two machines are network namespaces of this one, joined by a cable:
#
#     one: 10.77.0.1 ------- 10.77.0.2 :two         one: the master, a worker, and the shell that asks
#                                                   two: the other worker
#
# Every command that is shown behind [one]$ or [two]$ is what you would type on two real machines, but for the addresses.
# What each of them has to itself lies in FOLDER/one and FOLDER/two; two cannot see what one has. FOLDER/shared stands for
# a disk that both can write (NFS, say). Without FOLDER, all of it goes away at the end.
#
# It trains the example of two-digit addition, needs no download, and takes about a minute on two cores. It wants Linux,
# iproute2, util-linux, and root; without root it tries to become one in a user namespace. It takes `trainmaster` from
# PATH, or else from .venv, where `make setup` leaves it. The network of this machine is left alone.
set -euo pipefail

if [ "$(id -u)" != 0 ]; then
    exec unshare --map-root-user --net --mount sh -c 'mount -t tmpfs none /run && exec "$0" "$@"' "$0" "$@"
fi

root=$(cd "$(dirname "$0")/.." && pwd)
command -v trainmaster > /dev/null || export PATH="$root/.venv/bin:$PATH"
command -v trainmaster > /dev/null || { echo "there is no trainmaster: run \`make setup\` first" >&2 && exit 2; }
folder=$(realpath -m "${1:-$(mktemp -d)}")
is_ours=$([ $# = 0 ] && echo yes || echo no)
name=two-hosts-$$
master=tcp://10.77.0.1:5555
run=(--run.directory "$folder/shared" --run.threads 1 --run.evaluate_every None --batch_size 32)

clean_up() {
    for host in one two; do
        ip netns pids "$name-$host" 2> /dev/null | xargs --no-run-if-empty kill -9 || true
        ip netns delete "$name-$host" 2> /dev/null || true # with its end of the cable
    done
    wait
    [ $is_ours = no ] || rm -rf "$folder"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '\n== %s\n' "$*"; }

# here HOST COMMAND...: runs it on a host, in the host's own folder. A host has a name of its own too: workers whose
# hosts have one name count as being on one machine.
here() {
    ip netns exec "$name-$1" unshare --uts bash -c '
        host=$1 folder=$2 && shift 2
        hostname "$host"
        [ "$host" = one ] || mount -t tmpfs none "$folder/one" # for these processes alone
        cd "$folder/$host" && exec "$@"
    ' - "$1" "$folder" "${@:2}"
}

# on HOST COMMAND...: the same, and shows it.
on() {
    printf '[%s]$ %s\n' "$1" "${*:2}"
    here "$@"
}

# start HOST COMMAND...: shows it, and leaves it running; what it says goes to HOST/COMMAND.out. Its id is in $!.
start() {
    printf '[%s]$ %s &\n' "$1" "${*:2}"
    here "$@" > "$folder/$1/$3.out" 2>&1 &
}

# where: the state of the run and its step, as in `running 17`.
where() {
    here one trainmaster status "$master" --keys keys --json 2> /dev/null |
        python3 -c 'import json, sys; run = json.load(sys.stdin); print(run["state"], run["step"])' 2> /dev/null
}

# wait_for STATE [STEP]: until the run is in this state, and at this step or later. Says which step.
wait_for() {
    local state=none step=0
    for _ in $(seq 120); do
        kill -0 "$service" 2> /dev/null || break
        read -r state step < <(where) || true
        if [ "$state" = "$1" ] && [ "$step" -ge "${2:-0}" ]; then
            echo "the run is $state, at step $step"
            return
        fi
        sleep 0.5
    done
    echo "the run is not $1: it was $state, at step $step. Its master said:" >&2
    tail -n 20 "$folder/one/master.out" >&2
    return 1
}

# ended PROCESS WHO: waits for its end, and says with which exit code. Any but 0 ends this script.
ended() {
    local code=0
    wait "$1" || code=$?
    echo "$2 ended with $code"
    return $code
}

losses() { grep -o '"train/loss": [^,}]*' "$folder/shared/$1/metrics.jsonl"; }

# ---------------------------------------------------------------------------------------------------------------------
say "two machines and a cable"
for host in one two; do
    mkdir -p "$folder/$host"
    cp "$root"/examples/arithmetic/{sft,task}.py "$folder/$host" # the experiment, and the module that it imports
    ip netns add "$name-$host"
    ip -n "$name-$host" link set lo up
done
ip -n "$name-one" link add eth0 type veth peer name eth0 netns "$name-two"
for number in 1 2; do
    host=$([ $number = 1 ] && echo one || echo two)
    ip -n "$name-$host" address add "10.77.0.$number/24" dev eth0
    ip -n "$name-$host" link set eth0 up
done
mkdir -p "$folder/shared"

say "keys: made where the master will be; the other machine gets one file"
on one trainmaster keys keys --workers 2
echo "[one]\$ scp keys/worker-1.key two:"
(umask 077 && cp "$folder/one/keys/worker-1.key" "$folder/two") # which is what scp would do
on two ls

say "a worker on each machine, and the master; in any order"
start two trainmaster worker sft.py --master "$master" --keys worker-1.key
worker_two=$!
start one trainmaster worker sft.py --master "$master" --keys keys/worker-0.key
worker_one=$!
start one trainmaster master sft.py --bind "$master" --keys keys "${run[@]}" --run.steps 100000
service=$!
wait_for running 20

say "status -f, for three seconds, from a third shell"
on one timeout --foreground -s INT -k 2 3 trainmaster status "$master" --keys keys -f || true

say "pause: after the step that is under way"
on one trainmaster pause "$master" --keys keys
wait_for paused
before=$(where)
sleep 2
after=$(where)
echo "two seconds later: $after"
[ "$after" = "$before" ]

say "unpause"
on one trainmaster unpause "$master" --keys keys
wait_for running $((${before#* } + 20))

say "stop: after the step that is under way, with a checkpoint"
on one trainmaster stop "$master" --keys keys
ended "$service" "the master"
ended "$worker_one" "the worker on one"
ended "$worker_two" "the worker on two"
num_steps=$(losses arithmetic-sft | wc -l)
echo "$num_steps steps; checkpoints: $(ls "$folder/shared/arithmetic-sft/checkpoints")"

say "the same by one command, on one machine: the same layout, so the losses must be equal to the last bit"
on one trainmaster run sft.py "${run[@]}" --run.name one-command --run.steps "$num_steps" | tail -n 2
paste <(losses arithmetic-sft) <(losses one-command) | awk '{ print "step " NR ": " $2 "   " $4 }' | sed -n '1,3p;$p'
if cmp -s <(losses arithmetic-sft) <(losses one-command); then
    echo "all $num_steps losses are equal"
else
    echo "the losses differ"
    exit 1
fi
