"""An experiment's graphs as a picture (SVG): calls coloured by model, function calls apart, edges with their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from ..api.experiments.base import CompiledExperiment
from ..api.graph import DATASET, FunctionCall, Graph

_COLOURS = ("#8ecae6", "#ffb703", "#90be6d", "#cdb4db", "#f4a261", "#e5989b")
"""Of models, in their order; they begin again after the last."""
_WIDTH, _HEIGHT, _GAP, _BETWEEN, _MARGIN, _LINE = 150, 44, 26, 150, 24, 15
"""Of a box; between boxes above one another; between columns; around; of text. In pixels."""
_CHARACTER = 6.6
"""Width of one, about."""


@dataclass(frozen=True, slots=True)
class _Box:
    """Where a node is."""

    column: int
    x: float
    y: float

    @property
    def middle(self) -> float:
        return self.y + _HEIGHT / 2


def draw(compiled: CompiledExperiment) -> str:
    """The graphs of an experiment, one below the other, and which colour is which model."""
    colours = {role: _COLOURS[at % len(_COLOURS)] for at, role in enumerate(compiled.models)}
    root = ElementTree.Element("svg", xmlns="http://www.w3.org/2000/svg")
    ElementTree.SubElement(root, "style").text = (
        "text { font: 12px sans-serif } .title { font-weight: bold } .what, .key { font-size: 10px; fill: #333 } "
        ".key { paint-order: stroke; stroke: #fff; stroke-width: 4px } path { fill: none; stroke: #888 }"
    )
    right, below = _legend(root, colours), 2.0 * _MARGIN + _LINE
    for fed in compiled.graphs.values():
        width, below = _draw_graph(root, fed.graph, colours, below)
        right = max(right, width)
    for name, size in (("width", right + _MARGIN), ("height", below)):
        root.set(name, f"{size:.0f}")
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _legend(root: ElementTree.Element, colours: dict[str, str]) -> float:
    x = float(_MARGIN)
    for role, colour in colours.items():
        _add(root, "rect", x=x, y=_MARGIN, width=_LINE, height=_LINE, rx=3, fill=colour, stroke="#555")
        _text(root, role, x + _LINE + 6, _MARGIN + _LINE - 3)
        x += _LINE + 30 + _CHARACTER * len(role)
    return x


def _draw_graph(root: ElementTree.Element, graph: Graph, colours: dict[str, str], top: float) -> tuple[float, float]:
    """Returns how far it reaches to the right and below."""
    import networkx

    _text(root, graph.name, _MARGIN, top + _LINE, kind="title")
    top += 2 * _LINE
    columns = [sorted(names) for names in networkx.topological_generations(graph.edges)]
    tallest = max(map(len, columns))
    boxes: dict[str, _Box] = {}
    for at, names in enumerate(columns):
        first = top + (tallest - len(names)) * (_HEIGHT + _GAP) / 2
        for place, name in enumerate(names):
            boxes[name] = _Box(at, _MARGIN + at * (_WIDTH + _BETWEEN), first + place * (_HEIGHT + _GAP))
    below = top + tallest * (_HEIGHT + _GAP)
    for source, target in graph.edges.edges:
        keys: tuple[str, ...] = graph.edges.edges[source, target]["keys"]
        if boxes[target].column == boxes[source].column + 1:
            _edge(root, boxes[source], boxes[target], keys)
        else:
            _edge(root, boxes[source], boxes[target], keys, lane=below + _LINE)
            below += _LINE * (len(keys) + 1)
    for name, box in boxes.items():
        _node(root, graph, name, box, colours)
    return max(box.x for box in boxes.values()) + _WIDTH, below + _MARGIN


def _edge(
    root: ElementTree.Element, source: _Box, target: _Box, keys: Sequence[str], lane: float | None = None
) -> None:
    """A curve from the right of one box to the left of another; by a lane below all boxes if some stand between."""
    start, end, bend = source.x + _WIDTH, target.x, _BETWEEN / 2
    if lane is None:
        middle = (source.middle + target.middle) / 2
        there = f"C{start + bend},{source.middle} {end - bend},{target.middle} {end},{target.middle}"
        path = f"M{start},{source.middle} {there}"
        top = middle - _LINE * len(keys) / 2
    else:
        path = (
            f"M{start},{source.middle} C{start + bend},{source.middle} {start},{lane} {start + bend},{lane} "
            f"L{end - bend},{lane} C{end},{lane} {end - bend},{target.middle} {end},{target.middle}"
        )
        top = lane
    _add(root, "path", d=path)
    for at, key in enumerate(keys):
        _text(root, key, (start + end) / 2, top + at * _LINE + _LINE - 4, kind="key", anchor="middle")


def _node(root: ElementTree.Element, graph: Graph, name: str, box: _Box, colours: dict[str, str]) -> None:
    """A box with a name, and what it is: round for the dataset, dashed and white for a function call."""
    style: dict[str, str | float] = {"rx": 4, "fill": "#fff", "stroke": "#333"}
    if name == DATASET:
        said, style["rx"] = "", _HEIGHT / 2
    elif isinstance(call := graph.call(name), FunctionCall):
        said, style["stroke-dasharray"] = call.function.reward.function, "5 3"
    else:
        said, style["fill"] = f"{call.kind} on {call.model}", colours[call.model]
    _add(root, "rect", x=box.x, y=box.y, width=_WIDTH, height=_HEIGHT, **style)
    middle = box.x + _WIDTH / 2
    _text(root, name, middle, box.middle + (4 if not said else -3), kind="title", anchor="middle")
    _text(root, said, middle, box.middle + _LINE - 3, kind="what", anchor="middle")


def _text(root: ElementTree.Element, text: str, x: float, y: float, kind: str = "", anchor: str = "start") -> None:
    more = {"class": kind} if kind else {}
    _add(root, "text", x=x, y=y, **{"text-anchor": anchor}, **more).text = text


def _add(root: ElementTree.Element, tag: str, **attributes: str | float) -> ElementTree.Element:
    told = {name: value if isinstance(value, str) else f"{value:g}" for name, value in attributes.items()}
    return ElementTree.SubElement(root, tag, told)
