import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
from trainmaster.__main__ import main
from trainmaster.api.experiment_file import read_experiment_file
from trainmaster.system.drawing import draw

FILE = Path(__file__).parents[2] / "examples/arithmetic/grpo.py"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def picture() -> ElementTree.Element:
    return ElementTree.fromstring(draw(read_experiment_file(FILE).experiment.compile()))


def boxes(picture: ElementTree.Element) -> dict[str, ElementTree.Element]:
    """Of the first graph, by the name in them."""
    titles = [text for text in picture.iter(f"{SVG}text") if text.get("class") == "title"]
    found = {}
    for title in titles:
        for box in picture.iter(f"{SVG}rect"):
            left, top = float(box.get("x")), float(box.get("y"))
            inside = left < float(title.get("x")) < left + float(box.get("width"))
            if inside and top < float(title.get("y")) < top + float(box.get("height")):
                found.setdefault(title.text, box)
    return found


def test_every_call_is_a_box_in_its_models_colour(picture: ElementTree.Element):
    found = boxes(picture)
    assert found.keys() == {"dataset", "generate", "reference", "reward", "train", "score"}
    assert found["generate"].get("fill") == found["train"].get("fill") != found["reference"].get("fill")


def test_function_calls_stand_apart(picture: ElementTree.Element):
    dashed = {name for name, box in boxes(picture).items() if box.get("stroke-dasharray")}
    assert dashed == {"reward", "score"}


def test_every_edge_has_its_keys(picture: ElementTree.Element):
    keys = [text.text for text in picture.iter(f"{SVG}text") if text.get("class") == "key"]
    assert len(list(picture.iter(f"{SVG}path"))) == 6 + 2
    assert keys.count("tokens") == 3 + 1
    assert keys.count("prompt") == 2
    assert {"advantage", "reference_log_probabilities", "log_probabilities"} <= set(keys)


def test_no_two_boxes_overlap(picture: ElementTree.Element):
    areas = [
        tuple(float(box.get(name)) for name in ("x", "y", "width", "height")) for box in picture.iter(f"{SVG}rect")
    ]
    for at, (x, y, width, height) in enumerate(areas):
        for left, top, wide, high in areas[:at]:
            assert x >= left + wide or left >= x + width or y >= top + high or top >= y + height
        assert x + width <= float(picture.get("width"))
        assert y + height <= float(picture.get("height"))


def test_the_command_writes_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    out = tmp_path / "graph.svg"
    monkeypatch.setattr(sys, "argv", ["trainmaster", "graph", str(FILE), "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"drew {out}\n"
    assert ElementTree.parse(out).getroot().tag == f"{SVG}svg"
