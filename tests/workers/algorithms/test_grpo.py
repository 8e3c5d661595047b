"""The policy loss against the papers' equations, written out one token at a time on transformers' own logits."""

import math
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from trainmaster.api.algorithms import KLEstimator, LogProbabilities, LossNormalisation, PolicyLoss, SupervisedLoss
from trainmaster.workers.algorithms import inference_algorithm, training_algorithm
from trainmaster.workers.algorithms.functional import log_probabilities_and_entropy, token_log_probabilities
from trainmaster.workers.algorithms.grpo import GroupRelativePolicy, ResponseLogProbabilities, kl_divergence
from trainmaster.workers.algorithms.statistics import Statistics
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.attention import PackedBatch
from transformers import PretrainedConfig

CPU = torch.device("cpu")
CUTS = (
    ((0, 1, 2, 3, 4, 5),),
    ((0, 2), (3,), (1, 4, 5)),
    ((5,), (4,), (3,), (2,), (1,), (0,)),
    ((4, 3, 0), (3,), (2, 5, 1)),  # the sequence without a response twice: a last one and one alone
)
NAMES = {"loss", "entropy", "clip_fraction", "sampler_kl"}


def policy(**fields) -> PolicyLoss:
    return PolicyLoss(
        **{
            "clip_low": 0.2,
            "clip_high": 0.28,
            "kl_coefficient": 0.0,
            "kl_estimator": KLEstimator.K3,
            "normalisation": LossNormalisation.TOKEN,
            "temperature": 1.0,
            **fields,
        }
    )


@dataclass
class Reference:
    """What the equations give for a minibatch."""

    loss: torch.Tensor
    tokens: int = 0
    num_clipped_low: int = 0
    num_clipped_high: int = 0
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys((*NAMES - {"loss"}, "kl"), 0.0))


def reference(twin, chosen, settings: PolicyLoss) -> Reference:
    """PPO eq. 7 and GRPO eq. 3, with q/r/p as probabilities, in double precision."""
    made = Reference(torch.zeros((), dtype=torch.float64))
    total = made.loss
    num_responses = 0
    for index in chosen:
        one = twin.sequences[index]
        num_responses += 1
        table = twin.log_probabilities(one, settings.temperature)
        own = torch.zeros((), dtype=torch.float64)
        for at in one.response:
            log_p = table[at - 1, one.tokens[at]]
            p, q = log_p.exp(), math.exp(one.keys["log_probabilities"][at])
            r = math.exp(one.keys["reference_log_probabilities"][at])
            ratio = p / q
            if one.advantage > 0 and ratio > 1 + settings.clip_high:
                gain = torch.tensor((1 + settings.clip_high) * one.advantage)
                made.num_clipped_high += 1
            elif one.advantage < 0 and ratio < 1 - settings.clip_low:
                gain = torch.tensor((1 - settings.clip_low) * one.advantage)
                made.num_clipped_low += 1
            else:
                gain = ratio * one.advantage
            match settings.kl_estimator:
                case KLEstimator.K1:
                    kl = torch.log(p / r)
                case KLEstimator.K2:
                    kl = torch.log(p / r) ** 2 / 2
                case KLEstimator.K3:
                    kl = r / p - 1 - torch.log(r / p)
            loss = settings.kl_coefficient * kl - gain
            own = own + loss
            made.tokens += 1
            made.sums["kl"] += kl.item()
            made.sums["sampler_kl"] += math.log(q) - log_p.item()
            made.sums["entropy"] += -sum(x.exp().item() * x.item() for x in table[at - 1])
        is_by_sequence = settings.normalisation is LossNormalisation.SEQUENCE
        total = total + (own / max(len(one.response), 1) if is_by_sequence else own)
    made.sums["clip_fraction"] = made.num_clipped_low + made.num_clipped_high
    made.loss = total / (num_responses if settings.normalisation is LossNormalisation.SEQUENCE else made.tokens)
    return made


def train(twin, settings, cut) -> tuple[float, dict]:
    """The loss of the minibatch, with gradients in place, and its statistics: as `ModelShard.train`."""
    algorithm, statistics = GroupRelativePolicy(settings), Statistics(CPU)
    microbatches = [twin.microbatch(chosen) for chosen in cut]
    weight = sum(algorithm.weight(microbatch) for microbatch in microbatches)
    total = 0.0
    for microbatch in microbatches:
        loss = algorithm.loss(twin.stage, twin.hidden(microbatch), microbatch, statistics) / weight
        assert loss.shape == ()
        loss.backward()
        total += loss.item()
    return total, statistics.merged(None)


@pytest.mark.parametrize("cut", CUTS, ids=["whole", "three", "alone", "twice"])
@pytest.mark.parametrize("normalisation", LossNormalisation)
@pytest.mark.parametrize(
    ("kl_coefficient", "kl_estimator", "temperature"),
    [
        (0.0, KLEstimator.K3, 1.0),
        (0.3, KLEstimator.K1, 1.0),
        (0.3, KLEstimator.K2, 0.7),
        (0.3, KLEstimator.K3, 1.6),
    ],
)
def test_loss_gradients_and_statistics_equal_the_equations(
    with_policies, cut, normalisation, kl_coefficient, kl_estimator, temperature
):
    settings = policy(
        kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, normalisation=normalisation, temperature=temperature
    )
    twin = with_policies(temperature)
    wanted = reference(twin, [index for chosen in cut for index in chosen], settings)
    assert wanted.num_clipped_low > 0
    assert wanted.num_clipped_high > 0
    wanted.loss.backward()
    loss, statistics = train(twin, settings, cut)
    assert loss == pytest.approx(wanted.loss.item(), rel=1e-4, abs=1e-5)
    twin.assert_gradients_are_equal()
    assert set(statistics) == (NAMES | {"kl"} if kl_coefficient else NAMES)
    reported = statistics.pop("loss")
    assert reported.total / reported.weight == pytest.approx(loss, rel=1e-5), "what is reported is what is minimised"
    for name, mean in statistics.items():
        assert mean.weight == wanted.tokens
        assert mean.total == pytest.approx(wanted.sums[name], rel=1e-4, abs=1e-4), name


class IdentityHead:
    """A last stage whose hidden states are the logits."""

    config = PretrainedConfig(vocab_size=2)

    @staticmethod
    def logits(hidden):
        return hidden


def one_token(log_ratio: float, advantage: float, **fields) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A prompt of one token and a response of one, over two words: the loss, its gradient and the clipped fraction."""
    hidden = torch.zeros(1, 2, 2, requires_grad=True)  # p = 1/2
    keys = {
        "loss_mask": torch.tensor([False, True]),
        "log_probabilities": torch.tensor([0.0, math.log(0.5) - log_ratio]),
        "advantage": torch.tensor([advantage]),
    }
    microbatch = Microbatch(torch.tensor([[0, 1]]), PackedBatch((2,), CPU), keys)
    statistics = Statistics(CPU)
    loss = GroupRelativePolicy(policy(**fields)).loss(IdentityHead(), hidden, microbatch, statistics)
    loss.backward()
    return loss.detach(), hidden.grad[0, 0], statistics.merged(None)["clip_fraction"].total


@pytest.mark.parametrize("advantage", [2.0, -2.0])
@pytest.mark.parametrize("ratio", [0.3, 0.79, 0.81, 1.0, 1.27, 1.29, 3.0])
def test_the_ratio_is_clipped_on_the_side_where_it_would_gain(ratio, advantage):
    loss, gradient, fraction = one_token(math.log(ratio), advantage)
    is_clipped = ratio > 1.28 if advantage > 0 else ratio < 0.8
    bound = 1.28 if advantage > 0 else 0.8
    assert loss.item() == pytest.approx(-(bound if is_clipped else ratio) * advantage, rel=1e-5)
    assert fraction == is_clipped
    slope = 0.0 if is_clipped else ratio * advantage / 2  # d ratio / d logit = ratio (1 - p)
    assert gradient.tolist() == pytest.approx([slope, -slope], rel=1e-5)


def test_on_policy_the_gradient_is_the_policy_gradient_even_without_room():
    _, gradient, fraction = one_token(0.0, 3.0, clip_low=0.0, clip_high=0.0)
    assert fraction == 0
    assert gradient.tolist() == pytest.approx([1.5, -1.5])


@pytest.mark.parametrize("normalisation", LossNormalisation)
def test_weights_count_responses_or_their_tokens(twin, normalisation):
    algorithm = GroupRelativePolicy(policy(normalisation=normalisation))
    is_by_sequence = normalisation is LossNormalisation.SEQUENCE
    assert algorithm.weight(twin.microbatch((0, 1, 3))) == (3.0 if is_by_sequence else 5.0)
    assert algorithm.weight(twin.microbatch((3,))) == (1.0 if is_by_sequence else 0.0)


@pytest.mark.parametrize("normalisation", LossNormalisation)
@pytest.mark.parametrize("kl_coefficient", [0.0, 0.5])
def test_a_microbatch_without_responses_still_has_gradients_and_statistics(
    with_policies, kl_coefficient, normalisation
):
    twin, statistics = with_policies(1.0), Statistics(CPU)
    microbatch = twin.microbatch((3,))
    algorithm = GroupRelativePolicy(policy(kl_coefficient=kl_coefficient, normalisation=normalisation))
    loss = algorithm.loss(twin.stage, twin.hidden(microbatch), microbatch, statistics)
    loss.backward()
    assert loss.item() == 0.0
    assert all(
        parameter.grad is not None and not parameter.grad.any() for parameter in twin.stage.model.model.parameters()
    )
    merged = statistics.merged(None)  # every replica reduces the same names
    assert set(merged) == (NAMES | {"kl"} if kl_coefficient else NAMES)
    loss_mean = merged.pop("loss")
    assert (loss_mean.total, loss_mean.weight) == (0.0, normalisation is LossNormalisation.SEQUENCE)
    assert {(mean.total, mean.weight) for mean in merged.values()} == {(0.0, 0.0)}


def test_the_mask_of_a_first_token_is_not_read(with_policies):
    twin = with_policies(1.0)
    before, _ = train(twin, policy(), CUTS[1])
    for one in twin.sequences:
        one.keys["loss_mask"][0] = True  # nothing precedes it
    after, statistics = train(twin, policy(), CUTS[1])
    assert after == before
    assert statistics["loss"].weight == sum(len(one.response) for one in twin.sequences)


def test_the_reference_is_read_only_with_a_penalty(with_policies):
    assert policy().reads == ("tokens", "loss_mask", "log_probabilities", "advantage")
    assert policy(kl_coefficient=0.1).reads == (*policy().reads, "reference_log_probabilities")
    twin = with_policies(1.0)
    for one in twin.sequences:
        del one.keys["reference_log_probabilities"]
    train(twin, policy(), CUTS[0])


@pytest.mark.parametrize(("p", "r"), [(0.5, 0.25), (0.1, 0.9), (0.3, 0.3)])
def test_kl_estimators_have_their_closed_forms(p, r):
    now, other = torch.tensor([math.log(p)]), torch.tensor([math.log(r)])
    wanted = {
        KLEstimator.K1: math.log(p / r),
        KLEstimator.K2: math.log(p / r) ** 2 / 2,
        KLEstimator.K3: r / p - 1 - math.log(r / p),
    }
    assert set(wanted) == set(KLEstimator)
    for estimator, value in wanted.items():
        assert kl_divergence(now, other, estimator).item() == pytest.approx(value, rel=1e-4, abs=1e-6)


@given(st.lists(st.tuples(st.floats(-20, 0), st.floats(-20, 0)), min_size=1, max_size=8))
def test_k3_is_never_negative(pairs):
    now, other = torch.tensor(pairs, dtype=torch.float64).T
    assert (kl_divergence(now, other, KLEstimator.K3) >= -1e-12).all()


def test_the_unbiased_estimators_average_to_the_divergence():
    p, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.2, 0.6])
    divergence = (p * (p / r).log()).sum().item()
    for estimator in (KLEstimator.K1, KLEstimator.K3):
        assert (p * kl_divergence(p.log(), r.log(), estimator)).sum().item() == pytest.approx(divergence, rel=1e-5)


def test_the_gradient_of_k2_is_that_of_the_divergence():
    logits = torch.tensor([0.3, -0.2, 0.9], requires_grad=True)
    r = torch.tensor([0.2, 0.2, 0.6])
    log_p = logits.log_softmax(0)
    (log_p.exp() * (log_p - r.log())).sum().backward()
    wanted, logits.grad = logits.grad, None
    log_p = logits.log_softmax(0)
    (log_p.exp().detach() * kl_divergence(log_p, r.log(), KLEstimator.K2)).sum().backward()
    torch.testing.assert_close(logits.grad, wanted)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 2.0])
@pytest.mark.parametrize("chosen", [(0, 1, 2, 3, 4, 5), (3,), (3, 2), (5, 3)])
def test_response_log_probabilities_stand_where_their_tokens_do(twin, chosen, temperature):
    settings = LogProbabilities(temperature=temperature)
    algorithm = inference_algorithm(settings)
    assert isinstance(algorithm, ResponseLogProbabilities)
    statistics, microbatch = Statistics(CPU), twin.microbatch(chosen)
    with torch.no_grad():
        outputs = algorithm.infer(twin.stage, twin.hidden(microbatch), microbatch, statistics)
        wanted = []
        for one in (twin.sequences[index] for index in chosen):
            table = twin.log_probabilities(one, temperature)
            wanted += [table[at - 1, one.tokens[at]] if at in one.response else 0.0 for at in range(len(one.tokens))]
    assert tuple(outputs) == settings.writes
    (got,) = outputs.values()
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float32), rtol=1e-4, atol=1e-5)
    assert not got[~microbatch.keys["loss_mask"]].any()
    assert statistics.merged(None) == {}


def test_log_probabilities_of_the_policy_itself_give_no_penalty(twin):
    for index, one in enumerate(twin.sequences):
        microbatch = twin.microbatch((index,))
        algorithm = ResponseLogProbabilities(LogProbabilities(temperature=1.0))
        with torch.no_grad():
            (values,) = algorithm.infer(twin.stage, twin.hidden(microbatch), microbatch, Statistics(CPU)).values()
        one.keys |= {"log_probabilities": values, "reference_log_probabilities": values}
    _, statistics = train(twin, policy(kl_coefficient=0.1), CUTS[1])
    assert statistics["kl"].total == pytest.approx(0.0, abs=1e-5)
    assert statistics["sampler_kl"].total == pytest.approx(0.0, abs=1e-4)
    assert statistics["clip_fraction"].total == 0


def test_log_probabilities_are_the_same_with_and_without_entropy(twin):
    microbatch = twin.microbatch((0, 4))
    positions = microbatch.keys["loss_mask"].nonzero().squeeze(1)
    with torch.no_grad():
        hidden = twin.hidden(microbatch)
        plain = token_log_probabilities(twin.stage, hidden, microbatch.tokens, positions)
        chosen, entropy = log_probabilities_and_entropy(twin.stage, hidden, microbatch.tokens, positions)
    torch.testing.assert_close(plain, chosen)
    assert (entropy > 0).all()
    assert (entropy < math.log(24)).all()


def test_settings_choose_the_algorithm():
    settings = policy()
    algorithm = training_algorithm(settings)
    assert isinstance(algorithm, GroupRelativePolicy)
    assert algorithm.settings is settings
    with pytest.raises(AssertionError, match="no recipe trains by LogProbabilities"):
        training_algorithm(LogProbabilities(temperature=1.0))
    with pytest.raises(AssertionError, match="no recipe infers by PolicyLoss"):
        inference_algorithm(settings)
    assert type(training_algorithm(SupervisedLoss())) is type(inference_algorithm(SupervisedLoss()))


def test_a_token_far_off_does_not_overflow():
    policy = torch.tensor([-100.0], requires_grad=True)
    kl_divergence(policy, torch.tensor([0.0]), KLEstimator.K3).sum().backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
