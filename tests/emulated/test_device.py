"""The emulated device notices each thing that it is there for: every fault here is planted.

That it computes what is right, and finds nothing wrong there, is what the arms of test_arms.py rest on.
"""

import pytest
import torch

device = pytest.importorskip("support.emulated.device", exc_type=ImportError)

ONE, TWO = (device.Stream() for _ in range(2))


@pytest.fixture(autouse=True)
def fresh():
    torch.cuda.synchronize()
    device.forget()
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    device.forget()


def captured(compute, pool=None):
    """The graph of `compute`, in the pool of another graph, and what it returns."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(ONE), torch.cuda.graph(graph, stream=ONE, pool=pool):
        output = compute()
    return graph, output


def replayed(graph):
    with torch.cuda.stream(ONE):
        graph.replay()
    torch.cuda.synchronize()


def found(*words):
    return [sentence for sentence in device.findings() if all(w in sentence for w in words)]


def on_gpu(*values):
    return torch.tensor(values, device="cuda")


# -- the host ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 1],
        lambda x: torch.tensor([1.0], device="cuda"),
        lambda x: x.copy_(torch.ones(2)),
        lambda x: x[torch.tensor([1])],
        lambda x: x.__setitem__(torch.zeros(1, dtype=torch.int64, device="cuda"), torch.tensor(3.0)),
    ],
    ids=["item", "cpu", "nonzero", "mask", "tensor", "copy_", "index", "index_put"],
)
def test_a_wait_of_the_host_is_counted_and_may_fail(wait):
    x = torch.ones(2, device="cuda")
    device.forget()
    wait(x)
    assert sum(device.waits().values()) == 1
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(x)


def test_two_devices_do_not_mix_but_for_a_number():
    x = torch.ones(2, device="cuda")
    assert (x * torch.tensor(3.0)).tolist() == [3, 3]
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([x, torch.ones(1)])


# -- a capture -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "said"),
    [
        (lambda x: x * x.sum().item(), "the host waits: a number is read"),
        (lambda x: x + torch.tensor([1.0, 2.0]).to("cuda"), "a copy from pageable memory"),
        (lambda x: x + torch.ones(2).to("cuda", non_blocking=True), "a copy from pageable memory"),
        (
            lambda x: x + torch.ones(2).pin_memory().to("cuda", non_blocking=True),
            "pinned memory is allocated",
        ),
        (
            lambda x: x + torch.rand(2, device="cuda", generator=torch.Generator("cuda")),
            "random numbers of a generator that is not registered",
        ),
    ],
    ids=["item", "pageable", "asynchronous", "pinned", "generator"],
)
def test_a_capture_fails_of_what_cannot_be_captured(compute, said):
    x = torch.ones(2, device="cuda")
    with pytest.raises(RuntimeError, match="capture"):
        captured(lambda: compute(x))
    assert f"capture: {said}" in device.findings()


# -- memory --------------------------------------------------------------------------------------------------


def test_memory_that_a_graph_reads_and_nobody_keeps():
    kept = [torch.ones(300, device="cuda")]
    graph, _ = captured(lambda: kept[0] * 2)
    kept.clear()
    replayed(graph)
    assert found("graph: aten::mul", "reads memory that was freed after its capture")
    device.forget()
    other = torch.zeros(300, device="cuda")
    replayed(graph)
    assert found("graph: aten::mul", "reads memory that has been another tensor's since its capture")
    del other


def test_what_one_graph_makes_and_another_of_its_pool_reads():
    x, kept = torch.ones(8, device="cuda"), []

    def first():
        kept.append(x + 1)
        return x * 2

    graph, _ = captured(first)
    other, _ = captured(lambda: x * kept[0], graph.pool())
    replayed(graph)
    assert not device.findings()
    replayed(other)
    assert found("graph: aten::mul", "reads memory that another graph of its pool may have overwritten")


def test_freed_memory_does_not_keep_what_it_held():
    x = torch.full((100,), 7.0, device="cuda")
    address = x.data_ptr()
    del x
    y = torch.empty(100, device="cuda")
    assert y.data_ptr() == address
    assert y.isnan().all()


# -- the order of streams ------------------------------------------------------------------------------------


def test_a_stream_that_writes_what_another_may_still_read():
    x = torch.ones(3, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(ONE):
        x + 1
    with torch.cuda.stream(TWO):
        x.mul_(2)
    assert found("order: aten::mul", f"on stream {TWO.number} writes what stream {ONE.number} reads")


def read_by_the_other():
    """A tensor of one stream, and what the other, which waits for it, makes of it."""
    with torch.cuda.stream(ONE):
        x = torch.ones(3, device="cuda")
    TWO.wait_stream(ONE)
    with torch.cuda.stream(TWO):
        return x, x + 1


def test_memory_that_is_freed_while_another_stream_may_still_read_it():
    x, y = read_by_the_other()
    del x
    assert found(f"order: memory of stream {ONE.number} is freed while stream {TWO.number} reads it")
    del y


def test_a_stream_that_waits_may_read_and_memory_that_it_recorded_may_be_freed():
    x, y = read_by_the_other()
    x.record_stream(TWO)
    del x, y
    assert not device.findings()


def test_pinned_memory_that_changes_before_its_copy_is_done():
    host = torch.ones(4).pin_memory()
    x = host.to("cuda", non_blocking=True)
    host.fill_(2)
    assert found("copy: pinned memory was written before a copy from it was done")
    device.forget()
    x.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    host.fill_(3)
    assert not device.findings()
