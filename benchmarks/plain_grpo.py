"""The same GRPO in plain torch and transformers: what `trainmaster run` is measured against.

One process, one model, no Trainmaster, padded batches, as TRL's trainer does it without an engine: `generate` on the
whole batch of left-padded prompts, rewards in Python, then forward and backward on microbatches of padded rows, with
the head on the responses' places alone. The batch is on-policy and seen once, so the old log-probabilities are the new
ones, detached, and cost no forward pass (TRL's `num_iterations=1`).

    python benchmarks/plain_grpo.py SPEC.json      SPEC: see `Spec`; prints a JSON list, an object a step

Shapes: B rows of a batch, b of a microbatch, P longest prompt, R longest response, V words.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

CLIP = 0.2
MAX_GRADIENT_NORM = 1.0


@dataclass
class Spec:
    """One run."""

    model: str
    """A Hugging Face directory, with its tokenizer."""
    dataset: str
    """JSON Lines: `prompt`, and `answer`, with which a right response ends."""
    seed: int
    steps: int
    batch_size: int
    """Prompts a step, in the file's order."""
    group_size: int
    max_new_tokens: int
    microbatch_samples: int
    learning_rate: float
    threads: int


@dataclass
class Batch:
    """Prompts, each `group_size` times, with their responses."""

    tokens: Tensor
    """`[B, P + R]`: prompts padded on the left, responses on the right."""
    attention: Tensor
    """`[B, P + R]`, 1 where there is a token."""
    mask: Tensor
    """`[B, R]`, bool: the tokens of responses, the one that ends them included."""


class Plain:
    """Model, tokenizer and optimizer."""

    def __init__(self, spec: Spec) -> None:
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed)
        self.spec = spec
        # Any: what the auto class is said to return has no `generate`
        self.model: Any = AutoModelForCausalLM.from_pretrained(spec.model, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    def step(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        """One step on these prompts: its time, its statistics, and the length of each response."""
        start_s = time.perf_counter()
        rows = [row for row in rows for _ in range(self.spec.group_size)]
        batch = self.generate([row["prompt"] for row in rows])
        generated_s = time.perf_counter()
        rewards = self.score(batch, rows)
        scored_s = time.perf_counter()
        statistics = self.train(batch, self.advantages(rewards))
        end_s = time.perf_counter()
        return {
            "seconds/step": end_s - start_s,
            "seconds/generate": generated_s - start_s,
            "seconds/reward": scored_s - generated_s,
            "seconds/train": end_s - scored_s,
            "lengths": batch.mask.sum(1).tolist(),
            "reward/reward": float(rewards.mean()),
            **statistics,
        }

    def generate(self, prompts: list[str]) -> Batch:
        """Draws one response to each, from the model's own distribution."""
        inputs = self.tokenizer(prompts, return_tensors="pt", padding=True)
        self.model.eval()
        with torch.no_grad():
            tokens = self.model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=self.spec.max_new_tokens,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        is_end = tokens[:, inputs["input_ids"].shape[1] :] == self.tokenizer.eos_token_id  # [B, R]
        mask = is_end.cumsum(1) - is_end.long() == 0
        return Batch(tokens, torch.cat([inputs["attention_mask"], mask.long()], 1), mask)

    def score(self, batch: Batch, rows: list[dict[str, str]]) -> Tensor:
        """1 for each response whose text ends with the answer: `[B]`."""
        responses = batch.tokens[:, -batch.mask.shape[1] :]
        texts = self.tokenizer.batch_decode(responses, skip_special_tokens=True)
        return torch.tensor([float(text.endswith(row["answer"])) for text, row in zip(texts, rows, strict=True)])

    def advantages(self, rewards: Tensor) -> Tensor:
        """Rewards `[B]` less their group's mean, over its standard deviation; 0 in a group whose rewards are alike."""
        groups = rewards.view(-1, self.spec.group_size)
        centred = groups - groups.mean(1, keepdim=True)
        return torch.where(centred == 0, 0.0, centred / groups.std(1, keepdim=True)).flatten()

    def train(self, batch: Batch, advantages: Tensor) -> dict[str, float]:
        """One optimizer step on all rows. Loss and entropy are means over response tokens."""
        self.model.train()
        self.optimizer.zero_grad()
        count, size = int(batch.mask.sum()), self.spec.microbatch_samples
        totals = torch.zeros(2)
        for start in range(0, len(batch.tokens), size):
            part = slice(start, start + size)
            loss, entropy = self.losses(batch.tokens[part], batch.attention[part], batch.mask[part], advantages[part])
            (loss / count).backward()
            totals += torch.stack([loss.detach(), entropy])
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.optimizer.step()
        loss_mean, entropy_mean = (totals / count).tolist()
        return {"train/loss": loss_mean, "train/entropy": entropy_mean}

    def losses(self, tokens: Tensor, attention: Tensor, mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """Summed over response tokens: the clipped loss, and the entropy without gradient."""
        length = mask.shape[1]
        outputs = self.model(
            input_ids=tokens, attention_mask=attention, logits_to_keep=length + 1, use_cache=False
        )  # logits [b, R + 1, V]
        log_probabilities = outputs.logits[:, :-1].log_softmax(-1)
        with torch.no_grad():
            entropy = -(log_probabilities.exp() * log_probabilities).sum(-1)
        now = log_probabilities.gather(-1, tokens[:, -length:, None]).squeeze(-1)  # [b, R]
        ratio = (now - now.detach()).exp()
        gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - CLIP, 1 + CLIP) * advantages[:, None])
        return -(gain * mask).sum(), (entropy * mask).sum()


def run(spec: Spec) -> list[dict[str, Any]]:
    """What each step came to, in the words of Trainmaster's metrics."""
    rows = [json.loads(line) for line in Path(spec.dataset).read_text().splitlines()]
    plain, size = Plain(spec), spec.batch_size
    return [plain.step(rows[at * size : (at + 1) * size]) for at in range(spec.steps)]


if __name__ == "__main__":
    print(json.dumps(run(Spec(**json.loads(Path(sys.argv[1]).read_text())))))
