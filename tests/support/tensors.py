"""Tensors that tests draw, the same ones for the same seed."""

import torch
from torch import Tensor


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, drawn in float32 whatever the dtype."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
