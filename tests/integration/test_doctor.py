"""`trainmaster doctor` from the command line."""

import re

from workbench import Workbench


def test_a_layout_agrees_with_one_process_and_leaves_nothing_behind(workbench: Workbench) -> None:
    layout = ("--model.layout.pp", "2", "--model.layout.dp", "2", "--model.layout.schedule", "zb-h1")
    before = sorted(path.name for path in workbench.folder.iterdir())
    process = workbench.start("doctor", str(workbench.file), *layout)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "model: call train, dp=2 pp=2 tp=1 sp=1 schedule=zb-h1, beside one process" in out
    figures = dict(re.findall(r"^  (\S.*?)  +[\d.e+-]+ +([\d.e+-]+)$", out, re.MULTILINE))
    assert {"logits", "log-probabilities", "logits, transformers' own", "loss", "gradient norm"} < figures.keys()
    assert all(float(figure) < 1e-4 for figure in figures.values())
    assert "layout and one process agree" in out
    assert sorted(path.name for path in workbench.folder.iterdir()) == before
