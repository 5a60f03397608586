"""Any model's linear layers in few levels: trained through the quantizer, then packed (docs/lowbit.md)."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from .backends.formulas import Group, Scale, check_group, check_levels, check_scale
from .backends.planes import refuse_packed
from .backends.tensors import torch_decode, torch_unpack
from .container import PackedTensor, read_packed, write_packed
from .levels import quantize
from .names import misnamed
from .ste import straight_through

Model = TypeVar("Model", bound=nn.Module)


class QuantizedLinear(nn.Linear):
    """A linear layer used through the quantizer, anew at each forward; its parameters are the latent ones.

    `quantize_model` makes it of an nn.Linear, whose parameters, hooks and names in the state dict stay.
    """

    levels: str
    group: Group
    scale: Scale

    def forward(self, input: Tensor) -> Tensor:
        weight = straight_through(self.weight, self.levels, self.group, self.scale)
        return nn.functional.linear(input, weight.to(input.dtype), self.bias)

    def packed(self) -> PackedTensor:
        """Return the weight that the forward uses, packed."""
        return PackedTensor.of(quantize(self.weight, self.levels, group=self.group, scale=self.scale))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, levels={self.levels}, group={self.group}"


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
        codes = torch_unpack(self.codes, self.out_features * self.in_features, self.levels)
        codes = codes.view(self.out_features, self.in_features)
        return torch_decode(codes, self.step_bits.view(torch.float32), self.group)

    def forward(self, inputs: Tensor) -> Tensor:
        return nn.functional.linear(inputs, self.weight.to(inputs.dtype), self.bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, levels={self.levels}, "
            f"group={self.group}, bias={self.bias is not None}"
        )


# -- models --------------------------------------------------------------------------------------------------


def hidden_linears(model: nn.Module, keep: Collection[str] | None = None) -> dict[str, nn.Linear]:
    """Return a model's linear layers by name, in its order, but for those that `keep` names.

    With None, those that `quantize_model` was called for; else all but the output, which is what a Hugging
    Face model's `get_output_embeddings` returns, or the last linear layer. ValueError: none is left, or a
    name of `keep` that is none. Layers of other classes (of nn.MultiheadAttention, say) are not among them.
    """
    linears: dict[str, nn.Linear] = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Linear, QuantizedLinear):
            linears[name] = module
    if keep is None:
        if quantized := {name: m for name, m in linears.items() if isinstance(m, QuantizedLinear)}:
            return dict(quantized)
        output_of: Callable[[], Any] = getattr(model, "get_output_embeddings", lambda: None)
        output = output_of()
        keep = [name for name, m in linears.items() if m is output] or list(linears)[-1:]
    if isinstance(keep, str):
        keep = [keep]
    if linears and (wrong := misnamed(keep, linears, "the model", "linear layer")):
        raise ValueError(wrong)
    hidden = {name: m for name, m in linears.items() if name not in keep}
    if not hidden and any(isinstance(module, PackedLinear) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} was filled by load_packed, whose codes cannot be trained: train the "
            "model that was saved, from its state_dict."
        )
    if not hidden:
        raise ValueError(
            f"{type(model).__name__} has no nn.Linear to quantize beside {', '.join(keep) or 'itself'}; "
            "layers of other classes, such as GPT-2's Conv1D, stay in float32."
        )
    return hidden


def quantize_model(
    model: Model,
    levels: str = "ternary",
    *,
    group: Group = "tensor",
    scale: Scale = "absmean",
    keep: Collection[str] | None = None,
) -> Model:
    """Have the model's hidden linear layers (`hidden_linears`) used in few levels; returns the same model.

    Its parameters stay the latent float ones, under their names: any optimizer and any loop trains them, and
    checkpoints are those of the float model. Embeddings, norms, biases and the output are used as they are.
    """
    check_levels(levels)
    check_scale(scale)
    hidden = hidden_linears(model, keep)
    for linear in hidden.values():
        check_group(group, tuple(linear.weight.shape))
    for linear in hidden.values():
        linear.__class__ = QuantizedLinear  # and not a new module, which would lose its hooks
        linear.levels, linear.group, linear.scale = levels, group, scale  # type: ignore[assignment]
    return model


def save_packed(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Write a model that `quantize_model` was called for: its layers packed, all else in float32.

    What several names share is written once. ValueError where no layer is quantized.
    """
    layers = {id(m.weight): m for m in model.modules() if isinstance(m, QuantizedLinear)}
    if not layers:
        hidden_linears(model)  # which says so where the model was loaded packed
        raise ValueError(
            f"{type(model).__name__} has no layer in few levels: call quantize_model(model), then train it."
        )
    tensors = _tensors(model)
    write_packed(path, {n: layers[id(t)].packed() if id(t) in layers else t for n, t in tensors.items()})


@torch.no_grad()
def load_packed(path: str | os.PathLike[str], model: Model) -> Model:
    """Fill a model of the same shape from a file of `save_packed`, or of a run; returns it, to evaluate: what
    is packed cannot be trained on.

    Its nn.Linear layers become `PackedLinear`; other packed weights are filled in as float32 (those of the
    lab's GPT, which must not quantize them again). On a CPU its outputs are those of the saved model, bit for
    bit, as far as float32 holds what was saved. DamagedFileError; ValueError, before anything is changed,
    where the file holds another model.
    """
    saved = read_packed(path)
    own = _tensors(model)
    if odd := sorted(saved.keys() ^ own.keys()):
        raise ValueError(f"{path} holds another model: {odd[0]} is in one of the two only.")
    for name, tensor in saved.items():
        if tuple(own[name].shape) != tensor.shape or own[name].is_meta:
            raise ValueError(
                f"{path} holds another model: its {name} has the shape {tensor.shape}, this one's "
                f"{tuple(own[name].shape)} on {own[name].device}."
            )
    for name, tensor in saved.items():
        values = tensor.values() if isinstance(tensor, PackedTensor) else tensor
        own[name].copy_(torch.from_numpy(values))
    packed = {id(own[name]): tensor for name, tensor in saved.items() if isinstance(tensor, PackedTensor)}
    made: dict[int, PackedLinear] = {}  # a layer may have several names
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if type(layer) in (nn.Linear, QuantizedLinear) and id(layer.weight) in packed:
            weight = cast(Tensor, layer.weight)
            if id(layer) not in made:
                made[id(layer)] = PackedLinear(packed[id(weight)], cast(Any, layer.bias)).to(weight.device)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, made[id(layer)])
    return model.eval()


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a model's state dict, those of several names under the first."""
    unique: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        unique.setdefault(id(tensor), (name, tensor))
    return dict(unique.values())
