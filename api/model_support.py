"""Which model types run, and how: what was measured of every one, as it stands in model_support.json beside this file.

`make models` (docs/make_models.py) measures and writes the file. This module reads it, and refuses what did not pass:
a type that is not in it, and a layout, a switch or a use of it that did not pass, each with a reason and a cure.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any  # of a configuration, whose values are transformers' own

from .errors import ModelError

FILE = Path(__file__).parent / "model_support.json"


_LAYERDROP = ("layerdrop", "decoder_layerdrop")
"""Keywords of a configuration: the share of layers that one pass of training leaves out."""


class Column(StrEnum):
    """What is measured of a type, against transformers' own whole model."""

    SPLIT = "split"
    """It can be cut into pipeline stages."""
    PACKED = "packed"
    """Documents of one row are kept apart."""
    GRADIENTS = "gradients"
    """Of all parameters, over two microbatches."""
    DECODE = "decode"
    """Generation with KV caches."""
    SAVE = "save"
    """Checkpoints have the names and the bits of transformers' own."""


class Packing(StrEnum):
    """How a model takes the sequences of a batch."""

    ROW = "row"
    """All in one row, which its attention keeps apart."""
    ALONE = "alone"
    """One sequence a call: for models that carry state along a row, or have an attention of their own."""


@dataclass(frozen=True)
class Way:
    """How a type of model is run and cut."""

    packing: Packing = Packing.ROW
    embeds_everywhere: bool = False
    """Every stage holds the embeddings, because layers read them."""


@dataclass(frozen=True)
class Support:
    """What was measured of one model type."""

    model_type: str
    way: Way | None
    """How it runs; None: not at all, `reason` says why."""
    reason: str = ""
    fails: Mapping[Column, str] = field(default_factory=dict)
    """Columns that did not pass, with the reason as the end of a sentence that begins with the type."""
    unless: Mapping[str, tuple[bool, str]] = field(default_factory=dict)
    """Switches of its configuration, each with the value with which something did not pass, and the reason."""

    def passes(self, column: Column) -> bool:
        return self.way is not None and column not in self.fails

    @property
    def advice(self) -> list[str]:
        """What would work where not all does, or how else it runs."""
        if self.way is None:
            return ["use another type"]
        cures = {
            Column.SPLIT: "pp = 1",
            Column.PACKED: "one sequence a call, by itself",
            Column.DECODE: "no generation",
        }
        switches = [f"{name} = {not value}" for name, (value, _) in self.unless.items()]
        return [cures[column] for column in self.fails] + switches

    def refusal(self, config: Mapping[str, Any], num_stages: int, generates: bool = False) -> tuple[str, str] | None:
        """Why a use of this type is refused, and what would work; None if it is not."""
        name = f"model type {self.model_type!r}"
        if self.way is None:
            return f"{name} {self.reason}", "use another type; `trainmaster models` lists those that work"
        if num_stages > 1 and Column.SPLIT in self.fails:
            return f"{name} {self.fails[Column.SPLIT]}, so it cannot be cut", "set layout.pp and chunks to 1"
        if generates and Column.DECODE in self.fails:
            return (
                f"{name} {self.fails[Column.DECODE]}, so it cannot generate",
                "use a type that decodes; `trainmaster models` lists them",
            )
        for switch, (value, reason) in self.unless.items():
            if config.get(switch) is value:
                return f"{name} with {switch} = {value} {reason}", f"set {switch} to {not value}"
        for rate in _LAYERDROP:
            if num_stages > 1 and (share := config.get(rate)):
                return (
                    f"{name} with {rate} = {share} skips layers at random in training, also where two stages join",
                    f"set {rate} to 0, or layout.pp and chunks to 1",
                )
        return None


@dataclass(frozen=True)
class SupportTable:
    """All types that transformers maps to a causal language model."""

    transformers: str
    """The version that was measured."""
    types: Mapping[str, Support]

    def of(self, model_type: object) -> Support:
        """Raises ModelError for a type that is not in the table."""
        if not isinstance(model_type, str) or model_type not in self.types:
            similar = difflib.get_close_matches(str(model_type), self.types, n=3)
            cure = f"you may mean {' or '.join(similar)}" if similar else "`trainmaster models` lists those that work"
            raise ModelError(
                f"model type {model_type!r} is no causal language model of transformers {self.transformers}; {cure}"
            )
        return self.types[model_type]


@cache
def support_table() -> SupportTable:
    """As it was measured last."""
    read = json.loads(FILE.read_text(encoding="utf-8"))
    return SupportTable(read["transformers"], {name: from_json(name, entry) for name, entry in read["types"].items()})


def from_json(model_type: str, entry: Mapping[str, Any]) -> Support:
    """The reverse of `to_json`."""
    if "reason" in entry:
        return Support(model_type, None, entry["reason"])
    return Support(
        model_type,
        Way(Packing(entry["packing"]), entry.get("embeds_everywhere", False)),
        fails={Column(name): reason for name, reason in entry.get("fails", {}).items()},
        unless={name: (value, reason) for name, (value, reason) in entry.get("unless", {}).items()},
    )


def to_json(support: Support) -> dict[str, object]:
    """What stands in the file for a type; what is usual is left out."""
    if support.way is None:
        return {"reason": support.reason}
    entry: dict[str, object] = {"packing": support.way.packing.value}
    if support.way.embeds_everywhere:
        entry["embeds_everywhere"] = True
    if support.fails:
        entry["fails"] = {column.value: reason for column, reason in support.fails.items()}
    if support.unless:
        entry["unless"] = {name: list(found) for name, found in support.unless.items()}
    return entry
