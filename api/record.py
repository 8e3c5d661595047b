"""`record`: the one way to declare a typed, checked, immutable value, for configuration and for the wire."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass
from pydantic_core import ArgsKwargs

from .errors import ConfigError

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True)
def record(cls: type[T]) -> type[T]:
    """A frozen, slotted, keyword-only pydantic dataclass that rejects unknown fields and wrong types.

    Constructed in Python, a violation is a `ConfigError`; read from the wire by a `TypeAdapter`, a `ValidationError`.
    """
    config = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)
    made = dataclass(frozen=True, kw_only=True, slots=True, config=config)(cls)
    setattr(made, "__init__", _checked(made.__init__))  # noqa: B010  (mypy refuses the plain assignment)
    return made  # type: ignore[return-value]  # pydantic types it as its own protocol


@dataclass_transform(kw_only_default=True, frozen_default=True)
def message(cls: type[T]) -> type[T]:
    """A `record` that Python makes unchecked, as type checkers do that before: for what is made by the thousand.

    Read from the wire, it is checked like any other.
    """
    fields = {name: value for name, value in vars(cls).items() if name in cls.__annotations__}
    plain = type(cls.__name__, (), {**fields, "__annotations__": cls.__annotations__, "__module__": cls.__module__})
    made = record(cls)
    setattr(made, "__init__", vars(dataclasses.dataclass(frozen=True, kw_only=True)(plain))["__init__"])  # noqa: B010
    return made


def unchecked(cls: type[T], **values: object) -> T:
    """A record of values that were checked before, all of them given: a twentieth of the time."""
    made = object.__new__(cls)
    for name, value in values.items():
        object.__setattr__(made, name, value)
    return made


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    """Does what pydantic's own does, which it replaces: messages are made by the thousand."""

    @functools.wraps(init)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # Any: any record, any fields
        try:
            self.__pydantic_validator__.validate_python(ArgsKwargs(args, kwargs), self_instance=self)
        except ValidationError as error:
            raise config_error(error) from None

    return __init__


def config_error(error: ValidationError) -> ConfigError:
    """The first violation in pydantic's report, in our words."""
    first = error.errors(include_url=False)[0]
    field = ".".join([error.title, *(str(part) for part in first["loc"])])
    more = error.error_count() - 1
    cure = "correct this field" + (f"; {more} more of {error.title}'s fields are wrong" if more else "")
    match first["type"]:
        case "unexpected_keyword_argument":
            rule, cure = f"{error.title} has no such field", "remove it, or look the name up in docs/reference.md"
        case "missing" | "missing_keyword_only_argument":
            return ConfigError(field, None, "this field must be given", "give it a value")
        case _:
            rule = first["msg"][:1].lower() + first["msg"][1:]
    return ConfigError(field, first["input"], rule, cure)
