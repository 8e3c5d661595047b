"""`trainmaster schedule`, its pictures, and those of the docs."""

import importlib.util
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from trainmaster.__main__ import main
from trainmaster.api.config import Layout
from trainmaster.workers.pipeline.drawing import draw
from trainmaster.workers.pipeline.instructions import Instruction, Op
from trainmaster.workers.pipeline.lowering import lowered
from trainmaster.workers.pipeline.report import foretell
from trainmaster.workers.pipeline.schedules import Kind, schedule
from trainmaster.workers.pipeline.simulate import Span, Timeline, Times, simulate

DOCS = Path(__file__).parents[3] / "docs"
SVG = "{http://www.w3.org/2000/svg}"


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as left:
        main(["schedule", *arguments])
    assert isinstance(left.value.code, int)
    return left.value.code


def said(capsys: pytest.CaptureFixture[str]) -> dict[str, list[str]]:
    """What the table says, by the name of the row."""
    lines = capsys.readouterr().out.splitlines()
    start = next(at for at, line in enumerate(lines) if "verified" in line)
    end = next(at for at, line in enumerate(lines) if " instructions, digest " in line)
    columns = [0, lines[start].index("verified"), lines[start].index("formula")]
    return {
        line[: columns[1]].strip(): [line[columns[1] : columns[2]].strip(), line[columns[2] :].strip()]
        for line in lines[start + 1 : end]
    }


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize(("p", "m"), [("4", "16"), ("8", "32")])
def test_what_is_verified_stands_beside_the_formula(kind: Kind, p: str, m: str, capsys: pytest.CaptureFixture[str]):
    assert run("--kind", kind, "--stages", p, "--microbatches", m, "--times", "5,6,4") == 0
    rows = said(capsys)
    for name, (verified, formula) in rows.items():
        if formula and " by rank" not in name:
            assert verified == formula, name
    live = next(name for name in rows if name.startswith("live activations"))
    assert rows[live][0] == rows[live][1]
    assert (" in chunks" in live) == (kind is Kind.INTERLEAVED)


def test_the_figures_of_interleaving(capsys: pytest.CaptureFixture[str]):
    assert (
        run("--kind", "interleaved", "--stages", "4", "--microbatches", "8", "--chunks", "2", "--times", "5,6,4") == 0
    )
    rows = said(capsys)
    assert rows["makespan"] == ["142.5", "142.5"]
    assert rows["idle, all ranks from first to last"] == ["22.5", "22.5"]
    assert rows["bubble, all ranks"] == ["15.79%", "15.79%"]
    assert rows["live activations at most in chunks, by rank"] == ["11 9 7 5", "11 9 7 5"]


def test_the_docs_show_what_is_printed_now(capsys: pytest.CaptureFixture[str]):
    arguments = ["--kind", "interleaved", "--stages", "4", "--microbatches", "8", "--chunks", "2", "--times", "5,6,4"]
    assert run(*arguments) == 0
    printed = "".join(f"    {line.rstrip()}\n" for line in capsys.readouterr().out.splitlines())
    assert printed in (DOCS / "pipelines.md").read_text(encoding="utf-8")


def test_where_a_formula_does_not_hold_it_says_so(capsys: pytest.CaptureFixture[str]):
    assert run("--kind", "interleaved", "--stages", "4", "--microbatches", "6", "--comm", "0.5") == 0
    out = capsys.readouterr().out
    assert "the formulas of time are without communication" in out
    assert "hold where the number of ranks divides that of microbatches" in out
    assert run("--kind", "zb-h1", "--stages", "4", "--microbatches", "8", "--times", "1,1,2") == 0
    assert "hold where gradients of weights take no longer" in capsys.readouterr().out


def test_recomputation_has_a_row_of_its_own(capsys: pytest.CaptureFixture[str]):
    assert run("--kind", "gpipe", "--stages", "2", "--microbatches", "4", "--recompute") == 0
    rows = said(capsys)
    assert rows["live activations at most, by rank"] == ["1 1", ""]
    assert rows["inputs kept at most, by rank"] == ["4 4", ""]


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        (
            {"--kind": "zb"},
            "--kind = 'zb': must be one of gpipe, 1f1b, interleaved, zb-h1, forward. Choose one of these.",
        ),
        ({"--stages": "0"}, "--stages = '0': must be a whole number from 1. Give one, such as 4."),
        ({"--stages": "-4"}, "--stages = '-4': must be a whole number from 1"),
        ({"--microbatches": "x"}, "--microbatches = 'x': must be a whole number from 1"),
        ({"--microbatches": "9" * 5000}, "must be a whole number from 1"),
        ({"--microbatches": "99999999"}, "must be at most 100000, not 399999996. Lower it."),
        ({"--chunks": "2"}, "--chunks = '2': 1f1b has one a rank. Leave it out, or take --kind interleaved."),
        ({"--kind": "interleaved", "--chunks": "1"}, "--chunks = 1: interleaved takes 2 or more. Raise it"),
        ({"--times": "1,2"}, "--times = '1,2': must be three durations above 0"),
        ({"--times": "1,2,0"}, "--times = '1,2,0': must be three durations above 0"),
        ({"--times": "1,2,nan"}, "--times = '1,2,nan': 'nan' is no duration of 0 or more. Write them as 5,6,4."),
        ({"--comm": "-1"}, "--comm = '-1': '-1' is no duration of 0 or more. Write a number such as 0.5."),
        ({"--kind": "forward", "--recompute": None}, "--recompute = True: forward has no backward to recompute for"),
    ],
)
def test_bad_input_is_one_clear_error(changed: dict[str, str | None], error: str, capsys: pytest.CaptureFixture[str]):
    options = {"--kind": "1f1b", "--stages": "4", "--microbatches": "8"} | changed
    arguments = [name if value is None else f"{name}={value}" for name, value in options.items()]
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert error in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_an_unknown_option_is_refused(capsys: pytest.CaptureFixture[str]):
    assert run("--kind", "1f1b", "--stages", "4", "--microbatches", "8", "--model.layout.pp", "2") == 2
    assert "unrecognized arguments: --model.layout.pp 2" in capsys.readouterr().err


def test_a_layout_is_foretold_in_a_line():
    assert foretell(Layout(pp=4), 8) == "a bubble of 27.3%, at most 4 3 2 1 microbatches live, by rank"
    chunks = Layout(pp=4, schedule="interleaved", chunks=2)
    assert foretell(chunks, 8) == "a bubble of 15.8%, at most 11 9 7 5 chunks live, by rank"
    again = foretell(Layout(pp=2, schedule="gpipe", recompute=True), 4)
    assert again.endswith("at most 1 1 microbatches live, by rank, and inputs of 4 4")
    assert foretell(Layout(), 8) == ""
    assert foretell(Layout(pp=8), 10_000) == "", "it would take long"


# -- pictures ---------------------------------------------------------------------------------------------------------


def boxes(picture: ElementTree.Element) -> list[list[ElementTree.Element]]:
    """By rank."""
    return [list(group.iter(f"{SVG}rect")) for group in picture.iter(f"{SVG}g")]


def test_the_picture_is_the_timeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "s.svg"
    arguments = ["--kind", "zb-h1", "--stages", "3", "--microbatches", "4", "--times", "5,6,4", "--out", str(path)]
    assert run(*arguments) == 0
    assert f"drew {path}" in capsys.readouterr().out
    picture = ElementTree.parse(path).getroot()
    rows = boxes(picture)
    assert [len(row) for row in rows] == [12, 12, 12]
    timeline = simulate(lowered(schedule(Kind.ZB_H1, 3, 4)), Times(forward=5, input_gradient=6, weight_gradient=4))
    for row, spans in zip(rows, timeline.ranks, strict=True):
        compute = [span for span in spans if span.end > span.start]
        scale = float(row[0].get("width")) / (compute[0].end - compute[0].start)
        for box, span in zip(row, compute, strict=True):
            assert box.get("class") == span.instruction.op
            assert float(box.get("x")) == pytest.approx(64 + scale * span.start, abs=0.01)
            assert float(box.get("width")) == pytest.approx(scale * (span.end - span.start), abs=0.01)
            assert box.find(f"{SVG}title").text.startswith(f"{span.instruction}: ")
        assert all(
            float(one.get("x")) + float(one.get("width")) <= float(other.get("x")) + 0.01
            for one, other in pairwise(row)
        )
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert words.count("3") == 9
    assert {"rank 0", "rank 2", "forward", "input gradient", "weight gradient"} <= set(words)
    assert "backward" not in words
    assert any("a bubble of" in (word or "") for word in words)


def test_later_chunks_are_paler():
    picture = ElementTree.fromstring(draw({"": simulate(schedule(Kind.INTERLEAVED, 2, 2, 3), Times())}, "three"))
    assert {box.get("fill-opacity") for row in boxes(picture) for box in row} == {None, "0.675", "0.35"}
    assert "paler: later chunks" in [text.text for text in picture.iter(f"{SVG}text")]


def test_a_measured_timeline_is_drawn_from_its_own_beginning():
    """Seconds of a clock, one instruction far shorter than the rest."""
    spans = [Span(Instruction(Op.FORWARD, 0, at), 1e6 + at, 1e6 + at + (1e-6 if at == 5 else 0.9)) for at in range(20)]
    picture = ElementTree.fromstring(draw({"": Timeline((tuple(spans),))}, "measured"))
    (row,) = boxes(picture)
    assert float(row[0].get("x")) == 64
    assert float(picture.get("width")) < 1000


def test_a_prediction_stands_below_what_was_measured_to_the_same_scale():
    """Each from its own beginning."""
    (one,), (other,) = (
        (tuple(Span(Instruction(Op.FORWARD, 0, at), start + at, start + at + 0.5) for at in range(count)),)
        for start, count in ((1e6, 3), (0, 5))
    )
    picture = ElementTree.fromstring(draw({"measured": Timeline((one,)), "predicted": Timeline((other,))}, "both"))
    first, second = boxes(picture)
    assert [len(first), len(second)] == [3, 5]
    assert [float(each.get("x")) for each in first] == [float(each.get("x")) for each in second[:3]]
    assert {each.get("y") for each in first}.isdisjoint({each.get("y") for each in second})
    words = [text.text for text in picture.iter(f"{SVG}text")]
    assert words.index("measured") < words.index("predicted")
    assert float(picture.get("width")) >= float(second[-1].get("x")) + float(second[-1].get("width"))


def pictures() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("make_pictures", DOCS / "make_pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.pictures()


def test_the_pictures_of_the_docs_are_what_is_drawn_now():
    for name, drawn in pictures().items():
        path = DOCS / "pictures" / name
        assert path.read_text(encoding="utf-8") == drawn, f"{path} is out of date: run docs/make_pictures.py"
        assert f"](pictures/{name})" in (DOCS / "pipelines.md").read_text(encoding="utf-8")
        assert len(drawn) < 60_000


def test_the_command_is_there_at_once():
    script = "import sys\nfrom trainmaster.__main__ import main\ntry:\n"
    script += "    main(['schedule', '--kind', '1f1b', '--stages', '2', '--microbatches', '2'])\n"
    script += "except SystemExit as left:\n    print(left.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
