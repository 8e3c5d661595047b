import sys
from io import StringIO

import pytest
from rich.console import Console
from trainmaster.system.monitoring import progress as module
from trainmaster.system.monitoring.progress import ProgressLine


def plain() -> tuple[StringIO, ProgressLine]:
    output = StringIO()
    return output, ProgressLine(Console(file=output, soft_wrap=True, highlight=False, width=80))


def test_steps_are_plain_lines_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 110.0, 140.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    output, line = plain()
    with line:
        line.start(4)
        line.step(1, "loss 0.5124", 12345.6)
        line.step(4, "loss 0.2500", 9.0)
    assert output.getvalue().splitlines() == [
        "step 1/4  loss 0.5124  12,346 tokens/s  0:30 left",
        "step 4/4  loss 0.2500  9 tokens/s  0:00 left",
    ]


@pytest.mark.parametrize(
    "text", ["[bold]x[/bold]", "[/nothing]", "a\\[b]", "runs/:fire:/x", "x" * 200, "path\\", "[link=x]y[/link]"]
)
def test_a_note_is_printed_literally(text: str):
    output, line = plain()
    line.note(text)
    assert output.getvalue() == f"{text}\n"


def test_a_table_shows_title_columns_and_rows():
    output, line = plain()
    line.table("sizes", ("call", "unit"), [("train", "batch"), ("train", "minibatch")])
    shown = [text.split() for text in output.getvalue().splitlines()]
    assert shown == [["sizes"], ["call", "unit"], ["train", "batch"], ["train", "minibatch"]]


def test_a_table_is_printed_literally():
    output, line = plain()
    line.table("[red]sizes", ("[bold]call",), [("[blue]train",)])
    assert [text.strip() for text in output.getvalue().splitlines()] == ["[red]sizes", "[bold]call", "[blue]train"]


@pytest.mark.parametrize("is_terminal", [True, False])
def test_what_is_said_on_a_terminal_meanwhile_stands_above_the_line(is_terminal: bool, monkeypatch: pytest.MonkeyPatch):
    """But standard error that goes to a file stays there."""
    output, error = StringIO(), StringIO()
    monkeypatch.setattr(error, "isatty", lambda: is_terminal)
    monkeypatch.setattr(sys, "stderr", error)
    with ProgressLine(Console(file=output, force_terminal=True, width=100)) as line:
        line.start(4)
        sys.stderr.write("it failed\n")
    assert ("it failed\n" in output.getvalue(), error.getvalue()) == (
        (True, "") if is_terminal else (False, "it failed\n")
    )


def test_on_a_terminal_one_line_moves():
    output = StringIO()
    with ProgressLine(Console(file=output, force_terminal=True, width=100)) as line:
        line.start(4)
        line.step(2, "loss 0.5000", 100.0)
        line.note("saved")
    shown = output.getvalue()
    assert "step 2/4" in shown
    assert "loss 0.5000" in shown
    assert "saved" in shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (36_061, "10:01:01")]
)
def test_durations(seconds: float, shown: str):
    assert module._duration(seconds) == shown
