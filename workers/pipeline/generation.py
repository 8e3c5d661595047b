"""Generation over the stages of one replica: every rank runs the same loop over microbatches, with no one to tell it.

Stages form a ring. In a *trip* a microbatch goes round it once, and each of its live sequences gains a token:

    stage 0            stage 1            stage 2 (last)
    FORWARD  --hidden--> FORWARD --hidden--> FORWARD, SAMPLE
       ^ -----tokens----->  ------tokens------>  |
       └────────────────── tokens ───────────────┘

    what a stage does in a trip                              first trip (prefill)    on stages
      RECEIVE tokens [n] from the stage before, in the ring    -                       all
      SEND    tokens [n] to the next                           -                       all but the last
      CLOSE   if none of them goes on: leave the loop          -                       all
      RECEIVE hidden [1, T, H]                                 yes                     all but the first
      FORWARD the live rows (T = tokens that go on)            T = tokens of prompts   all
      SEND    hidden to the next                               yes                     all but the last
      SAMPLE, SEND tokens [n'] to stage 0                      yes                     the last

`tokens` is header and input in one: for each row of the last trip its new token, or -1 if the sequence has ended. All
-1 closes the microbatch: the message passes down the ring, each stage drops the cache, nothing is computed. Both ends
know all shapes, since a row is live exactly if its last token was not -1; n' is the number of those.

At most as many microbatches are open as there are stages, which fills them and bounds the memory of caches. Open ones
take turns; a closed one gives its place to the next. Every stage learns of a close in the same turn, so turns are the
same everywhere; a trip needs only what the ring made in earlier turns, and sends never wait, so there is no deadlock,
for any number of stages and microbatches.

Invariants: no row of an ended sequence is computed; a message's tag is unique to its microbatch and kind, and at most
one of a kind is under way between two stages; two stages exchange messages of one direction in the order of turns;
tokens depend on seed, sequence and position, not on who shares the trip.

Does not: cut prompts into microbatches, or know of tokenizers.

Shapes: n rows of a microbatch, T tokens of a pass, H hidden size, V vocabulary size, m new tokens at most, r tokens of
one response.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import IntEnum

import torch
from torch import Tensor

from ...api.errors import RunError
from ...api.sampling import Sampling
from ..models.attention import PackedPass
from ..models.cache import KVCache
from ..models.stage import Stage
from ..parallel.groups import Group, Sending
from .sampling import sample, uniforms

ENDED = -1
"""In place of a token: the sequence gets no more."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What to respond to."""

    id: str
    """Of the response's sequence: with the seed, it decides the draws."""
    tokens: Tensor
    """`[n]`, int64, on the CPU; at least one."""


@dataclass(frozen=True, slots=True)
class Response:
    """What a model said. Tensors are on the CPU; those of one microbatch share memory."""

    id: str
    """The prompt's."""
    tokens: Tensor
    """`[r]`, int64, with the token that ended it, if one did."""
    logprobs: Tensor
    """`[r]`, float32: of each token when it was chosen, as `sampling.sample` defines them."""
    is_finished: bool
    """Whether a token ended it; False: it was cut at `max_new_tokens`."""


def generate(
    stage: Stage,
    pipe: Group | None,
    microbatches: Sequence[Sequence[Prompt]],
    sampling: Sampling,
    stop_ids: Sequence[int],
    seed: int,
    device: torch.device,
    home: Group | None = None,
) -> list[Response] | None:
    """Responds to every prompt. All stages of a replica call this at once, with the same arguments.

    `pipe` joins the stages by index; None if there is one. `home` joins them, too, and carries tokens from the last
    stage to the first; by default `pipe` does, which is right for gloo, while NCCL runs the messages of both directions
    between two ranks in one order and may wait crosswise. `stop_ids`: all tokens that end a response.

    Returns, on the last stage, the responses in the order of prompts, microbatch after microbatch; None on the others.
    The stage's mode is left as it was. Raises RunError, on the last stage, if logits were no finite numbers.
    """
    assert (pipe is None) == (stage.num_stages == 1), "a pipe joins the stages where there are several"
    assert all(microbatches), "a microbatch has at least one prompt"
    with torch.inference_mode(), _evaluating(stage):
        ring = _Ring(stage, pipe, home or pipe, device)
        stops = torch.tensor(sorted(set(stop_ids)), dtype=torch.int64, device=device)
        flights = [_Flight(ring, index, prompts, sampling, stops, seed) for index, prompts in enumerate(microbatches)]
        unopened, turns = deque(flights), deque[_Flight]()
        while unopened or turns:
            has_place = len(turns) < stage.num_stages and len(unopened) > 0
            flight = unopened.popleft() if has_place else turns.popleft()
            if flight.trip():
                turns.append(flight)
        for flight in flights:
            flight.wait()
    if not stage.is_last:
        return None
    return [response for flight in flights for response in flight.responses()]


@contextmanager
def _evaluating(stage: Stage) -> Iterator[None]:
    if not stage.training:
        yield
        return
    stage.eval()
    try:
        yield
    finally:
        stage.train()


class _Kind(IntEnum):
    """Of a message."""

    TOKENS = 0
    HIDDEN = 1


@dataclass(frozen=True, slots=True)
class _Ring:
    """A stage and its neighbours."""

    stage: Stage
    pipe: Group | None
    home: Group | None
    device: torch.device

    def send(self, tensor: Tensor, microbatch: int, kind: _Kind) -> Sending:
        """To the next stage, and from the last to the first."""
        group = self.home if self.stage.is_last else self.pipe
        assert group is not None, "several stages have a pipe"
        target = (self.stage.index + 1) % self.stage.num_stages
        return group.send(tensor.contiguous(), target, _tag(microbatch, kind))

    def receive(self, tensor: Tensor, microbatch: int, kind: _Kind) -> Tensor:
        """From the stage before, and on the first from the last."""
        group = self.home if self.stage.is_first else self.pipe
        assert group is not None, "several stages have a pipe"
        source = (self.stage.index - 1) % self.stage.num_stages
        group.receive(tensor, source, _tag(microbatch, kind))
        return tensor


def _tag(microbatch: int, kind: _Kind) -> int:
    return microbatch * len(_Kind) + kind


class _Flight:
    """One microbatch on one stage, from prefill to close."""

    def __init__(
        self, ring: _Ring, index: int, prompts: Sequence[Prompt], sampling: Sampling, stops: Tensor, seed: int
    ) -> None:
        # rows by length, for equal neighbours attend together in the prefill
        rows = sorted(range(len(prompts)), key=lambda place: len(prompts[place].tokens))
        self._ring, self._index = ring, index
        self._prompts = [prompts[place].tokens for place in rows]
        self._max_length = len(self._prompts[-1]) + sampling.max_new_tokens - 1
        self._cache: KVCache | None = None  # memory only while the microbatch is open
        self._draft: _Draft | None = None
        if ring.stage.is_last:
            self._draft = _Draft(prompts, torch.tensor(rows, device=ring.device), sampling, stops, seed)
        self._own_tokens: Tensor | None = None  # where one stage is all, tokens come home without a message
        self._sendings: list[Sending] = []

    def trip(self) -> bool:
        """Takes one turn. False if the microbatch was closed."""
        stage, device = self._ring.stage, self._ring.device
        if self._cache is None:
            self._cache = KVCache(len(self._prompts), self._max_length)
            lengths = tuple([len(tokens) for tokens in self._prompts])
            ids, wanted = torch.cat(self._prompts).to(device), (torch.tensor(lengths).cumsum(0) - 1).to(device)
            current = PackedPass.prefill(self._cache, lengths, device)
        else:
            tokens = self._pass_on_tokens()  # [n]
            is_live = [token != ENDED for token in tokens.tolist()]
            order = self._cache.compact(is_live)
            if not order:
                self._cache = None
                return False
            ids, wanted = tokens, None
            if len(order) < len(is_live):
                rows = torch.tensor(order, device=device)
                ids = tokens[rows]
                if self._draft is not None:
                    self._draft.compact(rows)
            current = PackedPass.decode(self._cache, device)
        hidden = stage.run(ids[None], current, None if stage.is_first else self._receive_hidden(len(ids)))
        if self._draft is None:
            self._send(hidden, _Kind.HIDDEN)
            return True
        tokens = self._draft.add(stage.logits(hidden if wanted is None else hidden[:, wanted])[0])
        if stage.num_stages == 1:
            self._own_tokens = tokens
        else:
            self._send(tokens, _Kind.TOKENS)
        return True

    def wait(self) -> None:
        """Until all that was sent has left."""
        for sending in self._sendings:
            sending.wait()
        self._sendings.clear()

    def responses(self) -> list[Response]:
        """Of a closed microbatch, on the last stage."""
        assert self._draft is not None, "responses are on the last stage"
        return self._draft.responses()

    def _pass_on_tokens(self) -> Tensor:
        """What the rows of the last trip got, [n] int64; known to the next stage, too, when this returns."""
        stage = self._ring.stage
        if stage.num_stages == 1:
            assert self._own_tokens is not None, "a trip ends with tokens"
            return self._own_tokens
        assert self._cache is not None, "tokens follow a prefill"
        tokens = torch.empty(len(self._cache.lengths), dtype=torch.int64, device=self._ring.device)
        self._ring.receive(tokens, self._index, _Kind.TOKENS)
        self.wait()  # no wait: what was sent in the last trip led to these tokens
        if not stage.is_last:
            self._send(tokens, _Kind.TOKENS)
        return tokens

    def _receive_hidden(self, num_tokens: int) -> Tensor:
        stage = self._ring.stage
        hidden = torch.empty(1, num_tokens, stage.hidden_size, dtype=stage.model.dtype, device=self._ring.device)
        return self._ring.receive(hidden, self._index, _Kind.HIDDEN)

    def _send(self, tensor: Tensor, kind: _Kind) -> None:
        self._sendings.append(self._ring.send(tensor, self._index, kind))


@dataclass(slots=True)
class _Draft:
    """The responses of one microbatch while they grow, on the last stage. Row t holds the t-th token of each."""

    prompts: Sequence[Prompt]
    rows: Tensor
    """`[n]`, int64: of each live row, whose response it is, by index among the prompts."""
    sampling: Sampling
    stops: Tensor
    """`[any]`, int64."""
    seed: int
    length: int = 0
    """Tokens that every live response has."""
    uniforms: Tensor | None = field(init=False)
    """`[m, prompts]`; None at temperature 0."""
    tokens: Tensor = field(init=False)
    """`[m, prompts]`, int64; ENDED where there is none."""
    logprobs: Tensor = field(init=False)
    """`[m, prompts]`, float32."""
    is_finished: Tensor = field(init=False)
    """`[prompts]`, bool."""

    def __post_init__(self) -> None:
        count, longest, device = len(self.prompts), self.sampling.max_new_tokens, self.stops.device
        self.uniforms = None
        if self.sampling.temperature > 0:
            ids = [prompt.id for prompt in self.prompts]
            self.uniforms = uniforms(self.seed, ids, longest).t().contiguous().to(device)
        self.tokens = torch.full((longest, count), ENDED, dtype=torch.int64, device=device)
        self.logprobs = torch.zeros(longest, count, dtype=torch.float32, device=device)
        self.is_finished = torch.zeros(count, dtype=torch.bool, device=device)

    def compact(self, rows: Tensor) -> None:
        """Goes on with these rows of the last trip, in this order."""
        self.rows = self.rows[rows]

    def add(self, logits: Tensor) -> Tensor:
        """Draws a token for each live row. logits [n, V] -> [n] int64: the token, or ENDED."""
        at, sampling = self.length, self.sampling
        numbers = None if self.uniforms is None else self.uniforms[at][self.rows]
        forbidden = self.stops if at < sampling.min_new_tokens else None
        tokens, logprobs = sample(logits, numbers, sampling, forbidden)
        self.tokens[at, self.rows] = tokens
        self.logprobs[at, self.rows] = logprobs
        self.length += 1
        is_stop = torch.isin(tokens, self.stops)
        self.is_finished[self.rows] = is_stop
        if self.length == sampling.max_new_tokens:
            return torch.full_like(tokens, ENDED)
        return tokens.masked_fill(is_stop, ENDED)

    def responses(self) -> list[Response]:
        """In the order of prompts. Raises RunError for log-probabilities that are no numbers."""
        tokens = self.tokens[: self.length].t()
        is_token = tokens != ENDED
        lengths = is_token.sum(1).tolist()
        # clones made outside of inference mode, so that autograd takes them
        flat_tokens = tokens[is_token].cpu().clone()
        flat_logprobs = self.logprobs[: self.length].t()[is_token].cpu().clone()
        if not flat_logprobs.isfinite().all():
            raise RunError("the model gave logits that are no finite numbers; look at its weights and its last losses")
        return [
            Response(prompt.id, *values)
            for prompt, *values in zip(
                self.prompts,
                flat_tokens.split(lengths),
                flat_logprobs.split(lengths),
                self.is_finished.tolist(),
                strict=True,
            )
        ]
