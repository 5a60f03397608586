"""The parameters of language models, counted from their configurations, without transformers.

A family is a `model_type` of transformers, or "qwen", the original Qwen, or "ebc-gpt", the lab's own. What is
counted are the shapes that transformers builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

Shape = tuple[int, ...]


class Weight(NamedTuple):
    """A parameter: its shape, and whether INT8 loading quantises and freezes it."""

    shape: Shape
    quantised: bool = False


Weights = Counter[Weight]  # how many of each a model has


def weights_by_config(config: Mapping[str, Any], source: str) -> Weights:
    """Count the parameters of a configuration. Raises ValueError, with `source`, where it cannot."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        names = ", ".join(_FAMILIES)
        remedy = "build the model on the meta device and pass that for any other"
        raise ValueError(f"{source} has model_type={family!r}: known are {names}; {remedy}.")
    return _FAMILIES[family](_Fields(config, source))


@dataclass(frozen=True)
class _Fields:
    """A configuration, and what to call it where one of its fields is wrong."""

    config: Mapping[str, Any]
    source: str

    def count(self, name: str, default: int | None = None) -> int:
        """Read a whole number of 1 or more; `default` where it is missing or null."""
        value = self.config.get(name)
        if value is None and default is not None:
            return default
        if value is None:
            raise ValueError(f"{self.source} has no {name}: a whole number is needed to count weights.")
        if type(value) is not int or value < 1:
            raise self.wrong(name, "a whole number of 1 or more")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.config.get(name)
        if value is None:
            return default
        if type(value) is not bool:
            raise self.wrong(name, "true or false")
        return value

    def refuse(self, name: str, why: str) -> None:
        if self.flag(name, False):
            raise self.wrong(name, f"false, as {why}")

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.source} has {name}={self.config.get(name)!r}: it must be {wanted}.")


def _weights(
    blocks: int, matrices: Iterable[Shape], vectors: Iterable[int], outside: Iterable[Shape]
) -> Weights:
    """Count the matrices of each block's linear layers, its vectors, and what is outside the blocks."""
    weights: Weights = Counter(Weight(shape) for shape in outside)
    for shape in matrices:
        weights[Weight(shape, True)] += blocks
    for length in vectors:
        weights[Weight((length,))] += blocks
    return weights


def _head(fields: _Fields, width: int, tied: bool = False) -> list[Shape]:
    """Return the shapes of the embedding and, unless it is the same, of the head; `tied` where not said."""
    table = (fields.count("vocab_size"), width)
    return [table] if fields.flag("tie_word_embeddings", tied) else [table, table]


# -- Llama's relatives ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rotary:
    """In what a family differs from Llama: rotary decoders, whose MLPs have gates, without biases."""

    needs: tuple[str, ...] = ()  # fields whose absence leaves it open what they are
    tied: bool = False  # whether the head is the embedding where the configuration does not say
    norms: int = 2  # in a block, vectors of the width
    head_norms: int = 0  # in a block, vectors of a head's width
    biases: str = ""  # which attention matrices always have one, of "qkvo"
    flags: tuple[str, ...] = ()  # the fields, of attention_bias and mlp_bias, that are read
    fused: bool = False  # whether q, k and v are one matrix, and the gate and its rival


_KV = ("num_key_value_heads",)
_HEADS = ("num_key_value_heads", "head_dim")
_BIASED = ("attention_bias",)
_ROTARY = {
    "llama": _Rotary(flags=("attention_bias", "mlp_bias")),
    "mistral": _Rotary(_KV),
    "gemma": _Rotary(_HEADS, tied=True, flags=_BIASED),
    "gemma2": _Rotary(_HEADS, tied=True, norms=4, flags=_BIASED),
    "gemma3_text": _Rotary(_HEADS, tied=True, norms=4, head_norms=2, flags=_BIASED),
    "phi3": _Rotary(fused=True),
    "qwen2": _Rotary(_KV, biases="qkv"),
    "qwen3": _Rotary(_HEADS, head_norms=2, flags=_BIASED),
}


def _rotary_weights(family: _Rotary, fields: _Fields) -> Weights:
    for name in family.needs:
        if name not in fields.config:
            fields.count(name)  # null has a meaning, but there is no telling what absence does
    d, queries, keys, head = _heads(fields)
    inner = fields.count("intermediate_size")
    attention = {"q": (queries, d), "k": (keys, d), "v": (keys, d), "o": (d, queries)}
    mlp = [(inner, d), (inner, d), (d, inner)]
    read = {name: fields.flag(name, False) for name in family.flags}
    biased = [attention[name] for name in ("qkvo" if read.get("attention_bias") else family.biases)]
    biased += mlp * read.get("mlp_bias", False)
    vectors = [d] * family.norms + [head] * family.head_norms + [rows for rows, _ in biased]
    matrices = [*attention.values(), *mlp]
    if family.fused:
        matrices = [(queries + 2 * keys, d), (d, queries), (2 * inner, d), (d, inner)]
    outside = [*_head(fields, d, family.tied), (d,)]
    return _weights(fields.count("num_hidden_layers"), matrices, vectors, outside)


def _heads(fields: _Fields) -> tuple[int, int, int, int]:
    """Return the width, and the widths of all queries, of all keys, and of a head."""
    key_value_heads = fields.count("num_key_value_heads", fields.count("num_attention_heads"))
    d = fields.count("hidden_size")
    heads = fields.count("num_attention_heads")
    if fields.config.get("head_dim") is None and d % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size={d}, or head_dim given")
    if heads % key_value_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    head = fields.count("head_dim", d // heads)
    return d, heads * head, key_value_heads * head, head


# -- the others ----------------------------------------------------------------------------------------------


def _gpt2_weights(fields: _Fields) -> Weights:
    d = fields.count("n_embd")
    inner = fields.count("n_inner", 4 * d)
    fields.refuse("add_cross_attention", "only the decoder alone is counted")
    outside = [*_head(fields, d, tied=True), (fields.count("n_positions"), d), (d,), (d,)]
    matrices = [(d, 3 * d), (d, d), (d, inner), (inner, d)]
    vectors = [d, d, d, d, 3 * d, d, inner, d]  # two norms, and the biases of the four
    return _weights(fields.count("n_layer"), matrices, vectors, outside)


def _gptj_weights(fields: _Fields) -> Weights:
    d = fields.count("n_embd")
    inner = fields.count("n_inner", 4 * d)
    outside = [*_head(fields, d), (fields.count("vocab_size"),), (d,), (d,)]  # the head has a bias
    matrices = [*[(d, d)] * 4, (inner, d), (d, inner)]
    return _weights(fields.count("n_layer"), matrices, [d, d, inner, d], outside)


def _phi_weights(fields: _Fields) -> Weights:
    """Count Phi 1, 1.5 and 2: biases everywhere, no gate, one norm a block."""
    d, queries, keys, _ = _heads(fields)
    inner = fields.count("intermediate_size")
    fields.refuse("qk_layernorm", "norms of queries and keys are not counted")
    matrices = [(queries, d), (keys, d), (keys, d), (d, queries), (inner, d), (d, inner)]
    outside = [*_head(fields, d), (fields.count("vocab_size"),), (d,), (d,)]
    vectors = [d, d, *(rows for rows, _ in matrices)]
    return _weights(fields.count("num_hidden_layers"), matrices, vectors, outside)


def _qwen_weights(fields: _Fields) -> Weights:
    """Count the original Qwen, whose intermediate_size is that of the gate and its rival together."""
    d = fields.count("hidden_size")
    queries = fields.count("kv_channels") * fields.count("num_attention_heads")
    inner = fields.count("intermediate_size") // 2
    matrices = [(3 * queries, d), (d, queries), (inner, d), (inner, d), (d, inner)]
    unbiased = fields.flag("no_bias", True)
    vectors = [d, d, *(rows for rows, _ in (matrices[:1] if unbiased else matrices))]
    return _weights(fields.count("num_hidden_layers"), matrices, vectors, [*_head(fields, d), (d,)])


def _ebc_gpt_weights(fields: _Fields) -> Weights:
    """Count the lab's own GPT: no biases, separate q, k, v and o, untied head."""
    d = fields.count("width")
    vocabulary = fields.count("vocabulary")
    matrices = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
    outside: list[Shape] = [(vocabulary, d), (fields.count("context"), d), (d,), (vocabulary, d)]
    return _weights(fields.count("blocks"), matrices, [d, d], outside)


_FAMILIES: dict[str, Callable[[_Fields], Weights]] = {
    "gpt2": _gpt2_weights,
    "gptj": _gptj_weights,
    "phi": _phi_weights,
    "qwen": _qwen_weights,
    **{name: partial(_rotary_weights, family) for name, family in _ROTARY.items()},
    "ebc-gpt": _ebc_gpt_weights,
}
