"""The memory that training a model takes before activations, counted from the shapes of its parameters.

A model is a count of `Weight`s. Those of the known families follow from their configurations, those of a
module from its parameters (on the meta device, too: no memory is needed), and every figure is counted from
them. GB are 1e9 bytes. What the figures mean is in docs/axiom.md, "What it costs".
"""

from __future__ import annotations

import difflib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .families import Weight, Weights, weights_by_config
from .update import compression, state_bytes

GB = 1e9  # bytes
INT4_BYTES = 0.5 + 2 / 64  # of a weight: its four bits, and a 16-bit scale shared by 64

NEAREST = 4  # names that an error lists
TUNED = ("-instruct", "-chat", "-base", "-it", "-pt")  # ends of names of models of equal shapes

# -- known names and published claims ------------------------------------------------------------------------


def _llama(width: int, blocks: int, heads: int, inner: int, **others: Any) -> dict[str, Any]:
    config = {"model_type": "llama", "vocab_size": 32000, "hidden_size": width, "num_hidden_layers": blocks}
    return config | {"num_attention_heads": heads, "intermediate_size": inner} | others


def _gemma(version: str, width: int, blocks: int, heads: tuple[int, int, int], inner: int) -> dict[str, Any]:
    """Give a configuration; `heads`: of queries, of keys, and the width of one."""
    others = {"model_type": f"gemma{version}", "num_key_value_heads": heads[1], "head_dim": heads[2]}
    vocabulary = 262144 if version == "3_text" else 256000
    return _llama(width, blocks, heads[0], inner, vocab_size=vocabulary, **others)


def _phi(width: int, blocks: int, inner: int, family: str = "phi", **others: Any) -> dict[str, Any]:
    vocabulary = {"phi": 51200, "phi3": 32064}[family]
    return _llama(width, blocks, 32, inner, **{"model_type": family, "vocab_size": vocabulary} | others)


def _qwen(
    version: int, width: int, blocks: int, heads: tuple[int, int], inner: int, vocabulary: int = 151936
) -> dict[str, Any]:
    """Give the configuration of an untied Qwen; `heads`: of queries and of keys."""
    keys = {"kv_channels": 128} if version == 1 else {"num_key_value_heads": heads[1]}
    keys |= {"head_dim": 128} if version == 3 else {}
    family = {"model_type": "qwen" if version == 1 else f"qwen{version}", "vocab_size": vocabulary}
    return _llama(width, blocks, heads[0], inner, **family, **keys)


def _gpt2(width: int, blocks: int) -> dict[str, Any]:
    tokens = {"model_type": "gpt2", "vocab_size": 50257, "n_positions": 1024}
    return tokens | {"n_embd": width, "n_layer": blocks}


_MEDIUM = {"num_attention_heads": 40, "num_key_value_heads": 10}
_TIED = {"tie_word_embeddings": True}
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
    "EleutherAI/gpt-j-6b": {"model_type": "gptj", "vocab_size": 50400, "n_embd": 4096, "n_layer": 28},
    "google/gemma-2b": _gemma("", 2048, 18, (8, 1, 256), 16384),
    "google/gemma-7b": _gemma("", 3072, 28, (16, 16, 256), 24576),
    "google/gemma-2-2b": _gemma("2", 2304, 26, (8, 4, 256), 9216),
    "google/gemma-2-9b": _gemma("2", 3584, 42, (16, 8, 256), 14336),
    "google/gemma-2-27b": _gemma("2", 4608, 46, (32, 16, 128), 36864),
    "google/gemma-3-270m": _gemma("3_text", 640, 18, (4, 1, 256), 2048),
    "google/gemma-3-1b-pt": _gemma("3_text", 1152, 26, (4, 1, 256), 6912),
    "microsoft/phi-1": _phi(2048, 24, 8192),
    "microsoft/phi-1_5": _phi(2048, 24, 8192),
    "microsoft/phi-2": _phi(2560, 32, 10240),
    "microsoft/Phi-3-mini-4k-instruct": _phi(3072, 32, 8192, "phi3"),
    "microsoft/Phi-3-mini-128k-instruct": _phi(3072, 32, 8192, "phi3"),
    "microsoft/Phi-3-medium-4k-instruct": _phi(5120, 40, 17920, "phi3", **_MEDIUM),
    "microsoft/Phi-3-medium-128k-instruct": _phi(5120, 40, 17920, "phi3", **_MEDIUM),
    "microsoft/Phi-3.5-mini-instruct": _phi(3072, 32, 8192, "phi3"),
    "microsoft/phi-4": _phi(5120, 40, 17920, "phi3", vocab_size=100352, **_MEDIUM),
    "Qwen/Qwen-1_8B": _qwen(1, 2048, 24, (16, 16), 11008),
    "Qwen/Qwen-7B": _qwen(1, 4096, 32, (32, 32), 22016),
    "Qwen/Qwen-14B": _qwen(1, 5120, 40, (40, 40), 27392, 152064),
    "Qwen/Qwen-72B": _qwen(1, 8192, 80, (64, 64), 49152, 152064),
    "Qwen/Qwen2-0.5B": _qwen(2, 896, 24, (14, 2), 4864) | _TIED,
    "Qwen/Qwen2-1.5B": _qwen(2, 1536, 28, (12, 2), 8960) | _TIED,
    "Qwen/Qwen2-7B": _qwen(2, 3584, 28, (28, 4), 18944, 152064),
    "Qwen/Qwen2-72B": _qwen(2, 8192, 80, (64, 8), 29568, 152064),
    "Qwen/Qwen2.5-0.5B": _qwen(2, 896, 24, (14, 2), 4864) | _TIED,
    "Qwen/Qwen2.5-1.5B": _qwen(2, 1536, 28, (12, 2), 8960) | _TIED,
    "Qwen/Qwen2.5-3B": _qwen(2, 2048, 36, (16, 2), 11008) | _TIED,
    "Qwen/Qwen2.5-7B": _qwen(2, 3584, 28, (28, 4), 18944, 152064),
    "Qwen/Qwen2.5-14B": _qwen(2, 5120, 48, (40, 8), 13824, 152064),
    "Qwen/Qwen2.5-32B": _qwen(2, 5120, 64, (40, 8), 27648, 152064),
    "Qwen/Qwen2.5-72B": _qwen(2, 8192, 80, (64, 8), 29568, 152064),
    "Qwen/Qwen3-0.6B": _qwen(3, 1024, 28, (16, 8), 3072) | _TIED,
    "Qwen/Qwen3-1.7B": _qwen(3, 2048, 28, (16, 8), 6144) | _TIED,
    "Qwen/Qwen3-4B": _qwen(3, 2560, 36, (32, 8), 9728) | _TIED,
    "Qwen/Qwen3-8B": _qwen(3, 4096, 36, (32, 8), 12288),
    "Qwen/Qwen3-14B": _qwen(3, 5120, 40, (40, 8), 17408),
    "Qwen/Qwen3-32B": _qwen(3, 5120, 64, (64, 8), 25600),
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
        name_or_config: a name in `KNOWN` (in any case; without its owner, and with or without `-hf` or one of
            `TUNED`, too), a folder with config.json, such a file, a configuration, or a module. A known name
            is not looked up as a folder: write ./gpt2 for that. Of a module all parameters count, frozen ones
            too.
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
        return weights_by_config(KNOWN[name], name)
    if isinstance(source, str | Path):
        return weights_by_config(*_read_config(source))
    if callable(to_dict := getattr(source, "to_dict", None)):  # a configuration of transformers
        return weights_by_config(to_dict(), "the configuration")
    if isinstance(source, Mapping):
        return weights_by_config(source, "the configuration")
    if isinstance(source, nn.Module):
        quantised = {id(layer.weight) for layer in quantised_layers(source).values()}
        return Counter(Weight(tuple(p.shape), id(p) in quantised) for p in source.parameters())
    wanted = "a name, a folder, a configuration or a module"
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
    plain = name.strip().lower().removesuffix("-hf")
    return next((plain.removesuffix(tuned) for tuned in TUNED if plain.endswith(tuned)), plain)


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
