"""`Watch`: says once when a budget has stopped training, whatever the cause."""

from __future__ import annotations

import warnings

from ..budgets import Need
from ..clip import EllipsotopeClip
from ..proposal import Opened
from .checks import EBCWarning

PATIENCE = 10  # steps in a row
TINY = 1e-6  # a smaller c moves nothing
SENTENCES = {
    "tiny": (
        f"were shortened to less than {TINY:g} of what the optimizer proposed, so that nothing moves: "
        "something other than the weights changes predictions between the two forwards that EBC compares (a "
        "buffer or weight that a hook or the forward moves, random numbers), or target_kl is far too small. "
        "Look at ebc.last.trial_kl, the KL that was measured, and at trial, the c it was measured at."
    ),
    "gradients": (
        "were skipped because a gradient was not finite: look at the loss, and at ebc.last.grad_norm. "
        "Without EBC such a step makes weights NaN."
    ),
    "skipped": (
        "were skipped because no part of the update had a finite KL: look at the model's logits after a "
        "step, and lower the learning rate."
    ),
    "unmeasured": (
        "had no position that counts among the rows that choose c, so that the last c was used again each "
        "time: look at what mask_of, or the attention mask, leaves."
    ),
}


class Watch:
    """Counts steps in a row in which hardly anything moved or nothing could be measured; says so at ten."""

    def __init__(self) -> None:
        self._in_a_row = dict.fromkeys(SENTENCES, 0)
        self._said: set[str] = set()

    def see(self, clip: EllipsotopeClip, opened: Opened) -> None:
        """A step of `clip` that has ended."""
        limits = clip.settings.limits(opened.t)
        c = clip.last_c if limits else 1.0
        due = limits and clip.settings.measure == "every" and clip.budget.need is Need.MEASUREMENT
        unmeasured = due and opened.stats.trial_kl is None and clip.budget.measures_kl(opened.t)
        seen = {
            "tiny": 0 < c < TINY,
            "gradients": opened.void,
            "skipped": c == 0 and not opened.void,
            "unmeasured": unmeasured and c != 0 and not opened.void,
        }
        for what, is_so in seen.items():
            self._in_a_row[what] = self._in_a_row[what] + 1 if is_so else 0
            if self._in_a_row[what] == PATIENCE and what not in self._said:
                self._said.add(what)
                warnings.warn(f"{PATIENCE} steps in a row {SENTENCES[what]}", EBCWarning, stacklevel=2)
