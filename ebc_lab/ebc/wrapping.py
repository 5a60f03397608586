"""`WrappingOptimizer`: what other code sees of a stabilizer, which looks like one torch optimizer.

Schedulers, gradient scalers and checkpoints are shown the base optimizers' own parameter groups and states.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .given import bases as given_bases
from .parallel.shards import local
from .probe import GivenLogits, Prober


@contextmanager
def damage_told(owner: object) -> Iterator[None]:
    """Raise ValueError, of one sentence, for whatever a damaged or foreign state makes a load raise."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"this is not the state of this {type(owner).__name__}, or it is damaged ({why}): load what its "
            "state_dict() returned, of the same model and options."
        ) from error


def check_form(saved: Any, own: Any, name: str = "it") -> None:
    """Raise ValueError where a saved value is of another kind or shape than one's own. What is None says
    nothing, and an earlier version's state may lack a key, or have more."""
    if saved is None or own is None:
        fits = not isinstance(own if saved is None else saved, str | list | tuple | dict)
    elif isinstance(own, Tensor):
        like = torch.as_tensor(saved)
        fits = like.shape == own.shape and like.layout == own.layout
    elif isinstance(own, dict):
        fits = isinstance(saved, dict)
        for key in (own.keys() & saved.keys()) if fits else ():
            check_form(saved[key], own[key], str(key))
    elif isinstance(own, list | tuple):
        fits = isinstance(saved, list | tuple)
    else:
        number = isinstance(saved, (int, float)) or (isinstance(saved, Tensor) and saved.dim() == 0)
        fits = number if type(own) in (int, float) else isinstance(saved, type(own))
    if not fits:
        raise ValueError(f"{name} is not what it should be")


class WrappingOptimizer(torch.optim.Optimizer):
    """A torch optimizer around base optimizers, with their parameter groups and their states."""

    def __init__(self, model: nn.Module, optimizers: list[torch.optim.Optimizer]):
        self.bases = optimizers
        self.names, self.weights = given_bases.trained(model, self.bases)
        super().__init__(self.weights, {})
        self.defaults = self.bases[0].defaults  # some schedulers look there for a momentum
        self.model = model
        self.step_index = 0
        self.peak_lr = float(self.param_groups[0].get("lr", 1.0))
        self.prober: Prober
        self.given: GivenLogits
        # whether the rows that choose c are drawn from the whole batch, anew at each step
        self.spread = False
        self.project: Callable[[], None] | None = None
        self.retract: Callable[[], None] | None = None
        self._trained_at: list[Tensor] | None = None  # what is trained, while others are evaluated

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizers' own."""
        return [group for base in self.bases for group in base.param_groups]

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        """torch's own constructor starts with a list of its own, which is not kept."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the last base optimizer. The next step limits its parameters too."""
        if hasattr(self, "model"):
            self.bases[-1].add_param_group(param_group)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(repr(base) for base in self.bases)})"

    def __getstate__(self) -> dict[str, Any]:
        """All of it but what is found again, where the weights lie in memory."""
        # torch's own names for hooks, which cannot be pickled, all begin so
        state = {k: v for k, v in self.__dict__.items() if not k.startswith("_optimizer_")}
        return state | {"_layout": None, "_moving": []}

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the bases' states too; loads with `weights_only=True`."""
        return {"bases": [base.state_dict() for base in self.bases], **self.own_state_dict()}

    def own_state_dict(self) -> dict[str, Any]:
        """`state_dict` without the bases' states."""
        state = {"step_index": self.step_index, "peak_lr": self.peak_lr, **self._own_state()}
        state["rows"] = {"whole": self.prober.whole, "spread": self.spread}
        return state if self.given.settled else {**state, "fresh_logits": self.prober.fresh_logits}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if "bases" not in state_dict or len(state_dict["bases"]) != len(self.bases):
            raise ValueError(
                f"this is not the state of a {type(self).__name__} around {len(self.bases)} optimizer(s): "
                "load a plain optimizer's own into that one, before it is wrapped."
            )
        with damage_told(self):
            for base, state in zip(self.bases, state_dict["bases"], strict=True):
                for group, own in zip(state["param_groups"], base.param_groups, strict=True):
                    check_form(group, own)
                base.load_state_dict(state)
                given_bases.check_fused(base)
        self.load_own_state_dict(state_dict)

    def load_own_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `own_state_dict` returned, or `state_dict` as far as it is not the bases'.

        Raises ValueError for another state."""
        with damage_told(self):
            check_form(state, self.own_state_dict())
            self._load_own(state)

    def _load_own(self, state: dict[str, Any]) -> None:
        self.step_index = operator.index(state["step_index"])
        self.peak_lr = state["peak_lr"]
        if state.get("fresh_logits", False):  # states of before say nothing of it
            self.given.renew()
        self.given.resumed = self.step_index > 0
        rows = state.get("rows", {})
        self.prober.whole = rows.get("whole", self.prober.whole)
        self.spread = rows.get("spread", self.spread)
        self._load_own_state(state)

    def _own_state(self) -> dict[str, Any]:
        """What a stabilizer itself carries from step to step."""
        return {}

    def _load_own_state(self, state: dict[str, Any]) -> None:
        return

    @torch.no_grad()
    def eval(self) -> None:
        """Set the weights for evaluation, if a base evaluates other weights than it trains (Schedule-Free).

        Those are put on the projection's set or manifold too.
        """
        swapping = [base for base in self.bases if hasattr(base, "eval")]
        if not swapping or self._trained_at is not None:
            return
        self._trained_at = [local(p).detach().clone() for p in self.weights]
        for base in swapping:
            base.eval()
        self.prober.forget()
        for constrain in (self.project, self.retract):
            if constrain is not None:
                constrain()

    @torch.no_grad()
    def train(self) -> None:
        """Undo `eval`, bit for bit. Every base is told, since some start in evaluation mode."""
        for base in self.bases:
            getattr(base, "train", lambda: None)()
        if self._trained_at is None:
            return
        torch._foreach_copy_([local(p) for p in self.weights], self._trained_at)
        self._trained_at = None
        self.prober.forget()

    @torch.no_grad()
    def renew_rows(self, parameter: nn.Parameter, rows: Tensor) -> None:
        """Forget what the bases know of some rows of a parameter, which now hold something new.

        Every state of the parameter's shape is zeroed there, and copies of the weights take their values.
        """
        for base in self.bases:
            copies = {*given_bases.weight_copies(base), *getattr(base, "weight_starts", ())}
            for key, value in base.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value[rows] = parameter[rows].to(value.dtype) if key in copies else 0

    def _lr_ratio(self) -> float:
        """The learning rate over its peak (the one that a scheduler keeps, or the first), at most 1."""
        group = self.param_groups[0]
        if "lr" not in group:
            return 1.0
        peak = float(group.get("max_lr", group.get("initial_lr", self.peak_lr)))
        return min(1.0, float(group["lr"]) / peak) if peak else 1.0
