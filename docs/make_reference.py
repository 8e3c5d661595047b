"""Writes docs/reference.md: every configuration record and every command, from the code alone.

    python docs/make_reference.py

Records are found by walking the types of their fields, from the package's public names on. Nothing is listed here by
hand: a field's words are its docstring's, its rules are its type's. The text is the same on every supported Python.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import re
import textwrap
import types
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin  # Any: types and defaults are of any kind

import trainmaster
from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic.fields import FieldInfo
from trainmaster import __main__ as command_line

PATH = Path(__file__).with_name("reference.md")
PLAIN: Mapping[object, str] = types.MappingProxyType(
    {
        bool: "`True` or `False`",
        int: "whole number",
        float: "number",
        str: "text",
        Path: "path",
        type(None): "`None`",
        Any: "any value",
    }
)
"""Types that need no page of their own, in a user's words."""

HEAD = """\
# Reference

<!-- Made by docs/make_reference.py from the docstrings: change them, then run `make reference`. -->

Every name of the first three sections comes from the package itself: `from trainmaster import SFT, Model, Dataset`.

All records are frozen dataclasses. Fields are given by name. A field that does not exist, a value that does not fit its
type and a number that is not finite are refused when the record is made. A path may be given as text.

Each field of an experiment is an option of the command line, too: the names on the way to it, joined by dots, such as
`--model.layout.pp 2`. `_` and `-` mean the same there. A field that is `True` or `False` is two options, one to switch
it on (`--dataset.shuffle`) and one to switch it off (`--dataset.no-shuffle`). `None` is written `None`. A record or a
key of a dictionary that the file leaves out (an `evaluation` of `None`) has no options: put it into the file.
"""


def reference() -> str:
    """The whole page."""
    classes = found()
    recipes = [cls for cls in classes if callable(getattr(cls, "compile", None))]
    choices = [cls for cls in classes if issubclass(cls, StrEnum)]
    records = [cls for cls in classes if cls not in recipes and cls not in choices]
    parts = [HEAD]
    for title, members in (("Recipes", recipes), ("Records", records), ("Choices", choices)):
        parts.append(f"## {title}\n")
        for cls in members:
            parts.append(_choice(cls) if issubclass(cls, StrEnum) else _record(cls, classes))
    parts.append(_commands())
    parts.append(_exit_codes())
    return "\n".join(parts)


# -- records ----------------------------------------------------------------------------------------------------------


def found() -> list[type]:
    """Every record and choice that a user may have to write, by name."""
    classes: dict[str, type] = {}
    waiting = [cls for name in trainmaster.__all__ if _has_section(cls := getattr(trainmaster, name))]
    while waiting:
        cls = waiting.pop()
        if cls.__name__ in classes:
            assert classes[cls.__name__] is cls, f"two classes are called {cls.__name__}: their sections would collide"
            continue
        classes[cls.__name__] = cls
        for field in fields_of(cls).values():
            waiting += [part for part in _parts(field.annotation) if _has_section(part)]
    return [classes[name] for name in sorted(classes, key=str.lower)]


def fields_of(cls: type) -> dict[str, FieldInfo]:
    """By name; a choice has none."""
    return getattr(cls, "__pydantic_fields__", {})


def _has_section(part: object) -> bool:
    return isinstance(part, type) and (dataclasses.is_dataclass(part) or issubclass(part, StrEnum))


def _parts(annotation: object) -> Iterator[object]:
    """A type and all types inside of it."""
    yield annotation
    for part in get_args(annotation):
        yield from _parts(part)


def _record(cls: type, classes: list[type]) -> str:
    rows = [
        (f"`{name}`", _words(field.annotation, field.metadata), _default(field), _line(field.description))
        for name, field in fields_of(cls).items()
    ]
    users = [
        f"`{user.__name__}.{name}`"
        for user in classes
        for name, field in fields_of(user).items()
        if cls in _parts(field.annotation)
    ]
    head = [f"### {cls.__name__}", _docstring(cls)]
    if users:
        head.append(f"Goes into {', '.join(users)}.")
    if cls.__name__ not in trainmaster.__all__:
        head.append(f"From `{cls.__module__}`.")
    return "\n\n".join([*head, _table(("field", "type", "default", "meaning"), rows)])


def _choice(cls: type[StrEnum]) -> str:
    words = _member_docstrings(cls)
    rows = [(f"`{cls.__name__}.{each.name}`", f"`{each.value}`", _line(words.get(each.name))) for each in cls]
    table = _table(("in Python", "as text, and on the command line", "meaning"), rows)
    return f"### {cls.__name__}\n\n{_docstring(cls)}\n\n{table}"


def _docstring(cls: type) -> str:
    words = cls.__doc__ or ""
    return "" if words.startswith(f"{cls.__name__}(") else inspect.cleandoc(words)  # what dataclasses write themselves


def _member_docstrings(cls: type[StrEnum]) -> dict[str, str]:
    """Python keeps no docstrings of an enum's members, so they are read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef), "the source of a class is a class"
    words = {}
    for before, after in zip(body.body, body.body[1:], strict=False):
        match before, after:
            case ast.Assign(targets=[ast.Name(id=name)]), ast.Expr(value=ast.Constant(value=str() as text)):
                words[name] = text
    return words


def _words(annotation: object, metadata: list[Any] | tuple[Any, ...] = ()) -> str:
    """A type, with its rules, as a user would say it."""
    arguments = get_args(annotation)
    match get_origin(annotation):
        case origin if origin is Annotated:
            said = _words(arguments[0], arguments[1:])
        case origin if origin in (Union, types.UnionType):
            said = ", or ".join(_words(part) for part in arguments)
        case origin if origin is tuple and arguments[1:] == (...,):
            said = f"any number of: {_words(arguments[0])}"
        case origin if origin is dict:
            said = f"dictionary: {_words(arguments[0])} to {_words(arguments[1])}"
        case _ if annotation in PLAIN:
            said = PLAIN[annotation]
        case _ if _has_section(annotation):
            name = getattr(annotation, "__name__", "")
            said = f"[{name}](#{name.lower()})"
        case _:
            raise TypeError(f"docs/make_reference.py has no words for the type {annotation!r}: add them there")
    return " ".join([said, *map(_rule, metadata)])


def _rule(constraint: object) -> str:
    match constraint:
        case Gt(gt=bound):
            return f"above {bound}"
        case Ge(ge=bound):
            return f"of at least {bound}"
        case Lt(lt=bound):
            return f"below {bound}"
        case Le(le=bound):
            return f"of at most {bound}"
        case MinLen(min_length=length):
            return f"of length {length} or more"
        case MaxLen(max_length=length):
            return f"of length {length} or less"
    raise TypeError(f"docs/make_reference.py has no words for the rule {constraint!r}: add them there")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "must be given"
    return f"`{_value(field.get_default(call_default_factory=True, validated_data={}))}`"


def _value(value: object) -> str:
    """As a user would write it."""
    match value:
        case StrEnum():
            return f"{type(value).__name__}.{value.name}"
        case str() | Path():
            return '"' + str(value) + '"'
        case float():
            return re.sub(r"e([-+])0*", r"e\1", repr(value)).replace("e+", "e")
        case _ if fields_of(type(value)):
            given = [
                f"{name}={_value(getattr(value, name))}"
                for name, field in fields_of(type(value)).items()
                if field.is_required()
                or getattr(value, name) != field.get_default(call_default_factory=True, validated_data={})
            ]
            return f"{type(value).__name__}({', '.join(given)})"
    return repr(value)


# -- commands ---------------------------------------------------------------------------------------------------------


def _commands() -> str:
    parser = command_line._parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = [
        "## Commands\n",
        f"{parser.description} `trainmaster COMMAND` is the same as `python -m trainmaster COMMAND`.\n\n"
        "OVERRIDES are options that set fields of the experiment, as said at the top of this page. "
        "`trainmaster check FILE --help` lists all that a file has.\n",
    ]
    parts += [_command(name, command) for name, command in commands.choices.items()]
    return "\n".join(parts)


def _command(name: str, command: argparse.ArgumentParser) -> str:
    actions = [each for each in command._actions if each.help != argparse.SUPPRESS and each.dest != "help"]
    actions.sort(key=lambda each: bool(each.option_strings))  # FILE, RUN and WORKER first
    usage = ["trainmaster", name, *map(_usage, actions)]
    if not command.add_help:  # it leaves -h to the experiment's fields
        usage.append("[OVERRIDES]")
    rows = []
    for action in actions:
        given = "" if action.nargs == 0 else " " + _metavar(action)
        names = ", ".join(f"`{option}{given}`" for option in action.option_strings) or f"`{_metavar(action)}`"
        rows.append((names, _line(action.help)))
    table = "\n" + _table(("argument", "meaning"), rows) if rows else ""
    sentence = _line(command.description)
    return f"### trainmaster {name}\n\n    {' '.join(usage)}\n\n{sentence[:1].upper()}{sentence[1:]}.\n{table}"


def _usage(action: argparse.Action) -> str:
    if not action.option_strings:
        is_needed = action.nargs is None or action.dest == "file"  # a command without its FILE explains itself
        return _metavar(action) if is_needed else f"[{_metavar(action)}]"
    given = "" if action.nargs == 0 else " " + _metavar(action)
    said = f"{action.option_strings[0]}{given}"
    is_needed = action.required or action.default == ""  # an empty address is refused
    return said if is_needed else f"[{said}]"


def _metavar(action: argparse.Action) -> str:
    if action.choices is not None:
        return "{" + ",".join(map(str, action.choices)) + "}"
    return str(action.metavar or action.dest.upper())


def _exit_codes() -> str:
    """From the docstring of the command line: `Exit codes: 0 done; 1 ...; 2 ... . Of a worker also: 3 ...; 4 ... .`"""
    words = " ".join((command_line.__doc__ or "").partition("Exit codes:")[2].split())
    assert words, "the docstring of __main__.py has an `Exit codes:`"
    everybody, _, workers = words.partition(" Of a worker also: ")
    rows = [_code(item) for item in everybody.strip().rstrip(".").split("; ")]
    rows += [_code(item, "(a worker) ") for item in workers.rstrip(".").split("; ") if item]
    return f"## Exit codes\n\n{_table(('code', 'meaning'), rows)}"


def _code(item: str, who: str = "") -> tuple[str, str]:
    found = re.fullmatch(r"(\d+(?: \+ n)?) (.+)", item)
    assert found is not None, f"{item!r} does not begin with an exit code"
    return f"`{found[1]}`", _line(who + found[2])


# -- Markdown ---------------------------------------------------------------------------------------------------------


def _line(text: str | None) -> str:
    """For a cell: one line, in which a bar is a bar."""
    return " ".join((text or "").split()).replace("|", "\\|")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def main() -> None:
    """Writes the page."""
    PATH.write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
