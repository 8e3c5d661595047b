"""The command line: `trainmaster run | master | worker | check | doctor | graph FILE`, and `ps`, `status`, `logs`,
`pause`, `unpause`, `stop` for runs that are there; `schedule` draws a pipeline schedule, `models` lists what models
work.

Exit codes: 0 done; 1 the run failed; 2 the experiment or the command is wrong, nothing was trained; 128 + n stopped by
signal n (130 for Ctrl-C, 143 for SIGTERM). Of a worker also: 3 its master is gone; 4 its master ended the run early.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .api.errors import ConfigError, Interrupted, ModelError, RemoteError, RunError, TrainmasterError

if TYPE_CHECKING:
    from .api.experiment_file import LoadedExperiment
    from .system.service.keys import MasterKeys

_OVERRIDES = "every field of the experiment can be set: --model.layout.pp 2; `trainmaster check FILE --help` lists them"


def main(arguments: Sequence[str] | None = None) -> None:
    """The `trainmaster` command."""
    parser = _parser()
    options, overrides = parser.parse_known_args(arguments)
    command: Callable[[argparse.Namespace, list[str]], int] = options.handler
    if options.file is None or "--help" in overrides:
        options.parser.print_help()
        if options.file is None:
            sys.exit(0 if {"-h", "--help"} & set(overrides) else 2)
    try:
        code = command(options, overrides)
    except TrainmasterError as error:
        code = _report(error)
    except OSError as error:
        code = _report(_io_error(error))
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trainmaster",
        description="Post-trains language models with a master and model workers.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, handler: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
        # -h belongs to the experiment's own fields, which tyro explains
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            epilog=None if name == "worker" else _OVERRIDES,
            allow_abbrev=False,
            add_help=name == "worker",
        )
        command.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a file that assigns `experiment`")
        command.set_defaults(handler=handler, parser=command)
        return command

    run = add("run", _run, "start a master and its workers on this machine, and follow them")
    run.add_argument("--detach", action="store_true", help="leave it running, and return once it has begun")
    master = add("master", _master, "start the master alone; workers come by `trainmaster worker`")
    master.add_argument("--bind", default="", metavar="ADDRESS", help="tcp://HOST:PORT or ipc://PATH")
    master.add_argument(
        "--insecure-plain-tcp",
        action="store_true",
        help="bind an address that other machines reach, without keys and encryption",
    )
    master.add_argument("--keys", type=Path, metavar="DIRECTORY", help="the run's keys (RUN/keys)")
    worker = add("worker", _worker, "start one worker")
    worker.add_argument("--master", default="", metavar="ADDRESS", help="where the master is bound")
    worker.add_argument("--keys", type=Path, metavar="FILE", help="this worker's key, if its master has keys")
    worker.add_argument("--advertise", metavar="HOST", help="this machine's address for other workers")
    master.add_argument("--record", action="store_true", help=argparse.SUPPRESS)  # for `trainmaster doctor`
    for service in (run, master, worker):
        service.add_argument(
            "--health-port", type=int, metavar="PORT", help="answer /healthz, /readyz and /metrics there"
        )
        service.add_argument("--health-host", default="127.0.0.1", metavar="HOST", help="on this address (127.0.0.1)")
    for service in (master, worker):
        service.add_argument("--child", action="store_true", help=argparse.SUPPRESS)  # started by `trainmaster run`
    _add_operations(commands)
    keys = add("keys", _keys, "make the keys that a run's master, workers and operators lack")
    keys.add_argument("--workers", type=int, metavar="N", help="how many (as many as the experiment FILE asks for)")
    keys.add_argument("--revoke", default="", metavar="NAME", help="worker-N or operator: let its key in no more")
    add("check", _check, "check an experiment and its files; start nothing")
    doctor = add("doctor", _doctor, "compare one step of an experiment's models, in their layout, with one process")
    doctor.add_argument("--all", action="store_true", help="show the gradients of all parameters")
    graph = add("graph", _graph, "print an experiment's models and dataflow graph, or draw it")
    graph.add_argument("--out", type=Path, metavar="SVG", help="draw it into this file")
    _add_schedule(commands)
    _add_models(commands)
    return parser


def _add_operations(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands on runs that are there, by name, directory or address."""

    def add(name: str, handler: Callable[[argparse.Namespace, list[str]], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        if name != "ps":
            address = "" if name == "logs" else ", or its master's address"
            command.add_argument("run", metavar="RUN", help=f"a run's name, or its directory{address}")
        command.add_argument("--directory", type=Path, default=Path("runs"), help="where run directories are (runs)")
        if name not in ("ps", "logs"):
            command.add_argument("--keys", type=Path, metavar="PATH", help="the operator's key (RUN/keys/operator.key)")
        command.set_defaults(handler=handler, parser=command, file=Path())
        return command

    for name, text in (("ps", "list the runs of a folder"), ("status", "say what a run and its workers are at")):
        command = add(name, _operate, text)
        command.add_argument("--json", action="store_true", help="for programs")
        if name == "status":
            command.add_argument(
                "-f", "--follow", action="store_true", help="every second, until it ends; then how it ended"
            )
    command = add("logs", _operate, "show the logs of a run's services, by time")
    command.add_argument("worker", nargs="?", metavar="WORKER", help="a worker's rank, or master")
    command.add_argument("-f", "--follow", action="store_true", help="go on as they grow, until the run ends")
    add("pause", _operate, "have a run wait after the step that is under way")
    add("unpause", _operate, "have a paused run go on")
    command = add("stop", _operate, "end a run after the step that is under way, with a checkpoint")
    command.add_argument("--now", action="store_true", help="at once, without one")


def _add_schedule(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "verify a pipeline schedule, print its figures beside the formulas, or draw it"
    command = commands.add_parser("schedule", help=text, description=text, allow_abbrev=False)
    command.set_defaults(handler=_schedule, parser=command, file=Path())
    command.add_argument("--run", metavar="RUN", help="a run's directory, or its name in runs: show what was measured")
    command.add_argument("--step", type=int, metavar="N", help="of RUN: one of its run.timeline_steps")
    command.add_argument("--kind", metavar="KIND", help="gpipe, 1f1b, interleaved, zb-h1 or forward")
    command.add_argument("--stages", metavar="P", help="pipeline ranks")
    command.add_argument("--microbatches", metavar="M", help="microbatches of a step")
    command.add_argument("--chunks", metavar="V", help="stages a rank, of interleaved (2)")
    command.add_argument(
        "--times",
        default="1,1,1",
        metavar="F,I,W",
        help="how long a rank takes for a microbatch: forward, gradient of inputs, gradient of weights (1,1,1)",
    )
    command.add_argument("--comm", default="0", metavar="T", help="how long a message takes (0)")
    command.add_argument("--recompute", action="store_true", help="make activations again before each backward")
    command.add_argument("--out", type=Path, metavar="SVG", help="draw it into this file")


def _add_models(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    text = "list the model types of transformers and what works with each, or all that is known of one"
    command = commands.add_parser("models", help=text, description=text, allow_abbrev=False)
    command.set_defaults(handler=_models, parser=command, file=Path())
    command.add_argument("type", nargs="?", metavar="TYPE", help="a model_type, such as qwen3")
    command.add_argument("--json", action="store_true", help="for programs")


def _models(options: argparse.Namespace, rest: list[str]) -> int:
    from .system.supported import report

    if rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    print(report(options.type, options.json))
    return 0


def _schedule(options: argparse.Namespace, rest: list[str]) -> int:
    from .workers.pipeline.report import Request, show, show_measured

    if rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.run is not None:
        if options.step is None:
            options.parser.error("--run wants --step")
        show_measured(options.run, options.step, options.out)
        return 0
    missing = [f"--{name}" for name in ("kind", "stages", "microbatches") if not getattr(options, name)]
    if missing:
        options.parser.error(f"the following arguments are required: {', '.join(missing)} (or --run and --step)")
    show(
        Request(
            kind=options.kind,
            stages=options.stages,
            microbatches=options.microbatches,
            chunks=options.chunks,
            times=options.times,
            comm=options.comm,
            recompute=options.recompute,
            out=options.out,
        )
    )
    return 0


def _operate(options: argparse.Namespace, rest: list[str]) -> int:
    from .system import operate
    from .system.rpc.inquiries import Order

    command = options.parser.prog.split()[-1]
    if rest:
        options.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    match command:
        case "ps":
            operate.ps(options.directory, options.json)
        case "status":
            operate.status(options.run, options.directory, options.keys, options.follow, options.json)
        case "logs":
            operate.logs(options.run, options.worker, options.directory, options.follow)
        case "stop":
            operate.order(options.run, options.directory, options.keys, Order.STOP_NOW if options.now else Order.STOP)
        case _:
            operate.order(options.run, options.directory, options.keys, Order(command))
    return 0


def _load(options: argparse.Namespace, overrides: list[str], command: str) -> LoadedExperiment:
    from .api.experiment_file import read_experiment_file

    return read_experiment_file(options.file).resolve(overrides, prog=f"trainmaster {command} {options.file}")


def _run(options: argparse.Namespace, overrides: list[str]) -> int:
    import asyncio

    from .system.launchers.local import LocalRun
    from .system.preflight import check_files, check_functions, check_run_directory

    loaded = _load(options, overrides, "run")
    check_files(loaded.compiled)
    check_functions(loaded)
    health = _health(options)
    flags = () if health is None else ("--health-host", health[0], "--health-port", str(health[1]))
    if options.detach:
        from .system.launchers.detached import start_detached

        check_run_directory(loaded.compiled.run.path)
        return start_detached(options.file, overrides, loaded.compiled.run.path, flags)
    with _claimed(loaded.compiled.run.path) as directory:
        run = LocalRun(options.file, overrides, loaded.compiled.num_workers, directory, flags)
        code = asyncio.run(run.follow())
        if code == ConfigError.exit_code:
            _discard(directory)
    return code


def _master(options: argparse.Namespace, overrides: list[str]) -> int:
    import asyncio

    from .system.master import run_master
    from .system.preflight import check_files, check_functions
    from .system.service.addresses import check_address
    from .system.service.logs import log_to_stderr
    from .system.service.parent import end_with_parent
    from .workers.pipeline.report import foretell

    log_to_stderr(logging.ERROR if options.child else logging.WARNING)
    check_address("--bind", options.bind)
    loaded = _load(options, overrides, "master")
    path = loaded.compiled.run.path
    if options.child:
        end_with_parent()
    else:
        check_files(loaded.compiled)
        check_functions(loaded)
    try:
        with contextlib.nullcontext() if options.child else _claimed(path):
            keys = _master_keys(options, path, loaded.compiled.num_workers)
            asyncio.run(run_master(loaded, options.bind, keys, _health(options), foretell, options.record))
    except Interrupted as stopped:
        sys.stderr.write(f"{stopped}; checkpoints so far are in {path / 'checkpoints'}\n")
        return 128 + stopped.number
    except TrainmasterError as error:
        return _report(error, logs=path / "logs")
    except OSError as error:
        return _report(_io_error(error), logs=path / "logs")
    return 0


def _health(options: argparse.Namespace) -> tuple[str, int] | None:
    return None if options.health_port is None else (options.health_host, options.health_port)


def _master_keys(options: argparse.Namespace, run_directory: Path, num_workers: int) -> MasterKeys | None:
    """Those that are there, or new ones where other machines reach the master. None where only this machine does."""
    from .system.service.addresses import is_local
    from .system.service.keys import DIRECTORY, has_keys, load_master_keys, make_keys

    directory = options.keys or run_directory / DIRECTORY
    if options.insecure_plain_tcp:
        if options.keys is not None or has_keys(directory):
            cure = "leave --insecure-plain-tcp out, or remove the keys"
            raise ConfigError("--insecure-plain-tcp", True, f"the run has keys in {directory}", cure)
        if not is_local(options.bind):
            sys.stderr.write(f"warning: whoever reaches {options.bind} can read, steer and end this run\n")
        return None
    if options.keys is None and not has_keys(directory):
        if is_local(options.bind):
            return None
        make_keys(directory, num_workers)
        sys.stderr.write(f"made keys in {directory}: start each worker with --keys and its own worker-N.key\n")
    return load_master_keys(directory)


def _keys(options: argparse.Namespace, overrides: list[str]) -> int:
    from .system.service.keys import DIRECTORY, make_keys, revoke

    directory, num_workers = options.file, options.workers
    if options.file.is_file():
        compiled = _load(options, overrides, "keys").compiled
        directory, num_workers = compiled.run.path / DIRECTORY, num_workers or compiled.num_workers
    elif overrides:
        options.parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if options.revoke:
        revoke(directory, options.revoke)
        print(f"{directory}: {options.revoke} is revoked")
        return 0
    if num_workers is None:
        raise ConfigError("--workers", None, "must be given with a directory", "give the number of the run's workers")
    made = make_keys(directory, num_workers)
    print(f"{directory}: {', '.join(made) or 'nothing is missing'}")
    return 0


def _worker(options: argparse.Namespace, overrides: list[str]) -> int:
    from .api.experiment_file import read_experiment_file
    from .system.service.addresses import check_address
    from .system.service.logs import log_to_stderr
    from .system.service.parent import end_with_parent

    if overrides:
        raise ConfigError(
            "trainmaster worker", " ".join(overrides), "a worker takes its overrides from the master", "leave them out"
        )
    check_address("--master", options.master)
    log_to_stderr()
    if options.child:
        end_with_parent()
    from .system.service.keys import load_worker_keys
    from .workers.service import serve

    keys = None if options.keys is None else load_worker_keys(options.keys)
    return serve(read_experiment_file(options.file), options.master, options.advertise, keys, _health(options))


def _check(options: argparse.Namespace, overrides: list[str]) -> int:
    from .system.preflight import check_files, check_functions, check_run_directory

    loaded = _load(options, overrides, "check")
    check_files(loaded.compiled)
    check_functions(loaded)
    check_run_directory(loaded.compiled.run.path)
    print(f"{options.file}: {type(loaded.experiment).__name__} on {loaded.compiled.num_workers} workers: ready to run")
    return 0


def _doctor(options: argparse.Namespace, overrides: list[str]) -> int:
    import asyncio
    import tempfile

    from .system.launchers.local import LocalRun
    from .system.preflight import check_files, check_functions

    with tempfile.TemporaryDirectory(prefix="trainmaster-doctor-") as folder:
        overrides = [*overrides, "--run.directory", folder, "--run.name", "doctor"]
        loaded = _load(options, overrides, "doctor")
        check_files(loaded.compiled)
        check_functions(loaded)
        with _claimed(loaded.compiled.run.path) as directory:
            run = LocalRun(options.file, overrides, loaded.compiled.num_workers, directory, ("--record",))
            code = asyncio.run(run.follow())
            if code != 0:
                return code
            from .workers.doctor import examine, table

            for examination in examine(loaded.compiled, directory):
                print(table(examination, options.all))
                code = code if examination.agrees else RunError.exit_code
    return code


def _graph(options: argparse.Namespace, overrides: list[str]) -> int:
    from .system.describe import describe
    from .system.drawing import draw
    from .workers.pipeline.report import foretell

    compiled = _load(options, overrides, "graph").compiled
    if options.out is None:
        print(describe(compiled, foretell))
    else:
        options.out.write_text(draw(compiled), encoding="utf-8")
        print(f"drew {options.out}")
    return 0


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[Path]:
    """Owns the run directory; a run that never began leaves none behind."""
    from .system.preflight import claim_run_directory

    with claim_run_directory(path):
        try:
            yield path
        except (ConfigError, ModelError):
            _discard(path)
            raise


def _discard(directory: Path) -> None:
    """All but its keys, which may have been given out already."""
    from .system.service.keys import DIRECTORY

    if (directory / "checkpoints").exists():
        return
    for path in directory.iterdir():
        if path.is_dir() and path.name != DIRECTORY:
            shutil.rmtree(path)
        elif path.name != DIRECTORY:
            path.unlink()
    if not (directory / DIRECTORY).exists():
        directory.rmdir()


def _io_error(error: OSError) -> RunError:
    return RunError(f"{error.filename or 'input or output'}: {error.strerror or error}. Make room or rights there")


def _report(error: TrainmasterError, logs: Path | None = None) -> int:
    """Tells a person what went wrong; returns the exit code."""
    if isinstance(error, RemoteError):
        sys.stderr.write(error.remote_traceback.rstrip() + "\n")
    sys.stderr.write(f"error: {error}\n")
    if isinstance(error, RunError):
        for note in getattr(error, "__notes__", ()):
            sys.stderr.write(f"in: {note}\n")
        if error.likely:
            sys.stderr.write(f"likely: {error.likely}\n")
    if logs is not None and error.exit_code != ConfigError.exit_code:
        sys.stderr.write(f"logs: {logs}\n")
    return error.exit_code


if __name__ == "__main__":
    main()
