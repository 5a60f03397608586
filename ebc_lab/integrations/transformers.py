"""EBC in a Hugging Face `Trainer`: `EBC(target_kl=0.005).add_to(trainer)`.
`EnergyClip().add_to(trainer)` is the energy clip there.

The trainer has loaded its optimizer's state before any callback hears of the optimizer, and tells none which
checkpoint it resumes from. So EBC's state travels in `trainer_state.json`, among those of the callbacks.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from ebc_lab.ebc import Attached, EBCWarning, attach
from ebc_lab.ebc.options import KL_FLOOR

from .figures import EnergyFigures, Figures, check_alone

try:
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from transformers.trainer_callback import ExportableState
except ModuleNotFoundError as error:
    raise ImportError(
        "ebc_lab.integrations.transformers needs transformers: pip install 'ebc-lab[transformers]'."
    ) from error


class Reporting(TrainerCallback):
    """What the callbacks here share: their `_figures` stand beside every training loss."""

    _figures: Figures | EnergyFigures | None = None
    _trainer: Trainer | None = None

    def add_to(self, trainer: Trainer) -> Self:
        """Make this the first of the trainer's callbacks, so that all that report see its numbers."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.insert(0, callbacks.pop())
        self._trainer = trainer
        return self

    def _tell_unseen(self, args: TrainingArguments) -> None:
        if args.report_to and self._trainer is None:
            name = type(self).__name__
            warnings.warn(
                f"what reports to {', '.join(args.report_to)} does not see {name}'s numbers, since it comes "
                f"before it: use {name}(…).add_to(trainer) in the place of Trainer(callbacks=[{name}(…)]).",
                EBCWarning,
                stacklevel=3,
            )

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        logs: dict[str, float] = others["logs"]
        if "loss" not in logs or self._figures is None:  # an evaluation's, or the summary's
            return
        values = {name: float(value) for name, value in self._figures.values().items()}
        logs.update(values)
        state.log_history[-1].update(values)  # a copy of `logs`, kept before the callbacks were asked


class EBC(Reporting, ExportableState):
    """Limits every step of a `Trainer`, or of a subclass of it, after `add_to`.

    Every record of a training loss, in `log_history` and wherever the trainer reports to, gets `ebc/c`,
    `ebc/delta` and the last audit's `ebc/applied_kl`. Under `bf16` or `fp16`, `floor` is 1e-5 unless given,
    since the trainer's models cast their logits up.

    Args:
        target_kl: nats per token that a step may move the predictions by.
        logits_of, drop, options: as `ebc_lab.ebc.attach` takes them.
    Raises:
        ValueError: when training begins, as `attach`; a trainer that restores its callbacks from a checkpoint
            (`restore_callback_states_from_checkpoint`), and an option that JSON cannot hold.

    `attached` is what `attach` returned, from the beginning of a training on; afterwards the last one's.
    """

    def __init__(
        self,
        *,
        target_kl: float,
        logits_of: Callable[[Any], Any] | None = None,
        drop: tuple[str, ...] | None = None,
        **options: Any,
    ):
        self.options = {"target_kl": target_kl, "logits_of": logits_of, "drop": drop, **options}
        self.attached: Attached | None = None
        # a trainer that restores its callbacks sets these in a new one: EBC's state, and the options it lacks
        self.saved: dict[str, Any] | None = None
        self.lost: list[str] = []
        self._figures: Figures = Figures()
        self._training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._detach()
        if self.lost:
            raise ValueError(
                f"restore_callback_states_from_checkpoint makes EBC anew without {', '.join(self.lost)}: "
                "leave it out, EBC's own state is restored in any case."
            )
        self._tell_unseen(args)
        options = dict(self.options)
        if args.bf16 or args.fp16:
            options.setdefault("floor", KL_FLOOR["bfloat16"])
        # the same model, but where the trainer compiles it: what is measured must be computed in the same way
        model: nn.Module = others["model"] if self._trainer is None else self._trainer.model_wrapped
        self.attached = attach(model, others["optimizer"], **options)
        self._figures = Figures()
        if state.global_step > 0:
            self._resume(state)
        self._training = True
        # a checkpoint that was saved without EBC has no place for it
        _states(state).setdefault(type(self).__name__, self.state())

    def _resume(self, state: TrainerState) -> None:
        assert self.attached is not None
        saved_state = _states(state).get(type(self).__name__, {})
        saved = saved_state.get("attributes", {}).get("saved")
        if saved is None:
            self.attached.loaded_before = False  # said here
            warnings.warn(
                "this checkpoint was saved without EBC: c is searched for anew.", EBCWarning, stacklevel=3
            )
        else:
            self.attached.load_state_dict(_decoded(saved))

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        if self.attached is not None:
            self._figures.see(self.attached.last)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._detach()
        self._training = False

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.detach()

    def state(self) -> dict[str, Any]:
        """For `trainer_state.json`: the options that JSON can hold, and EBC's state while it trains."""
        saved = None
        if self._training and self.attached is not None:
            saved = _encoded(self.attached.state_dict())
        args = {name: value for name, value in self.options.items() if _is_json(value)}
        lost = sorted(self.options.keys() - args)
        return {"args": args, "attributes": {"saved": saved, "lost": lost}}


class EnergyClip(Reporting):
    """Limits every layer's gradient at every step of a `Trainer`, see `ebc_lab.ebc.energy_budget_clip`.

    It does so after the micro-batches of a step have been summed and their gradients unscaled and, unless
    `max_grad_norm=0`, clipped to that. Every record of a training loss gets `energy/worst`, the largest
    gradient over its budget, and `energy/skipped`.

    Args:
        ratio: gradient norm over output norm, > 0, or one by layer, named as in the trainer's model.
        options: `norm` and `non_finite`, as `energy_budget_clip` takes them.
    Raises:
        ValueError: when training begins, as `energy_budget_clip`; several processes or GPUs; `torch_compile`.
    """

    def __init__(self, ratio: float | Mapping[str, float] = 0.1, **options: Any):
        self.options = {"ratio": ratio, **options}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        check_alone(max(args.world_size, args.n_gpu), args.torch_compile)
        self._tell_unseen(args)
        self._remove()
        self._figures = EnergyFigures(others["model"], [others["optimizer"]], self.options)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        optimizer = others["optimizer"]
        scaler = getattr(optimizer, "scaler", None)  # of accelerate's wrapper
        if scaler is not None and not args.max_grad_norm:  # else the trainer has unscaled them
            scaler.unscale_(optimizer.optimizer)
        assert isinstance(self._figures, EnergyFigures)
        self._figures.clip(0)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        if isinstance(self._figures, EnergyFigures):
            self._figures.remove()


def _states(state: TrainerState) -> dict[str, Any]:
    """Return the callbacks' states, by the names of their classes."""
    return cast("dict[str, Any]", state.stateful_callbacks)


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value)
    except TypeError:
        return False
    return True


def _encoded(value: Any) -> Any:
    """A state as JSON: a tensor as its dtype, its shape, and its numbers as text, which says NaN as well."""
    if isinstance(value, Tensor):
        kind = float if value.is_floating_point() else int
        numbers = [repr(kind(x)) for x in value.flatten().tolist()]
        return {
            "dtype": str(value.dtype).removeprefix("torch."),
            "shape": list(value.shape),
            "numbers": numbers,
        }
    if isinstance(value, Mapping):
        return {key: _encoded(inner) for key, inner in value.items()}
    return value


def _decoded(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    if set(value) != {"dtype", "shape", "numbers"}:
        return {key: _decoded(inner) for key, inner in value.items()}
    dtype: torch.dtype = getattr(torch, value["dtype"])
    kind = float if dtype.is_floating_point else int
    return torch.tensor([kind(x) for x in value["numbers"]], dtype=dtype).reshape(value["shape"])
