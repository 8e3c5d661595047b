import pytest
from trainmaster.workers.pipeline.instructions import Edge, EdgeKind, Op
from trainmaster.workers.pipeline.lowering import inference_program, training_program
from trainmaster.workers.pipeline.schedules import forward_only, one_f_one_b
from trainmaster.workers.pipeline.verify import verify

SIZES = [(p, m) for p in range(1, 7) for m in range(1, 13)]
COMMUNICATION = (Op.SEND, Op.RECEIVE)


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_programs_are_verified_and_keep_their_compute(p: int, m: int):
    for program, compute in (
        (training_program(p, m), one_f_one_b(p, m)),
        (inference_program(p, m), forward_only(p, m)),
    ):
        verify(program)
        assert program.num_microbatches == m
        kept = tuple(tuple(each for each in rank if each.op not in COMMUNICATION) for rank in program.ranks)
        assert kept == compute


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_each_channel_receives_what_it_was_sent_in_order(p: int, m: int):
    program = training_program(p, m)
    wanted = {Edge(EdgeKind.ACTIVATION, s, s + 1) for s in range(p - 1)}
    wanted |= {Edge(EdgeKind.GRADIENT, s + 1, s) for s in range(p - 1)}
    edges = {each.edge for rank in program.ranks for each in rank if each.op in COMMUNICATION}
    assert edges == wanted
    for edge in edges:
        sent = [each.microbatch for each in program.ranks[edge.source] if each.op is Op.SEND and each.edge == edge]
        received = [
            each.microbatch for each in program.ranks[edge.target] if each.op is Op.RECEIVE and each.edge == edge
        ]
        assert sent == received == list(range(m))


def test_communication_stands_next_to_its_compute():
    shown = [list(map(str, rank)) for rank in training_program(2, 1).ranks]
    assert shown == [
        [
            "forward(0, microbatch 0)",
            "send(activation 0->1, microbatch 0)",
            "receive(gradient 1->0, microbatch 0)",
            "backward(0, microbatch 0)",
            "reduce(0)",
            "step(0)",
        ],
        [
            "receive(activation 0->1, microbatch 0)",
            "forward(1, microbatch 0)",
            "backward(1, microbatch 0)",
            "send(gradient 1->0, microbatch 0)",
            "reduce(1)",
            "step(1)",
        ],
    ]


@pytest.mark.parametrize(("p", "m"), SIZES)
def test_inference_has_no_backward_no_gradients_and_no_step(p: int, m: int):
    ops = {each.op for rank in inference_program(p, m).ranks for each in rank}
    assert ops == ({Op.FORWARD} if p == 1 else {Op.FORWARD, Op.SEND, Op.RECEIVE})


def test_one_stage_alone_does_not_communicate():
    assert not [each for each in training_program(1, 3).ranks[0] if each.op in COMMUNICATION]
