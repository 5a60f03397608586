"""Which parameters are budgeted together, by their names: this project's and Hugging Face's usual ones."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from .options import GROUPINGS, check_option

_BLOCK = re.compile(r"(?:^|\.)(?:blocks?|layers?|h)\.(\d+)\.")

# The modules that hold the hidden matrices, by the end of their names. Those of both attention and mlp
# (c_proj, wo, output.dense) are listed under mlp, and an `attention` in front of them decides otherwise.
_ATTENTION = (
    *("q", "q_proj", "q_lin", "query", "wq", "q_attn"),
    *("k", "k_proj", "k_lin", "key", "wk"),
    *("v", "v_proj", "v_lin", "value", "wv"),
    *("qkv", "qkv_proj", "query_key_value", "Wqkv", "c_attn", "in_proj"),
    *("o", "o_proj", "out_proj", "out_lin", r"(?:self_)?(?:attention|attn)\.dense"),
)
_MLP = (
    *("mlp_in", "fc1", "fc_in", "c_fc", "lin1", "linear1", "gate_proj", "up_proj", "gate_up_proj"),
    *("w1", "w3", "wi", "wi_0", "wi_1", "dense_h_to_4h", r"intermediate\.dense"),
    *("mlp_out", "fc2", "fc_out", "c_proj", "lin2", "linear2", "down_proj"),
    *("w2", "wo", "dense_4h_to_h", r"output\.dense"),
)


def _held_by(modules: Sequence[str]) -> str:
    """The pattern of these modules' parameters; in `in_proj_weight` the module has no name of its own."""
    return rf"(?:^|\.)(?:{'|'.join(modules)})[._](?:weight|bias)$"


_TYPES = {  # the first pattern that matches decides
    "norm": re.compile(r"norm|(?:^|\.)ln\w*\.", re.IGNORECASE),
    "head": re.compile(r"(?:^|\.)(?:head|lm_head|embed_out|cls|classifier|score|pooler)\.|^output\."),
    "embedding": re.compile(r"embed|(?:^|\.)w[tp]e\."),
    "attention": re.compile(rf"attn|attention|{_held_by(_ATTENTION)}", re.IGNORECASE),
    "mlp": re.compile(rf"mlp|ffn|feed_?forward|{_held_by(_MLP)}", re.IGNORECASE),
}
_HIDDEN = re.compile(_held_by(_ATTENTION + _MLP))


def _by_block(names: list[str]) -> list[str]:
    groups: list[str] = []
    rest = "embeddings"  # what comes before the first block; after it, the head
    for name in names:
        match = _BLOCK.search(name)
        if match:
            rest = "head"
        groups.append(f"block{match.group(1)}" if match else rest)
    return groups if rest == "head" else ["model"] * len(names)


def _type(name: str) -> str:
    return next((kind for kind, pattern in _TYPES.items() if pattern.search(name)), "other")


def _is_hidden_matrix(name: str) -> bool:
    return name.endswith("weight") and bool(_HIDDEN.search(name)) and _type(name) in ("attention", "mlp")


def _as_given(names: Sequence[str], groups: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """A grouping that was made elsewhere, which must hold each parameter once."""
    listed_names = [name for members in groups.values() for name in members]
    complaints = {
        "unknown": set(listed_names).difference(names),
        "in two places": {name for name in listed_names if listed_names.count(name) > 1},
        "in no group": set(names).difference(listed_names),
        "without a parameter": {group for group, members in groups.items() if not members},
    }
    for complaint, wrong in complaints.items():
        if wrong:
            listed = ", ".join(map(repr, sorted(wrong)))
            raise ValueError(f"grouping must hold every trained parameter once: {listed} is {complaint}.")
    return {group: list(members) for group, members in groups.items()}


def group_parameters(
    names: Iterable[str],
    kind: str | Mapping[str, Sequence[str]] = "block",
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, list[str]]:
    """Parameter names, in the model's order, -> {group: its names}, in order of first appearance.

    * `block`: what comes before the first block is `embeddings`, each `blocks.N`, `layers.N` or `h.N` is
      `blockN`, the rest is `head`; without any block, everything is `model`
    * `tensor`: each its own
    * `type`: `attention`, `mlp`, `norm`, `embedding`, `head`; anything else is `other`
    * `matrices`: each of q, k, v, o, mlp-in and mlp-out is its own group; everything else is left out. With
      `shapes` (name -> shape) only the two-dimensional ones count
    * `global`: one group, `all`
    * a mapping {group: names}: as it says, in its own order

    Raises ValueError on an unknown kind, where `matrices` finds none, and where a mapping does not hold every
    name exactly once.
    """
    names = list(names)
    if isinstance(kind, Mapping):
        return _as_given(names, kind)
    check_option("grouping", kind, GROUPINGS)
    if kind == "matrices":
        hidden = filter(_is_hidden_matrix, names)
        names = [name for name in hidden if shapes is None or len(shapes[name]) == 2]
        if not names:
            raise ValueError(
                "grouping='matrices' found no hidden matrix (q, k, v, o, mlp-in, mlp-out) by name: use "
                "grouping='tensor'."
            )
    of_each = {"block": _by_block(names), "type": map(_type, names), "global": ["all"] * len(names)}
    groups: dict[str, list[str]] = {}
    for name, group in zip(names, of_each.get(kind, names), strict=True):
        groups.setdefault(group, []).append(name)
    return groups
