"""Supervised fine-tuning on GSM8K (Cobbe et al. 2021), from random weights: the same loop as for a real model.

    trainmaster run examples/gsm8k/sft.py --dataset.path path/to/gsm8k/train.jsonl

To fine-tune a model that you have, of any family, add `--model path/to/its/directory`: it brings its own tokenizer.
"""

import json
import os
import tempfile
from pathlib import Path

from trainmaster import SFT, Dataset, Layout, Model, Optimizer, RunOptions

VOCABULARY_SIZE = 4096

experiment = SFT(
    model=Model(
        config={
            "model_type": "qwen3",
            "vocab_size": VOCABULARY_SIZE,
            "hidden_size": 128,
            "intermediate_size": 512,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": None,
            "eos_token_id": 0,
        },
        tokenizer=Path(__file__).parent / "generated" / "tokenizer",
        layout=Layout(pp=2),
    ),
    dataset=Dataset(path=Path("gsm8k/train.jsonl"), prompt="question", answer="answer", separator="\n"),
    optimizer=Optimizer(learning_rate=1e-3, warmup_steps=20),
    batch_size=16,
    microbatch_tokens=2048,
    run=RunOptions(name="gsm8k-sft", steps=100, save_every=50),
)


def prepare(experiment: SFT) -> None:
    """Trains a byte-level BPE tokenizer on the dataset, unless there is one."""
    directory, dataset = experiment.model.tokenizer, experiment.dataset
    if directory is not None and not directory.exists() and dataset.path.is_file():
        train_tokenizer(dataset.path, (dataset.prompt, dataset.answer), directory)


def train_tokenizer(path: Path, fields: tuple[str, ...], directory: Path) -> None:
    """Written aside, then renamed: another process may be at it too, and whoever comes second keeps what is there."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    tokenizer.train_from_iterator((row[field] for row in rows for field in fields if field in row), trainer)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as folder:
        aside = Path(folder) / "tokenizer"
        aside.mkdir()
        tokenizer.save(str(aside / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
        (aside / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
        try:
            os.rename(aside, directory)
        except OSError:
            if not directory.exists():
                raise
