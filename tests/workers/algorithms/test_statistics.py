import torch
from trainmaster.system.rpc.commands import Mean
from trainmaster.workers.algorithms.statistics import Statistics

CPU = torch.device("cpu")


class FakeGroup:
    """Adds what the other replicas would send, and keeps what this one sends."""

    def __init__(self, others: torch.Tensor | None = None) -> None:
        self.others, self.sent = others, []

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.sent.append(tensor.clone())
        if self.others is not None:
            tensor += self.others


def test_totals_and_weights_add_up():
    statistics = Statistics(CPU)
    statistics.add("loss", torch.tensor(1.5), 2)
    statistics.add("loss", 0.5, torch.tensor(3))
    statistics.add("kl", 4.0, 1.0)
    assert statistics.merged(None) == {"loss": Mean(total=2.0, weight=5.0), "kl": Mean(total=4.0, weight=1.0)}


def test_replicas_reduce_one_table_in_the_order_of_names():
    first, second = Statistics(CPU), Statistics(CPU)
    for name, total in (("loss", 1.0), ("entropy", 2.0)):
        first.add(name, total, 1)
    for name, total in (("entropy", 20.0), ("loss", 10.0)):  # as another microbatch may order them
        second.add(name, total, 3)
    alone = FakeGroup()
    second.merged(alone)
    (table,) = alone.sent
    assert table.dtype == torch.float64
    merged = first.merged(FakeGroup(table))
    assert merged == {"entropy": Mean(total=22.0, weight=4.0), "loss": Mean(total=11.0, weight=4.0)}


def test_merging_changes_nothing_that_was_added():
    statistics = Statistics(CPU)
    statistics.add("loss", 1.0, 1)
    group = FakeGroup(torch.ones(1, 2, dtype=torch.float64))
    assert statistics.merged(group) == statistics.merged(group) == {"loss": Mean(total=2.0, weight=2.0)}


def test_without_statistics_nothing_is_sent():
    group = FakeGroup()
    assert Statistics(CPU).merged(group) == {}
    assert group.sent == []


def test_sums_are_in_double_precision_and_hold_no_graph():
    statistics = Statistics(CPU)
    statistics.add("loss", 2.0**24, 1)
    one = torch.ones((), requires_grad=True)
    for _ in range(3):
        statistics.add("loss", one * 1.0, 1)
    assert statistics.merged(None)["loss"].total == 2.0**24 + 3
    assert not statistics._sums["loss"].requires_grad
