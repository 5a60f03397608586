"""`Watch`: says once when a budget has stopped training, whatever the cause."""

from __future__ import annotations

import warnings

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

    def see(self, c: float, *, bad_gradient: bool, unmeasured: bool) -> None:
        """One step: its c, 0 where it was skipped; whether for its gradient; whether no KL was measured."""
        skipped = bad_gradient or c == 0
        self._count("tiny", 0 < c < TINY)
        self._count("gradients", bad_gradient)
        self._count("skipped", skipped and not bad_gradient)
        self._count("unmeasured", unmeasured and not skipped)

    def _count(self, what: str, seen: bool) -> None:
        self._in_a_row[what] = self._in_a_row[what] + 1 if seen else 0
        if self._in_a_row[what] == PATIENCE and what not in self._said:
            self._said.add(what)
            warnings.warn(f"{PATIENCE} steps in a row {SENTENCES[what]}", EBCWarning, stacklevel=3)
