"""The memory that training a model takes before activations, counted from the shapes of its parameters.

A model is a count of `Weight`s. Those of GPT-2, Llama and Mistral follow from their configurations, those of
a module from its parameters (on the meta device, too: no memory is needed), and every figure is counted from
them. GB are 1e9 bytes. What the figures mean is in docs/axiom.md, "What it costs".
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from .update import compression, state_bytes

GB = 1e9  # bytes
INT4_BYTES = 0.5 + 2 / 64  # of a weight: its four bits, and a 16-bit scale shared by 64

NEAREST = 4  # names that an error lists

Shape = tuple[int, ...]


class Weight(NamedTuple):
    """A parameter: its shape, and whether INT8 loading quantises and freezes it."""

    shape: Shape
    quantised: bool = False


Weights = Counter[Weight]  # how many of each a model has


# -- known names and published claims ------------------------------------------------------------------------


def _llama(width: int, blocks: int, heads: int, inner: int, **others: Any) -> dict[str, Any]:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": width, "num_hidden_layers": blocks}
    return config | {"num_attention_heads": heads, "intermediate_size": inner} | others


def _gpt2(width: int, blocks: int) -> dict[str, Any]:
    tokens = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
    return tokens | {"n_embd": width, "n_layer": blocks}


KNOWN: dict[str, dict[str, Any]] = {
    "laptop-gpt": {"model_type": "ebc-gpt", "vocabulary": 65, "context": 64, "width": 128, "blocks": 3},
    "gpt2": _gpt2(768, 12),
    "gpt2-medium": _gpt2(1024, 24),
    "gpt2-large": _gpt2(1280, 36),
    "gpt2-xl": _gpt2(1600, 48),
    "huggyllama/llama-7b": _llama(4096, 32, 32, 11008),
    "huggyllama/llama-13b": _llama(5120, 40, 40, 13824),
    "huggyllama/llama-30b": _llama(6656, 60, 52, 17920),
    "huggyllama/llama-65b": _llama(8192, 80, 64, 22016),
    "meta-llama/Llama-2-7b-hf": _llama(4096, 32, 32, 11008),
    "meta-llama/Llama-2-13b-hf": _llama(5120, 40, 40, 13824),
    "meta-llama/Llama-2-70b-hf": _llama(8192, 80, 64, 28672, num_key_value_heads=8),
    "mistralai/Mistral-7B-v0.1": _llama(4096, 32, 32, 14336, num_key_value_heads=8, model_type="mistral"),
    "01-ai/Yi-1.5-6B": _llama(4096, 32, 32, 11008, num_key_value_heads=4, vocab_size=64000),
    "01-ai/Yi-1.5-9B": _llama(4096, 48, 32, 11008, num_key_value_heads=4, vocab_size=64000),
    "01-ai/Yi-1.5-34B": _llama(7168, 60, 56, 20480, num_key_value_heads=8, vocab_size=64000),
}
"""Configurations of the models known by name."""

CLAIMS: dict[str, dict[str, float]] = {
    "gpt2-large": {"total_compression": 170.0},
    "huggyllama/llama-7b": {
        "state_compression": 280.0,
        "gradient_compression": 200.0,
        "total_compression": 220.0,
        "axiom_gradients_gb": 0.14,
    },
    "01-ai/Yi-1.5-34B": {"total_compression": 853.0, "axiom_gradients_gb": 0.2},
}
"""The promises of the method's public description for some of them, by the keys of `estimate_memory`."""

TABLE = {
    "laptop-gpt": "laptop GPT, 0.616 M",
    "gpt2": "GPT-2 124 M",
    "gpt2-large": "GPT-2 774 M",
    "huggyllama/llama-7b": "Llama 7 B",
    "01-ai/Yi-1.5-34B": "Yi 34 B",
}
"""The models of `compression_table`, and what it calls them."""


# -- estimates -----------------------------------------------------------------------------------------------


def estimate_memory(
    name_or_config: str | Path | Mapping[str, Any] | nn.Module,
    *,
    rank: int = 4,
    device_gb: float | None = None,
) -> dict[str, Any]:
    """Estimate what training all weights takes with AXIOM, and with AdamW in float32, without activations.

    Args:
        name_or_config: a name in `KNOWN` (in any case; without its owner or `-hf`, too), a folder with
            config.json, such a file, a configuration, or a module. A known name is not looked up as a
            folder: write ./gpt2 for that. Of a module all parameters count, frozen ones too.
        rank: of AXIOM's momentum; 0 is none.
        device_gb: memory of the device in GB of 1e9 bytes, for `recommendation`.

    Returns the numbers of weights `parameters` and, in the largest tensor, `largest_tensor`; and in GB

    * `fp32_gb`, `fp16_gb`: the weights in 4 and 2 bytes
    * `int8_gb`: linear layers in 1 byte, all else (embeddings, the head, vectors) in 2. Their scales, one a
      row, are not counted: below 0.1% of it from a width of 1024 on
    * `int4_gb`: the same with 4 bits, and a 16-bit scale for every 64 weights
    * `adamw_state_gb`, `adamw_gradients_gb`: 8 and 4 bytes a weight
    * `axiom_state_gb`: the float32 tensors that the optimizer keeps. Of a matrix (m, n) and r = min(rank, m,
      n), the second moment (m + n) and the momentum's factors (m, r) and (n, r); of a vector, two values an
      element, at rank 0 one. A tensor's step and streak, two Python numbers, are not counted
    * `axiom_gradients_gb`: the largest tensor in 2 bytes, as with hooks one gradient exists at a time
    * `axiom_fp16_training_gb`: fp16_gb, axiom_state_gb and axiom_gradients_gb
    * `adamw_fp32_training_gb`: fp32_gb, adamw_state_gb and adamw_gradients_gb

    Then AdamW's bytes over AXIOM's: `state_compression`, `gradient_compression` and, of both together,
    `total_compression`. `recommendation` is a sentence.

    Raises FileNotFoundError for an unknown name (nothing is downloaded), ValueError for a configuration that
    is damaged, of another family or has no sensible numbers, for rank < 0 and device_gb <= 0, and TypeError
    for anything else.
    """
    if type(rank) is not int or rank < 0:
        raise ValueError(f"rank={rank!r} is no rank: it must be a whole number, 0 for no momentum.")
    if device_gb is not None and not 0 < device_gb < math.inf:
        raise ValueError(f"device_gb={device_gb} is no size of a memory: name its GB, above 0.")
    weights = weights_of(name_or_config)
    every = _Totals.of(weights, rank)
    if not every.parameters:
        raise ValueError("the model has no parameters, so there is nothing to estimate.")
    under_int8 = {weight: count for weight, count in weights.items() if not weight.quantised}
    trained = _Totals.of(Counter(under_int8), rank)
    sizes = _sizes(every, trained)
    return sizes | {"recommendation": _recommendation(sizes, every, trained, device_gb)}


def compression_table(ranks: Sequence[int] = (0, 4, 16)) -> list[dict[str, Any]]:
    """Count the true compression of the models of `TABLE`, a row each, beside what is claimed of them.

    A row has `name`, `label`, `parameters`, `state` (by rank), `gradients` (of AXIOM in 4 and in 2 bytes a
    weight, by bytes), `total` (the same, at rank 4) and `claims`. The baseline is AdamW: 8 bytes of state and
    4 of gradient a weight.
    """
    rows = []
    for name, label in TABLE.items():
        weights = weights_of(name)
        model = _Totals.of(weights, 4)
        n = model.parameters
        row: dict[str, Any] = {"name": name, "label": label, "parameters": n}
        by_size = {size: compression(n, model.state, size * model.largest) for size in (4, 2)}
        states = {rank: _Totals.of(weights, rank).state for rank in ranks}
        row["state"] = {rank: compression(n, state, 0)["state_compression"] for rank, state in states.items()}
        row["gradients"] = {size: ratios["gradient_compression"] for size, ratios in by_size.items()}
        row["total"] = {size: ratios["total_compression"] for size, ratios in by_size.items()}
        row["claims"] = CLAIMS.get(name, {})
        rows.append(row)
    return rows


@dataclass(frozen=True)
class _Totals:
    """Numbers of weights, in all and in the largest tensor, and bytes of state."""

    parameters: int
    largest: int
    state: int

    @classmethod
    def of(cls, weights: Weights, rank: int) -> _Totals:
        parameters = largest = state = 0
        for weight, count in weights.items():
            size = math.prod(weight.shape)
            parameters += count * size
            largest = max(largest, size)
            state += count * state_bytes(weight.shape, rank)
        return cls(parameters, largest, state)


def _sizes(every: _Totals, trained: _Totals) -> dict[str, Any]:
    n = every.parameters
    quantised = n - trained.parameters
    gradient = 2 * every.largest
    return {
        "parameters": n,
        "largest_tensor": every.largest,
        "fp32_gb": 4 * n / GB,
        "fp16_gb": 2 * n / GB,
        "int8_gb": (quantised + 2 * trained.parameters) / GB,
        "int4_gb": (INT4_BYTES * quantised + 2 * trained.parameters) / GB,
        "adamw_state_gb": 8 * n / GB,
        "adamw_gradients_gb": 4 * n / GB,
        "axiom_state_gb": every.state / GB,
        "axiom_gradients_gb": gradient / GB,
        **compression(n, every.state, gradient),
        "axiom_fp16_training_gb": (2 * n + every.state + gradient) / GB,
        "adamw_fp32_training_gb": 16 * n / GB,
    }


def _recommendation(
    sizes: Mapping[str, Any], every: _Totals, trained: _Totals, device_gb: float | None
) -> str:
    """Write in a sentence what fits a device, the heaviest way first, or what each way takes without one."""
    adamw, axiom = sizes["adamw_fp32_training_gb"], sizes["axiom_fp16_training_gb"]
    frozen = sizes["int8_gb"] + (trained.state + 2 * trained.largest) / GB
    share = trained.parameters / every.parameters
    ways = [(adamw, "AdamW in float32"), (axiom, "AXIOM with hooks in 16 bits")]
    if 0 < share < 1:
        ways.append((frozen, f"AXIOM with linear layers frozen in INT8 (the other {share:.1%} train)"))
    if device_gb is None:
        takes = ", ".join(f"{how} takes {size:.3g} GB" for size, how in ways)
        return f"{takes}; activations, which are not counted, come on top."
    for size, how in ways:
        if size < device_gb:
            left = f"{device_gb - size:.3g} GB are left for activations, which are not counted"
            return f"{how} fits {device_gb:g} GB: it takes {size:.3g} GB, {left}."
    least = min(ways)[0]
    return f"Nothing fits {device_gb:g} GB: at least {least:.3g} GB are needed, and activations come on top."


# -- weights of a model --------------------------------------------------------------------------------------


def weights_of(source: str | Path | Mapping[str, Any] | nn.Module) -> Weights:
    """Count the parameters of whatever `estimate_memory` takes, tied ones once. Raises as it does."""
    if isinstance(source, str) and (name := known_name(source)) is not None:
        return _weights_by_config(KNOWN[name], name)
    if isinstance(source, str | Path):
        return _weights_by_config(*_read_config(source))
    if isinstance(source, Mapping):
        return _weights_by_config(source, "the configuration")
    if isinstance(source, nn.Module):
        quantised = {id(layer.weight) for layer in quantised_layers(source).values()}
        return Counter(Weight(tuple(p.shape), id(p) in quantised) for p in source.parameters())
    wanted = "a name, a folder, a configuration (config.to_dict()) or a module"
    raise TypeError(f"memory is estimated of {wanted}, not of {type(source).__name__}.")


def quantised_layers(model: nn.Module) -> dict[str, nn.Module]:
    """List the layers that INT8 loading quantises and freezes: the linear ones, but not the output head.

    Linear are nn.Linear and the Conv1D of transformers (a transposed nn.Linear). The head is what
    `get_output_embeddings` of transformers returns; of other modules, the last nn.Linear if it has the shape
    of an embedding. A layer that shares its matrix with an embedding is left out, too.
    """
    linear: dict[str, Any] = {}
    embeddings = []
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Embedding):
            embeddings.append(layer.weight)
        elif isinstance(layer, nn.Linear) or type(layer).__name__ == "Conv1D":
            linear[name] = layer
    left_out = {id(weight) for weight in embeddings}
    named: Any = getattr(model, "get_output_embeddings", None)
    if named is not None:
        left_out.add(id(getattr(named(), "weight", None)))
    elif linear:
        last = list(linear.values())[-1].weight
        if last.shape in [weight.shape for weight in embeddings]:
            left_out.add(id(last))
    return {name: layer for name, layer in linear.items() if id(layer.weight) not in left_out}


def known_name(name: str) -> str | None:
    """Return the name in `KNOWN` that `name` stands for, or None."""
    return _aliases().get(_plain(name))


def _plain(name: str) -> str:
    return name.strip().lower().removesuffix("-hf")


def _aliases() -> dict[str, str]:
    """Map names in lower case, with and without the owner, to names in `KNOWN`."""
    aliases: dict[str, str] = {}
    for name in KNOWN:
        short = _plain(name).rpartition("/")[2]
        aliases |= {_plain(name): name, short: name}
        if short.startswith("gpt2"):
            aliases[f"openai-community/{short}"] = name
    return aliases


def _read_config(source: str | Path) -> tuple[Mapping[str, Any], str]:
    """Read the configuration of a folder or a file; also returns the file's name."""
    path = Path(source)
    file = path / "config.json" if path.is_dir() else path
    if file != path and not file.is_file():
        raise FileNotFoundError(f"{source} has no config.json: name a folder that has one, or the file.")
    if not file.is_file():
        missing = f"{source} is neither a known name nor a folder or file, and nothing is downloaded"
        aliases = _aliases()
        near = difflib.get_close_matches(_plain(str(source)), aliases, n=2 * NEAREST, cutoff=0)
        names = list(dict.fromkeys(aliases[alias] for alias in near))[:NEAREST]
        raise FileNotFoundError(f"{missing}: the nearest names known are {', '.join(names)}.")
    try:
        config = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is damaged, it cannot be read as JSON: {error}.") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file} is no configuration: it holds no JSON object.")
    return config, str(file)


# -- families ------------------------------------------------------------------------------------------------


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

    def wrong(self, name: str, wanted: str) -> ValueError:
        return ValueError(f"{self.source} has {name}={self.config.get(name)!r}: it must be {wanted}.")


def _weights_by_config(config: Mapping[str, Any], source: str) -> Weights:
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        names = ", ".join(_FAMILIES)
        remedy = "build the model on the meta device and pass that for any other"
        raise ValueError(f"{source} has model_type={family!r}: known are {names}; {remedy}.")
    return _FAMILIES[family](_Fields(config, source))


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


def _gpt2_weights(fields: _Fields) -> Weights:
    d = fields.count("n_embd")
    inner = fields.count("n_inner", 4 * d)
    vocabulary = fields.count("vocab_size")
    if fields.flag("add_cross_attention", False):
        raise fields.wrong("add_cross_attention", "false, as only the decoder alone is counted")
    outside: list[Shape] = [(vocabulary, d), (fields.count("n_positions"), d), (d,), (d,)]
    if not fields.flag("tie_word_embeddings", True):
        outside.append((vocabulary, d))
    matrices = [(d, 3 * d), (d, d), (d, inner), (inner, d)]
    vectors = [d, d, d, d, 3 * d, d, inner, d]  # two norms, and the biases of the four
    return _weights(fields.count("n_layer"), matrices, vectors, outside)


def _llama_weights(fields: _Fields) -> Weights:
    return _rotary_weights(fields, fields.flag("attention_bias", False), fields.flag("mlp_bias", False))


def _mistral_weights(fields: _Fields) -> Weights:
    if "num_key_value_heads" not in fields.config:
        fields.count("num_key_value_heads")  # null means all heads, but there is no telling what absence does
    return _rotary_weights(fields, attention_bias=False, mlp_bias=False)


def _rotary_weights(fields: _Fields, attention_bias: bool, mlp_bias: bool) -> Weights:
    key_value_heads = fields.count("num_key_value_heads", fields.count("num_attention_heads"))
    d = fields.count("hidden_size")
    heads = fields.count("num_attention_heads")
    inner = fields.count("intermediate_size")
    vocabulary = fields.count("vocab_size")
    if fields.config.get("head_dim") is None and d % heads:
        raise fields.wrong("num_attention_heads", f"a divisor of hidden_size={d}, or head_dim given")
    if heads % key_value_heads:
        raise fields.wrong("num_key_value_heads", f"a divisor of num_attention_heads={heads}")
    head = fields.count("head_dim", d // heads)
    queries, keys = heads * head, key_value_heads * head
    attention = [(queries, d), (keys, d), (keys, d), (d, queries)]
    mlp = [(inner, d), (inner, d), (d, inner)]
    biased = attention * attention_bias + mlp * mlp_bias
    vectors = [d, d, *(rows for rows, _ in biased)]  # two norms, and biases
    outside: list[Shape] = [(vocabulary, d), (d,)]
    if not fields.flag("tie_word_embeddings", False):
        outside.append((vocabulary, d))
    return _weights(fields.count("num_hidden_layers"), attention + mlp, vectors, outside)


def _ebc_gpt_weights(fields: _Fields) -> Weights:
    """Count the lab's own GPT: no biases, separate q, k, v and o, untied head."""
    d = fields.count("width")
    vocabulary = fields.count("vocabulary")
    matrices = [(d, d)] * 4 + [(4 * d, d), (d, 4 * d)]
    outside: list[Shape] = [(vocabulary, d), (fields.count("context"), d), (d,), (vocabulary, d)]
    return _weights(fields.count("blocks"), matrices, [d, d], outside)


_FAMILIES = {
    "gpt2": _gpt2_weights,
    "llama": _llama_weights,
    "mistral": _mistral_weights,
    "ebc-gpt": _ebc_gpt_weights,
}
