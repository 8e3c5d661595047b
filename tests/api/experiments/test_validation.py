"""Each rule, broken by one field of an experiment that keeps all others."""

from dataclasses import replace

import pytest
from trainmaster.api.algorithms import (
    Generation,
    KLEstimator,
    LogProbabilities,
    LossNormalisation,
    PolicyLoss,
    SupervisedLoss,
)
from trainmaster.api.config import Dataset, Layout, LoRA, Model, Optimizer, RunOptions
from trainmaster.api.errors import ConfigError
from trainmaster.api.experiments.base import CompiledExperiment, FedGraph, PlacedModel
from trainmaster.api.functions import RewardFunction
from trainmaster.api.graph import Call, CallKind, FunctionCall, Graph, Microbatching, ModelFunctionCall
from trainmaster.api.hooks import Offload, Reshard
from trainmaster.api.rewards import Reward
from trainmaster.api.sampling import Sampling

TRAINED = PlacedModel(model=Model(path="a", layout=Layout(dp=2)), field="actor", optimizer=Optimizer())
FROZEN = PlacedModel(model=Model(path="r", layout=Layout(dp=2)), field="reference")
MODELS = {"actor": TRAINED, "reference": FROZEN}
SAMPLING = Sampling(max_new_tokens=3)
POLICY = PolicyLoss(
    clip_low=0.2,
    clip_high=0.2,
    kl_coefficient=0.0,
    kl_estimator=KLEstimator.K3,
    normalisation=LossNormalisation.TOKEN,
    temperature=1.0,
)
TRAIN = ModelFunctionCall(
    name="train",
    model="actor",
    kind=CallKind.TRAIN_STEP,
    settings=SupervisedLoss(),
    inputs=("tokens", "loss_mask"),
    batch_size=8,
    minibatch_size=4,
    microbatching=Microbatching(max_tokens=64),
)
INFER = replace(
    TRAIN,
    name="infer",
    model="reference",
    kind=CallKind.INFERENCE,
    settings=LogProbabilities(temperature=1.0),
    outputs=("scores",),
    output_remap={"log_probabilities": "scores"},
)
SCORE = FunctionCall(
    name="score",
    function=RewardFunction(reward=Reward(function="own")),
    inputs=("tokens", "loss_mask"),
    outputs=("reward",),
    batch_size=8,
)
MOVE = Reshard(source="actor", target="reference", eta=0.5)


def fed(*calls: Call, rows: int = 4) -> FedGraph:
    graph = Graph("g", calls, ("tokens", "loss_mask", "chosen", "prompt"), sequences_per_row=rows)
    return FedGraph(graph=graph, dataset=Dataset(path="d"), dataset_field="dataset")


def compiled(*calls: Call, **models: PlacedModel) -> CompiledExperiment:
    return CompiledExperiment(run=RunOptions(), models=MODELS | models, training=fed(*calls))


def train(**fields) -> ModelFunctionCall:
    return replace(TRAIN, **fields)


def test_what_the_rules_allow():
    moved = train(pre_hooks=(Offload(model="reference"),), post_hooks=(MOVE, Offload(model="actor")))
    evaluate = train(name="evaluate", kind=CallKind.INFERENCE)
    assert compiled(moved, evaluate, INFER, SCORE).training.graph.call("train") == moved
    chosen = train(inputs=("chosen", "tokens"), input_remap={"chosen": "tokens", "tokens": "loss_mask"})
    assert compiled(chosen).models == MODELS
    assert compiled(train(minibatch_size=2)).models == MODELS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            train(model="critic"),
            r"graph g, call train, model = 'critic': the experiment's models are actor, reference\. Name one of these",
        ),
        (
            train(model="reference"),
            r"call train, model = 'reference': a model without an optimizer cannot be trained\. Give the model an opt",
        ),
        (
            train(minibatch_size=1),
            r"call train, minibatch_size = 1: each of the 2 replicas of actor \(layout\.dp\) needs a sequence\. Raise",
        ),
        (
            train(inputs=("tokens",)),
            r"call train, inputs = \['tokens'\]: SupervisedLoss reads loss_mask, and no input has this name .* Add it",
        ),
        (
            train(input_remap={"tokens": "prompt"}),
            r"call train, inputs = \['tokens', 'loss_mask'\]: SupervisedLoss reads tokens, and no input has this name",
        ),
        (
            train(outputs=("scores",)),
            r"call train, outputs = 'scores': SupervisedLoss writes nothing \(before remaps\)\. Take it out",
        ),
        (
            replace(INFER, output_remap={}),
            r"call infer, outputs = 'scores': LogProbabilities writes log_probabilities .* or map it from one of these",
        ),
        (
            replace(INFER, outputs=("log_probabilities",), output_remap={"scores": "log_probabilities"}),
            r"call infer, outputs = 'scores': LogProbabilities writes log_probabilities",
        ),
        (
            replace(SCORE, inputs=("tokens",)),
            r"call score, inputs = \['tokens'\]: RewardFunction reads loss_mask",
        ),
        (
            replace(SCORE, function=replace(SCORE.function, has_advantages=False), outputs=("reward", "advantage")),
            r"call score, outputs = 'advantage': RewardFunction writes reward \(before remaps\)",
        ),
        (
            replace(SCORE, batch_size=6),
            r"call score, batch_size = 6: a function is given whole groups, of 4 sequences each\. Use for example 8\.",
        ),
    ],
)
def test_a_call_fits_its_model_and_its_settings(call: Call, message: str):
    with pytest.raises(ConfigError, match=message):
        compiled(call)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (CallKind.GENERATE, SupervisedLoss()),
        (CallKind.GENERATE, LogProbabilities(temperature=1.0)),
        (CallKind.GENERATE, POLICY),
        (CallKind.INFERENCE, Generation(sampling=SAMPLING)),
        (CallKind.INFERENCE, POLICY),
        (CallKind.TRAIN_STEP, Generation(sampling=SAMPLING)),
        (CallKind.TRAIN_STEP, LogProbabilities(temperature=1.0)),
    ],
)
def test_a_calls_kind_fits_its_settings(kind: CallKind, settings):
    name = type(settings).__name__
    call = train(kind=kind, settings=settings, inputs=settings.reads)
    graph = Graph("g", (call,), settings.reads)
    with pytest.raises(
        ConfigError, match=rf"graph g, call train, settings = '{name}': a call of kind {kind} runs .*\. Change the call"
    ):
        CompiledExperiment(
            run=RunOptions(),
            models=MODELS,
            training=FedGraph(graph=graph, dataset=Dataset(path="d"), dataset_field="dataset"),
        )


OTHER_LAYOUT = replace(FROZEN, model=Model(path="r", layout=Layout(pp=2)))


@pytest.mark.parametrize(
    ("hook", "models", "message"),
    [
        (Offload(model="critic"), {}, r"offload, model = 'critic': the experiment's models are actor, reference"),
        (replace(MOVE, source="critic"), {}, r"reshard, source = 'critic': the experiment's models are"),
        (replace(MOVE, target="critic"), {}, r"reshard, target = 'critic': the experiment's models are"),
        (
            replace(MOVE, source="reference"),
            {},
            r"reshard, target = 'reference': a model does not move towards itself\. Name another",
        ),
        (
            MOVE,
            {"reference": OTHER_LAYOUT},
            r"reshard, target = 'reference': its layout is not that of its source, actor, .*\. Give reference the lay",
        ),
        (
            MOVE,
            {
                "actor": replace(TRAINED, model=Model(path="a", layout=Layout(dp=4))),
                "source": replace(FROZEN, field="source"),
                "reference": replace(FROZEN, first_rank=1),
            },
            r"reshard, target = 'reference': it starts at worker 1 and its source, source, at 0, and this version",
        ),
        (
            MOVE,
            {"reference": replace(FROZEN, optimizer=Optimizer())},
            r"reshard, target = 'reference': a model that an optimizer trains cannot be a target.* Take the optimizer",
        ),
        (
            Offload(model="reference"),
            {"reference": replace(FROZEN, first_rank=2)},
            r"offload, model = 'reference': a hook runs on the workers of its call's model, and this model has others",
        ),
    ],
)
@pytest.mark.parametrize("place", ["pre_hooks", "post_hooks"])
def test_a_hook_fits_its_models(hook: Reshard | Offload, models: dict[str, PlacedModel], message: str, place: str):
    if "source" in models:
        hook = replace(hook, source="source")
    with pytest.raises(ConfigError, match=rf"graph g, call train, {place}, {message}"):
        compiled(train(**{place: (hook,)}, minibatch_size=8), **models)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trainable": ("norm",)}, r"reference\.trainable = \('norm',\): this model is not trained\. Leave it out"),
        ({"lora": LoRA()}, r"reference\.lora\.path = None: .* adapters that begin here would change nothing"),
    ],
)
def test_what_is_trained_is_said_of_models_that_are(fields: dict[str, object], message: str):
    with pytest.raises(ConfigError, match=message):
        compiled(train(), reference=replace(FROZEN, model=replace(FROZEN.model, **fields)))


def test_evaluations_are_checked_too():
    with pytest.raises(ConfigError, match="graph g, call train, model = 'critic'"):
        CompiledExperiment(
            run=RunOptions(), models=MODELS, training=fed(TRAIN), evaluations=(fed(train(model="critic")),)
        )
