"""EBC in a Lightning `Trainer`: `Trainer(callbacks=[EBC(target_kl=0.005)])`.
`EnergyClip()` is the energy clip there.

The optimizers exist at `on_fit_start` and get their states from a checkpoint after it, so that EBC's own
state arrives with them; strategies that save the parameters' states alone (FSDP) bring it as the callback's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ebc_lab.ebc import Attached, attach

from .figures import EnergyFigures, Figures, check_alone

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:

    def _installed() -> ModuleType:
        for name in ("lightning.pytorch", "pytorch_lightning"):
            try:
                return import_module(name)
            except ModuleNotFoundError:
                continue
        raise ImportError("ebc_lab.integrations.lightning needs Lightning: pip install 'ebc-lab[lightning]'.")

    Callback = _installed().Callback


class EBC(Callback):
    """Limits every step of a `Trainer.fit`, of `lightning` or `pytorch_lightning`.

    Logs, wherever the trainer logs to, `ebc/c`, `ebc/delta` and the last audit's `ebc/applied_kl`.

    Args:
        target_kl: nats per token that a step may move the predictions by.
        module: the name of the submodule whose outputs are the logits, and which `training_step` calls, as in
            `self.net(tokens)`: "net". Default: the LightningModule, for a `training_step` that calls
            `self(tokens)`. Of several optimizers, those that train it are limited together.
        logits_of, drop, options: as `ebc_lab.ebc.attach` takes them.
    Raises:
        ValueError: when training begins, as `attach`; no such module; no optimizer trains it; at the first
            step, a module that was not called.

    `attached` is what `attach` returned, from the beginning of a fit on; afterwards the last fit's.
    """

    def __init__(
        self,
        *,
        target_kl: float,
        module: str = "",
        logits_of: Callable[[Any], Any] | None = None,
        drop: tuple[str, ...] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.module = module
        self.options = {"target_kl": target_kl, "logits_of": logits_of, "drop": drop, **options}
        self.attached: Attached | None = None
        self._figures = Figures()
        self._loaded: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()
        try:
            limited: nn.Module = pl_module.get_submodule(self.module)
        except AttributeError as error:
            raise ValueError(f"EBC(module={self.module!r}): {error}.") from None
        self.attached = attach(limited, _training(limited, trainer.optimizers), **self.options)
        self._figures = Figures()
        if self._loaded is not None:
            self.attached.load_state_dict(self._loaded)
            self._loaded = None

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        attached = self.attached
        if attached is None or attached.capture.ever:
            return
        if not any(limited is optimizer for limited in attached.optimizers):
            return
        children = [name for name, child in pl_module.named_children() if [*child.parameters()]]
        called = f"self.{self.module}(…)" if self.module else "self(…)"
        raise ValueError(
            f"training_step has not called {called}, whose logits EBC limits: name the submodule that it "
            f"calls, EBC(module=…), among {', '.join(children)}."
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.attached is not None:
            self._figures.see(self.attached.last)
            pl_module.log_dict(self._figures.values(), batch_size=1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._detach()

    def _detach(self) -> None:
        if self.attached is not None:
            self.attached.detach()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.attached is None else self.attached.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict


class EnergyClip(Callback):
    """Limits every layer's gradient at every step of a `Trainer.fit`, see `ebc_lab.ebc.energy_budget_clip`.

    It does so after the micro-batches of a step have been summed and their gradients unscaled, and before the
    trainer's own `gradient_clip_val`; of several optimizers, each time with the gradients of the one that
    steps. Logs `energy/worst`, the largest gradient over its budget, and `energy/skipped`.

    Args:
        ratio: gradient norm over output norm, > 0, or one by layer, named as in the LightningModule.
        options: `norm` and `non_finite`, as `energy_budget_clip` takes them.
    Raises:
        ValueError: when training begins, as `energy_budget_clip`; several processes.
    """

    def __init__(self, ratio: float | Mapping[str, float] = 0.1, **options: Any):
        super().__init__()
        self.options = {"ratio": ratio, **options}
        self._figures: EnergyFigures | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_alone(trainer.world_size)
        if self._figures is not None:  # of a fit that failed
            self._figures.remove()
        self._figures = EnergyFigures(pl_module, trainer.optimizers, self.options)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # of a fused one Lightning leaves it to the step
        assert self._figures is not None
        self._figures.clip(next(i for i, o in enumerate(trainer.optimizers) if o is optimizer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self._figures is not None
        pl_module.log_dict(self._figures.values(), batch_size=1)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._figures is not None:
            self._figures.remove()


def _training(limited: nn.Module, optimizers: list[Optimizer]) -> list[Optimizer]:
    """Those of the optimizers that hold a parameter of `limited`. Raises ValueError if none does."""
    weights = {id(p) for p in limited.parameters()}
    training = [o for o in optimizers if any(id(p) in weights for g in o.param_groups for p in g["params"])]
    if not training:
        raise ValueError(
            f"no optimizer of configure_optimizers trains the {type(limited).__name__} that EBC limits."
        )
    return training
