"""Bad input and deaths: one clear error, a non-zero exit code within 15 s, nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time

import pytest
from workbench import Workbench

BAR_S = 15.0
START_S = 25.0
"""Generous time for processes to come up on a busy machine; the bar counts from the fault."""


def check_refused(workbench: Workbench, *words: str, overrides: tuple[str, ...] = ()) -> None:
    start_s = time.monotonic()
    done = workbench.run(*overrides)
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    for word in words:
        assert word in errors[0]
    assert "Traceback" not in done.stderr
    assert time.monotonic() - start_s < BAR_S
    assert workbench.survivors() == []


def test_malformed_json_line(workbench: Workbench) -> None:
    path = workbench.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:-3]
    path.write_text("\n".join(lines))
    check_refused(workbench, "dataset.path", "train.jsonl:17", "not JSON")
    assert not (workbench.folder / "runs" / "test").exists(), "a run that never began leaves no directory"


def test_empty_dataset(workbench: Workbench) -> None:
    (workbench.folder / "train.jsonl").write_text("\n")
    check_refused(workbench, "dataset.path", "empty")


def test_missing_file(workbench: Workbench) -> None:
    check_refused(workbench, "evaluation.path", "nowhere.jsonl", overrides=("--evaluation.path", "nowhere.jsonl"))


def test_sequence_longer_than_the_context(workbench: Workbench) -> None:
    path = workbench.folder / "train.jsonl"
    lines = path.read_text().splitlines()
    lines[5] = json.dumps({"prompt": "1+1=", "answer": "2" * 80})
    path.write_text("\n".join(lines))
    overrides = ("--microbatch_tokens", "1000")
    check_refused(workbench, "train.jsonl:6", "85 tokens", "limit of 64", overrides=overrides)
    assert not (workbench.folder / "runs" / "test").exists()


def test_more_stages_than_layers(workbench: Workbench) -> None:
    check_refused(workbench, "model.layout.pp = 5", "4 layers", overrides=("--model.layout.pp", "5"))


def test_a_run_is_never_overwritten(workbench: Workbench) -> None:
    kept = workbench.folder / "runs" / "test" / "precious"
    kept.parent.mkdir(parents=True)
    kept.write_text("kept")
    check_refused(workbench, "run.name", "exists already")
    assert kept.read_text() == "kept"


def test_port_in_use(workbench: Workbench) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        master = workbench.start("master", str(workbench.file), "--bind", address)
        _, err = master.communicate(timeout=30)
    assert master.returncode == 2
    assert "--bind" in err
    assert "in use" in err
    assert not (workbench.folder / "runs" / "test").exists()


def test_a_public_address_is_not_had_in_the_clear_where_there_are_keys(workbench: Workbench) -> None:
    made = workbench.start("keys", str(workbench.file))
    out, err = made.communicate(timeout=30)
    assert made.returncode == 0, err
    assert "master, worker-0, operator" in out
    address = ("--bind", "tcp://0.0.0.0:5555", "--insecure-plain-tcp")
    master = workbench.start("master", str(workbench.file), *address)
    _, err = master.communicate(timeout=30)
    assert master.returncode == 2
    assert "--insecure-plain-tcp" in err
    assert (workbench.folder / "runs" / "test" / "keys" / "worker-0.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("failpoint", "words"),
    [
        ("worker.register", ("worker process", "SIGKILL")),
        ("worker.load_model@1", ("worker 1", "load models")),
        ("worker.train_step@1", ("worker 1", "call train")),
        ("worker.train_step@0", ("worker 0", "call train")),
        ("worker.save@0", ("worker 0", "call train")),
    ],
)
def test_a_killed_worker_is_named(failpoint: str, words: tuple[str, ...], workbench: Workbench) -> None:
    start_s = time.monotonic()
    done = workbench.run("--model.layout.dp", "2", "--run.steps", "2", TRAINMASTER_FAILPOINT=failpoint)
    assert done.returncode == 1, done.stderr
    for word in words:
        assert word in done.stderr
    assert "Traceback" not in done.stderr, "the death is the cause; what its neighbours felt is not"
    assert time.monotonic() - start_s < START_S + BAR_S
    assert workbench.wait_until_gone(1.0) == []
    checkpoints = workbench.folder / "runs" / "test" / "checkpoints"
    assert not checkpoints.exists() or not list(checkpoints.glob("step-*")), "a half-written checkpoint has no name"


BAD_LAYER = """
import sys, time

if sys.argv[1] == "worker":
    from trainmaster.workers.models.stage import Stage

    forward, trained = Stage.forward, []

    def fails(stage, ids, batch, hidden=None):
        trained.extend([stage.index] if stage.training else [])
        if trained == [1, 1]:
            (here / "broken").write_text(str(time.time()))
            raise ValueError("a bad layer")
        return forward(stage, ids, batch, hidden)

    Stage.forward = fails
"""


def test_an_exception_in_the_middle_of_a_pipeline_reaches_the_master_at_once(workbench: Workbench) -> None:
    workbench.file.write_text(workbench.file.read_text() + BAD_LAYER)
    done = workbench.run("--model.layout.pp", "3")
    taken_s = time.time() - float((workbench.folder / "broken").read_text())
    assert done.returncode == 1, done.stderr
    instruction = "forward(1, microbatch 1) of 1f1b, pipeline rank 1 of 3, failed with ValueError: a bad layer"
    assert re.search(
        rf"^error: call train on worker 1 \(.*\) failed with RunError: {re.escape(instruction)}$", done.stderr, re.M
    )
    assert "Traceback" in done.stderr
    assert 'raise ValueError("a bad layer")' in done.stderr, "the worker's own traceback"
    assert "PeerLost" not in done.stderr, "what its neighbours felt is not the cause"
    assert "logs: " in done.stderr
    assert workbench.wait_until_gone(1.0) == []
    assert taken_s < BAR_S, "no deadline was waited for: a call has an hour"


def test_a_token_outside_of_the_vocabulary(workbench: Workbench) -> None:
    check_refused(workbench, "model.tokenizer", "vocab_size of 10", overrides=("--model.config.vocab_size", "10"))


def test_a_killed_master_is_named(workbench: Workbench) -> None:
    process = workbench.start("run", str(workbench.file), "--run.steps", "100000")
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    (master,) = workbench.pids_of("master")
    os.kill(master, signal.SIGKILL)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"error: master (pid {master}) was killed by SIGKILL" in err
    assert workbench.wait_until_gone(1.0) == []


def test_a_worker_whose_experiment_comes_out_differently_tells_the_master(workbench: Workbench) -> None:
    text = workbench.file.read_text() + "import os, dataclasses\n"
    text += "if '\\0worker\\0' in open('/proc/self/cmdline').read():\n"
    text += "    experiment = dataclasses.replace(experiment, batch_size=8)\n"
    workbench.file.write_text(text)
    check_refused(workbench, "FILE", "comes out differently on worker 0")


def test_a_loss_that_is_no_number_ends_the_run_before_it_harms_the_weights(workbench: Workbench) -> None:
    done = workbench.run("--optimizer.learning_rate", "1e30", "--optimizer.max_gradient_norm", "None")
    assert done.returncode == 1, done.stdout
    assert "the gradient norm is nan at optimizer step" in done.stderr or "norm is inf" in done.stderr
    assert not (workbench.folder / "runs" / "test" / "checkpoints").exists()


def test_an_evaluation_of_odd_size_is_spread_over_copies(workbench: Workbench) -> None:
    done = workbench.run("--model.layout.dp", "2", "--batch_size", "2", "--run.steps", "1")
    assert done.returncode == 0, done.stderr
    assert len(workbench.series("evaluation/loss")) == 2


def test_help_needs_no_file(workbench: Workbench) -> None:
    process = workbench.start("master", "--help")
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "--insecure-plain-tcp" in out
