"""`AXIOM`: an optimizer with little state, whose updates can be made inside backward (docs/axiom.md).

Without hooks it is used like any torch optimizer. With them each gradient lives until its tensor has been
moved and no longer:

    optimizer = AXIOM(model.named_parameters(), lr=1e-3)
    optimizer.register_hooks()
    for x, y in batches:
        loss = loss_of(model, x, y)
        loss.backward()  # moves the weights
        optimizer.step(loss=loss)  # ends the step, and raises what the hooks found

Every formula looks at one tensor alone, so hooks change no bit, unless `max_grad_norm` or `lr_scale` is set.
Updates inside backward: Lv et al., arXiv:2306.09782.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from .checks import (
    NOT_FINITE,
    AnomalyError,
    check_group,
    check_range,
    finite_loss,
    listed,
    loss_in_words,
    norm_of,
    refuse_others,
    workers,
)
from .update import Rule, State, compression, new_state, state_bytes, state_shapes, update

SHARE_DECAY = 0.9  # of a tensor's share of the squared norm, under hooks with max_grad_norm
TINY = 1e-38  # in place of a norm of 0
USED = "_axiom_used"  # of a gradient: its version when a step used it, which every later change raises
RULE = (
    *("lr", "weight_decay", "streak_boost", "snr_floor"),
    *("rank", "momentum_weight", "relative", "beta1", "rms_limit"),
)


@dataclass
class Backward:
    """The gradients that hooks have seen since the last `step`, by parameter."""

    norms: dict[Tensor, Tensor] = field(default_factory=dict)  # of the gradients, 0-dim
    bad: list[Tensor] = field(default_factory=list)  # those with a gradient that is not finite
    slopes: dict[Tensor, Tensor] = field(default_factory=dict)  # <gradient, update>, with `record_slope`
    task: int | None = None  # autograd's number of the pass that is under way
    over: bool = False  # whether it has ended

    def admits(self, p: Tensor) -> bool:
        """Tell, in the hook of a parameter, whether it belongs to the pass that began after the last `step`.

        Reentrant checkpointing runs passes inside a pass. An outer one has a lower number, and goes on when
        an inner one has ended; two inner ones without a parameter before them look like two passes.
        """
        task = torch._C._current_graph_task_id()
        if p in self.norms or (self.over and self.task is not None and task > self.task):
            return False
        if self.task is None or task < self.task:
            self.task = task
            self.over = False
            Variable._execution_engine.queue_callback(self._end)
        return True

    def _end(self) -> None:
        self.over = True

    @property
    def moved(self) -> list[Tensor]:
        bad = {id(p) for p in self.bad}
        return [p for p in self.norms if id(p) not in bad]


class AXIOM(torch.optim.Optimizer):
    """Factored second moments, a low-rank momentum, and updates inside backward.

    Args:
        params: parameters, named parameters, or groups of them.
        lr: learning rate: a weight moves by about lr a step, with `relative` by lr times its tensor's rms.
        weight_decay: decoupled; W is multiplied by 1 - lr·weight_decay.
        max_grad_norm: limit of the global norm of the gradients; under hooks of each tensor's share of it.
        detect_anomaly: raise AnomalyError for gradients and losses that are not finite.
        streak_boost: up to how many times as far a tensor moves whose gradient keeps agreeing with its
            momentum; 1: off.
        snr_floor: down to which factor the rows of a matrix are damped whose momentum is weak; 1: off.
        rank: of the momentum of a matrix; 0: no momentum anywhere.
        momentum_weight: of the momentum beside the gradient, in the update of a matrix.
        relative: whether lr is in units of the tensor's own rms.
        beta1: decay of the momentum.
        rms_limit: of a tensor's update before lr.
    Raises:
        ValueError: a setting out of its range.
        TypeError: a parameter that is not of a floating dtype, or a setting of another optimizer.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        detect_anomaly: bool = True,
        streak_boost: float = 1.0,
        snr_floor: float = 0.5,
        *,
        rank: int = 0,
        momentum_weight: float = 0.5,
        relative: bool = False,
        beta1: float = 0.9,
        rms_limit: float = 1.0,
        **others: Any,
    ):
        refuse_others(others)
        gains = (streak_boost, snr_floor, rank, momentum_weight, relative, beta1, rms_limit)
        defaults = dict(zip(RULE, (lr, weight_decay, *gains), strict=True))
        if max_grad_norm is not None:
            check_range("max_grad_norm", max_grad_norm, 0, math.inf)
        self.max_grad_norm = max_grad_norm
        self.detect_anomaly = detect_anomaly
        self.lr_scale = 1.0
        self.peak_gradient_bytes = 0  # the most that gradients have taken at a time
        self.record_slope = False  # whether hooks measure <gradient, update> of each tensor
        self.backward = Backward()  # what the hooks have seen since the last `step`
        self._handles: list[RemovableHandle] = []
        super().__init__(params, defaults)

    def __getstate__(self) -> dict[str, Any]:
        """Return what copies and pickles are made of: all but the hooks and what these have seen."""
        names = ("max_grad_norm", "detect_anomaly", "peak_gradient_bytes")
        settings = {name: getattr(self, name) for name in names}
        fresh = {"lr_scale": 1.0, "record_slope": False, "_handles": [], "backward": Backward()}
        return {**super().__getstate__(), **settings, **fresh}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as in every torch optimizer. Raises ValueError, TypeError as the class does."""
        if getattr(self, "_handles", None):
            raise RuntimeError("remove_hooks() before adding a parameter group, and register them again.")
        super().add_param_group(param_group)
        try:
            check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    # -- settings --------------------------------------------------------------------------------------------

    def get_lr(self) -> float:
        """Return the learning rate of the first group."""
        return float(self.param_groups[0]["lr"])

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of all groups. Raises ValueError unless it is finite and at least 0."""
        check_range("lr", lr, 0, math.inf)
        for group in self.param_groups:
            group["lr"] = lr

    @property
    def hooked(self) -> bool:
        """Tell whether weights move inside backward."""
        return bool(self._handles)

    # -- one step --------------------------------------------------------------------------------------------

    def step(self, loss: Any = None) -> Any:
        """Take a step; under hooks, end it.

        Args:
            loss: the loss, to be checked; or a closure that computes it and calls backward.
        Returns:
            the loss.
        Raises:
            AnomalyError: the loss or a gradient is not finite. Without hooks nothing has changed; under hooks
                the tensors with such a gradient have not moved, and the others have.
        """
        if callable(loss):
            with torch.enable_grad():
                loss = loss()
        if self.hooked:
            self._end_backward(loss)
        else:
            self._plain_step(loss)
        return loss

    @torch.no_grad()
    def _plain_step(self, loss: Any) -> None:
        if self.detect_anomaly and not finite_loss(loss):
            raise AnomalyError(f"the loss is {loss_in_words(loss)}: nothing was changed.")
        gradients = [(p, p.grad, group) for p, group in self._parameters() if p.grad is not None]
        for p, g, _ in gradients:
            self._refuse_sparse(p, g)
        total = sum(g.numel() * g.element_size() for _, g, _ in gradients)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, total)
        scale = self._limit([(p, g) for p, g, _ in gradients])
        for p, g, group in gradients:
            update(p, g, self._state_of(p, group), self._rule(group), scale=scale)
            setattr(g, USED, g._version)

    def _limit(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> float:
        """Return the factor at most 1 that brings the norm of all gradients down to `max_grad_norm`.

        Raises AnomalyError where `detect_anomaly` is on and a gradient is not finite.
        """
        if not gradients or not (self.detect_anomaly or self.max_grad_norm is not None):
            return 1.0
        norms = torch.stack([norm_of(g).double() for _, g in gradients])
        if self.detect_anomaly and not norms.isfinite().all():
            finite = norms.isfinite().tolist()
            bad = [p for (p, _), sound in zip(gradients, finite, strict=True) if not sound]
            names = self._names(bad)
            raise AnomalyError(f"the gradient of {listed(names)} {NOT_FINITE}: nothing was changed.", names)
        if self.max_grad_norm is None:
            return 1.0
        whole = torch.linalg.vector_norm(norms)
        return min(1.0, self.max_grad_norm / max(float(whole), TINY))

    def _parameters(self) -> list[tuple[Tensor, dict[str, Any]]]:
        return [(p, group) for group in self.param_groups for p in group["params"] if p.numel()]

    def _state_of(self, p: Tensor, group: Mapping[str, Any]) -> State:
        state: State = self.state[p]
        if "step" not in state:
            state.update(new_state(p, group["rank"]))
        return state

    def _rule(self, group: Mapping[str, Any]) -> Rule:
        return Rule(
            **{name: group[name] for name in RULE} | {"lr": float(group["lr"])}, lr_scale=self.lr_scale
        )

    def _refuse_sparse(self, p: Tensor, g: Tensor) -> None:
        if g.is_sparse:
            raise RuntimeError(
                f"the gradient of {self._names([p])[0]} is sparse, which AXIOM does not take: "
                "build its embedding with sparse=False."
            )

    def _names(self, tensors: Sequence[Tensor]) -> list[str]:
        """Return what errors call parameters: their names, where the optimizer was given them."""
        known: dict[int, str] = {}
        for group in self.param_groups:
            for p, name in zip(group["params"], group.get("param_names", ()), strict=False):
                known[id(p)] = name
        index = {id(p): i for i, (p, _) in enumerate(self._parameters())}
        return [known.get(id(p), f"parameter {index[id(p)]} {tuple(p.shape)}") for p in tensors]

    # -- hooks -----------------------------------------------------------------------------------------------

    def register_hooks(self, lr_scale: float = 1.0) -> None:
        """Have backward move the weights, each tensor as soon as its gradient is complete, and free it.

        Plain steps may come before. Gradients that they have used, or that are zeros, are freed.

        Args:
            lr_scale: multiplies every update before its rms is limited: 25 gives every update whose rms is
                above rms_limit/25 the rms rms_limit.
        Raises:
            ValueError: lr_scale is not above 0.
            RuntimeError: there are hooks already, or several workers, or gradients that no step has used.
        """
        if not 0 < lr_scale < math.inf:
            raise ValueError(f"lr_scale must be above 0, not {lr_scale}.")
        if self.hooked:
            raise RuntimeError("the hooks are registered already: remove_hooks() first.")
        held = [(p, p.grad) for p, _ in self._parameters() if p.grad is not None]
        pending = [p for p, g in held if getattr(g, USED, None) != g._version and (g.is_sparse or g.any())]
        if pending:
            raise RuntimeError(
                f"{listed(self._names(pending))} has a gradient that no step has used: "
                "call step() or zero_grad() before register_hooks()."
            )
        if workers() > 1:
            raise RuntimeError(
                f"hooks move the weights before {workers()} workers have exchanged gradients: train without "
                "hooks, with axiom_hook between workers, or on one worker."
            )
        for p, _ in held:  # backward would add to it
            p.grad = None
        self.lr_scale = lr_scale
        self.backward = Backward()
        for i, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.requires_grad and p.numel():
                    self._handles.append(p.register_post_accumulate_grad_hook(self._hook(i)))

    def remove_hooks(self) -> None:
        """Undo `register_hooks`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.lr_scale = 1.0
        self.backward = Backward()

    def _hook(self, group: int) -> Callable[[Tensor], None]:
        # Python does not see that a tensor holds its hook: one that held the optimizer, and so all of its
        # tensors, would keep them for ever
        owner = weakref.ref(self)

        def hook(p: Tensor) -> None:
            optimizer = owner()
            if optimizer is not None:
                # by its index: load_state_dict makes new groups
                optimizer._move_inside(p, optimizer.param_groups[group])

        return hook

    @torch.no_grad()
    def _move_inside(self, p: Tensor, group: dict[str, Any]) -> None:
        """Take the gradient that backward has just completed, and move its tensor."""
        g = p.grad
        if g is None:  # what used the tensor has no gradient for it: torch calls the hook all the same
            return
        p.grad = None
        backward = self.backward
        if not backward.admits(p):
            raise RuntimeError(
                "a second backward before step(): under hooks the first has moved the weights, so gradients "
                "cannot be accumulated. Call step() after each backward, or remove_hooks(); activation "
                "checkpointing needs use_reentrant=False."
            )
        self._refuse_sparse(p, g)
        self.peak_gradient_bytes = max(self.peak_gradient_bytes, g.numel() * g.element_size())
        norm = norm_of(g)
        backward.norms[p] = norm
        if self.detect_anomaly and not math.isfinite(norm):
            backward.bad.append(p)
            return
        state = self._state_of(p, group)
        scale = 1.0
        if self.max_grad_norm is not None:  # its share of the limit of the global norm
            share = state["share"] if "share" in state else p.numel() / self._elements()
            limit = self.max_grad_norm * math.sqrt(share)
            scale = min(1.0, limit / max(float(norm), TINY))
        slope = update(p, g, state, self._rule(group), scale=scale, watch=self.record_slope)
        if slope is not None:
            backward.slopes[p] = slope

    def _elements(self) -> int:
        return sum(p.numel() for p, _ in self._parameters())

    @torch.no_grad()
    def _end_backward(self, loss: Any) -> None:
        backward = self.backward
        self.backward = Backward()
        left = [p for p, _ in self._parameters() if p.grad is not None]
        earlier = {id(p) for p in backward.moved}
        if back := [p for p in left if id(p) in earlier]:
            raise RuntimeError(
                f"{listed(self._names(back))} moved in backward and got its gradient back, as under "
                "DistributedDataParallel: with hooks, train the model without it."
            )
        if left:
            raise RuntimeError(
                f"{listed(self._names(left))} has a gradient and no hook, since it was frozen when they were "
                "registered: zero_grad(), remove_hooks() and register_hooks() again."
            )
        if backward.bad or (self.detect_anomaly and not finite_loss(loss)):
            bad, moved = self._names(backward.bad), self._names(backward.moved)
            after = f"{listed(moved)} had moved already" if moved else "nothing else had moved"
            if bad:
                message = f"the gradient of {listed(bad)} {NOT_FINITE} and was not used; {after}."
            else:
                message = f"the loss is {loss_in_words(loss)}; {after}."
            raise AnomalyError(message, bad, moved)
        if self.max_grad_norm is not None:
            self._renew_shares(backward.norms)

    def _renew_shares(self, norms: Mapping[Tensor, Tensor]) -> None:
        """Let every tensor's share follow its part of the squared norm, 0 without one: they sum to 1."""
        squares = {p: float(norm) ** 2 for p, norm in norms.items()}
        total = sum(squares.values())
        if not 0 < total < math.inf:
            return
        elements = self._elements()
        for p, _ in self._parameters():
            state = self.state[p]
            part = squares.get(p, 0.0) / total
            share = state.get("share", p.numel() / elements)
            state["share"] = SHARE_DECAY * share + (1 - SHARE_DECAY) * part

    # -- state -----------------------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict` returned; tensors stay float32 under weights of any dtype.

        torch would cast them to the dtype of the weights. Raises ValueError where it is of other parameters
        or settings; nothing has changed then.
        """
        parameters = [(p, group) for group in self.param_groups for p in group["params"]]
        saved = [i for group in state_dict["param_groups"] for i in group["params"]]
        if len(saved) != len(parameters):
            raise ValueError(
                f"this state is of {len(saved)} parameters, and the optimizer has {len(parameters)}."
            )
        for group in state_dict["param_groups"]:
            if set(RULE) - set(group):
                raise ValueError("this state is of another optimizer.")
            check_group({**group, "params": []})
        ranks = [group["rank"] for group in state_dict["param_groups"] for _ in group["params"]]
        states: dict[Tensor, State] = {}
        for i, rank, (p, _) in zip(saved, ranks, parameters, strict=True):
            state = state_dict["state"].get(i)
            if state is not None:
                self._check_state(p, state, rank)
                tensors = {k: v.to(p.device, copy=True) for k, v in state.items() if isinstance(v, Tensor)}
                states[p] = state | tensors
        super().load_state_dict({**state_dict, "state": {}})
        self.state.update(states)

    def _check_state(self, p: Tensor, state: State, rank: int) -> None:
        tensors = {name: v for name, v in state.items() if isinstance(v, Tensor)}
        shapes = {name: tuple(v.shape) for name, v in tensors.items()}
        single = all(v.dtype == torch.float32 and v.layout == torch.strided for v in tensors.values())
        wanted = state_shapes(p.shape, rank) if "step" in state else {}  # a share may be all that it has
        counts = [type(state[name]) for name in ("step", "streak") if name in state]
        if shapes != wanted or not single or counts not in ([], [int, int]):
            raise ValueError(f"the state of {self._names([p])[0]} is not what a tensor of its shape has.")

    def memory_usage(self, verbose: bool = True) -> dict[str, float]:
        """Return the bytes held by name, and how many times less they are than AdamW's in float32.

        `gradient_bytes` are those at the height of a step: the largest tensor's under hooks, else all.
        `verbose` prints the figures too.
        """
        of_tensors = [p.numel() * p.element_size() for p, _ in self._parameters()]
        elements = self._elements()
        state = sum(state_bytes(p.shape, group["rank"]) for p, group in self._parameters())
        gradients = max(of_tensors, default=0) if self.hooked else sum(of_tensors)
        usage = {
            "parameters": elements,
            "parameter_bytes": sum(of_tensors),
            "state_bytes": state,
            "gradient_bytes": gradients,
            **compression(elements, state, gradients),
        }
        if verbose:
            for name, value in usage.items():
                print(f"{name:22}{value:>16,.1f}×" if "compression" in name else f"{name:22}{value:>16,}")
        return usage


Axiom = AXIOM  # as older versions of the published package spell it
