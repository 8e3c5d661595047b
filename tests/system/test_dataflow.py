import random

import pytest
from flows import World, function_call, graphs, model_call, samples, sites
from hypothesis import given, settings
from hypothesis import strategies as st
from trainmaster.api.errors import RunError
from trainmaster.api.graph import CallKind, Graph
from trainmaster.system.dataflow import Complete, Dataflow, Move, Release, Start

worlds = st.builds(
    World,
    graph=graphs(),
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=5),
    max_steps_ahead=st.integers(0, 3),
    luck=st.integers().map(random.Random),
    fate=st.integers(),
)


def flow(*calls, dataset_keys=("tokens",), max_steps_ahead=0) -> Dataflow:
    graph = Graph("g", calls, dataset_keys)
    return Dataflow(graph, sites(graph), max_steps_ahead)


def start_all(machine: Dataflow, actions: list) -> list:
    """What follows when everything is moved at once."""
    left, done = list(actions), []
    while left:
        action = left.pop(0)
        if isinstance(action, Move):
            left += machine.moved(action.firing)
        else:
            done.append(action)
    return done


@given(worlds)
@settings(max_examples=400, deadline=None)
def test_every_call_reads_every_sequence_once_and_oldest_first(world: World):
    world.run()
    everything = [each for batch in world.batches for each in batch]
    for call in world.graph.calls:
        read = [each for _, name, _, ids in world.fired if name == call.name for each in ids]
        assert read == [each for each in everything if each not in world.gone[call.name]], call.name
    assert sorted(world.released) == sorted(everything), "each is released once"
    assert sorted(complete.step for complete in world.completed) == list(range(len(world.batches)))
    for complete in world.completed:
        batch = set(world.batches[complete.step])
        assert complete.num_sequences == len(batch)
        assert complete.num_read == {name: len(batch - gone) for name, gone in world.gone.items()}
    assert world.most_buffered <= (world.max_steps_ahead + 1) * max(world.sizes)
    assert (world.flow.num_in_flight, world.flow.num_buffered) == (0, 0)


@given(worlds, st.integers())
@settings(max_examples=100, deadline=None)
def test_what_a_firing_reads_does_not_depend_on_how_long_anything_takes(world: World, luck: int):
    other = World(world.graph, world.sizes, world.max_steps_ahead, random.Random(luck), world.fate)
    world.run()
    other.run()
    assert sorted(other.fired) == sorted(world.fired)


@given(worlds, st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_a_run_that_fails_anywhere_has_read_nothing_twice_and_freed_nothing_early(world: World, num_events: int):
    world.run(max_events=num_events)
    assert max(world.read.values(), default=0) <= 1
    assert len(set(world.released)) == len(world.released)
    buffered = sum(map(len, world.batches[: len(world.completed) + world.flow.num_in_flight])) - len(world.released)
    assert world.flow.num_buffered == buffered, "what was admitted is in the buffer, or was released"


GENERATE = model_call("generate", "prompt", "tokens", kind=CallKind.GENERATE)
REWARD = function_call("reward", "tokens", "reward")
TRAIN = model_call("train", "tokens reward", kind=CallKind.TRAIN_STEP)
RLHF = (GENERATE, REWARD, TRAIN)


def run_until(machine: Dataflow, actions: list, stop: str) -> tuple[dict[str, Start], list]:
    """Finishes whatever starts, until `stop` does; returns starts by call, and what happened otherwise."""
    starts, others, left = {}, [], start_all(machine, actions)
    while left:
        action = left.pop(0)
        if not isinstance(action, Start):
            others.append(action)
            continue
        starts[action.firing.call.name] = action
        if action.firing.call.name != stop:
            outputs = samples(*action.firing.samples.ids, key=(action.firing.call.outputs or ("none",))[0])
            left += start_all(machine, machine.finished(action.firing, outputs))
    return starts, others


def test_a_call_starts_when_its_inputs_have_moved():
    machine = flow(*RLHF, dataset_keys=("prompt",))
    (move,) = machine.admit(1, samples("a", "b", key="prompt"))
    assert isinstance(move, Move)
    (start,) = machine.moved(move.firing)
    assert isinstance(start, Start)
    assert (start.firing, start.firing.samples.ids, start.lag) == (move.firing, ("a", "b"), 0)


def test_a_step_is_complete_once_and_says_who_read_what():
    machine = flow(*RLHF, dataset_keys=("prompt",))
    _, others = run_until(machine, machine.admit(7, samples("a", "b", key="prompt")), "")
    release, complete = others
    assert release == Release(("a", "b"))
    assert complete == Complete(7, 2, {"generate": 2, "reward": 2, "train": 2})


def test_with_no_steps_ahead_the_next_waits_for_the_one_before():
    machine = flow(*RLHF, dataset_keys=("prompt",))
    run_until(machine, machine.admit(1, samples("a", key="prompt")), "train")
    assert not machine.has_room
    with pytest.raises(AssertionError, match="step 2 is admitted while 1 are in flight"):
        machine.admit(2, samples("b", key="prompt"))


def test_a_step_ahead_is_generated_while_rewards_are_computed_and_lags_by_one():
    machine = flow(*RLHF, dataset_keys=("prompt",), max_steps_ahead=1)
    run_until(machine, machine.admit(1, samples("a", key="prompt")), "reward")
    starts, _ = run_until(machine, machine.admit(2, samples("b", key="prompt")), "generate")
    assert (starts["generate"].firing.step, starts["generate"].lag) == (2, 1)
    assert not machine.has_room


def test_an_older_step_goes_first():
    machine = flow(*RLHF, dataset_keys=("prompt",), max_steps_ahead=2)
    starts, _ = run_until(machine, machine.admit(1, samples("a", key="prompt")), "reward")
    ahead, _ = run_until(machine, machine.admit(2, samples("b", key="prompt")), "generate")
    assert start_all(machine, machine.admit(3, samples("c", key="prompt"))) == [], "the actor is busy"
    done = start_all(machine, machine.finished(starts["reward"].firing, samples("a", key="reward")))
    assert done == []
    after = start_all(machine, machine.finished(ahead["generate"].firing, samples("b", key="tokens")))
    started = [(each.firing.step, each.firing.call.name) for each in after]
    assert started == [(1, "train"), (2, "reward")], "not the generation of step 3, which has waited for longer"


def test_nobody_takes_workers_that_an_older_call_waits_for():
    """critic wants 2-5, of which the actor has 2 and 3; reference wants 4-7, which are free."""
    calls = [model_call(each, model=each) for each in ("actor", "critic", "reference")]
    machine = flow(*calls, max_steps_ahead=1)
    (actor,) = start_all(machine, machine.admit(1, samples("a")))
    assert actor.firing.call.name == "actor"
    assert start_all(machine, machine.admit(2, samples("b"))) == []
    after = start_all(machine, machine.finished(actor.firing))
    assert [start.firing.call.name for start in after] == ["critic"]


def test_a_call_with_smaller_batches_fires_as_they_come():
    machine = flow(GENERATE, function_call("reward", "tokens", "reward", batch_size=2), dataset_keys=("prompt",))
    (generate,) = start_all(machine, machine.admit(1, samples("a", "b", "c", "d", key="prompt")))
    (reward,) = start_all(machine, machine.produced(generate.firing, samples("b", "a", key="tokens")))
    assert (reward.firing.samples.ids, reward.firing.is_last) == (("a", "b"), False)
    assert start_all(machine, machine.finished(generate.firing, samples("d", "c", key="tokens"))) == [], "it is busy"
    release, last = start_all(machine, machine.finished(reward.firing, samples("a", "b", key="reward")))
    assert release == Release(("a", "b")), "each as soon as it was read by all"
    assert (last.firing.samples.ids, last.firing.is_last) == (("c", "d"), True)


def test_a_later_window_waits_for_an_earlier_one():
    machine = flow(GENERATE, function_call("reward", "tokens", "reward", batch_size=2), dataset_keys=("prompt",))
    (generate,) = start_all(machine, machine.admit(1, samples("a", "b", "c", "d", key="prompt")))
    assert start_all(machine, machine.produced(generate.firing, samples("c", "d", key="tokens"))) == []


def test_inputs_of_the_next_window_move_while_this_one_runs():
    machine = flow(model_call("score", batch_size=1), model_call("all", batch_size=2, model="reference"))
    _, score = start_all(machine, machine.admit(1, samples("a", "b")))
    assert score.firing.samples.ids == ("a",)
    assert [firing.samples.ids for firing in machine._moved] == [("b",)]


def test_a_batch_of_another_size_than_the_graphs_is_cut_into_as_many_parts():
    machine = flow(model_call("score", batch_size=2), model_call("all", batch_size=4, model="reference"))
    _, score = start_all(machine, machine.admit(1, samples("a", "b", "c", "d", "e", "f")))
    assert score.firing.samples.ids == ("a", "b", "c")


def test_what_a_function_drops_is_read_by_none_that_depends_on_it_and_by_all_others():
    other = model_call("other", "tokens", model="reference")
    machine = flow(*RLHF, other, dataset_keys=("prompt",))
    (generate,) = start_all(machine, machine.admit(1, samples("a", "b", key="prompt")))
    started = start_all(machine, machine.finished(generate.firing, samples("a", "b", key="tokens")))
    by_name = {start.firing.call.name: start.firing for start in started}
    (train,) = start_all(machine, machine.finished(by_name["reward"], samples("b", key="reward"), ("a",)))
    assert train.firing.samples.ids == ("b",)
    assert by_name["other"].samples.ids == ("a", "b")
    assert start_all(machine, machine.finished(train.firing)) == []
    release, complete = machine.finished(by_name["other"])
    assert release == Release(("a", "b"))
    assert complete.num_read == {"generate": 2, "reward": 2, "other": 2, "train": 1}


def test_a_batch_that_was_dropped_whole_still_ends_with_every_call():
    machine = flow(*RLHF, dataset_keys=("prompt",))
    starts, _ = run_until(machine, machine.admit(1, samples("a", key="prompt")), "reward")
    release, train = start_all(machine, machine.finished(starts["reward"].firing, None, ("a",)))
    assert release == Release(("a",))
    assert (len(train.firing.samples), train.firing.is_last) == (0, True)
    (complete,) = machine.finished(train.firing)
    assert complete.num_read["train"] == 0


def test_training_waits_for_those_that_read_the_model_in_its_step():
    score = model_call("score", "tokens", "score")
    machine = flow(score, model_call("train", "tokens", kind=CallKind.TRAIN_STEP))
    (first,) = start_all(machine, machine.admit(1, samples("a")))
    assert first.firing.call.name == "score"
    (then,) = start_all(machine, machine.finished(first.firing, samples("a", key="score")))
    assert then.firing.call.name == "train"


def test_a_call_that_leaves_an_output_out_is_named():
    machine = flow(*RLHF, dataset_keys=("prompt",))
    (generate,) = start_all(machine, machine.admit(1, samples("a", "b", key="prompt")))
    with pytest.raises(RunError, match=r"call generate has ended, but sequence b got no tokens from it"):
        machine.finished(generate.firing, samples("a", key="tokens"))
