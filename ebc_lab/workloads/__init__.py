"""What a run trains: a model with its data and its loss. Importing this package loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ebc_lab.ebc import StepStats
    from ebc_lab.records.paths import RunFiles

    from .corpus import Corpus

    Renew = Callable[[nn.Parameter, Tensor], None]  # a parameter, and rows of it that hold something new


class BatchSource(Protocol):
    """A run's batches by step: the same for every arm and after every resume."""

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of `step`, on the run's device."""
        return self.rows(self.source_at(step))

    def source_at(self, step: int) -> Tensor:
        """What `rows` makes the batch of `step` from, on the run's device, of the same shape at every step:
        where its rows are, (B,) int64, or what is in them."""

    def rows(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """Those rows, as (inputs, targets), by operations of the device alone."""


class Workload(Protocol):
    """All that training knows of what it trains.

    Its inputs are tokens (B, T), or of workload=images images, one token's prediction each: T = 1.
    `model(inputs)` is a deterministic function of weights and buffers. Only the optimizer moves weights
    between the two forwards of an audit; whatever else moves waits for `after_step`. A subclass keeps what it
    has nothing to add to.
    """

    tokens: dict[str, Tensor]  # each split's, (n,) int64, on the run's device; not of images, nor of what is
    # too long to be there at once
    vocabulary: int  # V
    characters_per_token: dict[str, float]  # of each split; empty where there is no text
    step_columns: tuple[str, ...] = ()  # what it adds to steps.csv
    eval_columns: tuple[str, ...] = ()  # and to evals.csv
    capturable: bool = True  # whether a step may become a CUDA graph: nothing in it is drawn on the host

    def batches(self) -> tuple[BatchSource, BatchSource | None]:
        """The training batches, and with budget.probe_tokens=held those that choose c."""

    def held_out(
        self, split: str, count: int | None = None, *, exact: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """What a split is evaluated on, as (inputs, targets (n, T)), on the run's device: all of it, or about
        `count` rows spread over it, found by integers alone where `exact`."""

    def build(self) -> nn.Module:
        """The model, inputs -> logits (B, T, V), on the CPU, with weights from the seed alone."""

    def forward(self, called: nn.Module, inputs: Tensor) -> tuple[Tensor, Any]:
        """Inputs -> logits (B, T, V) in the run's precision, bit for bit those of `called`, the model
        (maybe compiled), and what `loss` and `after_step` need of this forward."""

    def loss(
        self, logits: Tensor, targets: Tensor, states: Any, step: int
    ) -> tuple[Tensor, Mapping[str, Tensor]]:
        """What is minimised, 0-dim, and its parts by the names of their columns, detached, 0-dim: `loss` is
        the cross-entropy, nats per token, which every decision looks at; targets (B, T)."""

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        """The hidden matrices, for Muon and the projections."""

    def directions(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters whose rows are unit vectors, for projection=sphere."""
        return []

    def groups(self, names: Sequence[str], kind: str) -> Mapping[str, Sequence[str]] | None:
        """The groups of a budget, group -> names of parameters; None: by the names alone."""
        return None

    def after_step(self, step: int, stats: StepStats, states: Any, renew: Renew) -> Mapping[str, Tensor]:
        """After the update and its audit: statistics and events of its own -> further columns, 0-dim.

        `renew` is to be told of rows of a parameter that hold something new.
        """
        return {}

    def event_at(self, step: int) -> bool:
        """Whether this step does more than others afterwards, so that it is never taken from a graph."""
        return False

    def evaluated(self, model: nn.Module, step: int, loss: float, files: RunFiles) -> Mapping[str, float]:
        """After an evaluation that found `loss`, at the weights by which the run is judged: the figures of
        `eval_columns`."""
        return {}

    def finished(self, model: nn.Module, step: int, files: RunFiles) -> Mapping[str, Any]:
        """At the end of a run that has not diverged: keep the model -> figures for the result."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the model and the optimizer; empty for nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> Any:
        """Take up what `state_dict` returned."""
        return None


Makers = Mapping[str, Callable[..., Workload]]  # name -> what makes it of run, corpus and device


def _gpt(run: RunConfig, corpus: Corpus, device: torch.device) -> Workload:
    from .custom import OwnModelWorkload
    from .gpt import GPTWorkload
    from .gru import GRUWorkload
    from .modern import ModernGPTWorkload

    built = {"gpt": GPTWorkload, "modern": ModernGPTWorkload, "gru": GRUWorkload}
    cls = built[run.model.name] if run.model.target is None else OwnModelWorkload
    return cls(run, corpus, device)


def _ebm(run: RunConfig, corpus: Corpus, device: torch.device) -> Workload:
    from .ebm import EBMWorkload

    return EBMWorkload(run, corpus, device)


def _images(run: RunConfig, corpus: Corpus, device: torch.device) -> Workload:
    from .images import ImageWorkload

    return ImageWorkload(run, device)


WORKLOADS: Makers = {"gpt": _gpt, "ebm": _ebm, "images": _images}


def load(run: RunConfig, device: torch.device, makers: Makers = WORKLOADS) -> Workload:
    """Return the workload that a run names, with its data read and checked. Raises UserError."""
    from .text import checked_text

    corpus, _ = checked_text(run, quiet=True)
    return makers[run.workload.name](run, corpus, device)
