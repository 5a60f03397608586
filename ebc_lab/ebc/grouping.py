"""Which parameters are budgeted together. A grouping is one function from a parameter's name to its group's name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_BLOCK = re.compile(r"(?:^|\.)(?:blocks?|layers?|h)\.(\d+)\.")


def _by_block(names: list[str]) -> list[str]:
    blocks = [_BLOCK.search(name) for name in names]
    seen = [i for i, match in enumerate(blocks) if match]
    if not seen:
        return ["model"] * len(names)
    groups = []
    for i, match in enumerate(blocks):
        groups.append(f"block{match.group(1)}" if match else "embeddings" if i < seen[0] else "head")
    return groups


GROUPINGS: dict[str, Callable[[list[str]], list[str]]] = {"block": _by_block}


def group_parameters(names: Iterable[str], kind: str = "block") -> dict[str, list[str]]:
    """Parameter names, in the model's order, -> {group: its names}, in order of first appearance.

    `block`: what comes before the first block is `embeddings`, each `blocks.N`, `layers.N` or `h.N` is `blockN`, the rest
    is `head`. Raises ValueError on an unknown kind.
    """
    if kind not in GROUPINGS:
        raise ValueError(f"grouping={kind!r} is unknown; it takes {', '.join(GROUPINGS)}.")
    names = list(names)
    groups: dict[str, list[str]] = {}
    for name, group in zip(names, GROUPINGS[kind](names), strict=True):
        groups.setdefault(group, []).append(name)
    return groups
