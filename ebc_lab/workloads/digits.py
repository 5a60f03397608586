"""Scikit-learn's digits: 1,797 images of 8×8 pixels in 17 levels, with their classes, 0 to 9. No torch here.

The test set of Alpaydin & Kaynak 1998 (UCI, Optical Recognition of Handwritten Digits), which the library
ships, so that nothing is downloaded. They are split 60/20/20 in an order drawn once for all: writers are
shared between the splits.
"""

from __future__ import annotations

import functools
import hashlib
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import SPLITS

CLASSES = 10
SIDE = 8  # pixels
MEAN, SPREAD = 5, 6  # of the pixels, about
BOUNDARIES = (0.60, 0.80)  # of train | val | test
# of pixels and classes, in the order that is split
SHA256 = "41603210916a6c1ce0a3d6372e74c54b9d8ce99d13cc38d2b4b7753b1891d389"


class Images(NamedTuple):
    """The images of a split, or all of them."""

    pixels: np.ndarray  # (n, 8, 8) uint8, 0 to 16
    classes: np.ndarray  # (n,) uint8

    def sha256(self) -> str:
        """The checksum of pixels and classes."""
        return hashlib.sha256(self.pixels.tobytes() + self.classes.tobytes()).hexdigest()


@functools.cache
def digits() -> dict[str, Images]:
    """Return split -> its images. Raises UserError where the library ships others."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(loaded.target))
    whole = Images(loaded.images[order].astype(np.uint8), loaded.target[order].astype(np.uint8))
    if whole.sha256() != SHA256:
        raise UserError(
            f"scikit-learn's digits have sha256 {whole.sha256()[:12]}…, not {SHA256[:12]}…: install another "
            "version of scikit-learn."
        )
    cuts = [0, *(int(len(order) * b) for b in BOUNDARIES), len(order)]
    return {
        split: Images(whole.pixels[a:b], whole.classes[a:b])
        for split, (a, b) in zip(SPLITS, pairwise(cuts), strict=True)
    }
