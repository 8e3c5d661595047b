"""Which model types can be run, and how: what `make models` measured of every one, read from model_support.json.

Owns the ways of running a model, the columns of the table, and the refusal of what did not pass. Does not measure
(`docs/make_models.py`), and knows nothing of a type that is not in the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Packing(StrEnum):
    """How a model takes the sequences of a batch."""

    ROW = "row"
    """All in one row, which its attention keeps apart."""
    ALONE = "alone"
    """One sequence a call: for models that carry state along a row."""


@dataclass(frozen=True)
class Way:
    """How a type of model is run and cut."""

    packing: Packing = Packing.ROW
    embeds_everywhere: bool = False
    """Every stage holds the embeddings, because layers read them."""
