"""A tiny dataset, tokenizer and model, and real processes that run on them."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

CHARACTERS = "0123456789+="
TINY_MODEL = {
    "model_type": "qwen3",
    "vocab_size": 16,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
EXPERIMENT = """
from pathlib import Path

from trainmaster import SFT, Dataset, Model, Optimizer, RunOptions

here = Path(__file__).parent
experiment = SFT(
    model=Model(config={config!r}, tokenizer=here / "tokenizer"),
    dataset=Dataset(path=here / "train.jsonl"),
    evaluation=Dataset(path=here / "held_out.jsonl"),
    optimizer=Optimizer(learning_rate=3e-3, warmup_steps=4),
    batch_size=16,
    microbatch_tokens=64,
    run=RunOptions(name="test", directory=here / "runs", steps=4, threads=1),
)
"""


def write_tiny_folder(folder: Path) -> None:
    """train.jsonl, held_out.jsonl, tokenizer/ and experiment.py."""
    problems = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(problems)
    for name, part in (("train", problems[:64]), ("held_out", problems[64:85])):
        rows = [{"prompt": f"{a}+{b}=", "answer": "1" * (a + 1) + str(a + b)} for a, b in part]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_character_tokenizer(folder / "tokenizer")
    (folder / "experiment.py").write_text(EXPERIMENT.format(config=TINY_MODEL))


def write_character_tokenizer(path: Path) -> None:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {text: 3 + at for at, text in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<eos>", "<unk>"])
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}))


@dataclass
class Workbench:
    """A private copy of the tiny folder, and the processes that a test starts in it."""

    folder: Path
    popen: type[subprocess.Popen[str]] = subprocess.Popen
    """Starts services: see `preloaded`."""
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def file(self) -> Path:
        return self.folder / "experiment.py"

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = self.popen(
            [sys.executable, "-m", "trainmaster", *arguments],
            cwd=self.folder,
            env=os.environ | {"TRAINMASTER_TEST": self.mark} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.started.append(process)
        return process

    def run(self, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`trainmaster run` to its end."""
        process = self.start("run", str(self.file), *overrides, **environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def run_undisturbed(self, *overrides: str) -> None:
        """The run as it is without a fault, under the name `undisturbed`: see `series`."""
        done = self.run("--run.name", "undisturbed", *overrides)
        assert done.returncode == 0, done.stderr

    def metrics(self, name: str = "test") -> list[dict[str, float]]:
        lines = (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def series(self, key: str, name: str = "test") -> list[float]:
        return [entry[key] for entry in self.metrics(name) if key in entry]

    def survivors(self) -> list[int]:
        """Pids of living processes that this test started, directly or not."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if self.mark.encode() in (entry / "environ").read_bytes() and not _is_zombie(entry):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def pids_of(self, service: str) -> list[int]:
        """Living `master` or `worker` services that this test started."""
        part = b"\0" + service.encode() + b"\0"
        found = []
        for pid in self.survivors():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if part in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def wait_until_gone(self, deadline_s: float = 10.0) -> list[int]:
        """Survivors after all had time to end."""
        end_s = time.monotonic() + deadline_s
        while (left := self.survivors()) and time.monotonic() < end_s:
            time.sleep(0.05)
        return left


def wait_for_step(process: subprocess.Popen[str], step: int) -> None:
    """Reads what a master says until it has taken this one."""
    assert process.stdout is not None
    assert any(line.startswith(f"step {step}/") for line in process.stdout), process.communicate()


def logged_s(log: Path, pattern: str) -> float | None:
    """When this was first said in a service's log, on the wall clock; None if it was not."""
    for line in log.read_text().splitlines() if log.exists() else ():
        if re.search(pattern, line):
            stamp = datetime.strptime(" ".join(line.split()[:2]), "%Y-%m-%d %H:%M:%S,%f")
            return stamp.timestamp()
    return None


def _is_zombie(entry: Path) -> bool:
    return (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
