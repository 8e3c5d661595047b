"""Two-digit addition, the answer's digits reversed (`07+35=` -> `240`): a task that a tiny model learns in a minute.

Reversed, because a model that writes from left to right then meets the carry in the order in which it arises; with
leading zeros, because every digit then has a place of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable
from pathlib import Path

FOLDER = Path(__file__).parent / "generated" / hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Another task, another folder."""
TRAIN, HELD_OUT, TOKENIZER = FOLDER / "train.jsonl", FOLDER / "held_out.jsonl", FOLDER / "tokenizer"
CHARACTERS = "0123456789+= "
NUM_HELD_OUT = 400
MODEL = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def write_all() -> None:
    """Makes data and tokenizer, unless they are there. Safe in several processes at once: each file appears whole."""
    if all(path.exists() for path in (TRAIN, HELD_OUT, TOKENIZER)):
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    problems = [(a, b) for a in range(100) for b in range(100)]
    random.Random(0).shuffle(problems)
    _appear(HELD_OUT, lambda path: _write_rows(path, problems[:NUM_HELD_OUT]))
    _appear(TRAIN, lambda path: _write_rows(path, problems[NUM_HELD_OUT:]))
    _appear(TOKENIZER, _write_tokenizer)


def _write_rows(path: Path, problems: list[tuple[int, int]]) -> None:
    rows = [{"prompt": f"{a:02}+{b:02}=", "answer": f"{a + b:03}"[::-1]} for a, b in problems]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {text: 3 + at for at, text in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _appear(path: Path, write: Callable[[Path], None]) -> None:
    """Writes aside, then renames; whoever comes second keeps what is there."""
    if path.exists():
        return
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        aside = Path(folder) / path.name
        write(aside)
        try:
            os.rename(aside, path)
        except OSError:
            if not path.exists():
                raise
