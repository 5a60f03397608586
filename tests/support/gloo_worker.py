"""Processes that train one model together, by gloo on this machine: what each does, and what starts them.

usage: python gloo_worker.py RANK WORLD STORE OUT SCENARIO ARGUMENTS
    SCENARIO is `short` or `exact`, ARGUMENTS its keyword arguments as JSON; its result is saved at
    OUT.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ebc_lab.axiom.distributed import AXIOM_DDP, AxiomDDPState, axiom_hook
from ebc_lab.verity import Grids, VerityAdam, ops, weights_checksum

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.exact_gpt import batches, gpt  # noqa: E402

SHORT_STEPS = 30
SMALL_BUCKETS = {"bucket_cap_mb": 0.004}
Results = list[dict[str, Any]]


def small_model() -> nn.Module:
    """2,706 parameters in 8 tensors, of which one alone is a whole number of blocks of 256."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 32), nn.Tanh(), nn.LayerNorm(32), nn.Linear(32, 10)
    )


def small_loss(model: nn.Module, rank: int, step: int) -> Tensor:
    """Of one of four batches of this rank; rank 1 has a gradient of zeros at step 3."""
    generator = torch.Generator().manual_seed(4 * rank + step % 4)
    inputs = torch.randn(16, 24, generator=generator)
    labels = inputs[:, :10].argmax(1)
    weight = 0.0 if (rank, step) == (1, 3) else 1.0
    return weight * F.cross_entropy(model(inputs), labels)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)


def start(scenario: str, folder: Path, world: int = 2, script: str = __file__, **arguments: Any) -> Results:
    """Runs a scenario of `script` in `world` processes, in an empty folder -> the result of each rank."""
    outs = [folder / f"{rank}.pt" for rank in range(world)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = []
    for rank, out in enumerate(outs):
        words = [str(rank), str(world), str(folder / "store"), str(out), scenario, json.dumps(arguments)]
        command = [sys.executable, script, *words]
        running.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        said = [process.communicate(timeout=500)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    failed = [text for process, text in zip(running, said, strict=True) if process.returncode]
    assert not failed, "\n".join(failed)
    return [torch.load(out, weights_only=True) for out in outs]


def join(rank: int, world: int, store: str) -> None:
    """Makes this process one of the workers; they meet at the file `store`."""
    if "lo" in [name for _, name in socket.if_nameindex()]:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)


def weights_of(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def own_residuals(state: AxiomDDPState) -> list[Tensor]:
    return [r for kept in state.state_dict()["residuals"] for r in kept]


class Spy:
    """axiom_hook, and the sizes of the buckets it was given."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def hook(self, state, bucket):  # torch refuses annotations that are strings
        self.sizes.append(bucket.buffer().numel())
        return axiom_hook(state, bucket)


class Trained:
    """A model wrapped for a mode, `axiom` or `forgetful` (without error feedback), and its optimizer."""

    def __init__(
        self,
        mode: str,
        model: nn.Module,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer],
        **settings: Any,
    ):
        self.model = model
        self.optimizer = optimizer(model)
        self.wrapped = DistributedDataParallel(model, **settings)
        self.spy = Spy()
        self.state = AxiomDDPState(error_feedback=mode == "axiom")
        self.wrapped.register_comm_hook(self.state, self.spy.hook)

    def run(self, steps: range, loss_of: Callable[[nn.Module, int], Tensor]) -> Trained:
        for step in steps:
            self.optimizer.zero_grad()
            loss_of(self.wrapped, step).backward()
            self.optimizer.step()
        return self

    def result(self) -> dict[str, Any]:
        state = self.state
        sizes = {"sent": state.sent, "dense": state.dense, "buckets": self.spy.sizes}
        return {**sizes, "weights": weights_of(self.model), "residuals": own_residuals(state)}


def short(rank: int) -> dict[str, Any]:
    """Our two modes for a few steps, `axiom` in several ways that come to the same, and bad gradients."""

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return small_loss(model, rank, step)

    every = range(SHORT_STEPS)
    modes = ("axiom", "forgetful")
    told = {mode: Trained(mode, small_model(), sgd).run(every, loss_of).result() for mode in modes}
    views = {"gradient_as_bucket_view": True, **SMALL_BUCKETS}
    told["small buckets"] = Trained("axiom", small_model(), sgd, **SMALL_BUCKETS).run(every, loss_of).result()
    told["views"] = Trained("axiom", small_model(), sgd, **views).run(every, loss_of).result()
    told["resumed"] = resumed(loss_of)
    told["bad"] = bad_gradient(rank)
    told["bfloat16"] = in_bfloat16(rank)
    told["summed"] = summed(rank)
    return told


def resumed(loss_of: Callable[[nn.Module, int], Tensor]) -> dict[str, Any]:
    """`axiom`, stopped half way and continued by new objects from what they say of themselves."""
    half = SHORT_STEPS // 2
    first = Trained("axiom", small_model(), sgd, **SMALL_BUCKETS).run(range(half), loss_of)
    second = Trained("axiom", small_model(), sgd, **SMALL_BUCKETS)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.state.load_state_dict(first.state.state_dict())
    return second.run(range(half, SHORT_STEPS), loss_of).result()


def bad_gradient(rank: int) -> dict[str, Any]:
    """The gradients, and residuals before and after, of a step at which one value of rank 1 is infinite."""
    trained = Trained("axiom", small_model(), sgd, **SMALL_BUCKETS)
    trained.run(range(2), lambda model, step: small_loss(model, rank, step))
    before = own_residuals(trained.state)
    trained.optimizer.zero_grad()
    parameters = list(trained.model.parameters())
    if rank == 1:
        first = torch.arange(parameters[-1].numel()) == 0
        parameters[-1].register_hook(lambda g: g.masked_fill(first, torch.inf))
    small_loss(trained.wrapped, rank, 2).backward()
    gradients = [p.grad for p in parameters]
    return {"gradients": gradients, "before": before, "after": own_residuals(trained.state)}


def in_bfloat16(rank: int) -> dict[str, Any]:
    """Two steps of a model of bfloat16 weights."""
    trained = Trained("axiom", small_model().bfloat16(), sgd)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        inputs = torch.randn(16, 24, generator=torch.Generator().manual_seed(rank)).bfloat16()
        return model(inputs).float().square().mean()

    return trained.run(range(2), loss_of).result()


def summed(rank: int) -> list[Tensor]:
    """A payload of AXIOM_DDP, added up by all_reduce, which it is not made for."""
    payload = AXIOM_DDP(300).compress(torch.randn(300, generator=torch.Generator().manual_seed(rank)))[:2]
    for part in payload:
        dist.all_reduce(part)
    return list(payload)


def exact(rank: int, share: int) -> dict[str, Any]:
    """A GPT of exact layers: the first worker has `share` rows of each batch, the second one the rest, one by
    one."""
    model = gpt()
    optimizer = VerityAdam(model.parameters(), lr=0.01)
    grids = Grids(model)
    for inputs, targets in batches(4):
        own = slice(None, share) if rank == 0 else slice(share, None)
        x, y = inputs[own], targets[own]
        parts = 1 if rank == 0 else len(x)
        finished = False
        while not finished:
            for a, b in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ops.cross_entropy(model(a), b).backward()
            finished = grids.finish(x.numel(), group=True)
        optimizer.step()
    return {"checksum": weights_checksum(model)}


SCENARIOS: dict[str, Callable[..., dict[str, Any]]] = {"short": short, "exact": exact}


def main(
    scenarios: dict[str, Callable[..., dict[str, Any]]],
    rank: str,
    world: str,
    store: str,
    out: str,
    scenario: str,
    arguments: str,
) -> None:
    torch.set_num_threads(1)
    join(int(rank), int(world), store)
    told = scenarios[scenario](int(rank), **json.loads(arguments))
    torch.save(told, out)
    dist.barrier()  # neither leaves while the other still needs it
    dist.destroy_process_group()


if __name__ == "__main__":
    main(SCENARIOS, *sys.argv[1:])
