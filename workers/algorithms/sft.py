"""Supervised fine-tuning.

For a minibatch of sequences x^i with answer positions A^i (the loss mask, less each sequence's first token),

    L = - sum_i sum_{t in A^i} log p(x^i_t | x^i_<t)  /  sum_i |A^i|

the maximum-likelihood objective of the answers given their prompts (Ouyang et al. 2022, arXiv 2203.02155, section 3.5,
step 1). The denominator is the count over the whole minibatch, all data-parallel ranks and microbatches, so that the
loss and its gradient depend neither on the layout nor on the cut. (A mean of means would weigh short answers more.)
"""

from __future__ import annotations

from torch import Tensor

from ..data.microbatch import Microbatch
from ..models.stage import Stage
from .functional import predicted_positions, token_log_probabilities, zero_connected
from .statistics import Statistics


class SupervisedFineTuning:
    """See the module's docstring."""

    def weight(self, microbatch: Microbatch) -> float:
        """The number of answer tokens."""
        return float(len(predicted_positions(microbatch.keys["loss_mask"], microbatch.packed)))

    def loss(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> Tensor:
        """The summed cross-entropy of the answer tokens."""
        positions = predicted_positions(microbatch.keys["loss_mask"], microbatch.packed)
        if len(positions) == 0:
            loss = zero_connected(hidden)
        else:
            loss = -token_log_probabilities(stage, hidden, microbatch.tokens, positions).sum()
        statistics.add("loss", loss, len(positions))
        return loss

    def infer(self, stage: Stage, hidden: Tensor, microbatch: Microbatch, statistics: Statistics) -> dict[str, Tensor]:
        """Only the loss, as a statistic: an evaluation."""
        self.loss(stage, hidden, microbatch, statistics)
        return {}
