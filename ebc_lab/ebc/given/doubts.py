"""`Doubts`: what is said where a model, its logits or its steps are not what EBC takes them for.

Errors come before a step of theirs has moved a weight; in a run that is resumed, which has trained like this
before, they are warnings.
"""

from __future__ import annotations

import warnings

import torch

from ..budgets import Need
from ..clip import EllipsotopeClip
from ..flat import Copy, joint_norm
from ..parallel.shards import local
from ..proposal import Opened
from . import checks, losses
from .capture import Capture, Forward
from .look import Look
from .watch import Watch

BELIEVING = 10  # steps at the start in which a measured KL of 0 is doubted
SEEN = 1e-5  # of the weights' norm: a larger step changes the last bits of some logit
WRONG = "(check=False if EBC is wrong in this.)"


class Doubts:
    """Looks at each forward before its step, and at each step after it.

    Args:
        clip: whose steps are taken.
        capture: what it is given.
        look: at the first steps; None: nothing is doubted.
    """

    def __init__(self, clip: EllipsotopeClip, capture: Capture, look: Look | None):
        self.clip = clip
        self.capture = capture
        self.look = look
        self._watch = Watch()
        self._believing = BELIEVING if look is not None else 0  # steps in which a KL of 0 is looked at
        self._found = False  # whether a model that returns its loss has been seen to return logits

    def suspect(self, forward: Forward) -> None:
        """Raises ValueError where a forward's logits are not what EBC takes them for, while no step has moved
        a weight; afterwards the look says so."""
        if self.look is None or self.look.done or forward.logits is None or forward.overwritten:
            return
        logits = self.capture.rows_first(forward.logits)
        checks.rows_of(forward.batch, logits, None, self.capture.axis)
        wrong = losses.refusal(logits, forward.gradient)
        if wrong is not None and not self.look.steps and not self.clip.given.resumed:
            raise ValueError(f"{wrong} {WRONG}")
        self.look.wrong = wrong or self.look.wrong

    def suspect_own(self, opened: Opened) -> None:
        """Raises ValueError where the model returns something else in evaluation than in training."""
        if self.look is None or self.look.done or opened.batch is None or opened.batch.reused:
            return
        given = None if self.capture.last is None else self.capture.last.logits
        in_training = given is not None and losses.are_probabilities(self.capture.rows_first(given))
        if losses.are_probabilities(opened.batch.probe.z) and not in_training:
            self._refuse(
                "in evaluation mode, in which EBC measures, the model returns probabilities, and in training "
                "logits: give logits_of=lambda z: z if model.training else z.log(), z being what it returns "
                f"or what logits_of makes of that. {WRONG}"
            )

    def find_logits(self, forward: Forward) -> None:
        """Find out without which arguments a model that has returned its loss returns its logits.

        Those that hold no tensor and have a default may be what makes it return a loss, as a flag for a fused
        head does. Raises ValueError where neither way gives logits.
        """
        if forward.logits is not None or self._found:
            return
        arguments, prober = self.capture.arguments, self.clip.prober
        flags = () if arguments.chosen else arguments.flags(forward.batch)
        without = {k: v for k, v in forward.batch["kwargs"].items() if k not in flags}
        errors = []
        with self.capture.pause(), forward.precision():
            for batch in (forward.batch, {**forward.batch, "kwargs": without})[: 1 + bool(flags)]:
                try:
                    with prober.measuring(), torch.no_grad():
                        prober.as_trained(batch)
                except ValueError as error:
                    errors.append(error)
                else:
                    self._found = True
                    break
        if not self._found:
            given = ", ".join(forward.batch["kwargs"]) or "its own"
            raise ValueError(
                "the model has returned a loss and no logits, and called without "
                f"{', '.join(arguments.drop)} it returned none either ({checks.failed(errors[0])}): name all "
                f"arguments that only its loss needs, of {given} too, in "
                f"drop=({arguments.drop[0]!r}, …), or attach to the module inside it that returns logits."
            ) from errors[0]
        if errors:
            arguments.drop = (*arguments.drop, *flags)
            forward.batch = batch

    def after(self, opened: Opened) -> None:
        """Say what stops training. Raises ValueError where moved weights change no prediction at all."""
        clip = self.clip
        limits = clip.settings.limits(opened.t)
        due = limits and clip.settings.measure == "every" and clip.budget.need is Need.MEASUREMENT
        kl = opened.stats.trial_kl
        self._watch.see(
            clip.last_c if limits else 1.0,
            bad_gradient=opened.void,
            unmeasured=due and kl is None and clip.budget.measures_kl(opened.t),
        )
        if self._believing and kl is not None and opened.kept is not None and not opened.stats.skipped:
            self._believing -= 1
            if not kl > 0:
                self._doubt(opened, opened.kept)

    def _doubt(self, opened: Opened, kept: Copy) -> None:
        """A KL of 0 was measured: may it be believed?"""
        assert opened.batch is not None
        weights = [local(p) for p in self.clip.weights]
        length = joint_norm(kept.views)
        moved = float(joint_norm(torch._foreach_sub(weights, kept.views)) / length)
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

    def unseen(self) -> str:
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

    def _refuse(self, message: str) -> None:
        """Raises ValueError, or warns in a run that is resumed: it has trained like this before."""
        if not self.clip.given.resumed:
            raise ValueError(message)
        warnings.warn(message, checks.EBCWarning, stacklevel=2)
