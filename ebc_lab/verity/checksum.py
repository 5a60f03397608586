"""The checksum of a model's weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def weights_checksum(model: nn.Module) -> str:
    """Return 16 hex digits of the sha256 over the parameters, sorted by name: equal means equal bits."""
    digest = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(p.shape)} {p.dtype}\n".encode())
        values: Tensor = p.detach().cpu().contiguous()
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
