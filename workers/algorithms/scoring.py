"""Log-probabilities and entropies of tokens from the hidden states before them; the logits are never there at once.

    forward     for each chunk of tokens: head -> logits -> log-probability, entropy, normaliser; the logits are let go
    backward    for each chunk of tokens: head again -> their gradient -> that of the head and of the hidden states

Logits are many times larger than anything else of a model with a large vocabulary: a chunk has as many tokens as fit
into a fixed number of bytes. The head is the model's own, with what it does to logits (softcap, scaling, adapters).

Invariants: everything from the head's products on is float32, in models of half precision, too; gradients are those of
the closed form, d log p(t) / d logits = onehot(t) - p; the head computes the same both times (dropout included).

The gradients of the head's parameters are added to `.grad` as the backward passes through a chunk, so that only one
chunk's gradient of the head exists at a time: `backward()` is supported, `torch.autograd.grad` for them is not.

Shapes: n tokens, c tokens of a chunk, H hidden size, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

Head = Callable[[Tensor], Tensor]
"""Hidden states [1, c, H] to logits [1, c, V]."""

CHUNK_BYTES: Mapping[str, int] = {"cpu": 2**24, "cuda": 2**29}
"""Of the float32 logits of one chunk, by type of device: in a processor's cache, and enough for a GPU to be busy."""
_HALF = (torch.bfloat16, torch.float16)


def score(
    head: Head, hidden: Tensor, tokens: Tensor, vocabulary_size: int, temperature: float, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    """`log p(token)` of the softmax at this temperature, and, if asked for, the entropy of that softmax (no gradient).

    hidden [1, n, H] of any floating type, tokens [n] int64 -> both [n], float32. `vocabulary_size` (V) only says how
    large chunks are.

        log_probabilities, entropy = score(stage.logits, hidden[:, positions - 1], tokens[positions], 32_000, 1.0, True)
    """
    budget = CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    size = max(1, budget // (vocabulary_size * torch.float32.itemsize))
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
            logits = _tempered(_logits(head, hidden[:, part]), temperature)  # [c, V]
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
                    logits = _logits(ctx.head, given)  # [c, V]
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


def _logits(head: Head, hidden: Tensor) -> Tensor:
    """[c, V]: float32 also where the head is a product of half precision."""
    if hidden.dtype not in _HALF:
        return head(hidden)[0]
    with _float32_products():
        return head(hidden)[0]


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


# -- products of half precision ---------------------------------------------------------------------------------------


class _float32_products(TorchFunctionMode):
    """Inside, products with a matrix of half precision are float32: a logit of 20 in bfloat16 is off by up to 0.06."""

    def __torch_function__(
        self,
        func: Callable[..., Any],  # any torch function, with its own arguments
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.linear:
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if input.dtype not in _HALF or weight.dtype is not input.dtype:
            return F.linear(input, weight, bias)
        out = _Product.apply(input, weight)
        assert isinstance(out, Tensor), "what forward gives"
        return out if bias is None else out + bias.float()


class _Product(torch.autograd.Function):
    """`given @ weight^T`, float32, of half-precision `given` [1, c, in] and `weight` [out, in]."""

    @staticmethod
    def forward(ctx: Any, given: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(given, weight)
        return _product(given.flatten(0, -2), weight.t()).unflatten(0, given.shape[:-1])

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        given, weight = ctx.saved_tensors
        slope = gradient.flatten(0, -2).to(given.dtype)
        for_given = for_weight = None
        if ctx.needs_input_grad[0]:
            for_given = (slope @ weight).view_as(given)
        if ctx.needs_input_grad[1]:
            for_weight = _product(slope.t(), given.flatten(0, -2))  # float32, if the parameter takes such gradients
        return for_given, for_weight


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Of two matrices of half precision, accumulated and given in float32."""
    if left.device.type == "cuda":
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()
