"""What the runner does not take yet, it names. (What it computes is in tests/workers/test_shard.py.)"""

import pytest
import torch
from trainmaster.api.errors import ProgramError
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.pipeline.instructions import Instruction, Op
from trainmaster.workers.pipeline.runner import Runner


@pytest.mark.parametrize("op", [Op.RECOMPUTE, Op.INPUT_GRADIENT, Op.WEIGHT_GRADIENT, Op.SAMPLE, Op.CLOSE])
def test_an_instruction_beyond_the_runner_is_named(op: Op):
    stage = Stage.__new__(Stage)  # never looked at
    runner = Runner(stage, None, None, torch.device("cpu"), torch.float32)
    with pytest.raises(ProgramError, match=rf"{op}\(0, microbatch 0\) is beyond this runner"):
        runner.run([Instruction(op, 0, 0)], [], lambda *_: None)
