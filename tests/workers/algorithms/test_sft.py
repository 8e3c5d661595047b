"""The maximum-likelihood loss against a sum over tokens on transformers' own logits."""

import pytest
import torch
from trainmaster.workers.algorithms.sft import SupervisedFineTuning
from trainmaster.workers.algorithms.statistics import Statistics

CPU = torch.device("cpu")
CUTS = (((0, 1, 2, 3, 4, 5),), ((0, 2), (3,), (1, 4, 5)), ((5,), (4,), (3,), (2,), (1,), (0,)))


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "three", "alone"])
def test_loss_and_gradients_equal_a_sum_over_answer_tokens(twin, cut):
    total, count = torch.zeros((), dtype=torch.float64), 0
    for one in twin.sequences:
        table = twin.log_probabilities(one, 1.0)
        for at in one.response:
            total, count = total - table[at - 1, one.tokens[at]], count + 1
    (total / count).backward()

    algorithm, statistics = SupervisedFineTuning(), Statistics(CPU)
    microbatches = [twin.microbatch(chosen) for chosen in cut]
    weight = sum(algorithm.weight(microbatch) for microbatch in microbatches)
    losses = [algorithm.loss(twin.stage, twin.hidden(one), one, statistics) for one in microbatches]
    for loss in losses:
        (loss / weight).backward()

    assert weight == count
    assert sum(loss.item() for loss in losses) == pytest.approx(total.item(), rel=1e-5)
    twin.assert_gradients_are_equal()
    mean = statistics.merged(None)["loss"]
    assert mean.total == pytest.approx(total.item(), rel=1e-5)
    assert mean.weight == count


def test_a_microbatch_without_answers_still_has_gradients(twin):
    statistics, microbatch = Statistics(CPU), twin.microbatch((3,))
    loss = SupervisedFineTuning().loss(twin.stage, twin.hidden(microbatch), microbatch, statistics)
    loss.backward()
    assert loss.item() == 0.0
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in twin.stage.model.model.parameters()
    )
    assert (statistics.merged(None)["loss"].total, statistics.merged(None)["loss"].weight) == (0.0, 0.0)


def test_an_evaluation_has_the_loss_and_no_outputs(twin):
    algorithm, trained, inferred = SupervisedFineTuning(), Statistics(CPU), Statistics(CPU)
    microbatch = twin.microbatch((0, 1, 2))
    with torch.no_grad():
        hidden = twin.hidden(microbatch)
        algorithm.loss(twin.stage, hidden, microbatch, trained)
        assert algorithm.infer(twin.stage, hidden, microbatch, inferred) == {}
    assert inferred.merged(None) == trained.merged(None)
