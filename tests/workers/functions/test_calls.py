"""The function call with everything around it faked but the store: no process, no tokenizer, no dataset."""

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from trainmaster.api.batch import KeyColumn, Samples
from trainmaster.api.errors import RewardError
from trainmaster.api.functions import RewardFunction
from trainmaster.api.graph import FunctionCall
from trainmaster.api.rewards import Item, OnFailure, Reward, Scored
from trainmaster.system.rpc.commands import Example, Mean
from trainmaster.workers.data.store import Store
from trainmaster.workers.functions import calls
from trainmaster.workers.functions.calls import NUM_EXAMPLES, NUM_FAILURES, FunctionRunner

SPECIAL = 0


class FakeTokenizer:
    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert all(type(token) is int for token in tokens)
        return " ".join(str(token) for token in tokens if not (skip_special_tokens and token == SPECIAL))


class FakeSource:
    def row(self, sequence: str) -> dict[str, str]:
        return {"of": sequence.split("/")[2]}


@dataclass
class FakePool:
    """Gives a sequence its score; None and those that it does not know fail."""

    file: Path
    reward: Reward
    scores: dict[str, float | None] = field(default_factory=dict)
    seen: list[Item] = field(default_factory=list)
    is_closed: bool = False

    def score(self, items: list[Item]) -> list[Scored]:
        self.seen += items
        values = [self.scores.get(item.id) for item in items]
        return [
            Scored(item.id, value, "raised ValueError: no" if value is None else None)
            for item, value in zip(items, values, strict=True)
        ]

    def close(self) -> None:
        self.is_closed = True


@dataclass
class Bench:
    runner: FunctionRunner
    pool: FakePool
    store: Store
    samples: Samples

    def stored(self, key: str) -> dict[str, float]:
        return {one: self.store.get(one, key).item() for one in self.samples.ids if (one, key) in self.store}


@pytest.fixture
def bench(monkeypatch):
    """Makes a runner for sequences with these scores. Each has prompt 5 6, response 7 i 0."""
    pools: list[FakePool] = []

    def pool(file: Path, reward: Reward) -> FakePool:
        pools.append(FakePool(file, reward))
        return pools[-1]

    monkeypatch.setattr(calls, "RewardPool", pool)

    def make(
        scores: dict[str, float | None],
        on_failure: OnFailure = OnFailure.FAIL,
        remaps: dict[str, dict[str, str]] | None = None,
        **fields,
    ) -> Bench:
        """`remaps`: `input_remap` and `output_remap` of the call."""
        score = {"failure_score": -1.0} if on_failure is OnFailure.SCORE else {}
        function = RewardFunction(reward=Reward(function="own", on_failure=on_failure, **score), **fields)
        remaps = {"input_remap": {}, "output_remap": {}} | (remaps or {})
        keys = {name: key for key, name in remaps["input_remap"].items()}
        tokens, mask = (keys.get(name, name) for name in function.reads)
        call = FunctionCall(
            name="reward",
            function=function,
            inputs=(tokens, mask),
            outputs=tuple(remaps["output_remap"].get(name, name) for name in function.writes),
            batch_size=max(len(scores), 1),
            **remaps,
        )
        store = Store()
        for at, sequence in enumerate(scores):
            store.put(sequence, tokens, torch.tensor([5, 6, 7, 10 + at, SPECIAL]))
            store.put(sequence, mask, torch.tensor([False, False, True, True, True]))
        lengths = (5,) * len(scores)
        columns = {
            tokens: KeyColumn(dtype="int64", lengths=lengths),
            mask: KeyColumn(dtype="bool", lengths=lengths),
        }
        runner = FunctionRunner(call, Path("own.py"), FakeTokenizer(), FakeSource(), store)
        pools[-1].scores = scores
        return Bench(runner, pools[-1], store, Samples(ids=tuple(scores), keys=columns))

    return make


GOOD = {"d/0/3/0": 1.0, "d/0/3/1": 0.0, "d/0/8/0": 0.5, "d/0/8/1": 0.5}


def test_scores_and_advantages_are_kept_one_number_a_sequence(bench):
    made = bench(GOOD)
    done = made.runner.run(made.samples)
    column = KeyColumn(dtype="float32", lengths=(1, 1, 1, 1))
    assert done.outputs == Samples(ids=tuple(GOOD), keys={"reward": column, "advantage": column})
    for sequence in GOOD:
        for key in ("reward", "advantage"):
            value = made.store.get(sequence, key)
            assert (value.shape, value.dtype) == ((1,), torch.float32)
    assert made.stored("reward") == GOOD
    root = 0.5**0.5
    assert made.stored("advantage") == pytest.approx(dict(zip(GOOD, (root, -root, 0.0, 0.0), strict=True)))
    assert (done.dropped, done.failures) == ((), ())
    assert done.statistics == {
        "reward": Mean(total=2.0, weight=4),
        "failures": Mean(total=0, weight=4),
        "zero_variance": Mean(total=1, weight=2),
    }


def test_the_function_gets_texts_without_special_tokens_and_its_row(bench):
    made = bench(GOOD)
    made.runner.run(made.samples)
    assert made.pool.seen[1] == Item(id="d/0/3/1", prompt="5 6", response="7 11", row={"of": "3"})
    assert [item.id for item in made.pool.seen] == list(GOOD)
    assert made.pool.file == Path("own.py")
    assert made.pool.reward.function == "own"


def test_a_remapped_call_reads_and_writes_by_the_graphs_keys(bench):
    remaps = {"input_remap": {"chosen": "tokens", "tokens": "loss_mask"}, "output_remap": {"reward": "score"}}
    made = bench(GOOD, remaps=remaps)
    done = made.runner.run(made.samples)
    assert made.pool.seen[1] == Item(id="d/0/3/1", prompt="5 6", response="7 11", row={"of": "3"})
    assert set(done.outputs.keys) == {"score", "advantage"}
    assert made.stored("score") == GOOD
    assert made.stored("reward") == {}


def test_inputs_and_outputs_may_be_swapped(bench):
    plain = bench(GOOD)
    wanted = plain.runner.run(plain.samples)
    swap = {"tokens": "loss_mask", "loss_mask": "tokens"}
    made = bench(GOOD, remaps={"input_remap": swap, "output_remap": {"reward": "advantage", "advantage": "reward"}})
    assert made.runner.run(made.samples).outputs == wanted.outputs
    assert made.pool.seen == plain.pool.seen
    assert made.stored("advantage") == GOOD
    assert made.stored("reward") == plain.stored("advantage")


def test_advantages_are_plain_differences_if_asked(bench):
    made = bench(GOOD, normalise_by_std=False)
    made.runner.run(made.samples)
    assert list(made.stored("advantage").values()) == [0.5, -0.5, 0.0, 0.0]


def test_an_evaluation_has_rewards_alone(bench):
    made = bench(GOOD, has_advantages=False, drop_zero_variance=True)
    done = made.runner.run(made.samples)
    assert set(done.outputs.keys) == {"reward"}
    assert set(done.statistics) == {"reward", "failures"}
    assert done.dropped == ()
    assert made.stored("advantage") == {}


def test_groups_that_are_all_alike_leave_the_batch_if_asked(bench):
    made = bench(GOOD, drop_zero_variance=True)
    done = made.runner.run(made.samples)
    assert done.dropped == ("d/0/8/0", "d/0/8/1")
    assert done.statistics["zero_variance"] == Mean(total=1, weight=2)
    assert done.statistics["reward"] == Mean(total=2.0, weight=4)  # before they leave


BAD = {"d/0/3/0": 1.0, "d/0/3/1": None, "d/0/8/0": 0.5, "d/0/8/1": 0.25, "d/0/9/0": 0.0, "d/0/9/1": 0.0}


def test_a_failure_ends_the_call(bench):
    made = bench(BAD)
    with pytest.raises(RewardError, match=r"sample d/0/3/1: reward function `own` raised ValueError: no"):
        made.runner.run(made.samples)
    assert made.stored("reward") == {}


def test_a_failure_drops_its_group(bench):
    made = bench(BAD, OnFailure.DROP)
    done = made.runner.run(made.samples)
    assert done.dropped == ("d/0/3/0", "d/0/3/1")
    assert done.outputs.ids == ("d/0/8/0", "d/0/8/1", "d/0/9/0", "d/0/9/1")
    assert done.failures == ("d/0/3/1: raised ValueError: no",)
    assert set(made.stored("reward")) == set(made.stored("advantage")) == set(done.outputs.ids)
    assert done.statistics == {
        "reward": Mean(total=0.75, weight=4),
        "failures": Mean(total=1, weight=6),
        "zero_variance": Mean(total=1, weight=2),
    }


def test_both_reasons_drop_each_sequence_once(bench):
    made = bench(BAD, OnFailure.DROP, drop_zero_variance=True)
    done = made.runner.run(made.samples)
    assert done.dropped == ("d/0/3/0", "d/0/3/1", "d/0/9/0", "d/0/9/1")


def test_a_failure_is_scored(bench):
    made = bench(BAD, OnFailure.SCORE, normalise_by_std=False)
    done = made.runner.run(made.samples)
    assert done.dropped == ()
    assert made.stored("reward")["d/0/3/1"] == -1.0
    assert made.stored("advantage")["d/0/3/0"] == 1.0
    assert done.statistics["failures"] == Mean(total=1, weight=6)
    assert done.failures == ("d/0/3/1: raised ValueError: no",)


def test_a_batch_may_lose_every_sequence(bench):
    made = bench(dict.fromkeys(GOOD), OnFailure.DROP)
    done = made.runner.run(made.samples)
    assert done.dropped == tuple(GOOD)
    assert done.outputs == Samples(ids=(), keys={})
    assert done.statistics == {
        "reward": Mean(total=0, weight=0),
        "failures": Mean(total=4, weight=4),
        "zero_variance": Mean(total=0, weight=0),
    }


def test_the_first_responses_and_failures_are_shown(bench):
    scores: dict[str, float | None] = {f"d/0/{at}/0": None for at in range(NUM_FAILURES + 2)}
    scores |= {"d/0/1/0": 0.5}
    made = bench(scores, OnFailure.DROP)
    done = made.runner.run(made.samples)
    assert len(done.examples) == NUM_EXAMPLES
    assert done.examples[0] == Example(id="d/0/0/0", prompt="5 6", response="7 10", reward=None)
    assert done.examples[1] == Example(id="d/0/1/0", prompt="5 6", response="7 11", reward=0.5)
    assert len(done.failures) == NUM_FAILURES
    assert done.statistics["failures"] == Mean(total=NUM_FAILURES + 1, weight=NUM_FAILURES + 2)


def test_it_closes_its_processes(bench):
    made = bench(GOOD)
    made.runner.close()
    assert made.pool.is_closed
