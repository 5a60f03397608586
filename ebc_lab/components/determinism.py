"""On what a run's bits depend: on the machine, on it alone, or under determinism=verity on nothing but the
run's settings.

What computes a run's gradients and sums is its numerics, `Torch` or `Verity`. The maths of the latter is in
`ebc_lab.verity` (docs/verity.md).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ebc_lab.config.errors import UserError
from ebc_lab.config.modes import check_exact
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepInputs
from ebc_lab.ebc.step import Arithmetic
from ebc_lab.records.paths import RunFiles
from ebc_lab.verity import (
    Grids,
    VerityAdam,
    VerityError,
    check_platform,
    ops,
    use_engine,
    weights_checksum,
)
from ebc_lab.verity.arithmetic import Arithmetic as VerityArithmetic
from ebc_lab.verity.engine import engine_name, why_not_native
from ebc_lab.verity.native import openmp_team
from ebc_lab.workloads import WORKLOADS, Makers, Workload
from ebc_lab.workloads.gpt import ExactGPTWorkload
from ebc_lab.workloads.losses import EXACT_SUMS, SUMS, Sums, mean_of

from .hook import Built, Hook
from .optimizer import moments

Saving = Callable[[], AbstractContextManager[Any]]
Backward = tuple[Mapping[str, Tensor], StepInputs, Any]


class Torch(Hook):
    """The numerics of torch's own operations, whose last bits depend on the machine."""

    strict = False  # whether an operation without a reproducible kernel is refused
    refusals: ClassVar[tuple[type[Exception], ...]] = ()  # of a step whose values are not finite
    arithmetic: ClassVar[Arithmetic | None] = None  # in the place of torch, for a stabilizer
    workloads: ClassVar[Makers] = WORKLOADS
    sums: ClassVar[Sums] = SUMS  # of losses in an evaluation
    exact_windows = False  # whether evaluation windows are spread by integers alone
    keeps_subnormals = False  # whether a CPU computes with numbers below 1e-38, a hundred times as slowly

    def __init__(self, run: RunConfig, built: Built):
        self.run = run

    @classmethod
    def set_up(cls, run: RunConfig) -> None:
        """Make this process compute as the run asks. Raises UserError where that would give wrong bits."""
        if cls.strict or run.device == "cuda":
            repeat_bits(strict=cls.strict)
        elif torch.are_deterministic_algorithms_enabled():  # an earlier run of this process asked for it
            torch.use_deterministic_algorithms(False)
        flush_subnormals(not cls.keeps_subnormals)

    def log_lines(self) -> list[str]:
        """Return what the run's log says of what computes it."""
        return []

    def backward(self, batch: StepInputs, called: nn.Module, workload: Workload, saving: Saving) -> Backward:
        """Leave the gradients of the mean loss in `p.grad`.

        Args:
            batch: tokens and targets (B, T), which go through the model in `accumulate` parts, one after
                another; and the probe rows of the step.
            called: the model as training calls it.
            saving: surrounds a forward.
        Returns:
            the parts of the loss by their names, 0-dim, detached; the inputs of the optimizer's step, which
            are those of the last part; what the workload kept of that.
        """
        assert batch.targets is not None
        count = self.run.accumulate
        sums: dict[str, Tensor] = {}
        for i, (x, y) in enumerate(zip(batch.tokens.chunk(count), batch.targets.chunk(count), strict=True)):
            # processes exchange their gradients in the last backward alone
            exchanging: AbstractContextManager[Any] = nullcontext()
            if i + 1 < count and isinstance(called, DistributedDataParallel):
                exchanging = called.no_sync()
            with exchanging:
                with saving():
                    logits, states = workload.forward(called, x)
                    total, parts = workload.loss(logits, y, states, batch.t)
                torch.autograd.backward(total if count == 1 else total / count)
            sums = {name: part + sums[name] if sums else part for name, part in parts.items()}
        means = {name: s if count == 1 else s / count for name, s in sums.items()}
        return means, replace(batch, tokens=x, logits=logits, targets=y), states

    def finished(self, model: nn.Module, files: RunFiles) -> dict[str, str]:
        return {"weights_checksum": weights_checksum(model)}


class Repeatable(Torch):
    """The same with torch's reproducible kernels: the same bits again on the same machine."""

    strict = True


class Verity(Torch):
    """Gradients as integer sums over the batch: no bit depends on the machine, or on how a batch is split.

    Its state, the grids that the next step's sums lie on, belongs into the checkpoint.
    """

    name = "grids"
    graphed = False
    refusals = (VerityError,)
    arithmetic = VerityArithmetic()
    workloads: ClassVar[Makers] = {"gpt": ExactGPTWorkload}
    sums = EXACT_SUMS
    exact_windows = True
    keeps_subnormals = True

    def __init__(self, run: RunConfig, built: Built):
        super().__init__(run, built)
        self.parts = run.determinism.micro_batches
        self.grids = Grids(built.model)

    @classmethod
    def set_up(cls, run: RunConfig) -> None:
        """Choose the process's engine. Refuse a platform whose bits would be wrong, and a run that would be
        computed otherwise than its name says, whoever built it: raises UserError."""
        super().set_up(run)
        check_exact(run)
        try:
            use_engine(run.determinism.engine)
            check_platform(run.device)
        except (ValueError, VerityError) as error:
            raise UserError(f"determinism=verity: {error}") from None

    @classmethod
    def make_bases(
        cls, run: RunConfig, model: nn.Module, matrices: Sequence[nn.Parameter]
    ) -> list[Optimizer]:
        return [VerityAdam(model.parameters(), **moments(run.optimizer))]

    def log_lines(self) -> list[str]:
        return [f"determinism=verity, engine {engine_in_words(self.run.device)}"]

    def backward(self, batch: StepInputs, called: nn.Module, workload: Workload, saving: Saving) -> Backward:
        """As above, but the loss is float64 and the step looks at the whole batch.

        Raises VerityError, with no gradient changed, where a value is not finite.
        """
        assert batch.targets is not None
        count = batch.targets.numel()
        fits = False
        while not fits:  # twice at most: then the grids fit this batch
            logits, total = self.summed(called, batch.tokens, batch.targets)
            fits = self.grids.finish(count)
        mean = torch.tensor(mean_of(total, count), dtype=torch.float64, device=batch.targets.device)
        return {"loss": mean}, replace(batch, logits=logits), None

    def summed(self, called: nn.Module, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Run forward and backward of every part -> all logits (B, T, V), and the sum of all losses in units
        of 2^-32; the gradients' sums are left in `grids`."""
        use_engine(self.run.determinism.engine)  # a run beside this one may have chosen another
        logits = []
        total = 0
        for x, y in zip(inputs.chunk(self.parts), targets.chunk(self.parts), strict=True):
            z = called(x)
            losses = ops.cross_entropy(z, y, reduction="none")
            torch.autograd.backward(losses, torch.ones_like(losses))
            total += ops.loss_total(losses.detach())
            logits.append(z.detach())
        return (logits[0] if self.parts == 1 else torch.cat(logits)), total

    def state_dict(self) -> dict[str, Any]:
        return self.grids.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.grids.load_state_dict(state)


NUMERICS: dict[str, type[Torch]] = {"none": Torch, "torch": Repeatable, "verity": Verity}


def engine_in_words(device: str) -> str:
    """Return which engine computes on this device now, and why not the faster one: `eager: there is no
    compiler`."""
    name = engine_name(device)
    if name == "c":
        return name
    why = why_not_native() if device == "cpu" else f"c has no code for {device}"
    return f"{name}: {why}" if why else name


def repeat_bits(*, strict: bool = False) -> None:
    """Have a GPU give the same bits whatever else it computes, so that packed runs equal single ones.

    By default the backward pass of attention adds in the order in which blocks finish, and cuBLAS chooses its
    algorithm by the workspace of a stream; the workspace must be set before the first call of cuBLAS.
    `strict`: an operation that has no reproducible kernel raises RuntimeError, on a CPU too.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True, warn_only=not strict)
    torch.backends.cudnn.benchmark = False
    # each buffer would be written twice
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def flush_subnormals(wanted: bool) -> None:
    """Have all threads that compute for this one flush subnormal numbers to zero, or keep them.

    `torch.set_flush_denormal` sets the calling thread. Those of torch's pool begin with its mode and stay
    with it, so that a run's bits would depend on the runs before it in its process.
    """
    torch.set_flush_denormal(wanted)
    threads, team = torch.get_num_threads(), openmp_team()
    if threads > 1 and team is not None:
        each = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(lambda _: torch.set_flush_denormal(wanted))
        run = ctypes.CFUNCTYPE(None, type(each), ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(team)
        run(each, None, threads, 0)
