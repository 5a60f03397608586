"""`PackedLinear`: a linear layer whose weight lies packed in memory (docs/lowbit.md)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .backends.formulas import Group, Scale
from .backends.planes import refuse_packed, unpack_flat
from .backends.tensors import empty_on, torch_decode
from .container import PackedTensor
from .levels import quantize


class PackedLinear(nn.Module):
    """A linear layer that holds packed codes instead of a weight and unpacks them at each forward.

    It saves memory, not time: 1.6 or 2.33 bits a weight instead of 32. Codes and steps are integer buffers
    (`codes`, `step_bits`), so that moving the model to another dtype does not round them; the weight is made
    in float32 and then cast to the input's dtype. Only the bias can be trained.
    """

    codes: Tensor
    step_bits: Tensor

    def __init__(self, packed: PackedTensor, bias: Tensor | None = None) -> None:
        super().__init__()
        if len(packed.shape) != 2:
            raise ValueError(f"a linear layer needs a matrix, not packed codes of shape {packed.shape}")
        self.out_features, self.in_features = packed.shape
        self.levels = packed.levels
        self.group = packed.group
        refuse_packed(packed.data, self.out_features * self.in_features, packed.levels)
        self.register_buffer("codes", torch.from_numpy(packed.data.copy()))
        self.register_buffer("step_bits", torch.from_numpy(packed.steps.copy()).view(torch.int32))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def of(
        cls, linear: nn.Linear, levels: str = "ternary", group: Group = "tensor", scale: Scale = "absmean"
    ) -> PackedLinear:
        """Make the layer whose weight is the quantized one of `linear`, on the same device."""
        packed = PackedTensor.of(quantize(linear.weight, levels, group=group, scale=scale))
        return cls(packed, linear.bias).to(linear.weight.device)

    @property
    def weight(self) -> Tensor:
        """Unpack the float32 weight anew: (out_features, in_features)."""
        shape = self.out_features, self.in_features
        empty = empty_on(self.codes.device)
        codes = unpack_flat(self.codes, shape[0] * shape[1], self.levels, empty)[0].reshape(shape)
        return torch_decode(codes, self.step_bits.view(torch.float32), self.group)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, levels={self.levels}, "
            f"group={self.group}, bias={self.bias is not None}"
        )
