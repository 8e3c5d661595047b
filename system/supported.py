"""`trainmaster models`: the support table as text, whole or of one type. Torch-free.

type       how    split  packed  gradients  decode  save  what would work
lfm2       alone  yes    -       yes        -       yes   one sequence a call, by itself; no generation
llama      row    yes    yes     yes        yes     yes
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..api.errors import ConfigError, ModelError
from ..api.model_support import Column, Packing, Support, support_table, to_json

_HOW = {
    Packing.ROW: "takes the sequences of a microbatch in one row",
    Packing.ALONE: "takes one sequence a call, whatever the microbatch",
}


def report(model_type: str | None, as_json: bool = False) -> str:
    """All types, or all that is known of one. Raises ConfigError for one that transformers has not."""
    table = support_table()
    try:
        supports = [table.of(model_type)] if model_type is not None else list(table.types.values())
    except ModelError as error:
        rule, _, cure = str(error).partition("; ")
        raise ConfigError("TYPE", model_type, rule, cure) from None
    if as_json:
        types = {support.model_type: to_json(support) for support in supports}
        return json.dumps({"transformers": table.transformers, "types": types}, indent=1)
    lines = _one(supports[0]) if model_type is not None else _all(supports) + _counts(supports, table.transformers)
    return "\n".join(lines)


def _all(supports: Sequence[Support]) -> list[str]:
    rows = [["type", "how", *(column.value for column in Column), "what would work"]]
    for support in supports:
        how = "-" if support.way is None else support.way.packing.value
        marks = ["yes" if support.passes(column) else "-" for column in Column]
        rows.append([support.model_type, how, *marks, support.reason or "; ".join(support.advice)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _counts(supports: Sequence[Support], version: str) -> list[str]:
    running = [support for support in supports if support.way is not None]
    num_alone = sum(support.way is not None and support.way.packing is Packing.ALONE for support in running)
    counts = ", ".join(f"{column.value} {sum(support.passes(column) for support in running)}" for column in Column)
    return [
        "",
        f"{len(running)} of {len(supports)} types of transformers {version} run, {num_alone} one sequence a call",
        f"passed: {counts}",
        "`trainmaster models TYPE` gives reasons",
    ]


def _one(support: Support) -> list[str]:
    if support.way is None:
        return [f"{support.model_type} {support.reason}", *support.advice]
    lines = [f"{support.model_type} {_HOW[support.way.packing]}"]
    if support.way.embeds_everywhere:
        lines.append("every stage holds its embeddings")
    for column in Column:
        lines.append(f"  {column.value:10s} {'no: ' + support.fails[column] if column in support.fails else 'yes'}")
    lines += [f"  {name} = {value} no: {reason}" for name, (value, reason) in support.unless.items()]
    return lines + [f"what would work: {advice}" for advice in support.advice]
