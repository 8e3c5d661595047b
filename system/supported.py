"""`trainmaster models`: the support table, whole or of one type. Torch-free.

    type          how    split packed gradients decode save
    llama         row    yes   yes    yes       yes    yes
    lfm2          alone  yes   -      yes       -      yes    runs as it is, one sequence a call; ...
"""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..api.errors import ConfigError, ModelError
from ..api.model_support import Column, Packing, Support, support_table, to_json

_UNCUT = 10_000
"""Columns where no terminal has a say."""


def show(model_type: str | None, as_json: bool = False) -> None:
    """Prints all types, or all that is known of one. Raises ConfigError for a type that transformers has not."""
    table = support_table()
    if model_type is None:
        chosen = list(table.types.values())
    else:
        try:
            chosen = [table.of(model_type)]
        except ModelError as error:
            rule, _, cure = str(error).partition("; ")
            raise ConfigError("TYPE", model_type, rule, cure) from None
    console = Console(soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = _UNCUT
    if as_json:
        types = {support.model_type: to_json(support) for support in chosen}
        console.print(json.dumps({"transformers": table.transformers, "types": types}, indent=1), markup=False)
    elif model_type is None:
        console.print(_all(chosen))
        for line in _counts(chosen, table.transformers):
            console.print(Text(line, style="dim"))
    else:
        for line in _one(chosen[0]):
            console.print(Text(line))


def _all(supports: list[Support]) -> Table:
    shown = Table(box=None, pad_edge=False)
    for name in ("type", "how", *(column.value for column in Column), "what would work"):
        shown.add_column(name, no_wrap=True)
    for support in supports:
        how = "-" if support.way is None else support.way.packing.value
        marks = ["yes" if support.passes(column) else "-" for column in Column]
        note = support.reason if support.way is None else "; ".join(support.advice)
        shown.add_row(support.model_type, how, *marks, note)
    return shown


def _counts(supports: list[Support], version: str) -> list[str]:
    running = [support for support in supports if support.way is not None]
    alone = sum(support.way is not None and support.way.packing is Packing.ALONE for support in running)
    counts = ", ".join(f"{column} {sum(support.passes(column) for support in running)}" for column in Column)
    return [
        f"{len(running)} of {len(supports)} types of transformers {version} run, {alone} of them one sequence a call",
        f"passed: {counts}",
        "`trainmaster models TYPE` gives reasons; docs/models.md says what is measured",
    ]


def _one(support: Support) -> list[str]:
    if support.way is None:
        return [f"{support.model_type} {support.reason}", "use another type"]
    how = {
        Packing.ROW: "all sequences of a microbatch in one row",
        Packing.ALONE: "one sequence a call of the model, whatever the microbatch",
    }
    lines = [f"{support.model_type}: {how[support.way.packing]}"]
    if support.way.embeds_everywhere:
        lines.append("every stage holds the embeddings")
    for column in Column:
        found = f"no: it {support.fails[column]}" if column in support.fails else "yes"
        lines.append(f"  {column.value:10s} {found}")
    lines += [f"  {name} = {value}: no: it {reason}" for name, (value, reason) in support.unless.items()]
    return lines + [f"what would work: {advice}" for advice in support.advice]
