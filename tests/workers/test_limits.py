"""A dataset is opened only if every model of its graph can read what it gives and what is made of it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import pytest
from trainmaster.api.config import Dataset, Model, RunOptions
from trainmaster.api.errors import ConfigError, DataError
from trainmaster.api.experiment_file import LoadedExperiment
from trainmaster.api.experiments.grpo import GRPO
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling
from trainmaster.system.rpc.commands import DatasetOpened, OpenDataset
from trainmaster.system.rpc.messages import Welcome
from trainmaster.workers.handlers import Handlers
from workbench import TINY_MODEL

WELCOME = Welcome(
    run="test",
    epoch=1,
    rank=0,
    num_workers=1,
    num_local_workers=1,
    overrides=(),
    experiment_digest="",
    log_directory="",
    orphan_s=1.0,
    silence_s=1.0,
)
LONGEST = 4
"""Tokens of a prompt, "1+2="."""


@pytest.fixture(autouse=True)
def _no_cache_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def grpo(tiny_folder: Path) -> GRPO:
    """Of an actor and a reference with 16 tokens, of which its tokenizer has 15, and contexts of 64."""
    model = Model(config=TINY_MODEL, tokenizer=tiny_folder / "tokenizer")
    return GRPO(
        actor=model,
        reference=model,
        prompts=Dataset(path=tiny_folder / "train.jsonl"),
        reward=Reward(function="exact_match"),
        sampling=Sampling(max_new_tokens=20),
        kl_coefficient=0.1,
        microbatch_tokens=256,
        run=RunOptions(threads=1),
    )


def opened(experiment: GRPO) -> DatasetOpened:
    loaded = LoadedExperiment(
        file=Path("experiment.py"),
        overrides=(),
        experiment=experiment,
        compiled=experiment.compile(),
        code_digest="",
        experiment_digest="",
    )
    found = Handlers(WELCOME, loaded, "127.0.0.1").execute(OpenDataset(graph="grpo"))
    assert isinstance(found, DatasetOpened)
    return found


def with_config(model: Model, **changes: object) -> Model:
    return replace(model, config=model.config | changes)


def other_tokenizer(model: Model, folder: Path, change) -> Model:
    """With a tokenizer whose tokenizer.json was changed."""
    folder.mkdir()
    for file in model.tokenizer.iterdir():
        (folder / file.name).write_text(file.read_text())
    described = json.loads((folder / "tokenizer.json").read_text())
    change(described)
    (folder / "tokenizer.json").write_text(json.dumps(described))
    return replace(model, tokenizer=folder)


def special(text: str, at: int) -> dict[str, object]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": at, "content": text, "special": True, **flags}


def test_what_fits_is_opened(grpo: GRPO) -> None:
    assert opened(grpo).longest == LONGEST


@pytest.mark.parametrize("role", ["actor", "reference"])
def test_a_context_that_ends_within_the_responses_is_refused(grpo: GRPO, role: str) -> None:
    fitting = with_config(getattr(grpo, role), max_position_embeddings=LONGEST + 20)
    opened(replace(grpo, **{role: fitting}))
    short = with_config(fitting, max_position_embeddings=LONGEST + 19)
    rule = rf"4 tokens, over the limit of 3 \(23 is the context of {role}, less sampling\.max_new_tokens\)"
    with pytest.raises(DataError, match=rule):
        opened(replace(grpo, **{role: short}))


def test_microbatches_that_hold_no_response_are_refused(grpo: GRPO) -> None:
    with pytest.raises(DataError, match=r"over the limit of 3 \(23 is microbatch_tokens, less"):
        opened(replace(grpo, microbatch_tokens=LONGEST + 19))


def test_a_tokenizer_with_more_tokens_than_the_models_vocabulary_is_refused(grpo: GRPO) -> None:
    opened(replace(grpo, actor=with_config(grpo.actor, vocab_size=15)))
    rule = r"actor\.tokenizer = '.*': its highest token is 14 \('='\), and actor has a vocab_size of 14: tokens 0 to 13"
    with pytest.raises(ConfigError, match=rule + r"\. .* raise actor\.config\.vocab_size to 15 or more"):
        opened(replace(grpo, actor=with_config(grpo.actor, vocab_size=14), kl_coefficient=0.0, reference=None))
    with pytest.raises(ConfigError, match=r"actor\.tokenizer = .* reference has a vocab_size of 14"):
        opened(replace(grpo, reference=with_config(grpo.reference, vocab_size=14)))


def test_an_end_that_can_never_be_drawn_is_refused_though_no_row_has_it(grpo: GRPO, tmp_path: Path) -> None:
    """Special tokens of no use may be beyond the vocabulary."""

    def lengthen(described: dict) -> None:
        described["added_tokens"].append(special("<image>", 99))
        described["model"]["vocab"]["<image>"] = 99

    actor = other_tokenizer(grpo.actor, tmp_path / "longer", lengthen)
    grpo = replace(grpo, actor=actor, reference=None)
    opened(grpo)
    with pytest.raises(ConfigError, match=r"its highest token is 99 \('<image>'\), and actor has a vocab_size of 16"):
        opened(replace(grpo, sampling=Sampling(max_new_tokens=20, stop_tokens=("<image>",))))
    config = json.loads((actor.tokenizer / "tokenizer_config.json").read_text())
    (actor.tokenizer / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<image>"}))
    with pytest.raises(ConfigError, match=r"its highest token is 99 \('<image>'\), and actor has a vocab_size of 16"):
        opened(grpo)


def test_a_reference_that_lacks_what_the_actor_samples_is_refused(grpo: GRPO) -> None:
    opened(replace(grpo, reference=with_config(grpo.reference, vocab_size=20)))
    rule = r"reference\.config\.vocab_size = 15: its vocab_size is 15, and actor samples from 16 tokens"
    with pytest.raises(ConfigError, match=rule):
        opened(replace(grpo, reference=with_config(grpo.reference, vocab_size=15)))


def test_a_reference_with_other_tokens_is_refused(grpo: GRPO, tmp_path: Path) -> None:
    def swap(described: dict) -> None:
        vocabulary = described["model"]["vocab"]
        vocabulary["0"], vocabulary["1"] = vocabulary["1"], vocabulary["0"]

    def rename(described: dict) -> None:
        described["added_tokens"][0]["content"] = "<fill>"
        described["model"]["vocab"]["<fill>"] = described["model"]["vocab"].pop("<pad>")

    assert grpo.reference is not None
    renamed = other_tokenizer(grpo.reference, tmp_path / "renamed", rename)
    opened(replace(grpo, reference=renamed))
    swapped = other_tokenizer(grpo.reference, tmp_path / "swapped", swap)
    rule = r"reference\.tokenizer = '.*swapped': token 3 is '1' here and '0' in the tokenizer of actor"
    with pytest.raises(ConfigError, match=rule):
        opened(replace(grpo, reference=swapped))
