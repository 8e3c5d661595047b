"""A run that times a step, and `trainmaster schedule --run`, which draws what it measured."""

from __future__ import annotations

import json

from workbench import Workbench

TIMED = ("--model.layout.pp", "2", "--run.steps", "2", "--run.timeline_steps", "2")


def test_a_timed_step_is_drawn_beside_its_prediction(workbench: Workbench) -> None:
    chunks = ("--model.layout.schedule", "interleaved", "--model.layout.chunks", "2")
    done = workbench.run(*TIMED, *chunks, "--model.layout.recompute", "stage")
    assert done.returncode == 0, done.stderr
    assert "schedule interleaved, 2 chunks, recompute stage, on workers 0" in done.stdout
    assert "schedule interleaved, 2 chunks, recompute stage: a bubble of" in done.stdout
    files = sorted((workbench.folder / "runs" / "test" / "timelines").iterdir())
    assert [file.name for file in files] == [f"step-2-worker-{rank}.jsonl" for rank in range(2)]
    for rank, file in enumerate(files):
        line = json.loads(file.read_text())
        assert (line["kind"], line["num_chunks"], line["recompute"], line["rank"]) == ("interleaved", 2, True, rank)
        assert all(0 <= start <= end for start, end in line["times"])
    picture = workbench.folder / "measured.svg"
    shown = workbench.start("schedule", "--run", "test", "--step", "2", "--out", str(picture))
    out, err = shown.communicate(timeout=60)
    assert shown.returncode == 0, err
    assert "test, step 2: model, interleaved, 2 ranks with 2 chunks each" in out
    assert "measured" in out
    assert "predicted" in out
    assert picture.read_text().startswith("<svg")
    assert picture.read_text().index("measured: ") < picture.read_text().index("predicted: ")
    other = workbench.start("schedule", "--run", "test", "--step", "1")
    _, err = other.communicate(timeout=60)
    assert other.returncode == 2
    assert "has no timeline of this step" in err
