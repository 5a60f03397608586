"""All loops."""

from __future__ import annotations

from . import labels, language, losses, policies, time_first, transformers_models, unusual, vision
from .loop import Loop

KINDS = (language, losses, time_first, transformers_models, vision, labels, policies, unusual)
LOOPS: list[Loop] = [loop for kind in KINDS for loop in kind.LOOPS]
