import pytest
from pydantic import Field, NonNegativeInt, TypeAdapter, ValidationError
from trainmaster.api.errors import ConfigError
from trainmaster.api.record import record, unchecked


@record
class Inner:
    size: NonNegativeInt
    """A field that must be given."""


@record
class Outer:
    inner: Inner
    name: str = "outer"
    ratio: float = Field(default=0.5, description="not from a docstring")


def test_a_record_holds_its_fields_and_compares_by_value():
    made = Outer(inner=Inner(size=1))
    assert (made.inner.size, made.name, made.ratio) == (1, "outer", 0.5)
    assert made == Outer(inner=Inner(size=1), name="outer")
    assert made != Outer(inner=Inner(size=2))


def test_an_unknown_field_is_named():
    with pytest.raises(ConfigError, match=r"Inner\.sise = 1: Inner has no such field\. Remove it"):
        Inner(size=1, sise=1)


def test_a_missing_field_is_named():
    with pytest.raises(ConfigError, match=r"Inner\.size = None: this field must be given\. Give it a value\."):
        Inner()


def test_a_wrong_type_names_field_value_and_rule():
    with pytest.raises(ConfigError, match=r"Inner\.size = 'many': input should be a valid integer") as caught:
        Inner(size="many")
    assert (caught.value.field, caught.value.value) == ("Inner.size", "many")


def test_a_value_out_of_range_names_the_range():
    with pytest.raises(ConfigError, match=r"Inner\.size = -1: input should be greater than or equal to 0"):
        Inner(size=-1)


def test_further_violations_are_counted():
    with pytest.raises(ConfigError, match="1 more of Outer's fields are wrong"):
        Outer(inner=Inner(size=1), name=3, ratio="x")


def test_a_nested_violation_names_the_whole_path():
    with pytest.raises(ConfigError, match=r"Outer\.inner\.size = 'many'"):
        Outer(inner={"size": "many"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_floats_are_finite(value: float):
    with pytest.raises(ConfigError, match=r"Outer\.ratio = (nan|inf): input should be a finite number"):
        Outer(inner=Inner(size=1), ratio=value)


def test_a_record_is_frozen():
    made = Inner(size=1)
    with pytest.raises(AttributeError, match="size"):
        made.size = 2
    assert made.size == 1


def test_a_record_is_slotted():
    assert not hasattr(Inner(size=1), "__dict__")


def test_a_record_of_checked_values_need_not_be_checked_again():
    assert unchecked(Outer, inner=Inner(size=1), name="a", ratio=0.7) == Outer(inner=Inner(size=1), name="a", ratio=0.7)


def test_fields_are_keyword_only():
    with pytest.raises(ConfigError, match="Inner"):
        Inner(1)


def test_from_the_wire_a_violation_is_a_validation_error():
    with pytest.raises(ValidationError, match="size"):
        TypeAdapter(Outer).validate_python({"inner": {"size": "many"}})


def test_docstrings_describe_fields():
    assert TypeAdapter(Inner).json_schema()["properties"]["size"]["description"] == "A field that must be given."
