"""Low-bit training: weights, gradients and optimizer state in three or five levels, measured.

A library of its own: it imports torch and numpy and nothing else of `ebc_lab`. The maths and the figures are
in docs/lowbit.md. Importing this package loads neither torch nor numpy; a name is imported when it is used.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "levels": "Quantized absmean entropy_bits quantize quantize_stochastic rounding_key stochastic_step "
    "uniforms zero_share",
    "packing": "pack packed_size unpack",
    "container": "DamagedFileError PackedTensor inspect_packed read_packed write_packed",
    "linear": "PackedLinear QuantizedLinear hidden_linears load_packed quantize_model save_packed",
    "ste": "straight_through",
    "gradients": "GradientQuantizer",
    "state": "QuantizedAdam",
    "clustering": "DataClustering KMeansClustering KMeansResult ParameterClustering kmeans suggest_k "
    "window_features",
    "policy": "AuxiliaryNetwork make_policy",
    "backends": "HAS_GPU BackendUnavailableError available_backends get_backend",
    "dispatch": "BackendConfig HybridDispatcher create_auto_dispatcher",
    "trainer": "HybridLLMTrainer TrainingConfig",
    "benchmark": "PerformanceBenchmark",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        from .names import INSTEAD

        if name in INSTEAD:  # an AttributeError's words would not survive `from ... import`
            raise ImportError(f"{__name__} has no {name!r}: {INSTEAD[name]}.", name=__name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
