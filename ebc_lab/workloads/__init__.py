"""What a run trains: a model with its data and its loss. Importing this package loads no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.partition import PARTITION
from ebc_lab.config.schema import RunConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ebc_lab.ebc import StepStats
    from ebc_lab.records.paths import RunFiles

    from .batches import Batches
    from .corpus import Corpus

    Renew = Callable[[nn.Parameter, Tensor], None]  # a parameter, and rows of it that hold something new

HELD_SHARE = 0.02  # of the training text, its end, where the budget is measured on held-back text


class Workload(Protocol):
    """All that training knows of what it trains.

    `model(tokens)` is a deterministic function of weights and buffers. Only the optimizer moves weights
    between the two forwards of an audit; whatever else moves waits for `after_step`.
    """

    tokens: dict[str, Tensor]  # each split's, (n,) int64, on the run's device
    vocabulary: int  # V
    characters_per_token: dict[str, float]  # of each split
    step_columns: tuple[str, ...]  # what it adds to steps.csv
    eval_columns: tuple[str, ...]  # and to evals.csv
    capturable: bool  # whether a step may become a CUDA graph: nothing in it is drawn on the host

    def build(self) -> nn.Module:
        """The model, tokens (B, T) -> logits (B, T, V), on the CPU, with weights from the seed alone."""

    def forward(self, called: nn.Module, inputs: Tensor) -> tuple[Tensor, Any]:
        """Tokens (B, T) -> logits (B, T, V) in the run's precision, bit for bit those of `called`, the model
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

    def groups(self, names: Sequence[str], kind: str) -> Mapping[str, Sequence[str]] | None:
        """The groups of a budget, group -> names of parameters; None: by the names alone."""

    def after_step(self, step: int, stats: StepStats, states: Any, renew: Renew) -> Mapping[str, Tensor]:
        """After the update and its audit: statistics and events of its own -> further columns, 0-dim.

        `renew` is to be told of rows of a parameter that hold something new.
        """

    def event_at(self, step: int) -> bool:
        """Whether this step does more than others afterwards, so that it is never taken from a graph."""

    def evaluated(self, model: nn.Module, step: int, loss: float, files: RunFiles) -> Mapping[str, float]:
        """After an evaluation that found `loss`, at the weights by which the run is judged: the figures of
        `eval_columns`."""

    def finished(self, model: nn.Module, step: int, files: RunFiles) -> Mapping[str, Any]:
        """At the end of a run that has not diverged: keep the model -> figures for the result."""

    def state_dict(self) -> dict[str, Any]:
        """What the next step depends on beside the model and the optimizer; empty for nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


Makers = Mapping[str, Callable[..., Workload]]  # name -> what makes it of run, corpus and device


def _gpt(run: RunConfig, corpus: Corpus, device: torch.device) -> Workload:
    from .custom import OwnModelWorkload
    from .gpt import GPTWorkload

    cls = GPTWorkload if run.model.target is None else OwnModelWorkload
    return cls(run, corpus, device)


def _ebm(run: RunConfig, corpus: Corpus, device: torch.device) -> Workload:
    from .ebm import EBMWorkload

    return EBMWorkload(run, corpus, device)


WORKLOADS: Makers = {"gpt": _gpt, "ebm": _ebm}


def load(run: RunConfig, device: torch.device, makers: Makers = WORKLOADS) -> Workload:
    """Return the workload that a run names, with its text read, checked and tokenised. Raises UserError."""
    from .text import checked_text

    corpus, _ = checked_text(run, quiet=True)
    return makers[run.workload.name](run, corpus, device)


def training_batches(run: RunConfig, text: Tensor) -> tuple[Batches, Batches | None]:
    """Return the run's training batches, and with budget.probe_tokens=held those that choose c.

    Raises UserError where the text is too short to hold any of it back, or for the run's clusters.
    """
    from .batches import Batches
    from .partition import PartitionedBatches

    context = run.model.context
    partition = PARTITION.of(run)
    if not PARTITION.neutral(partition):
        return PartitionedBatches(text, run.batch_size, context, run.seed, partition), None
    if run.stabilizer.name != "ebc" or run.budget.probe_tokens != "held":
        return Batches(text, run.batch_size, context, run.seed), None
    cut = round((1 - HELD_SHARE) * len(text))
    held_back = text[cut:]
    if len(held_back) < context + 1:
        raise UserError(
            f"the corpus is too short for budget.probe_tokens=held: {len(held_back)} characters would be "
            f"held back and a window takes {context + 1}; use a longer text, or probe_tokens=train."
        )
    trained = Batches(text[:cut], run.batch_size, context, run.seed, of=len(text))
    return trained, Batches(held_back, run.budget.probe_sequences, context, run.seed)
