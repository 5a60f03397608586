"""Language models from a local folder in 32, 16 or 8 bits. Nothing is downloaded."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .memory import quantised_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {32: torch.float32, 16: torch.bfloat16, 8: torch.bfloat16}


def load_model(folder: str | Path, *, bits: int = 8) -> PreTrainedModel:
    """Load a causal language model that transformers saved to `folder`, on the CPU and in eval mode.

    Args:
        folder: with config.json and the weights; a name on a model hub is not looked up.
        bits: 32 for float32, 16 for bfloat16. 8: the matrices of linear layers become INT8, one scale a row
            (torchao's `Int8WeightOnlyConfig`), the rest bfloat16.

    INT8 matrices are **frozen**: with bits=8 only embeddings, the output head, norms and biases train, 3.9%
    of Llama 7 B and 32% of GPT-2 124 M. That is tuning a small part of a model, not training it. Gradients do
    pass through the frozen layers. GPT-2's Conv1D layers become nn.Linear, so their matrices are transposed.
    The whole model exists in bfloat16 before it is quantised.

    Raises FileNotFoundError where there is no such folder, ValueError for other bits and for a folder that is
    damaged, and ModuleNotFoundError without transformers or, with bits=8, torchao.
    """
    if bits not in DTYPES:
        others = "; for 4, use BitsAndBytesConfig of transformers (docs/axiom.md, In place of QLoRA)"
        raise ValueError(f"bits={bits!r} cannot be loaded: choose 32, 16 or 8{others}.")
    path = Path(folder)
    if not (path / "config.json").is_file():
        missing = f"{folder} is no folder with a config.json, and nothing is downloaded"
        remedy = "name a folder that save_pretrained or `hf download NAME --local-dir FOLDER` wrote"
        raise FileNotFoundError(f"{missing}: {remedy}.")
    transformers = _library("transformers")
    quantization = _library("torchao.quantization") if bits == 8 else None
    model: PreTrainedModel = _read(transformers, path, DTYPES[bits])
    if quantization is not None:
        names = set(quantised_layers(model))
        for name in names:
            layer = model.get_submodule(name)
            if not isinstance(layer, nn.Linear):
                model.set_submodule(name, _as_linear(layer))
        config = quantization.Int8WeightOnlyConfig()
        quantization.quantize_(model, config, filter_fn=lambda _, name: name in names)
        for name in names:
            model.get_submodule(name).weight.requires_grad_(False)
    return model


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        package = name.partition(".")[0]
        remedy = "install it by pip install 'ebc-lab[axiom]'"
        raise ModuleNotFoundError(f"load_model needs {package}: {remedy}.", name=package) from error


def _read(transformers: Any, path: Path, dtype: torch.dtype) -> Any:
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,  # found below, and named
            output_loading_info=True,
        )
    except MemoryError:
        raise
    except Exception as error:  # transformers, safetensors and json each have their own
        why = " ".join(str(error).split()).partition(". ")[0] or type(error).__name__
        raise ValueError(f"{path} cannot be loaded as a causal language model: {why.rstrip('.')}.") from None
    drawn = {str(key) for key in report["missing_keys"]}  # at random, by transformers
    drawn |= {str(key) for key, *_ in report["mismatched_keys"]}
    if drawn:
        wrong = f"{len(drawn)} of its weights are missing or of another shape, first {min(drawn)}"
        raise ValueError(f"{path} is damaged, or its config.json is another model's: {wrong}.")
    return model


def _as_linear(layer: Any) -> nn.Linear:
    """Turn a Conv1D of transformers, x W + b with W (in, out), into an nn.Linear."""
    inputs, outputs = layer.weight.shape
    linear = nn.Linear(inputs, outputs, device="meta")
    linear.weight = nn.Parameter(layer.weight.detach().T.contiguous())
    linear.bias = layer.bias
    return linear
