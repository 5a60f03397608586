"""The processes that train one run together, each on its share of every batch's rows (DDP).

All of them build the same `Training` from the same seed, take the same steps and share the windows of each
evaluation but the last ones, on whole splits, which are rank 0's. It alone writes; what it decides for all of
them, and every loss, goes through here.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ebc_lab.config.schema import RunConfig

WATCH_S = 1.0  # between looks whether the launcher of these processes is there
FOREVER = timedelta(days=365)  # the driver's heartbeat notices a process that hangs
BACKENDS = "cpu:gloo,cuda:nccl"
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the `count` that train one run."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes the run's files."""
        return self.rank == 0

    def rows(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, (B, …) -> (B / count, …): every `count`-th.

        So the leading k rows of all processes are the leading k · count rows of the batch, and parts of their
        batches make up a part of the whole.
        """
        return batch[self.rank :: self.count] if self.count > 1 else batch

    def gathered(self, own: Tensor, rows: int) -> Tensor:
        """Values of this process's rows, (rows / count, rounded up or down) -> of all rows, (rows,)."""
        if self.count == 1:
            return own
        most = -(-rows // self.count)
        parts = [own.new_empty(most) for _ in range(self.count)]
        dist.all_gather(parts, torch.cat([own, own.new_zeros(most - len(own))]))
        return torch.stack(parts, 1).flatten()[:rows]

    def share_of(self, run: RunConfig) -> RunConfig:
        """The run as its optimizer measures it here: with its share of the probed and the audited rows."""
        if self.count == 1:
            return run
        probe = replace(run.budget, probe_sequences=run.budget.probe_sequences // self.count)
        rows = -(-run.audit_tokens // run.model.context)
        tokens = -(-rows // self.count) * run.model.context
        return replace(run, budget=probe, audit_tokens=tokens)

    def training(self, forward: nn.Module) -> nn.Module:
        """What training calls: the gradients of `forward` become the mean over all processes in backward."""
        return DistributedDataParallel(forward) if self.count > 1 else forward

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean over all processes of values by name, 0-dim each."""
        if self.count == 1:
            return dict(values)
        stacked = torch.stack([value.double() for value in values.values()])
        dist.all_reduce(stacked)
        means = (stacked / self.count).unbind()
        return {name: mean.to(values[name].dtype) for name, mean in zip(values, means, strict=True)}

    def agreed(self, flag: bool) -> bool:
        """What rank 0 says."""
        if self.count == 1:
            return flag
        votes = torch.tensor(int(flag))
        dist.broadcast(votes, 0)
        return bool(votes)

    def from_first(self, compute: Callable[[], T]) -> T:
        """Return what `compute` returns in rank 0, or raise what it raises there, in every process."""
        if self.count == 1:
            return compute()
        answer: list[Any] = [None, None]
        if self.first:
            try:
                answer = [compute(), None]
            except Exception as error:
                answer = [None, error]
        dist.broadcast_object_list(answer, 0)
        value: T = answer[0]
        if answer[1] is not None:
            raise answer[1]
        return value

    def refuse_drift(self, weights: list[nn.Parameter], step: int) -> None:
        """Raises RuntimeError unless the weights, after so many steps, are those of all processes."""
        if self.count == 1:
            return
        norms = torch.stack(torch._foreach_norm([w.detach() for w in weights], 2, torch.float64))
        extremes = torch.cat([norms, -norms])
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
        most, least = extremes[: len(norms)], -extremes[len(norms) :]
        if not torch.equal(most, least) and bool(torch.isfinite(most).all()):
            raise RuntimeError(f"after {step} steps the weights differ between the processes of the run")


ALONE = Ranks()


def joined() -> Ranks:
    """This process among those that torchrun started with it, once all are there; alone where it did not."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return ALONE
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    on_gpu = torch.cuda.device_count() >= count_here(count)
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKENDS if on_gpu else "gloo", timeout=FOREVER)
    return Ranks(dist.get_rank(), dist.get_world_size())


def count_here(count: int) -> int:
    """Return how many of the processes that train a run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", count))


def _end_with(launcher: int) -> None:
    """End this process when its launcher is gone or asks for it. SIGTERM from anybody else, which Slurm sends
    to every process of a job, is for the worker, which says what is to be done; it must be blocked."""
    while os.getppid() == launcher:
        heard = signal.sigtimedwait([signal.SIGTERM], WATCH_S)
        if heard is not None and heard.si_pid == launcher:
            break
    os._exit(1)


def lost_another(error: BaseException) -> bool:
    """Whether a process failed because another one of its run was gone."""
    lost = isinstance(error, RuntimeError) and "gloo/transport" in str(error)
    return lost or isinstance(error, dist.DistError)
