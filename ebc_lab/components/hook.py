"""`Hook`: what a part of a run does at the turns of a step, beside the model, its loss and its optimizer.

A part that the loop has to call is a subclass here, in the file of its name, and an entry in `HOOKS`
(`ebc_lab/components/__init__.py`). `Training` calls a run's hooks in that order and knows none by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from ebc_lab.config.part import Part
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StabilizedOptimizer, StepInputs, StepStats
from ebc_lab.records.paths import RunFiles


@dataclass(frozen=True)
class Built:
    """What a run has built when its hooks begin."""

    model: nn.Module
    matrices: Sequence[nn.Parameter]  # the hidden ones
    optimizer: StabilizedOptimizer
    vocabulary: int


class Hook:
    """Does nothing at every turn of a step `t` (0-based). A subclass says where it does something."""

    part: ClassVar[type[Part] | None] = None  # it acts where this changes something; None: in every run
    name: ClassVar[str] = ""  # the key of its state in checkpoint.pt
    graphed = True  # whether a step with this hook may become a CUDA graph: it reads nothing on the host
    columns: tuple[str, ...] = ()  # what it adds to steps.csv
    eval_columns: tuple[str, ...] = ()  # and to evals.csv

    def __init__(self, run: RunConfig, built: Built):
        """Begin, once all of the run is built and nothing is trained."""

    # -- while the run is built ------------------------------------------------------------------------------

    @classmethod
    def acts(cls, run: RunConfig) -> bool:
        """Whether the run needs this hook at all."""
        return cls.part is None or not cls.part.from_run(run).changes_nothing()

    @classmethod
    def install(cls, run: RunConfig, model: nn.Module) -> None:
        """Change what the model computes, before anything else is built on it."""

    @classmethod
    def make_bases(
        cls, run: RunConfig, model: nn.Module, matrices: Sequence[nn.Parameter]
    ) -> list[Optimizer] | None:
        """Return base optimizers for the place of the run's own, or None."""
        return None

    @classmethod
    def prepare(cls, run: RunConfig, bases: Sequence[Optimizer]) -> None:
        """Change how the base optimizers step, before a stabilizer takes them."""

    # -- at a step -------------------------------------------------------------------------------------------

    def event_at(self, t: int) -> bool:
        """Return whether no other step does the same, so that no CUDA graph captures it."""
        return False

    def rate(self, t: int, lr: float) -> float:
        """Return the learning rate in the place of the scheduled one."""
        return lr

    def targets(self, t: int, targets: Tensor) -> Tensor:
        """Return the targets of the whole batch, (B, T), in the place of the text's."""
        return targets

    def saving(self) -> AbstractContextManager[Any]:
        """Surround a forward whose activations are kept for backward."""
        return nullcontext()

    def before(self, t: int, batch: StepInputs) -> Mapping[str, Tensor]:
        """Look at the weights before the step on `batch`, this process's rows, moves them -> columns of
        steps.csv, 0-dim."""
        return {}

    def gradients(self, t: int, loss: Tensor, lr: float) -> Mapping[str, Tensor]:
        """Change the gradients, or what the update makes of them, after backward -> columns, 0-dim."""
        return {}

    def after(self, t: int, stats: StepStats) -> Mapping[str, Tensor]:
        """Look at what the update did -> columns, 0-dim."""
        return {}

    # -- at an evaluation ------------------------------------------------------------------------------------

    def evaluated(self, model: nn.Module) -> Mapping[str, float]:
        """Look at the weights by which the run is judged -> the figures of `eval_columns`."""
        return {}

    def ends(self, step: int, loss: float) -> str | None:
        """Say why the run ends after `step` steps, where it has this loss on the fixed windows; None: it goes
        on. Asked before the last step alone, and it must depend on nothing else."""
        return None

    # -- what a run leaves -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return what the next step depends on; empty for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put it back. Raises anything where it is damaged, or another model's."""

    def figures(self, bases: Sequence[Optimizer]) -> Mapping[str, Any]:
        """Return figures for result.json, of a run that has not diverged."""
        return {}

    def finished(self, model: nn.Module, files: RunFiles) -> Mapping[str, Any]:
        """Return further figures of the model by whose weights the run is judged, and keep it."""
        return {}

    def summary(self, columns: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return figures for result.json from the columns of steps.csv, also of a run that has diverged."""
        return {}
