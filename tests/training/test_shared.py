"""What the processes that train one run agree on, as threads of this process; test_ranks.py has processes.
And the values of steps that are on a device, as if it were one that a host waits for."""

import contextlib
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from ebc_lab.config.schema import RunConfig
from ebc_lab.training import ranks
from ebc_lab.training.pending import Packed, PendingSteps
from ebc_lab.training.ranks import ALONE, Ranks


class Threads:
    """torch.distributed for `count` threads, each of which is one process."""

    ReduceOp = torch.distributed.ReduceOp

    def __init__(self, count):
        self.count, self.own = count, threading.local()
        self.meeting, self.given = threading.Barrier(count, timeout=10), [None] * count

    def _met(self, value):
        """What all have given, in the order of their ranks."""
        self.given[self.own.rank] = value
        self.meeting.wait()
        given = list(self.given)
        self.meeting.wait()
        return given

    def all_gather(self, parts, own):
        for part, value in zip(parts, self._met(own.clone()), strict=True):
            part.copy_(value)

    def all_reduce(self, tensor, op=ReduceOp.SUM):
        given = torch.stack(self._met(tensor.clone()))
        tensor.copy_(given.amax(0) if op == self.ReduceOp.MAX else given.sum(0))

    def broadcast(self, tensor, source):
        tensor.copy_(self._met(tensor.clone())[source])

    def broadcast_object_list(self, objects, source):
        objects[:] = self._met(list(objects))[source]

    def all(self, function):
        """What `function(ranks)` returns in each, or the error that it raises."""

        def process(rank):
            self.own.rank = rank
            try:
                return function(Ranks(rank, self.count))
            except Exception as error:
                return error

        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(process, range(self.count)))


@pytest.fixture(params=[1, 3])
def together(request, monkeypatch):
    if request.param == 1:
        return SimpleNamespace(count=1, all=lambda function: [function(ALONE)])
    made = Threads(request.param)
    monkeypatch.setattr(ranks, "dist", made)
    return made


@pytest.mark.parametrize("rows", [7, 9, 2])
def test_rows_are_dealt_to_the_processes_and_gathered_in_their_order(together, rows):
    batch = torch.arange(10.0, 10.0 + rows)
    found = together.all(lambda one: one.gathered(one.rows(batch), rows))
    assert [values.tolist() for values in found] == [batch.tolist()] * together.count
    dealt = together.all(lambda one: one.rows(batch).tolist())
    assert dealt == [batch[rank :: together.count].tolist() for rank in range(together.count)]


def test_a_mean_is_of_all_processes_and_what_the_first_one_says_holds_for_all(together):
    def mean(one):
        given = {"loss": torch.tensor(float(one.rank)), "norm": torch.tensor(2.0 * one.rank).double()}
        found = one.mean(given)
        return {name: (value.item(), value.dtype) for name, value in found.items()}

    middle = (together.count - 1) / 2
    expected = {"loss": (middle, torch.float32), "norm": (2 * middle, torch.float64)}
    assert together.all(mean) == [expected] * together.count
    assert together.all(lambda one: one.agreed(one.first)) == [True] * together.count
    assert together.all(lambda one: one.agreed(not one.first)) == [False] * together.count
    assert together.all(lambda one: one.from_first(lambda: f"of {one.rank}")) == ["of 0"] * together.count


def test_what_the_first_one_raises_is_raised_in_all(together):
    def fails(one):
        with contextlib.suppress(KeyError):
            one.from_first(lambda: {}["gone"] if one.first else 1)
            return "went on"
        return "raised"

    assert together.all(fails) == ["raised"] * together.count


@pytest.mark.parametrize(
    ("change", "drifts"),
    [(0.0, False), (1e-6, True), (torch.nan, False)],  # a run that diverges does so in all
)
def test_weights_that_differ_between_the_processes_end_the_run(together, change, drifts):
    def look(one):
        weights = [torch.ones(3), torch.full((2, 2), 2.0)]
        weights[1][0, 0] += change * one.rank if change == change else change
        one.refuse_drift([torch.nn.Parameter(w) for w in weights], 40)

    found = together.all(look)
    if together.count == 1 or not drifts:
        assert found == [None] * together.count
    else:
        assert {str(error) for error in found} == {
            "after 40 steps the weights differ between the processes of the run"
        }


def test_each_measures_its_share_of_the_probed_and_the_audited_rows():
    run = RunConfig(audit_tokens=500)
    run.model.context, run.budget.probe_sequences = 64, 6  # 8 rows are audited
    assert Ranks(0, 1).share_of(run) is run
    share = Ranks(1, 3).share_of(run)
    assert (share.budget.probe_sequences, share.audit_tokens) == (2, 3 * 64)


@pytest.mark.parametrize("packed", [False, True])
def test_values_that_wait_on_a_device_come_in_the_order_of_their_steps(packed):
    values = [
        {"loss": torch.tensor(2.0), "kl": torch.tensor([1.0, 3.0]), "c": 0.5},
        {"loss": torch.tensor(1.5), "kl": torch.tensor([4.0, 5.0]), "c": 1.0},
        {"loss": torch.tensor(1.0), "kl": torch.tensor([6.0, 7.0]), "c": 0.25, "audit": torch.tensor(9.0)},
    ]

    def taken(device):
        pending = PendingSteps(3, torch.device("cpu"))
        replayed = Packed.of(values[0])  # a graph's output: its next replay writes over it
        for nth, one in enumerate(values):
            if packed and nth < 2:
                replayed.numbers.copy_(Packed.of(one).numbers)
                pending.add(0.1 * nth, replayed)
            else:
                pending.add(0.1 * nth, Packed.of(one) if packed else one)
        pending.device = device
        assert len(pending) == 3
        found = pending.take()
        assert len(pending) == 0
        assert pending.take() == []
        return found

    here = taken(torch.device("cpu"))
    assert here == taken(SimpleNamespace(type="cuda"))
    assert [lr for lr, _ in here] == [0.0, 0.1, 0.2]
    assert here[2][1] == {"loss": 1.0, "kl": [6.0, 7.0], "c": 0.25, "audit": 9.0}
    assert [numbers["kl"] for _, numbers in here] == [[1.0, 3.0], [4.0, 5.0], [6.0, 7.0]]
