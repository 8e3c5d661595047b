"""Log-probabilities and entropies of tokens from the hidden states before them; the logits are never there at once.

    forward     for each chunk of tokens: head -> logits -> log-probability, entropy, normaliser; the logits are let go
    backward    for each chunk of tokens: head again -> their gradient -> that of the head and of the hidden states

Logits are many times larger than anything else of a model with a large vocabulary: a chunk has as many tokens as fit
into a number of bytes. The head is the model's own, with what it does to logits (softcap, scaling, adapters).

Invariants: everything from the logits on is float32 (and so are logits, see `Stage.logits`); gradients are those of
the closed form, d log p(t) / d logits = onehot(t) - p; the head computes the same both times (dropout included).

The gradients of the head's parameters are added to `.grad` as the backward passes through a chunk, so that only one
chunk's gradient of the head exists at a time: `backward()` is supported, `torch.autograd.grad` for them is not.

Shapes: n tokens, c tokens of a chunk, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Head = Callable[[Tensor], Tensor]
"""Hidden states [1, c, H] to logits [1, c, V]."""

CHUNK_BYTES: Mapping[str, int] = {"cpu": 2**24, "cuda": 2**29}
"""Of the float32 logits of one chunk, by type of device: in a processor's cache, and enough for a GPU to be busy."""
LEAST_TOKENS = 1024
"""A chunk has at least this many, or H if that is less: with fewer, a backward would be busy adding up the gradients of
the head, which are V x H for every chunk."""


def score(
    head: Head, hidden: Tensor, tokens: Tensor, vocabulary_size: int, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`log p(token)` of the softmax at this temperature, and, if asked for, the entropy of that softmax (no gradient).

    hidden [1, n, H] of any floating type, tokens [n] int64 -> both [n], float32. `vocabulary_size` (V) only says how
    large chunks are.

        log_probabilities, entropy = score(stage.logits, hidden[:, positions - 1], tokens[positions], 32_000, 1.0, True)
    """
    budget = CHUNK_BYTES["cpu" if hidden.device.type == "cpu" else "cuda"]
    size = max(budget // (vocabulary_size * torch.float32.itemsize), min(hidden.shape[-1], LEAST_TOKENS))
    # the head may be trained where nothing before it is, and the hidden states then need no gradient
    witness = torch.empty(0, requires_grad=torch.is_grad_enabled())
    log_probabilities, entropy = _Score.apply(hidden, tokens, head, size, temperature, with_entropy, witness)
    return log_probabilities, entropy if with_entropy else None


class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # whatever autograd keeps
        hidden: Tensor,
        tokens: Tensor,
        head: Head,
        size: int,
        temperature: float,
        with_entropy: bool,
        witness: Tensor,
    ) -> tuple[Tensor, Tensor]:
        normaliser, log_probabilities, entropy = torch.zeros(3, len(tokens), device=hidden.device)
        ctx.random = _random_state(hidden.device)
        for part in _chunks(len(tokens), size):
            logits = _tempered(head(hidden[:, part])[0], temperature)  # [c, V]
            normaliser[part] = logits.logsumexp(-1)
            log_probabilities[part] = logits.gather(-1, tokens[part, None]).squeeze(-1) - normaliser[part]
            if with_entropy:
                logits = logits - normaliser[part, None]  # log p
                entropy[part] = -logits.exp().mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, tokens, normaliser)
        ctx.head, ctx.size, ctx.temperature = head, size, temperature
        ctx.mark_non_differentiable(entropy)
        return log_probabilities, entropy

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, tokens, normaliser = ctx.saved_tensors
        found = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        with _repeating(ctx.random, hidden.device):
            for part in _chunks(len(tokens), ctx.size):
                given = hidden[:, part].detach().requires_grad_(found is not None)
                with torch.enable_grad():
                    logits = ctx.head(given)[0]  # [c, V]
                if not logits.requires_grad:  # neither the head nor what is before it is trained
                    continue
                scale = gradient[part, None] / ctx.temperature
                slope = _tempered(logits.detach(), ctx.temperature) - normaliser[part, None]
                slope.exp_().mul_(-scale)  # becomes scale * (onehot - p)
                slope.scatter_add_(-1, tokens[part, None], scale)
                torch.autograd.backward(logits, slope.to(logits.dtype))
                if found is not None:
                    assert given.grad is not None, "logits depend on hidden states"
                    found[:, part] = given.grad
        return found, None, None, None, None, None, None


def _chunks(num_tokens: int, size: int) -> Iterator[slice]:
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    return logits.float() if temperature == 1.0 else logits.float() / temperature


# -- random numbers ---------------------------------------------------------------------------------------------------


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


@contextmanager
def _repeating(state: Tensor, device: torch.device) -> Iterator[None]:
    """Inside, random numbers are those that were drawn from this state on; outside they go on as if nothing were."""
    now = _random_state(device)
    _set_random_state(state, device)
    try:
        yield
    finally:
        _set_random_state(now, device)


def _set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
