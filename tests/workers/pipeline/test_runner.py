"""What the runner does not take, it names. (What it computes: test_training.py, tests/workers/test_shard.py.)"""

import pytest
import torch
from pipelines import CPU, QWEN, microbatch
from trainmaster.api.errors import ProgramError
from trainmaster.workers.data.microbatch import Microbatch
from trainmaster.workers.models.loading import init_stage
from trainmaster.workers.models.stage import Stage
from trainmaster.workers.parallel.gradients import sum_copies
from trainmaster.workers.pipeline.instructions import Instruction, Op, Program, chained
from trainmaster.workers.pipeline.lowering import lowered
from trainmaster.workers.pipeline.runner import Runner, Training
from trainmaster.workers.pipeline.schedules import Kind, schedule


@pytest.mark.parametrize("op", [Op.SAMPLE, Op.CLOSE])
def test_an_instruction_beyond_the_runner_is_named(op: Op):
    stage = Stage.__new__(Stage)  # never looked at
    torch.nn.Module.__init__(stage)
    stage.index = 0
    runner = Runner([stage], None, None, torch.device("cpu"), torch.float32)
    program = Program("odd", 0, chained([0]), ((Instruction(op, 0, 0),),))
    with pytest.raises(ProgramError, match=rf"{op}\(0, microbatch 0\) is beyond this runner"):
        runner.run(program, [], lambda *_: None)


@pytest.mark.parametrize("kind", [Kind.INTERLEAVED, Kind.FORWARD])
def test_stages_of_one_rank_hand_on_by_themselves_and_share_a_tied_embedding(kind: Kind):
    microbatches = [microbatch(at) for at in range(3)]
    stages = [init_stage(QWEN, 3, index, 4, CPU) for index in range(4)]
    whole = init_stage(QWEN, 3, 0, 1, CPU)
    found: dict[int, list[torch.Tensor]] = {}

    def finish(stage: Stage, hidden: torch.Tensor, each: Microbatch) -> torch.Tensor:
        loss = stage.logits(hidden).square().sum()
        found.setdefault(stage.num_stages, []).append(loss.detach())
        return loss

    training = Training(seed="0", reduce=lambda _: None, step=lambda: None) if kind is not Kind.FORWARD else None
    for held in (stages, [whole]):
        program = lowered(schedule(kind, 1, 3, len(held)))
        Runner(held, None, None, CPU, torch.float32).run(program, microbatches, finish, training)
    torch.testing.assert_close(found[4], found[1])
    if training is None:
        return
    sum_copies([[stage.tied_embedding] for stage in stages if stage.tied_embedding is not None], None)
    wanted = dict(whole.named_parameters())
    for stage in stages:
        for name, each in stage.named_parameters():
            torch.testing.assert_close(each.grad, wanted[name].grad, rtol=1e-4, atol=1e-4, msg=name)
