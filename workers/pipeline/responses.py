"""Prompts and what a model says to them: records, and the drafts that grow on the last stage.

A generation may end before its responses do (`Response.is_interrupted`): then `Prompt.continued` is what to go on from,
and `Response.continued` puts the pieces together. Since draws depend on nothing but seed, sequence and position, the
whole is the response that an uninterrupted generation would have given.

    (piece,) = generate(..., [[prompt]], ..., Round(max_new_tokens=8))
    (rest,) = generate(..., [[prompt.continued(piece)]], ...)
    piece.continued(rest)

A further turn of a conversation is a prompt of its own: all tokens so far, and an id that no other turn has.

Shapes: n live rows, V vocabulary size, m new tokens at most, r tokens of one response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...api.errors import RunError
from ...api.sampling import Sampling
from .sampling import sample, uniforms
from .slots import ENDED, Claim


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to respond to."""

    id: str
    """Of the response's sequence: with the seed, it decides the draws."""
    tokens: Tensor
    """`[n]`, int64, on the CPU; at least one."""
    num_drawn: int = 0
    """How many of the last tokens are a response already, which is to be continued."""

    def continued(self, response: Response) -> Prompt:
        """What to go on from, after an interrupted response to this."""
        assert self.id == response.id, f"the response to {response.id} does not follow {self.id}"
        assert response.is_interrupted, f"the response to {response.id} is whole"
        return Prompt(self.id, torch.cat([self.tokens, response.tokens]), self.num_drawn + len(response.tokens))

    def claim(self, sampling: Sampling) -> Claim:
        """Its part of a KV cache. The last token is never attended to."""
        count, left = len(self.tokens), sampling.max_new_tokens - self.num_drawn
        assert 0 < left <= sampling.max_new_tokens, f"{self.id}: {self.num_drawn} tokens of the response are there"
        assert count > self.num_drawn, f"{self.id}: a prompt has a token of its own"
        return Claim(count, count + left - 1)


@dataclass(frozen=True, slots=True)
class Response:
    """What a model said. Tensors are on the CPU; those of one generation share memory."""

    id: str
    """The prompt's."""
    tokens: Tensor
    """`[r]`, int64, with the token that ended it, if one did. None if it was interrupted before the first."""
    logprobs: Tensor
    """`[r]`, float32: of each token when it was chosen, as `sampling.sample` defines them."""
    is_finished: bool
    """Whether a token ended it."""
    is_interrupted: bool = False
    """Whether it may be continued. If neither, it was cut at `Sampling.max_new_tokens`."""

    def continued(self, rest: Response) -> Response:
        """This and what followed, as one."""
        assert self.id == rest.id, f"the response to {rest.id} does not follow that to {self.id}"
        assert self.is_interrupted, f"the response to {self.id} is whole"
        tokens, logprobs = torch.cat([self.tokens, rest.tokens]), torch.cat([self.logprobs, rest.logprobs])
        return replace(rest, tokens=tokens, logprobs=logprobs)


@dataclass(slots=True)
class Rows:
    """The live rows of one microbatch on the last stage, in the order of the running pass."""

    sequences: Tensor
    """`[n]`, int64: whose response it is, by index among the prompts."""
    positions: Tensor
    """`[n]`, int64: of the token that is drawn next, in the response."""


@dataclass(slots=True)
class Drafts:
    """All responses of a generation while they grow."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    stops: Tensor
    """`[any]`, int64; its device is where rows live."""
    seed: int
    max_round_tokens: int | None
    """The most tokens that each gains now."""
    _uniforms: Tensor | None = field(init=False)
    """`[prompts, m]`, filled as prompts join; None at temperature 0."""
    _limits: Tensor = field(init=False)
    """`[prompts]`, int64: the length at which each response ends in this round."""
    _drawn: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Of each pass: whose, `[n]` int64; tokens, `[n]` int64; log-probabilities, `[n]` float32."""

    def __post_init__(self) -> None:
        longest, device, self._uniforms = self.sampling.max_new_tokens, self.stops.device, None
        if self.sampling.temperature > 0:
            self._uniforms = torch.empty(len(self.prompts), longest, device=device)
        drawn = [prompt.num_drawn for prompt in self.prompts]
        ends = [longest if self.max_round_tokens is None else min(longest, at + self.max_round_tokens) for at in drawn]
        self._limits = torch.tensor(ends, dtype=torch.int64, device=device)

    def follow(self, rows: Rows | None, order: Sequence[int], joining: Sequence[int]) -> Rows:
        """The next pass's rows: those of the last pass that go on, and prompts that join."""
        if rows is not None and len(order) == len(rows.sequences) and not joining:
            return rows
        device = self.stops.device
        if joining and self._uniforms is not None:
            ids = [self.prompts[sequence].id for sequence in joining]
            self._uniforms[list(joining)] = uniforms(self.seed, ids, self.sampling.max_new_tokens).to(device)
        sequences = torch.tensor(joining, dtype=torch.int64, device=device)
        positions = torch.tensor([self.prompts[sequence].num_drawn for sequence in joining], device=device)
        if rows is None or not order:
            return Rows(sequences, positions)
        kept = torch.tensor(order, device=device)
        return Rows(
            torch.cat([rows.sequences[kept], sequences]), torch.cat([rows.positions[kept], positions.to(torch.int64)])
        )

    def add(self, rows: Rows, logits: Tensor) -> Tensor:
        """Draws a token for each row, whose positions move on. logits [n, V] -> [n] int64: the token, or ENDED."""
        numbers = None if self._uniforms is None else self._uniforms[rows.sequences, rows.positions]
        forbidden, held = None, None
        if self.sampling.min_new_tokens > 0 and len(self.stops) > 0:
            forbidden, held = self.stops, rows.positions < self.sampling.min_new_tokens
        tokens, logprobs = sample(logits, numbers, self.sampling, forbidden, held)
        self._drawn.append((rows.sequences, tokens, logprobs))
        rows.positions = rows.positions + 1
        has_ended = rows.positions >= self._limits[rows.sequences]
        if len(self.stops) > 0:
            has_ended |= torch.isin(tokens, self.stops)
        return tokens.masked_fill(has_ended, ENDED)

    def responses(self) -> list[Response]:
        """In the order of prompts. Raises RunError for log-probabilities that are no numbers."""
        if not self._drawn:
            empty = torch.empty(0, dtype=torch.int64), torch.empty(0)
            return [Response(prompt.id, *empty, False, is_interrupted=True) for prompt in self.prompts]
        sequences, tokens, logprobs = (torch.cat(parts) for parts in zip(*self._drawn, strict=True))
        order = sequences.argsort(stable=True)  # passes are in the order of positions
        tokens, logprobs = tokens[order].cpu().clone(), logprobs[order].cpu().clone()
        if not logprobs.isfinite().all():
            raise RunError("the model gave logits that are no finite numbers; look at its weights and its last losses")
        lengths = sequences.bincount(minlength=len(self.prompts)).tolist()
        is_stop = torch.isin(tokens, self.stops.cpu())
        return [
            self._response(*each)
            for each in zip(
                self.prompts, tokens.split(lengths), logprobs.split(lengths), is_stop.split(lengths), strict=True
            )
        ]

    def _response(self, prompt: Prompt, tokens: Tensor, logprobs: Tensor, is_stop: Tensor) -> Response:
        is_finished = len(is_stop) > 0 and bool(is_stop[-1])
        is_short = prompt.num_drawn + len(tokens) < self.sampling.max_new_tokens
        return Response(prompt.id, tokens, logprobs, is_finished, is_interrupted=is_short and not is_finished)
