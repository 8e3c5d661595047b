"""What one traversal of a graph came to: what a step is reported by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from ..api.batch import Samples
from ..api.graph import ModelFunctionCall
from ..api.remap import output_keys
from .rpc.commands import CallDone, Example, FunctionDone, Mean, ShardFile
from .rpc.peer import Answer

CALL_MODEL = "call_model"
"""Under which name a worker reports the time of a `CallModel` command."""
CALL_FUNCTION = "call_function"


@dataclass(slots=True)
class Traversal:
    """Filled as calls answer."""

    num_tokens: int = 0
    """Of all sequences, prompts and responses."""
    num_sequences: int = 0
    num_read: Mapping[str, int] = field(default_factory=dict)
    """By call: sequences. The others were dropped before it."""
    lags: dict[str, int] = field(default_factory=dict)
    """By sequence that was generated: steps that its weights had not seen, of those before its own."""
    statistics: dict[str, dict[str, Mean]] = field(default_factory=dict)
    """By call."""
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    """By call, then by command or hook: the time of the worker that took longest."""
    busy_s: dict[int, float] = field(default_factory=dict)
    """By rank: seconds in which it computed."""
    files: tuple[ShardFile, ...] = ()
    """What `Save` hooks wrote."""
    skipped: list[str] = field(default_factory=list)
    """Calls that had too little to work on."""
    failures: tuple[str, ...] = ()
    """What function calls could not do, by sample, in words."""
    examples: tuple[Example, ...] = ()

    def add_dataset(self, samples: Samples) -> None:
        if "tokens" in samples.keys:
            self.num_tokens += sum(samples.lengths("tokens"))

    def add_request(self, call: ModelFunctionCall, answers: Mapping[int, Answer]) -> None:
        """From all workers of the call's model, by rank."""
        tokens = output_keys(call).get("tokens")
        for rank, answer in answers.items():
            self.files += answer.success.files
            result = answer.success.result
            if isinstance(result, CallDone):
                self.busy_s[rank] = self.busy_s.get(rank, 0.0) + answer.seconds[CALL_MODEL]
                self._add_statistics(call.name, result.statistics)
                if result.outputs is not None and tokens in result.outputs.keys:
                    self.num_tokens += sum(result.outputs.lengths(tokens))
        self.add_seconds(call.name, longest(answers.values()))

    def add_function(self, call: str, answer: Answer, done: FunctionDone) -> None:
        self._add_statistics(call, done.statistics)
        self.add_seconds(call, answer.seconds)
        self.failures += done.failures
        self.examples += done.examples

    def add_seconds(self, call: str, seconds: Mapping[str, float]) -> None:
        totals = self.seconds.setdefault(call, {})
        for name, each in seconds.items():
            totals[name] = totals.get(name, 0.0) + each

    def _add_statistics(self, call: str, statistics: Mapping[str, Mean]) -> None:
        if statistics:
            merge(self.statistics.setdefault(call, {}), statistics)


def longest(answers: Iterable[Answer]) -> dict[str, float]:
    """By command or hook: the seconds of who took longest."""
    found: dict[str, float] = {}
    for answer in answers:
        for name, seconds in answer.seconds.items():
            found[name] = max(seconds, found.get(name, 0.0))
    return found


def merge(totals: dict[str, Mean], more: Mapping[str, Mean]) -> None:
    """Adds means to totals, in place."""
    for name, mean in more.items():
        before = totals.get(name, Mean(total=0.0, weight=0.0))
        totals[name] = Mean(total=before.total + mean.total, weight=before.weight + mean.weight)


def warnings_of(traversal: Traversal) -> Sequence[str]:
    """What a person should know about a step, in words."""
    warnings = []
    for statistics in traversal.statistics.values():
        alike = statistics.get("zero_variance")
        if alike is not None and alike.weight and alike.total == alike.weight:
            warnings.append("all groups have zero reward variance: nothing to learn from this step")
    for call in dict.fromkeys(traversal.skipped):
        warnings.append(f"{call} was skipped: too few sequences were left for it")
    if traversal.failures:
        warnings.append(f"{len(traversal.failures)} samples got no score, such as {traversal.failures[0]}")
    return warnings
