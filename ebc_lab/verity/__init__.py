"""Training whose bits do not depend on the machine (docs/verity.md).

The same weights, byte for byte, whatever the threads, the vector instructions, the split of a batch, the
order of its rows, and the number of workers.

This package imports torch and nothing else of this project, so it can be copied into another one.

* `bits`, `functions`: exponents, sums as trees, exp, log, the normal distribution
* `ops`: exact layers and their gradients; `grids`: gradients as integer sums over tokens; `optim`: Adam
* `engine`: torch alone (`eager`), or a C file that this machine's compiler builds (`native`)
* `model`: a GPT; `arithmetic`: what EBC computes; `checks`: whether a platform computes as it must, and a
  model is made of exact layers; `checksum`: of the weights

`Verity` is VerityAdam under the name by which `quarterbit.verity` has its optimizer.
"""

from __future__ import annotations

from . import ops
from .arithmetic import Arithmetic
from .bits import VerityError, bits_for
from .checks import check_model, check_platform
from .checksum import weights_checksum
from .engine import use_engine
from .functions import cos2pi, normal_
from .grids import Grids
from .model import VerityGPT
from .ops import (
    VLAGELU,
    VLAAvgPool2d,
    VLAConv2d,
    VLAEmbedding,
    VLALayerNorm,
    VLALinear,
    VLARMSNorm,
    VLASiLU,
    VLASoftmax,
    VLAStack,
    exact_matmul,
)
from .optim import VerityAdam

Verity = VerityAdam

__all__ = [
    "VLAGELU",
    "Arithmetic",
    "Grids",
    "VLAAvgPool2d",
    "VLAConv2d",
    "VLAEmbedding",
    "VLALayerNorm",
    "VLALinear",
    "VLARMSNorm",
    "VLASiLU",
    "VLASoftmax",
    "VLAStack",
    "Verity",
    "VerityAdam",
    "VerityError",
    "VerityGPT",
    "bits_for",
    "check_model",
    "check_platform",
    "cos2pi",
    "exact_matmul",
    "normal_",
    "ops",
    "use_engine",
    "weights_checksum",
]
