"""The units of deploy/systemd: what they say, what `systemd-analyze` makes of them, how they behave under a systemd.

The systemd is a container's (`systemd-nspawn`) that sees this machine's /usr and little else. The program in it is
ours, or stands in for it: then it speaks to systemd with our `notify`, and hangs or ends as its environment file says.
"""

import configparser
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from trainmaster.__main__ import _parser
from trainmaster.api.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy" / "systemd"
PROGRAM = "/opt/trainmaster/bin/trainmaster"
SERVICES = ("master", "worker")


def unit(service: str) -> Path:
    return FOLDER / f"trainmaster-{service}@.service"


def section(service: str, name: str) -> dict[str, str]:
    parser = configparser.ConfigParser(interpolation=None, delimiters="=")
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(unit(service))
    return dict(parser[name])


def help_of(command: str) -> str:
    options, _ = _parser().parse_known_args([command, "FILE"])
    return options.parser.format_help()


def environment_examples() -> list[dict[str, str]]:
    blocks = re.findall(r"```ini\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    return [dict(line.split("=", 1) for line in block.splitlines()) for block in blocks]


# -- what they say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_what_is_started_is_a_command_of_ours(service: str):
    program, command, *arguments = section(service, "Service")["ExecStart"].split()
    assert (program, command) == (PROGRAM, service)
    known = help_of(command)
    assert [flag for flag in arguments if flag.startswith("--") and flag not in known] == []


@pytest.mark.parametrize(("at", "service"), list(enumerate(SERVICES)))
def test_the_examples_set_what_the_units_read(at: int, service: str):
    environment = environment_examples()[at]
    read = set(re.findall(r"\$\{?([A-Z]+)", section(service, "Service")["ExecStart"]))
    assert set(environment) == read
    known = help_of(service)
    assert [flag for flag in environment["OPTIONS"].split() if flag.startswith("--") and flag not in known] == []


@pytest.mark.parametrize("service", SERVICES)
def test_the_service_reports_and_is_watched(service: str):
    said = section(service, "Service")
    assert (said["Type"], said["NotifyAccess"], said["WatchdogSec"]) == ("notify", "main", "60")
    assert said["Environment"] == "PYTHONFAULTHANDLER=1"  # SIGABRT leaves the stacks
    assert "WatchdogSignal" not in said


def test_what_starts_again():
    assert section("master", "Service")["Restart"] == "no"
    worker = section("worker", "Service")
    assert worker["Restart"] == "on-failure"
    assert worker["RestartPreventExitStatus"] == str(ConfigError.exit_code)
    assert int(section("worker", "Unit")["StartLimitBurst"]) > 0


@pytest.mark.parametrize("service", SERVICES)
def test_to_be_stopped_is_no_failure(service: str):
    said = section(service, "Service")
    assert said["KillSignal"] == "SIGTERM"
    assert set(said["SuccessExitStatus"].split()) == {str(128 + number) for number in (signal.SIGINT, signal.SIGTERM)}


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_that_breaks_torch(service: str):
    said = section(service, "Service")
    assert not {"MemoryDenyWriteExecute", "PrivateDevices", "ProtectClock", "DeviceAllow", "ProtectHome"} & set(said)
    assert (said["NoNewPrivileges"], said["ProtectSystem"], said["PrivateTmp"]) == ("yes", "full", "yes")


@pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze (Debian: apt-get install systemd)"
)
@pytest.mark.parametrize("service", SERVICES)
def test_systemd_finds_nothing_wrong(service: str, tmp_path: Path):
    instance = tmp_path / f"trainmaster-{service}@first.service"
    instance.write_text(unit(service).read_text().replace(PROGRAM, "/bin/true"))  # ours is not installed here
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(instance)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert [line for line in done.stderr.splitlines() if "trainmaster" in line] == []
    assert done.returncode == 0, done.stderr


# -- how they behave --------------------------------------------------------------------------------------------------

STAND_IN = """
import os, signal, sys, time
from pathlib import Path
from trainmaster.system.service.failpoints import hold_the_interpreter
from trainmaster.system.service.notify import notify, watchdog_s

what = sys.argv[2]
seen = Path(f"lives-{sys.argv[1]}-{what}")
life = len(seen.read_text()) if seen.exists() else 0
seen.write_text("x" * (life + 1))
print(f"life {life} of {what}: {sys.argv[1:]}", flush=True)

def stopped(number, _):
    notify("STOPPING=1")
    print(f"{sys.argv[1]} {what} stops with {128 + number}", flush=True)
    sys.exit(128 + number)

signal.signal(signal.SIGTERM, stopped)
if what == "torch":
    import torch
    assert float((torch.ones(64, 64) @ torch.ones(64, 64)).sum()) == 64**3
if what == "silent":
    time.sleep(600)
assert notify(f"READY=1\\nSTATUS=life {life}")
if what.isdecimal():
    sys.exit(int(what))
if what.startswith("once-") and life == 0:
    sys.exit(int(what.removeprefix("once-")))
interval_s = watchdog_s()
assert interval_s is not None
for beat in range(10**6):
    if what == "hangs" and life == 0 and beat == 2:
        hold_the_interpreter(600)
    assert notify("WATCHDOG=1")
    time.sleep(interval_s)
"""
"""Stands in for `trainmaster COMMAND FILE`: FILE says how it behaves."""

QUICK = "[Unit]\nStartLimitIntervalSec=30\n[Service]\nWatchdogSec=3\nRestartSec=0.1\n"
"""What tests do not want to wait for."""

DRIVER = """
units="%(units)s"
systemctl start --no-block $units
for attempt in $(seq 300); do
    is_settled=yes
    for each in %(running)s; do
        [ "$(systemctl show -P StatusText $each)" = "%(last)s" ] || is_settled=no
    done
    for each in %(failed)s; do
        [ "$(systemctl show -P ActiveState $each)" = failed ] || is_settled=no
    done
    [ $is_settled = yes ] && break
    sleep 0.1
done
sleep 1
systemctl stop %(stopped)s
for each in $units; do
    echo "[$each]"
    systemctl show -p ActiveState,SubState,Result,NRestarts,ExecMainCode,ExecMainStatus,StatusText $each
done > /out/shown
journalctl --no-pager -o cat > /out/journal
systemctl --version | head -1 > /out/version
"""

NSPAWN = [
    "systemd-nspawn",
    "--directory=/",
    "--volatile=yes",  # /usr of this machine, read by all; everything else is new, and in memory
    "--boot",
    "--register=no",
    "--keep-unit",
    "--console=read-only",
    "--private-network",
]


def _bind(source: Path | str, target: str) -> str:
    return f"--bind-ro={source}:{target}"


def boot(folder: Path, driver: str, files: dict[str, Path]) -> str:
    """Runs the shell script `driver` under a systemd of its own. Returns what the console said."""
    (folder / "driver.sh").write_text(driver)
    (folder / "driver.service").write_text(
        "[Unit]\nAfter=systemd-journald.service systemd-sysusers.service systemd-tmpfiles-setup.service\n"
        "[Service]\nType=oneshot\nExecStart=/bin/sh /out/driver.sh\nExecStopPost=/bin/systemctl poweroff --force\n"
    )
    files = files | {"/etc/systemd/system/driver.service": folder / "driver.service"}
    done = subprocess.run(
        [
            *NSPAWN,
            f"--machine=trainmaster-{folder.name[:20].replace('_', '-').strip('-')}",
            f"--bind={folder}:/out",
            *(_bind(source, target) for target, source in files.items()),
            "systemd.unit=driver.service",
            "systemd.firstboot=no",
            "systemd.mask=systemd-networkd-wait-online.service",  # there is no network to wait for
        ],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def containers() -> None:
    """Skips where no container boots."""
    if shutil.which("systemd-nspawn") is None:
        pytest.skip("no systemd-nspawn (Debian: apt-get install systemd-container)")
    started = subprocess.run(
        [*NSPAWN[:3], *NSPAWN[4:], "--machine=trainmaster-probe", "/bin/true"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if started.returncode != 0:
        pytest.skip(f"no container starts on this machine, which root can: {started.stderr.strip()[-300:]}")


def installed(folder: Path, program: str, changes: str) -> dict[str, Path]:
    """What Python needs to run `program` as /opt/trainmaster/bin/trainmaster, and the units with `changes`."""
    python = f"/opt/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    paths = "LD_LIBRARY_PATH=/opt/python/lib PYTHONPATH=/opt/site-packages:/opt/link"
    starter, user, drop_in = folder / "starter", folder / "user.conf", folder / "changes.conf"
    starter.write_text(f'#!/bin/sh\n{paths} exec {python} {program} "$@"\n')
    starter.chmod(0o755)
    user.write_text("u trainmaster - - /var/lib/trainmaster\n")
    drop_in.write_text(changes)
    return {
        "/opt/python": Path(sys.base_prefix),
        "/opt/site-packages": Path(sysconfig.get_path("purelib")),
        "/opt/link/trainmaster": ROOT,
        PROGRAM: starter,
        "/etc/sysusers.d/trainmaster.conf": user,
        **{f"/etc/systemd/system/{unit(service).name}": unit(service) for service in SERVICES},
        **{f"/etc/systemd/system/{unit(service).name}.d/changes.conf": drop_in for service in SERVICES},
    }


@pytest.mark.fault
@pytest.mark.usefixtures("containers")
def test_under_a_systemd(tmp_path: Path):
    behaviours = {
        "master": ("runs", "torch", "1", "2", "silent"),
        "worker": ("runs", "hangs", "once-3", "once-4", "0", "2", "1"),
    }
    units = {}
    (tmp_path / "environment").mkdir()
    for service, names in behaviours.items():
        for name in names:
            lines = (f"FILE={name}", "BIND=tcp://127.0.0.1:5555", "MASTER=tcp://127.0.0.1:5555", "OPTIONS=--a 1 --b")
            (tmp_path / "environment" / f"{service}-{name}.env").write_text("\n".join(lines) + "\n")
            units[service, name] = f"trainmaster-{service}@{service}-{name}.service"
    again = [units["worker", name] for name in ("hangs", "once-3", "once-4")]
    failed = [units["worker", "1"], units["worker", "2"], *(units["master", name] for name in ("1", "2", "silent"))]
    stopped = [units["master", "runs"], units["master", "torch"], units["worker", "runs"]]
    driver = DRIVER % {
        "units": " ".join(units.values()),
        "running": " ".join(again),
        "last": "life 1",
        "failed": " ".join(failed),
        "stopped": " ".join(stopped),
    }
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    (tmp_path / "silent.conf").write_text("[Service]\nTimeoutStartSec=2\n")
    files = {
        "/opt/stand_in.py": tmp_path / "stand_in.py",
        "/etc/systemd/system/trainmaster-master@master-silent.service.d/silent.conf": tmp_path / "silent.conf",
        "/etc/trainmaster": tmp_path / "environment",
    }
    console = boot(tmp_path, driver, files | installed(tmp_path, "/opt/stand_in.py", QUICK))
    assert (tmp_path / "shown").exists(), console
    shown = configparser.ConfigParser(interpolation=None)
    shown.read(tmp_path / "shown")
    journal = (tmp_path / "journal").read_text()
    print((tmp_path / "version").read_text(), (tmp_path / "shown").read_text())

    def found(service: str, name: str) -> tuple[str, str, int]:
        said = shown[units[service, name]]
        return said["ActiveState"], said["Result"], int(said["NRestarts"])

    # a worker that hangs, whose master is gone, or whose run failed, is there again
    for name in ("hangs", "once-3", "once-4"):
        assert found("worker", name) == ("active", "success", 1), journal
    assert "Watchdog timeout" in journal
    assert re.search(r"Fatal Python error: Aborted.*hold_the_interpreter", journal, re.DOTALL), journal
    # one whose run is done, or who is told to stop, is not, and neither is a mistake
    assert found("worker", "0") == ("inactive", "success", 0)
    assert found("worker", "runs") == ("inactive", "success", 0)
    assert found("worker", "2") == ("failed", "exit-code", 0)
    # one that fails again and again is left alone
    assert found("worker", "1")[0] == "failed"
    assert 0 < found("worker", "1")[2] <= 5
    # a master is never started again; to be stopped is no failure of it; and torch works behind the fences
    assert found("master", "runs") == ("inactive", "success", 0)
    assert "master runs stops with 143" in journal
    assert found("master", "torch") == ("inactive", "success", 0)
    assert found("master", "1") == ("failed", "exit-code", 0)
    assert found("master", "2") == ("failed", "exit-code", 0)
    assert found("master", "silent") == ("failed", "timeout", 0)
    # options are split at spaces, and what is not set is not there
    assert "['master', 'runs', '--bind', 'tcp://127.0.0.1:5555', '--a', '1', '--b']" in journal
    assert "['worker', 'runs', '--master', 'tcp://127.0.0.1:5555', '--a', '1', '--b']" in journal


@pytest.mark.fault
@pytest.mark.usefixtures("containers")
def test_a_run_under_a_systemd(tmp_path: Path, tiny_folder: Path):
    environment = tmp_path / "environment"
    environment.mkdir()
    overrides = "--run.name first --run.directory runs --model.layout.dp 2"
    for name, port in (("first", 9100), ("first-0", 9110), ("first-1", 9111)):
        lines = ("FILE=/srv/tiny/experiment.py", "BIND=tcp://127.0.0.1:5555", "MASTER=tcp://127.0.0.1:5555")
        lines += (f"OPTIONS=--health-port {port}", f"OVERRIDES={overrides}")
        (environment / f"{name}.env").write_text("\n".join(lines) + "\n")
    units = "trainmaster-worker@first-0 trainmaster-worker@first-1 trainmaster-master@first"
    driver = f"""
        systemctl start {units}
        for attempt in $(seq 600); do
            systemctl is-active {units} | grep -qvE '^(inactive|failed)$' || break  # all are at their end
            sleep 0.1
        done
        systemctl is-active {units} > /out/shown
        journalctl --no-pager -o cat -u 'trainmaster-*' > /out/journal
        ls /var/lib/trainmaster/runs/first/checkpoints > /out/checkpoints
    """
    shutil.copytree(tiny_folder, tmp_path / "tiny").chmod(0o755)  # for the user that it runs as
    files = {"/srv/tiny": tmp_path / "tiny", "/etc/trainmaster": environment}
    console = boot(
        tmp_path, driver, files | installed(tmp_path, "-m trainmaster", changes="[Service]\nTimeoutStartSec=60\n")
    )
    assert (tmp_path / "journal").exists(), console
    assert (tmp_path / "shown").read_text() == "inactive\n" * 3, (tmp_path / "journal").read_text()
    assert (tmp_path / "checkpoints").read_text() == "step-4\n"
