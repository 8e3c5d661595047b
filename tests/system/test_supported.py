import json

import pytest
from trainmaster.__main__ import main
from trainmaster.api.errors import ConfigError
from trainmaster.api.model_support import Column, support_table, to_json
from trainmaster.system.supported import report


def test_every_type_has_a_line_with_what_works():
    types = support_table().types
    head, *lines = report(None).splitlines()
    assert head.split()[:7] == ["type", "how", *(column.value for column in Column)]
    shown = {line.split()[0]: line.split()[1:7] for line in lines[: len(types)]}
    assert set(shown) == set(types)
    assert shown["llama"] == ["row", *["yes"] * 5]
    assert shown["lfm2"] == ["alone", "yes", "-", "yes", "-", "yes"]
    assert shown["bart"] == ["-"] * 6


def test_the_counts_are_those_of_the_lines():
    lines = report(None).splitlines()
    marks = [line.split()[2:7] for line in lines[1 : len(support_table().types) + 1]]
    for column, word in zip(zip(*marks, strict=True), Column, strict=True):
        assert f"{word.value} {column.count('yes')}" in lines[-2]


def test_one_type_has_reasons_and_cures():
    said = report("gemma3n_text")
    assert "split      no: cannot run from hidden states alone" in said
    assert "packed     yes" in said
    assert said.endswith("what would work: pp = 1")
    assert report("llama").count("yes") == 5
    assert report("bert").splitlines() == ["bert is an encoder", "use another type"]


def test_json_is_the_file():
    read = json.loads(report("lfm2", as_json=True))
    assert read["types"] == {"lfm2": to_json(support_table().types["lfm2"])}
    assert len(json.loads(report(None, as_json=True))["types"]) == len(support_table().types)


def test_an_unknown_type_is_refused_with_what_may_be_meant():
    with pytest.raises(ConfigError, match=r"TYPE = 'qwen33': .*You may mean qwen3"):
        report("qwen33")


def test_the_command(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as left:
        main(["models", "llama"])
    assert left.value.code == 0
    assert capsys.readouterr().out.startswith("llama takes the sequences of a microbatch in one row\n")
    with pytest.raises(SystemExit) as left:
        main(["models", "qwen33"])
    assert left.value.code == 2
