"""Where a text is cut into training, validation and test."""

from __future__ import annotations

from itertools import pairwise

from ebc_lab.config.schema import SPLITS

BOUNDARIES = (0.90, 0.95)  # of train | val | test


def split_slices(n: int) -> dict[str, slice]:
    """Return split -> its part of a text of n characters."""
    cuts = [0, *(int(n * b) for b in BOUNDARIES), n]
    return {split: slice(a, b) for split, (a, b) in zip(SPLITS, pairwise(cuts), strict=True)}
