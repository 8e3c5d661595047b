"""Timelines as a picture (SVG): a row a rank, a box an instruction, coloured by what it does, with its microbatch.

It draws what it is given, predicted or measured, each from its own beginning, and all to one scale. Later chunks of a
rank are paler, what ran at once stands one above the other, and what is white is idle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from xml.etree import ElementTree

from .instructions import COMMUNICATION, Op
from .simulate import Span, Timeline

_COLOURS = {
    Op.FORWARD: "#6ea8dc",
    Op.RECOMPUTE: "#b7a6d9",
    Op.BACKWARD: "#6fbf8b",
    Op.INPUT_GRADIENT: "#8fd3c8",
    Op.WEIGHT_GRADIENT: "#f2b84b",
    Op.SAMPLE: "#e88a8a",
    Op.CLOSE: "#cccccc",
    Op.REDUCE: "#999999",
    Op.STEP: "#666666",
}
_ROW, _GAP, _LEFT, _MARGIN, _LINE = 24, 6, 64, 16, 16
"""Of a row; between rows; of the ranks' names; around; of text. In pixels."""
_BOX, _WIDEST = 20.0, 8000.0
"""Width of a short box, and of the whole at most."""
_DIGIT = 6.6
"""Width of one, about."""
_PALEST = 0.35


def draw(timelines: Mapping[str, Timeline], title: str, notes: Sequence[str] = ()) -> str:
    """The picture, with a legend of what occurs in it, and `notes` below, a line each. Timelines by their headings."""
    spans = [span for each in timelines.values() for rank in each.ranks for span in rank if _is_shown(span)]
    width = max(end - begin for begin, end in map(_extent, timelines.values()))
    lengths = sorted(span.end - span.start for span in spans)
    # short boxes are legible, but a few that are far shorter than the rest do not stretch a measured timeline
    scale = min(_BOX / lengths[len(lengths) // 10], _WIDEST / width)
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
    ElementTree.SubElement(root, "style").text = (
        "text { font: 11px sans-serif } .title { font-weight: bold } .row { fill: #fff; stroke: #ddd } "
        ".box text { text-anchor: middle } .box rect, .key { stroke: #444; stroke-width: .5 } "
        + " ".join(f".{op.value} {{ fill: {colour} }}" for op, colour in _COLOURS.items())
    )
    top = float(_MARGIN + _LINE)
    _text(root, title, _MARGIN, top, kind="title")
    ops = {span.instruction.op for span in spans}
    stages = {span.instruction.stage for span in spans} - {None}
    num_ranks = max(len(each.ranks) for each in timelines.values())
    _legend(root, [op for op in _COLOURS if op in ops], len(stages) > num_ranks, top + _LINE / 2)
    top += 2.5 * _LINE
    for heading, timeline in timelines.items():
        if heading:
            _text(root, heading, _MARGIN, top + _LINE * 0.66)
            top += _LINE + _GAP
        top = _rows(root, timeline, top, scale)
    for note in notes:
        top += _LINE
        _text(root, note, _MARGIN, top)
    words = max(_DIGIT * len(each) for each in (title, *notes))
    root.set("width", f"{max(_LEFT + width * scale, words, 480) + 2 * _MARGIN:.0f}")
    root.set("height", f"{top + _MARGIN:.0f}")
    ElementTree.indent(root, space=" ")
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _extent(timeline: Timeline) -> tuple[float, float]:
    """Of what is shown."""
    spans = [span for rank in timeline.ranks for span in rank if _is_shown(span)]
    return min(span.start for span in spans), max(span.end for span in spans)


def _rows(root: ElementTree.Element, timeline: Timeline, top: float, scale: float) -> float:
    """Returns where they end."""
    begin, end = _extent(timeline)
    for rank, on_rank in enumerate(timeline.ranks):
        _text(root, f"rank {rank}", _MARGIN, top + _ROW * 0.66)
        _add(root, "rect", x=_LEFT, y=top, width=(end - begin) * scale, height=_ROW, **{"class": "row"})
        _row(ElementTree.SubElement(root, "g", {"class": "box"}), on_rank, top, begin, scale)
        top += _ROW + _GAP
    return top


def _is_shown(span: Span) -> bool:
    return span.instruction.op not in COMMUNICATION and span.end > span.start


def _run_at_once(one: Span, other: Span) -> bool:
    """Neighbours that are co-issued, and not one after the other, as a rank may run them."""
    return one.instruction.is_with_next and other.start < one.end


def _row(group: ElementTree.Element, spans: Sequence[Span], top: float, begin: float, scale: float) -> None:
    stages = sorted({span.instruction.stage for span in spans if span.instruction.stage is not None})
    shown = list(filter(_is_shown, spans))
    lower = {at for at, (one, other) in enumerate(pairwise(shown), 1) if _run_at_once(one, other)}
    for at, span in enumerate(shown):
        height = _ROW / 2 if at in lower or at + 1 in lower else _ROW
        y = top + _ROW / 2 if at in lower else top
        each, x, width = span.instruction, _LEFT + (span.start - begin) * scale, (span.end - span.start) * scale
        chunk = 0 if each.stage is None else stages.index(each.stage)
        paleness = {} if chunk == 0 else {"fill-opacity": 1 - (1 - _PALEST) * chunk / (len(stages) - 1)}
        box = _add(group, "rect", x=x, y=y, width=width, height=height, **{"class": each.op.value}, **paleness)
        ElementTree.SubElement(box, "title").text = f"{each}: {span.start:g} to {span.end:g}"
        if each.microbatch is not None and width > _DIGIT * len(str(each.microbatch)):
            _text(group, str(each.microbatch), x + width / 2, y + (height + 0.32 * _ROW) / 2)


def _legend(root: ElementTree.Element, ops: Sequence[Op], has_chunks: bool, top: float) -> None:
    x = float(_MARGIN)
    for op in ops:
        _add(root, "rect", x=x, y=top, width=_LINE - 4, height=_LINE - 4, **{"class": f"key {op.value}"})
        words = op.value.replace("_", " ")
        _text(root, words, x + _LINE, top + _LINE - 6)
        x += 2 * _LINE + _DIGIT * len(words)
    if has_chunks:
        _text(root, "paler: later chunks", x, top + _LINE - 6)


def _text(root: ElementTree.Element, text: str, x: float, y: float, kind: str = "") -> None:
    _add(root, "text", x=x, y=y, **({"class": kind} if kind else {})).text = text


def _add(root: ElementTree.Element, tag: str, **attributes: str | float) -> ElementTree.Element:
    told = {name: value if isinstance(value, str) else f"{value:.6g}" for name, value in attributes.items()}
    return ElementTree.SubElement(root, tag, told)
