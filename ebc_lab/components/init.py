"""Weights that a run starts from, or keeps; what is learnt of a new text, and forgotten of the old one.

The old text is the one that the weights come from. Its loss is measured on a few windows at every evaluation
and on its whole validation split before the first step and after the last.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepInputs
from ebc_lab.records.files import write_atomic
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.weights import KeptWeights, read_weights, seal
from ebc_lab.workloads.batches import windows
from ebc_lab.workloads.corpus import locate
from ebc_lab.workloads.losses import evaluate
from ebc_lab.workloads.starts import about_of, old_text, refuse_misfit
from ebc_lab.workloads.text import tokenizer_of
from ebc_lab.workloads.tokens import tokenised

from .adapter import merged
from .hook import Built, Hook


class Init(Hook):
    """Puts another run's weights in the place of those drawn, and keeps the run's own."""

    part = InitConfig
    name = "init"

    def __init__(self, run: RunConfig, built: Built):
        from . import numerics_of

        self.run = run
        self.numerics = numerics_of(run)
        self.model = built.model
        self.start: dict[str, Tensor] = {}  # the weights before the first step, on the CPU
        self.start_loss: float | None = None  # on the old text
        self.old: Tensor | None = None  # its validation split
        settings = InitConfig.from_run(run)
        if settings.name == "none":
            return
        self.start = {name: w.cpu().clone() for name, w in merged(built.model).items()}
        if settings.text != "none":
            tokenizer = tokenizer_of(run, locate(run.data, quiet=True))
            ids = tokenised(tokenizer, old_text(run)).splits["val"]
            self.old = torch.from_numpy(ids).to(next(built.model.parameters()).device)
            exact = self.numerics.exact_windows
            self.windows = windows(self.old, run.model.context, run.eval_windows, exact=exact)
            self.eval_columns = tuple(InitConfig.evals)

    @classmethod
    def install(cls, run: RunConfig, model: nn.Module) -> None:
        """Load the weights. Raises UserError where they are gone, damaged, others or another model's."""
        settings = InitConfig.from_run(run)
        if settings.name == "run":
            kept = read_weights(Path(settings.run or ""), settings.sha256)
            refuse_misfit(kept, run)
            load(kept, model)

    def event_at(self, t: int) -> bool:
        return t == 0  # a loss is read on the host

    def before(self, t: int, batch: StepInputs) -> dict[str, Tensor]:
        """Measure the old text before the first step."""
        if t == 0 and self.old is not None:
            self.start_loss = self._whole(self.model)
        return {}

    def evaluated(self, model: nn.Module) -> dict[str, float]:
        """Measure the old text on the same windows each time."""
        if self.old is None:
            return {}
        found = evaluate(model, self.run, self.windows, how=self.numerics.sums)
        return {self.eval_columns[0]: found["loss"]}

    def _whole(self, model: nn.Module) -> float:
        """Return the loss on the whole validation split of the old text."""
        assert self.old is not None
        pairs = windows(self.old, self.run.model.context)
        return evaluate(model, self.run, pairs, how=self.numerics.sums)["loss"]

    def finished(self, model: nn.Module, files: RunFiles) -> dict[str, float]:
        """Measure the old text and how far the weights are from their start; keep them, if the run asks."""
        figures: dict[str, float] = {}
        weights = merged(model)
        if self.start:
            figures["weights_moved"] = distance(weights, self.start)
        if self.old is not None and self.start_loss is not None:
            after = self._whole(model)
            figures |= {"init_start_loss": self.start_loss, "init_val_loss": after}
            figures["forgotten"] = after - self.start_loss
        if InitConfig.from_run(self.run).keep:
            write_atomic(files.weights, seal("weights", about_of(self.run), archive_of(weights)))
            figures["weights_bytes"] = files.weights.stat().st_size
        return figures

    def state_dict(self) -> dict[str, Any]:
        return {} if self.old is None else {"start_loss": self.start_loss}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start_loss = state.get("start_loss")


HOOK = Init


def archive_of(weights: Mapping[str, Tensor]) -> bytes:
    """Return weights as `torch.save` writes them, the same bytes for the same values."""
    buffer = io.BytesIO()
    torch.save({"model": {name: w.cpu().clone() for name, w in weights.items()}}, buffer)
    return buffer.getvalue()


def load(kept: KeptWeights, model: nn.Module) -> None:
    """Put kept weights into a model. Nothing in the file is executed. Raises UserError where they are another
    model's."""
    try:
        saved = torch.load(io.BytesIO(kept.archive), map_location="cpu", weights_only=True)["model"]
        others = {name: _form(w) for name, w in saved.items()}
    except Exception as error:
        raise UserError(f"{kept.path} is damaged ({type(error).__name__}): train that run again.") from None
    own = {name: _form(w) for name, w in model.state_dict().items()}
    if own != others:
        odd = sorted(name for name in own.keys() | others.keys() if own.get(name) != others.get(name))
        there, here = (shapes.get(odd[0], "not there") for shapes in (others, own))
        raise UserError(
            f"the weights {kept.path} are another model's: {odd[0]} is {there} in the file and {here} in "
            "this run: choose a run of the same model."
        )
    model.load_state_dict(saved)


def _form(w: Tensor) -> tuple[int | str, ...]:
    """Return a tensor's shape, with the dtype of one that is not of floating-point numbers."""
    return (*w.shape,) if w.is_floating_point() else (*w.shape, str(w.dtype))


def distance(weights: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """Return ‖W − W₀‖ over ‖W₀‖, over all weights together."""
    pairs = [(weights[name].cpu().double(), w.double()) for name, w in start.items()]
    moved = math.fsum(float((now - w).square().sum()) for now, w in pairs)
    norm = math.fsum(float(w.square().sum()) for _, w in pairs)
    return math.sqrt(moved / norm) if norm else math.nan
