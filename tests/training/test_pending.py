"""Values that wait on their device come over complete, in order, and once."""

import torch

from ebc_lab.training.pending import Packed, PendingSteps

CPU = torch.device("cpu")


def test_loose_and_packed_steps_come_back_in_order():
    pending = PendingSteps(3, CPU)
    graph = Packed.of(
        {"loss": torch.tensor(1.0), "s": torch.tensor([2.0, 3.0]), "skipped": torch.tensor(True)}
    )
    pending.add(0.1, {"loss": torch.tensor(0.5, dtype=torch.float64), "s": torch.tensor([1.0])})
    pending.add(0.2, graph)
    graph.numbers.fill_(7)  # its next replay
    pending.add(0.3, graph)
    assert len(pending) == 3
    assert pending.take() == [
        (0.1, {"loss": 0.5, "s": [1.0]}),
        (0.2, {"loss": 1.0, "s": [2.0, 3.0], "skipped": 1.0}),
        (0.3, {"loss": 7.0, "s": [7.0, 7.0], "skipped": 7.0}),
    ]
    assert pending.take() == []


def test_a_longer_record_does_not_disturb_those_that_wait():
    pending = PendingSteps(2, CPU)
    pending.add(0.1, Packed.of({"a": torch.tensor(1.0)}))
    pending.add(0.1, Packed.of({"a": torch.tensor(2.0), "b": torch.tensor([3.0, 4.0])}))
    assert pending.take() == [(0.1, {"a": 1.0}), (0.1, {"a": 2.0, "b": [3.0, 4.0]})]
