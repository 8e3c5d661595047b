"""Answering prompts: the generation call that recipes share, and the evaluation that scores its answers."""

from __future__ import annotations

from pydantic import PositiveInt

from ..algorithms import Generation
from ..config import Dataset, Model
from ..functions import RewardFunction
from ..graph import CallKind, FunctionCall, Graph, Microbatching, ModelFunctionCall
from ..record import record
from ..rewards import Reward
from ..sampling import Sampling
from .base import FedGraph

PROMPT_KEYS = ("prompt",)


@record
class AnswerEvaluation:
    """Held-out prompts, answered and scored between steps: `evaluation/reward` is the mean."""

    dataset: Dataset
    """The prompts."""
    reward: Reward
    """How answers are scored."""
    sampling: Sampling
    """How they are drawn; `temperature=0` takes the likeliest token each time."""
    batch_size: PositiveInt = 256
    """Prompts that are answered together."""

    def feed(self, field: str, role: str, model: Model, max_tokens: int) -> FedGraph:
        """prompts --prompt--> generate(role) --tokens, loss_mask--> score

        `field`: the experiment's, which holds this evaluation; it names the graph too.
        """
        function = RewardFunction(reward=self.reward, has_advantages=False)
        score = FunctionCall(
            name="score",
            function=function,
            inputs=function.reads,
            outputs=function.writes,
            batch_size=self.batch_size,
        )
        answer = generate_call(role, model, self.sampling, self.batch_size, max_tokens)
        return FedGraph(
            graph=Graph(field, (answer, score), PROMPT_KEYS), dataset=self.dataset, dataset_field=f"{field}.dataset"
        )


def generate_call(role: str, model: Model, sampling: Sampling, batch_size: int, max_tokens: int) -> ModelFunctionCall:
    """Answers prompts with the model in this role; `max_tokens` a pipeline slot, the answers' room included."""
    settings = Generation(sampling=sampling)
    return ModelFunctionCall(
        name="generate",
        model=role,
        kind=CallKind.GENERATE,
        settings=settings,
        inputs=settings.reads,
        outputs=settings.writes,
        batch_size=batch_size,
        minibatch_size=batch_size,
        microbatching=Microbatching(max_tokens=max_tokens, min_count=model.layout.pp),
    )
