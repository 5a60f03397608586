"""`attach`: EBC on a user's own optimizers, through torch's hooks, so that no loop or trainer has to change.

A forward hook keeps the batch and the logits of the last training forward. The hook before an optimizer's
step is the first half of `EllipsotopeClip`'s step (`open_step`), the hook after it the second (`close_step`):
the same code, and the same bits. With several optimizers the step begins with the first of them that steps
and ends with the last; in between the weights are where the c of the step before would leave them.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .clip import EllipsotopeClip
from .flat import Copy, Shortened, all_finite, joint_norm
from .given import checks
from .given.arguments import Arguments, MaskOf
from .given.bases import Optimizers, as_list, is_as_loaded, parameters_of, state_keeper
from .given.calls import Replaced, is_inside, step_of, unscale
from .given.capture import Capture, Forward
from .given.first import FirstSteps
from .given.look import FIRST, Look
from .given.rows import RowsOf
from .given.state import Snapshot
from .given.watch import Watch
from .parallel.shards import gradients_of, local, shared_out, unwrapped
from .proposal import Opened
from .step import StepInputs, StepStats
from .wrapping import damage_told

KEY = "ebc"  # in an optimizer's state dict
FIRST_C = 0.1  # taken for c between the steps of several optimizers, where nothing is known of it yet
_MARK = "_ebc_attached"


def attach(
    model: nn.Module,
    optimizers: Optimizers,
    *,
    logits_of: Callable[[Any], Any] | None = None,
    drop: tuple[str, ...] | None = None,
    mask_of: MaskOf | None = None,
    rows_of: RowsOf | None = None,
    check: bool = True,
    **options: Any,
) -> Attached:
    """Limit what `optimizers` do to `model`, from their next step on; training stays as it is.

    Args:
        model: the module that training calls, or that a DistributedDataParallel or `torch.compile` around it
            calls; its logits are (B, ..., V), rows first.
        optimizers: one torch optimizer, or several that share out the model's parameters and step together.
        logits_of: the model's output -> logits. Default: a tensor itself, or `.logits`.
        drop: names of the forward's arguments that only its loss needs; a model that returns its loss alone
            where it is given them is called without. Default: `labels`, except for encoder-decoders, which
            make their input of them.
        mask_of: the forward's arguments by name -> the mask of the positions that count, of the logits' shape
            without the classes. Default: an attention mask of that shape.
        rows_of: (the forward's arguments by name, an index of rows) -> the arguments of these rows, a dict by
            name or a tuple. Default: every tensor that has as many rows as the logits is cut; where none
            has, or the model cannot be called on a part, EBC calls it on whole batches.
        check: whether the first steps are looked at for what EBC would silently get wrong, see `Look`. What
            that finds is an error or one warning, with its remedy; no step depends on it.
        options: those of `EllipsotopeClip`: `target_kl` (nats per token), `budget`, `audit_every`, ...
            `probe_sequences` is None unless given: as many rows as hold about 250 tokens that count; "all"
            lets every row choose c, and leaves none for audits.
    Returns:
        What can be read (`last`, `look`), saved with DCP, and detached.
    Raises:
        ValueError: as `EllipsotopeClip`; an optimizer that is attached already; at the first steps, logits
            that are not what EBC takes them for.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{type(model).__name__} is no torch.nn.Module: attach(model, optimizer, …).")
    beside = {"forward", "compiled"} & set(options)
    if beside:
        raise TypeError(
            f"`attach` takes no {' and no '.join(sorted(beside))}, since it calls the model as training "
            "does: use EllipsotopeClip for that."
        )
    if isinstance(drop, str):
        raise TypeError(f"drop is a tuple of names: drop=({drop!r},).")
    return Attached(model, optimizers, logits_of, drop, mask_of, rows_of, check, options)


class Attached:
    """EBC on optimizers that somebody else calls, see `attach`.

    `last` is the StepStats of the last step, `look` what the first ones have shown (None with `check=False`),
    `clip` the `EllipsotopeClip` whose step is taken. The state
    travels in the first optimizer's state dict as "ebc"; where only parameters' states are saved
    (`torch.distributed.checkpoint`'s `get_optimizer_state_dict`), save this object beside them: it has
    `state_dict` and `load_state_dict`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: Optimizers,
        logits_of: Callable[[Any], Any] | None,
        drop: tuple[str, ...] | None,
        mask_of: MaskOf | None,
        rows_of: RowsOf | None,
        check: bool,
        options: Mapping[str, Any],
    ):
        self.optimizers = as_list(optimizers)
        if any(isinstance(o, EllipsotopeClip) or hasattr(o, _MARK) for o in self.optimizers):
            raise ValueError("EBC is on this optimizer already: detach() that first.")
        self._keeper, *_ = [state_keeper(o) for o in self.optimizers]
        called = unwrapped(model)
        inner = getattr(called, "_orig_mod", called)
        compiled = called if called is not inner else None
        self.capture = Capture(
            called,
            logits_of,
            Arguments(called, drop, mask_of, rows_of),
            options.get("batch_dim", 0),
            self._forward_begins,
            self._version,
        )
        defaults = {"forward": self.capture.call, "compiled": compiled, "probe_sequences": None}
        self.clip = EllipsotopeClip(inner, self.optimizers, **{**defaults, **options})
        measures = self._measures()
        if measures or len(self.optimizers) > 1:  # else a forward says nothing that a step could use
            self.capture.watch()
        self.clip.watches_given = options.get("fresh_logits") is not False
        self.clip.prober.watched = FIRST
        if rows_of is not None:
            self.clip.prober.cut_by = self.capture.arguments.rows
        self.look = Look() if check and measures else None
        self._first: FirstSteps | None = None
        if self.look is not None:
            self._first = FirstSteps(self.clip, self.capture, self.look)
            self.capture.first = self._first.see_forward
        self._watch = Watch()
        self._opened: Opened | None = None
        self._waiting: list[Optimizer] = []  # those that have not stepped yet in the step that is open
        self._void: list[Optimizer] = []  # those of them whose gradients are not finite
        self._late: list[Optimizer] = []  # those that were void when the last step ended without them
        self._norms: dict[Optimizer, Tensor] = {}  # of the gradients that each of several has stepped with
        self._shortened: Shortened | None = None  # the weights between two optimizers' steps
        self._c: float | None = None  # of the last step, which they are shortened by
        self._hidden: list[tuple[nn.Parameter, Tensor | None]] = []
        self._before: Copy | None = None  # W, in a step whose closure has not been called yet
        self._passing = False  # whether the step that is open is let through as it is
        self._inside: Optimizer | None = None  # the one whose step is running
        self._call: FrameType | None = None  # that step
        self._told_of_moves = False
        # whether an optimizer's state was loaded already, without EBC's, and nobody has said so
        self.loaded_before = self.clip.keeps_old and any(map(is_as_loaded, self.optimizers))
        self._nested = 0  # calls of it inside: a subclass's step calls its parent's, which has the hooks too
        self._handles = [handle for o in self.optimizers for handle in self._hooks(o)]

    def _hooks(self, optimizer: Optimizer) -> list[Any]:
        setattr(optimizer, _MARK, True)
        eager: Any = torch.compiler.disable  # some compile an optimizer's step
        handles: list[Any] = [
            optimizer.register_step_pre_hook(eager(self._pre)),
            optimizer.register_step_post_hook(eager(self._post)),
        ]
        if optimizer is self.optimizers[0]:
            handles += self._state_hooks(self._keeper)
        return handles

    def _state_hooks(self, keeper: Optimizer) -> list[Any]:
        """Have EBC's state saved and loaded with the keeper's, by methods of its own too: they may not call
        torch's, which have the hooks."""
        names = "state_dict", "load_state_dict"
        if all(getattr(getattr(keeper, n), "__func__", None) is getattr(Optimizer, n) for n in names):
            return [
                keeper.register_state_dict_post_hook(self._save),
                keeper.register_load_state_dict_pre_hook(self._load),
            ]

        def state_dict(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
            self._finish()
            return self._save(keeper, call(*given, **named))

        def load_state_dict(call: Callable[..., Any], *given: Any, **named: Any) -> Any:
            if given:
                return call(self._load(keeper, given[0]), *given[1:], **named)
            name = next(iter(named))
            return call(**{**named, name: self._load(keeper, named[name])})

        return [Replaced(keeper, *pair) for pair in zip(names, (state_dict, load_state_dict), strict=True)]

    def __repr__(self) -> str:
        clip, s, last = self.clip, self.clip.settings, self.last
        names = ", ".join(type(o).__name__ for o in self.optimizers)
        bounds = f"target_kl={s.target_kl:g}, budget={s.budget!r}"
        bounds += "" if s.radius is None else f", radius={s.radius:g} ({s.radius_unit})"
        lines = [f"EBC on {names} of a {type(clip.model).__name__}: {bounds}"]
        if clip.chosen_by is not None:
            drawn = ", drawn from the whole batch" if clip.spread else ""
            whole = ", read from forwards on whole batches" if clip.prober.whole else ""
            lines.append("c chosen by {} rows, {} tokens".format(*clip.chosen_by) + drawn + whole)
        if len(self.optimizers) > 1 and clip.keeps_old:
            lines.append("one c for all; between their steps weights stand where the last c puts them")
        if last is not None:
            measured = "" if last.trial_kl is None else f", a KL of {last.trial_kl:.2g} at {last.trial:.2g}"
            what = "skipped" if last.skipped else f"c {last.clip_coefficient:.3g}{measured}"
            lines.append(f"{clip.step_index} steps, the last: {what}")
        if self.look is not None:
            lines.append(f"first steps: {self.look.summary}")
        return "\n".join(lines)

    @property
    def last(self) -> StepStats | None:
        """What the last step did; None before the first."""
        return self.clip.last

    def this_forward(self) -> AbstractContextManager[None]:
        """The forward inside chooses c at the next step, whatever else the model is called with."""
        return self.capture.named()

    def detach(self) -> None:
        """Leave model and optimizers as they were; the weights stay."""
        self._finish()
        self.capture.remove()
        if self._first is not None:
            self._first.stop()
        for handle in self._handles:
            handle.remove()
        for optimizer in self.optimizers:
            vars(optimizer).pop(_MARK, None)

    # -- state -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """What EBC itself carries from step to step, without the optimizers' states."""
        self._finish()
        state = {**self.clip.own_state_dict(), "certain": self.capture.certain}
        if self.look is not None:
            state["look"] = self.look.state_dict()
        return state if self._c is None else {**state, "last_c": self._c}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._abandon()  # else W of before would be taken for where the loaded weights came from
        self.clip.load_own_state_dict(state)
        with damage_told(self):
            last_c = state.get("last_c")
            self._c = None if last_c is None else float(last_c)
            self.capture.certain = bool(state.get("certain", False))  # states of before say nothing of it
            if self.look is not None and "look" in state:  # states of before have none
                self.look.load_state_dict(state["look"])
        self.loaded_before = False

    def _save(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(state, dict):
            message = (
                f"{type(optimizer).__name__}.state_dict() returns a {type(state).__name__}, in which EBC's "
                "state has no place: save ebc.state_dict() beside it, and load that with ebc.load_state_dict."
            )
            warnings.warn(message, checks.EBCWarning, stacklevel=2)
            return state
        saved = copy.copy(state)  # of whatever class an optimizer's own method makes it
        saved[KEY] = self.state_dict()
        return saved

    def _load(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(state, dict):
            return state
        rest = dict(state)
        saved = rest.pop(KEY, None)
        if saved is not None:
            self.load_state_dict(saved)
        elif self.clip.step_index == 0:
            self.loaded_before = False
            warnings.warn(
                "this optimizer state comes without EBC's, so c is searched for anew: load a state dict that "
                "was saved while EBC was attached, or EBC's own state after it.",
                checks.EBCWarning,
                stacklevel=2,
            )
        return rest

    # -- one step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = step_of()
        if self._inside is optimizer and call is not None and is_inside(call, self._call):
            self._nested += 1
            return None
        if self._inside is not None:  # that step has failed, and nobody knows how far it came
            self._abandon()
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        late = (
            optimizer in self._late
            and closure is None
            and (self._is_bad(optimizer) or not _gradients(optimizer))
        )
        if optimizer not in self._waiting and not late:
            self._finish()  # it steps again: the others have not, this time
            self._waiting = list(self.optimizers)
            self._late = []
            self._passing = False
        self._lengthen()
        self._inside = optimizer
        self._call = call
        unscale(optimizer)
        if late:
            self._hide(optimizer)
            return None
        if closure is None:
            self._begin()
            return None
        if self._opened is None and not self._passing and (self._measures() or self.clip.keeps_old):
            self.clip.sync_process_group()
            self._before = self.clip.keep()

        def watched() -> Any:
            """Call the closure, and begin the step after its first call: then the gradients are there."""
            value = closure()
            with torch.no_grad():
                self._begin()
            return value

        if "closure" in kwargs:
            return args, {**kwargs, "closure": watched}
        return (args[0], watched, *args[2:]), kwargs

    def _begin(self) -> None:
        """What comes before an optimizer moves its weights, the step's first one or a later one."""
        if self._opened is None and not self._passing:
            self._open()
        optimizer = self._inside
        if self._opened is None or optimizer is None:
            return
        if optimizer in self._void:
            self._hide(optimizer)
        elif len(self.optimizers) > 1:  # a GradScaler unscales the gradients of each by itself
            self.clip.gradients.see_again(optimizer)
            self._norms[optimizer] = self.clip.arithmetic.norm(_gradients(optimizer))

    def _hide(self, optimizer: Optimizer) -> None:
        """Its gradients, while it steps: it leaves a weight without one, and its state, alone."""
        self._hidden += [(p, p.grad) for p in parameters_of([optimizer])]
        for p in parameters_of([optimizer]):
            p.grad = None

    def _open(self) -> None:
        """The first half of the step, with the gradients at hand."""
        forward = self.capture.last
        if forward is None and self._nothing_to_do():
            self._passing = True
            return
        if forward is None and self._measures():
            raise ValueError(self._unseen())
        if self.loaded_before and self.clip.step_index == 0:
            self.loaded_before = False
            warnings.warn(
                "the optimizer's state seems to have been loaded before EBC was attached, and EBC's was left "
                "out: c is searched for anew. Attach first, or load EBC's own with ebc.load_state_dict.",
                checks.EBCWarning,
                stacklevel=2,
            )
        t = self.clip.begin_step()
        self._norms = {}
        if forward is None:
            self._opened = self._opened_by(StepInputs(t), self._before)
        else:
            self._opened = self._opened_after(forward, t, self._before)

    def _opened_by(self, inputs: StepInputs, weights_before: Copy | None) -> Opened:
        """The step opened; those of several optimizers whose gradients are not finite have no part in it."""
        opened = self.clip.open_step(inputs, weights_before)
        self._void = list(self._waiting) if opened.void else []
        if not opened.void or len(self._waiting) == 1:
            return opened
        bad = [o for o in self._waiting if self._is_bad(o)]
        if all(o in bad or not _gradients(o) for o in self._waiting):
            return opened
        self._void = bad
        try:
            for o in bad:
                self._hide(o)
            return self.clip.open_step(inputs, weights_before)
        finally:
            self._show_gradients()

    def _is_bad(self, optimizer: Optimizer) -> bool:
        """Whether a gradient of its is not finite, in one process at least."""
        gradients = _gradients(optimizer)
        return self.clip.any_process(not all_finite(gradients, joint_norm(gradients)))

    def _opened_after(self, forward: Forward, t: int, weights_before: Copy | None) -> Opened:
        if self._first is not None:
            self._first.suspect(forward)
        self.clip.prober.state.start = forward.start
        self.capture.find_logits(self.clip.prober, forward)
        if t < FIRST or self.clip.audits(t) or self.capture.certain:
            self.capture.leave_out_certain(forward)
        if self.capture.draws:
            self.clip.given.renew()
        # a closure may have moved them, in one process at least
        moved = weights_before is not None and self.clip.any_process(not weights_before.equals_weights())
        stale = moved or (forward.version is not None and forward.version != self._version())
        inputs = StepInputs(
            t, forward.batch, forward.logits, forward.mask, stale=stale or forward.overwritten
        )
        with self.capture.pause(), forward.precision():
            if not moved or weights_before is None:
                opened = self._opened_by(inputs, weights_before)
                if self._first is not None:
                    self._first.begin(opened, forward, stale)
                return opened
            # the closure was called at other weights than W
            with weights_before.standing_in(self.clip.weights):
                return self._opened_by(inputs, weights_before)

    def _version(self) -> object:
        """What is another when the weights are, as SAM moves them between a forward and its step.

        All of the model's: an optimizer that is not attached may have moved others. Under FSDP those that are
        limited, since the model has other parameters during a forward than after it.
        """
        weights: Sequence[Tensor] = self.clip.weights
        shared = any(map(shared_out, weights))
        watched = weights if shared else self.clip.prober.state.parameters()
        places = [local(p).data_ptr() if shared else p.data_ptr() for p in watched]
        return [p._version for p in watched], places

    def _measures(self) -> bool:
        """Whether there is anything to measure at some step."""
        return self.clip.settings.active or self.clip.audit_every > 0 or self.clip.curve_every > 0

    def _nothing_to_do(self) -> bool:
        """Whether no weight would move: without gradients, or where a checkpoint library makes an optimizer's
        state from zeros."""
        assert self._inside is not None
        if self._inside.state:
            return not any(p.grad is not None for p in self.clip.weights)
        return not any(bool(g.any()) for g in gradients_of(self.clip.weights))

    @torch.no_grad()
    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested:
            self._nested -= 1
            return
        self._inside = None
        self._call = None
        self._show_gradients()
        self._waiting = [o for o in self._waiting if o is not optimizer]
        if all(o in self._void for o in self._waiting):
            late = self._late or self._waiting
            self._finish()
            self._late = [o for o in late if o is not optimizer]
        else:
            self._shorten()

    def _shorten(self) -> None:
        """Between two optimizers' steps c is not known: leave the weights where the last one puts them."""
        opened = self._opened
        if opened is None or opened.void or not self._limits(opened):
            return
        c = float(getattr(self.clip.budget, "trial", FIRST_C)) if self._c is None else self._c
        if c < 1:
            self._shortened = self.clip.shorten(opened, c)

    def _limits(self, opened: Opened) -> bool:
        return self.clip.keeps_old and self.clip.settings.in_force(opened.t)

    def _lengthen(self) -> None:
        shortened, self._shortened = self._shortened, None
        if shortened is None or self.clip.lengthen(shortened) or self._told_of_moves:
            return
        self._told_of_moves = True
        warnings.warn(
            "weights were moved between the steps of two optimizers that EBC limits together. There they are "
            "where the last c puts them, the step ends from where they were moved to, and what moved them is "
            "limited with it: move them after the last of the optimizers has stepped.",
            checks.EBCWarning,
            stacklevel=2,
        )

    def _forward_begins(self) -> Snapshot | None:
        if self._inside is None:  # else it is a closure's
            self._finish()
            self._late = []
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        return self.clip.prober.state.remember()

    def _finish(self) -> None:
        """The second half of the step that is open, if one is: after the last optimizer's step, and at the
        latest before the weights are used."""
        self._inside = self._call = self._before = None
        self._nested = 0
        self._waiting = []
        if self._opened is not None or self._shortened is not None or self._hidden:
            with torch.no_grad():
                self._close()

    def _close(self) -> None:
        self._lengthen()
        opened, self._opened = self._opened, None
        self._show_gradients()
        if opened is None:
            return
        if len(self._norms) + len(self._void) == len(self.optimizers) > 1 and not opened.void:
            opened.stats.grad_norm = self._norm_now(opened.stats.grad_norm)
        forwards = self.capture.used
        self.capture.clear()
        with self.capture.pause():
            stats = self.clip.close_step(opened)
            self._watch.see(self.clip, opened)
            if len(self.optimizers) > 1 and self._limits(opened) and not stats.skipped:
                self._c = float(stats.clip_coefficient)
            if self._first is not None:
                self._first.end(opened, forwards)
                if self._first.done:
                    self._first = self.capture.first = None
        self.clip.prober.state.start = None

    def _unseen(self) -> str:
        """What is said where an optimizer steps and no forward was seen."""
        if self.capture.ever:
            return (
                "the optimizer steps, and the model was not called in training since its last step: EBC "
                "needs the forward that the gradients come from."
            )
        return (
            f"the optimizer steps, and the {type(self.clip.model).__name__} that EBC is attached to was "
            "never called as a module with gradients on: attach to the module that training calls, as "
            "model(…), not model.forward(…) or another method."
        )

    def _norm_now(self, norm: Tensor) -> Tensor:
        """That of the gradients the optimizers have stepped with, if they were unscaled or clipped since the
        step began, when it was `norm`; which is the same up to rounding otherwise."""
        norms = torch.stack([n.to(norm.device, torch.float64) for n in self._norms.values()])
        now = self.clip.workers.joined_norm(torch.linalg.vector_norm(norms))
        same = (now - norm).abs() <= 1e-4 * norm
        return torch.where(same, norm, now.to(norm.dtype))

    def _abandon(self) -> None:
        """Forget the step that is open."""
        self._opened = self._shortened = None
        self._late = []
        self.clip.gradients.forget()
        if self._first is not None:
            self._first.forget()
        self._hidden = []
        self._finish()

    def _show_gradients(self) -> None:
        for p, gradient in self._hidden:
            p.grad = gradient
        self._hidden = []


def _gradients(optimizer: Optimizer) -> list[Tensor]:
    return gradients_of(parameters_of([optimizer]))
