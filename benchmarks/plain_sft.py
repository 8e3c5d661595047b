"""The same supervised run in plain torch and transformers: what `trainmaster run` is measured and checked against.

One process, one model, no Trainmaster: a transformers model whose attention runs each packed sequence by itself (the
fastest way on a CPU), cross-entropy on answer tokens only, fused AdamW. It reads the same rows in the same order.

    python benchmarks/plain_sft.py SPEC.json      SPEC: see `Spec`; prints one JSON object
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, AutoTokenizer


@dataclass
class Spec:
    """One run."""

    model: str
    """A Hugging Face directory, with its tokenizer."""
    dataset: str
    prompt: str
    answer: str
    separator: str
    seed: int
    steps: int
    batch_size: int
    microbatch_tokens: int
    learning_rate: float
    warmup_steps: int
    threads: int


_seqlens: list[int] = []


def packed_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]: each sequence by itself."""
    out = [
        F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=kwargs["scaling"], enable_gqa=True)
        for q, k, v in zip(query.split(_seqlens, 2), key.split(_seqlens, 2), value.split(_seqlens, 2), strict=True)
    ]
    return torch.cat(out, 2).transpose(1, 2).contiguous(), None


def encode(spec: Spec) -> list[tuple[list[int], int]]:
    """Tokens of each row, and how many of them are the prompt's."""
    tokenizer = AutoTokenizer.from_pretrained(spec.model)
    rows = [json.loads(line) for line in Path(spec.dataset).read_text().splitlines() if line.strip()]
    encoded = []
    for row in rows:
        prompt = tokenizer(row[spec.prompt] + spec.separator)["input_ids"]
        answer = tokenizer(row[spec.answer], add_special_tokens=False)["input_ids"]
        encoded.append(([*prompt, *answer, tokenizer.eos_token_id], len(prompt)))
    return encoded


def batches(spec: Spec, num_rows: int) -> Iterator[list[int]]:
    """Row numbers of each step: passes in orders drawn from (seed, pass)."""
    stream: list[int] = []
    number = 0
    for _ in range(spec.steps):
        while len(stream) < spec.batch_size:
            entropy = hashlib.sha256(f"{spec.seed}/dataset/{number}".encode()).digest()
            generator = np.random.Generator(np.random.Philox(int.from_bytes(entropy[:16], "big")))
            stream += generator.permutation(num_rows).tolist()
            number += 1
        yield stream[: spec.batch_size]
        stream = stream[spec.batch_size :]


def microbatches(rows: list[tuple[list[int], int]], max_tokens: int) -> Iterator[list[tuple[list[int], int]]]:
    """First-fit in order of length: few, full microbatches."""
    bins: list[list[tuple[list[int], int]]] = []
    loads: list[int] = []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        at = next((at for at, load in enumerate(loads) if load + len(row[0]) <= max_tokens), None)
        if at is None:
            bins.append([row])
            loads.append(len(row[0]))
        else:
            bins[at].append(row)
            loads[at] += len(row[0])
    yield from bins


def loss_sum(model: torch.nn.Module, rows: list[tuple[list[int], int]]) -> Tensor:
    """Summed cross-entropy of the answer tokens of one packed row of sequences."""
    _seqlens[:] = [len(tokens) for tokens, _ in rows]
    tokens = torch.tensor([token for tokens, _ in rows for token in tokens])  # [T]
    positions = torch.cat([torch.arange(len(tokens)) for tokens, _ in rows])[None]  # [1, T]
    starts = np.cumsum([0, *_seqlens[:-1]])
    targets = torch.tensor(
        [start + at for start, (tokens, prompt) in zip(starts, rows, strict=True) for at in range(prompt, len(tokens))]
    )
    hidden = model.model(input_ids=tokens[None], position_ids=positions, attention_mask=None, use_cache=False)[0]
    return F.cross_entropy(model.lm_head(hidden[0, targets - 1]), tokens[targets], reduction="sum")


def run(spec: Spec) -> dict[str, Any]:
    torch.set_num_threads(spec.threads)
    AttentionInterface.register("plain_packed", packed_attention)
    AttentionMaskInterface.register("plain_packed", lambda *args, **kwargs: None)
    model = AutoModelForCausalLM.from_pretrained(spec.model, attn_implementation="plain_packed")
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=spec.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    encoded = encode(spec)
    losses, rates = [], []
    for step, chosen in enumerate(batches(spec, len(encoded)), start=1):
        start_s = time.perf_counter()
        rows = [encoded[index] for index in chosen]
        count = sum(len(tokens) - prompt for tokens, prompt in rows)
        optimizer.zero_grad()
        total = 0.0
        for part in microbatches(rows, spec.microbatch_tokens):
            loss = loss_sum(model, part)
            (loss / count).backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = spec.learning_rate * min(1.0, step / max(1, spec.warmup_steps))
        optimizer.step()
        losses.append(total / count)
        rates.append(sum(len(tokens) for tokens, _ in rows) / (time.perf_counter() - start_s))
    return {"losses": losses, "tokens_per_s": rates}


if __name__ == "__main__":
    print(json.dumps(run(Spec(**json.loads(Path(sys.argv[1]).read_text())))))
