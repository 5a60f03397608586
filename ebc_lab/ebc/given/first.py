"""`FirstSteps`: is what EBC measures what training optimizes? The first steps under `attach`, looked at anew.

A step that moves something is looked at in three ways that its own measurement does not use. Two forwards at
W, the second with the rows in reverse order: a model whose rows do not depend on each other says the same.
The KL of the step on rows that did not choose c. And the fall of the loss: what the gradients promise of the
step, -<dL/dW, c·dW>, against what the movement of the logits makes of it, -<dL/dz, z(W + c·dW) - z(W)>, or
that of the output's tensors that they are made of. They agree where the logits measured carry the whole loss.
Nothing of the step depends on what is seen.

What is certainly wrong is an error before a step has moved a weight; in a run that is resumed, which has
trained like this before, it is a warning.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..budgets import Need
from ..clip import EllipsotopeClip
from ..flat import Copy, joint_norm, real
from ..logits import mean_kl
from ..parallel.shards import local, shared_out
from ..probe import Batch
from ..proposal import Opened
from . import checks, losses, rows
from .capture import Capture, Forward
from .look import Look, Seen
from .source import Source, rows_of, tensors_of

SMALL = 0.1  # nats per token: up to here the loss falls as its gradient promises
BELIEVING = 10  # steps at the start in which a measured KL of 0 is doubted
SEEN = 1e-5  # of the weights' norm: a larger step changes the last bits of some logit
WRONG = "(check=False if EBC is wrong in this.)"


class FirstSteps:
    """Looks at forwards and steps until it is `done`, and is dropped then; what it has seen is in `look`.

    Args:
        clip: whose steps are taken.
        capture: the forwards.
    """

    def __init__(self, clip: EllipsotopeClip, capture: Capture, look: Look):
        self.clip = clip
        self.capture = capture
        self.look = look
        measures = clip.settings.active and clip.budget.need is Need.MEASUREMENT
        self._believing = BELIEVING * measures  # steps in which a KL of 0 is looked at
        self._looking: Looking | None = None  # at the step that is open
        self._gradients: dict[int, Tensor] = {}  # that backward has brought to weights, by their ids
        self._hooks: dict[int, Any] = {}
        self._watch_weights()

    @property
    def done(self) -> bool:
        """Whether nothing is left to look at."""
        return self.look.done and self._believing <= 0

    def stop(self) -> None:
        """Nothing is watched any more."""
        self.forget()
        for handle in self._hooks.values():
            handle.remove()
        self._hooks = {}

    def forget(self) -> None:
        """Drop what was seen of a step that has begun and will not be finished."""
        self._looking = None
        self._gradients = {}

    # -- a forward, and the gradients that come back ---------------------------------------------------------

    def see_forward(self, forward: Forward, logits: Tensor | None, graded: list[Tensor], output: Any) -> None:
        """Keep the gradient that comes back to the output, of the tensors that the logits are made of."""
        if self.look.done or type(logits) is not Tensor:
            return
        capture = self.capture
        shown = capture.rows_first(logits.detach())
        memory = logits.untyped_storage()._cdata
        alike = [t for t in graded if type(t) is Tensor and t.untyped_storage()._cdata == memory]
        alike = [t for t in alike if t is logits] or alike
        if len(alike) == 1:  # of several views of one tensor the loss may use another
            (tensor,) = alike

            def came(gradient: Tensor, of: Tensor = tensor.detach()) -> None:
                with torch.no_grad():  # backward may be differentiated itself
                    new = losses.gradient_of(shown, of, gradient)
                    old = forward.gradient
                    forward.gradient = new if old is None or new is None else old + new
                    forward.backwards += 1

            tensor.register_hook(came)
            return
        if any(type(t) is not Tensor for t in graded) or any(map(shared_out, capture.model.parameters())):
            return
        try:
            source = Source(capture.model, capture.logits_of, output, shown, capture.axis)
        except Exception:  # whatever it is that it cannot do twice
            return
        forward.source = source
        tensors = tensors_of(output)
        for place in source.places:

            def came_there(gradient: Tensor, place: int = place) -> None:
                with torch.no_grad():
                    source.came(place, gradient)
                    forward.gradient = source.by_logits()
                    forward.backwards += place == source.places[0]

            tensors[place].register_hook(came_there)

    def _watch_weights(self) -> None:
        """Keep the gradients that backward brings to the weights, before anything else changes them:
        optimizers and loops use them as room to compute in."""
        for p in self.clip.weights:
            if p.requires_grad and not shared_out(p) and id(p) not in self._hooks:
                # not a hook on the tensor, which has autograd copy the gradient, maybe to other strides
                self._hooks[id(p)] = p.register_post_accumulate_grad_hook(self._came)

    def _came(self, weight: Tensor) -> None:
        if weight.grad is None:  # a Function returned none, or it was used in backward already
            return
        with torch.no_grad():  # backward may be differentiated itself
            self._gradients[id(weight)] = weight.grad.detach().clone()

    # -- a step ----------------------------------------------------------------------------------------------

    def suspect(self, forward: Forward) -> None:
        """Raises ValueError where a forward's logits are not what EBC takes them for, while no step has moved
        a weight; afterwards the look says so."""
        if self.look.done or forward.logits is None or forward.overwritten:
            return
        logits = self.capture.rows_first(forward.logits)
        wrong = losses.refusal(logits, forward.gradient)
        if wrong is not None and not self.look.steps and not self.clip.given.resumed:
            raise ValueError(f"{wrong} {WRONG}")
        self.look.wrong = wrong or self.look.wrong

    def begin(self, opened: Opened, forward: Forward, stale: bool) -> None:
        """The step is open, the weights are at W; `stale`: the forward was at others. Raises ValueError where
        the model returns something else in evaluation than in training."""
        if self.look.done or opened.batch is None:
            return
        given = forward.logits
        in_training = given is not None and losses.are_probabilities(self.capture.rows_first(given))
        if not opened.batch.reused and losses.are_probabilities(opened.batch.probe.z) and not in_training:
            self._refuse(
                "in evaluation mode, in which EBC measures, the model returns probabilities, and in training "
                "logits: give logits_of=lambda z: z if model.training else z.log(), z being what it returns "
                f"or what logits_of makes of that. {WRONG}"
            )
        if not opened.void and not stale:
            with self._trying(), forward.precision():
                self._looking = Looking(opened, opened.batch, forward, self.capture)

    def end(self, opened: Opened, forwards: int) -> None:
        """It has ended: they are at W + c·dW. `forwards`: how many have made its gradient. Raises ValueError
        where moved weights change no prediction at all."""
        clip, look, stats = self.clip, self.look, opened.stats
        if self._believing and stats.trial_kl is not None and opened.kept is not None and not stats.skipped:
            self._believing -= 1
            if not stats.trial_kl > 0:
                self._doubt(opened, opened.kept)
        looking, self._looking = self._looking, None
        gradients, self._gradients = self._gradients, {}
        if looking is not None and not bool(stats.skipped):
            with self._trying(), looking.forward.precision():
                looking.after(clip.weights, gradients if clip.workers.alone and forwards == 1 else None)
            look.see(looking.seen, looking.batch, clip)
        if look.done:
            self.stop()
        else:
            self._watch_weights()

    def _doubt(self, opened: Opened, kept: Copy) -> None:
        """A KL of 0 was measured: may it be believed?"""
        assert opened.batch is not None
        weights = [local(p) for p in self.clip.weights]
        moved = float(joint_norm(torch._foreach_sub(weights, kept.views)) / joint_norm(kept.views))
        if moved < SEEN:
            return
        now = opened.batch.moved(opened.batch.probe)
        with kept.standing_in(self.clip.weights):
            before = opened.batch.moved(opened.batch.probe)
        if self.clip.any_process(not torch.equal(now, before)):
            return
        kept.restore()
        self._refuse(
            f"the weights have moved by {moved:.2g} of their norm, and the model that EBC calls says exactly "
            "the same: it computes from a copy of the weights (a cache, packed or merged weights, a captured "
            "graph), or these weights have no part in its logits. Attach to the module whose logits they "
            f"make. {WRONG}"
        )

    def _refuse(self, message: str) -> None:
        """Raises ValueError, or warns in a run that is resumed: it has trained like this before."""
        if not self.clip.given.resumed:
            raise ValueError(message)
        warnings.warn(message, checks.EBCWarning, stacklevel=2)

    @contextmanager
    def _trying(self) -> Iterator[None]:
        """What fails inside ends the look, and not the training, with a warning."""
        try:
            yield
        except Exception as error:
            self.look.failed = checks.failed(error)
            message = (
                f"EBC's first steps were not looked at: a forward failed meanwhile ({self.look.failed})."
            )
            warnings.warn(message, checks.EBCWarning, stacklevel=2)


class Looking:
    """One step: `before` it at W, `after` it at W + c·dW."""

    def __init__(self, opened: Opened, batch: Batch, forward: Forward, capture: Capture):
        self.batch = batch
        self.forward = forward
        self.capture = capture
        self.kept = opened.kept
        self.k = len(batch.probe.z)
        self.size = min(batch.size, 2 * self.k)
        self.at = batch.choice.seen()
        # where all rows choose c, or are called together, one may depend on the others, and on their order
        self.turns = self.k < batch.size and not batch.prober.whole
        try:
            self.z, self.outputs = self._logits()
        except Exception:  # they must be sorted, by their lengths as a rule
            self.turns = False
            self.z, self.outputs = self._logits()
        self.leading_mask = None if forward.mask is None else capture.rows_first(forward.mask)
        every = torch.ones(self.z.shape[:-1], dtype=torch.bool, device=self.z.device)
        self.mask = every if self.leading_mask is None else rows.take(self.leading_mask, self.at)
        self.seen = Seen(self._kl(batch.probe.z, self.z, slice(self.k)), batch.floor)

    def _kl(self, before: Tensor, after: Tensor, part: slice) -> float:
        """That of some of the rows that are looked at, from `before` on, which holds these alone."""
        return float(mean_kl(before, after[part], self.mask[part]))

    def _logits(self) -> tuple[Tensor, dict[int, Tensor | None]]:
        """The logits, and what they are made of where they are no view of it: by place, rows first."""
        source = self.forward.source
        at = self.at.flip(0) if self.turns else self.at
        self.capture.keeping = source is not None
        try:
            z = self.batch.logits(self.batch.cut(at), None if self.turns else at)
            returned = tensors_of(self.capture.returned)
        finally:
            self.capture.keeping = False
            self.capture.returned = None
        outputs = {}
        for place in [] if source is None else source.places:
            axis = self.batch.prober.axis
            some = rows_of(returned[place], self.size, axis) if place < len(returned) else None
            outputs[place] = some if some is None or not self.turns else some.flip(0)
        return (z.flip(0) if self.turns else z), outputs

    def after(self, weights: Sequence[Tensor], gradients: dict[int, Tensor] | None) -> None:
        """`gradients`: of the weights, where this forward has made all of them."""
        seen = self.seen
        z, outputs = self._logits()
        k = self.k
        seen.kl, seen.kl_others = self._kl(self.z[:k], z, slice(k)), self._kl(self.z[k:], z, slice(k, None))
        seen.tokens_others = int(self.mask[k:].bool().sum())
        seen.unused = self.forward.used is False
        gradient, source = self.forward.gradient, self.forward.source
        if gradient is not None and gradient.usable:
            seen.idle = losses.share_of(~gradient.rows.any(-1), self.leading_mask)
            seen.doubt = losses.doubt(gradient, losses.are_log_probabilities(self.z))
        elif source is not None:
            seen.idle = source.idle(self.leading_mask)
        leading = self.batch.choice.order is None  # as the rows are whose gradient is known
        if gradients is not None and leading and seen.kl < SMALL and not self.batch.prober.normalises:
            seen.share = self._share(z, outputs, weights, gradients)

    def _share(
        self,
        z: Tensor,
        outputs: dict[int, Tensor | None],
        weights: Sequence[Tensor],
        gradients: dict[int, Tensor],
    ) -> float:
        """The part of the promised fall of the loss that passes the logits, or what they are made of."""
        forward, source = self.forward, self.forward.source
        if self.kept is None or forward.backwards != 1 or (source is not None and source.has_weights):
            return math.nan
        if source is None:
            seen = _fall(forward.gradient, self.z, z, self.k)
        else:
            falls = [_fall(source.gradients.get(i), self.outputs[i], outputs[i], self.k) for i in outputs]
            seen = sum(falls)
        promised = 0.0
        for p, old in zip(weights, self.kept.views, strict=True):
            g = gradients.get(id(p))
            if g is None and p.grad is not None:
                return math.nan  # it was made by something else than backward
            if g is not None:
                promised -= float((real(g).double() * (real(local(p)).double() - real(old).double())).sum())
        return seen / promised if promised > 0 else math.nan


def _fall(gradient: losses.Gradient | None, before: Tensor | None, after: Tensor | None, k: int) -> float:
    """What a movement makes of the fall of the loss, from its `k` leading rows; NaN where that is unknown."""
    if gradient is None or not gradient.usable or before is None or after is None:
        return math.nan
    rows = min(len(gradient.rows), k)
    g = gradient.rows[:rows].double()
    part = float(g.abs().sum()) / gradient.mass
    if not part > 0 or before[:rows].shape != g.shape or after[:rows].shape != g.shape:
        return math.nan
    return -float((g * (after[:rows].double() - before[:rows].double())).sum()) / part
