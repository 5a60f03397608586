"""What equal bits rest on: a platform that computes as IEEE 754 says, and a model made of exact layers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .bits import VerityError, divided, pow2f
from .functions import sqrt64

SEED = 2026
GRAIN = 32768  # elements, below which torch leaves an operation to one thread


def check_platform(device: str | torch.device = "cpu") -> None:
    """Raise VerityError, naming the failed test; it takes milliseconds, once a process for each device.

    Whether subnormal numbers are kept is looked at every time, since a program may change that.
    """
    kind = torch.device(device)
    if kind.type == "mps":
        raise VerityError("this device has no float64: use device=cpu or cuda.")
    _check("subnormal numbers are kept", _subnormals, kind)
    _check_once(kind)


def _check(what: str, test: Callable[[torch.device], bool], device: torch.device) -> None:
    try:
        passed = test(device)
    except (RuntimeError, TypeError) as error:
        message = str(error).partition("\n")[0]
        raise VerityError(f"{device} failed the test '{what}': {message}.") from None
    if not passed:
        raise VerityError(
            f"{device} failed the test '{what}', so its results would depend on the machine: use a new "
            "process that never calls torch.set_flush_denormal(True), which torch's other threads keep when "
            "this one takes it back, and on a GPU do not emulate float64."
        )


@functools.cache
def _check_once(device: torch.device) -> None:
    for what, test in TESTS.items():
        _check(what, test, device)


def _numbers(device: torch.device, *values: float) -> Tensor:
    """Repeat float64 numbers, so that there are some for vector instructions and for the rest behind them."""
    return torch.tensor(values, dtype=torch.float64, device=device).repeat(37)


def _subnormals(device: torch.device) -> bool:
    """Compute so many that every thread of torch's pool takes part: each has a mode of its own."""
    count = 37 + (GRAIN * torch.get_num_threads() if device.type == "cpu" else 0)
    wide = torch.full((count,), 3.0, dtype=torch.float64, device=device) * pow2f(-1022) * pow2f(-20)
    narrow = torch.full((count,), pow2f(-126), device=device) * pow2f(-10)
    return all(bool(x.all()) for x in (wide > 0, narrow > 0, narrow.double() == pow2f(-136)))


def _ties_to_even(device: torch.device) -> bool:
    x = _numbers(device, 1 + pow2f(-24), 1 + 3 * pow2f(-24), -1 - pow2f(-24))
    expected = _numbers(device, 1.0, 1 + pow2f(-22), -1.0)
    halves = _numbers(device, 0.5, 1.5, -2.5).round()
    return torch.equal(x.float().double(), expected) and torch.equal(halves, _numbers(device, 0.0, 2.0, -2.0))


def _no_contraction(device: torch.device) -> bool:
    """Compute (1 + 2^-30)² - (1 + 2^-29): 0 with two roundings, 2^-60 with one."""
    a = _numbers(device, 1 + pow2f(-30))
    return bool(((a * a - (1 + pow2f(-29))) == 0).all())


def _root_and_quotient(device: torch.device) -> bool:
    """Try cases on which approximations go wrong; the values are those of exact arithmetic, rounded once."""
    a = _numbers(device, 1.0, 1.0, 1 - pow2f(-53), float.fromhex("0x1.fffffffffffffp+1"))
    b = _numbers(device, 3.0, 49.0, 1 + pow2f(-52), float.fromhex("0x1.0000000000001p+0"))
    quotients = "0x1.5555555555555p-2 0x1.4e5e0a72f0539p-6 0x1.ffffffffffffdp-1 0x1.ffffffffffffdp+1"
    roots = "0x1.bb67ae8584caap+0 0x1.c000000000000p+2 0x1.0000000000000p+0 0x1.0000000000000p+0"
    right = [_numbers(device, *map(float.fromhex, row.split())) for row in (quotients, roots)]
    return torch.equal(divided(a, b), right[0]) and torch.equal(sqrt64(b), right[1])


def _integers(device: torch.device, *shape: int, below: int) -> Tensor:
    drawn = torch.randint(-below, below + 1, shape, generator=torch.Generator().manual_seed(SEED))
    drawn.view(-1)[::3] = below  # the worst case is all of one sign
    return drawn.to(device)


def _exact_products(device: torch.device) -> bool:
    """Multiply integers of 21 bits, 2048 to a sum: partial sums come close to 2^53."""
    a = _integers(device, 2048, 9, below=2**21 - 1)
    b = _integers(device, 2048, 7, below=2**21 - 1)
    expected = (a.cpu()[:, :, None] * b.cpu()[:, None]).sum(0, dtype=torch.int64)
    whole = a.double().t() @ b.double()
    several = torch.bmm(a.double().view(2, 1024, 9).mT, b.double().view(2, 1024, 7))
    several = several[0] + several[1]
    return all(torch.equal(product.to(torch.int64).cpu(), expected) for product in (whole, several))


def _integer_sums(device: torch.device) -> bool:
    terms = _integers(device, 999, 3, below=2**40)
    ids = torch.arange(999, device=device) % 5
    sums = torch.zeros(5, 3, dtype=torch.int64, device=device).index_add_(0, ids, terms).cpu()
    each = [terms.cpu()[i::5].sum(0, dtype=torch.int64) for i in range(5)]
    return torch.equal(sums, torch.stack(each))


TESTS: dict[str, Callable[[torch.device], bool]] = {
    "ties are rounded to even": _ties_to_even,
    "products and sums are not fused": _no_contraction,
    "roots and quotients are rounded correctly": _root_and_quotient,
    "matrix products of integers are exact": _exact_products,
    "sums of integers are exact": _integer_sums,
}


# -- a model's layers ----------------------------------------------------------------------------------------

NAMED = 3  # layers in a refusal
EXACT = {  # of torch: they hold others, move numbers, select, or multiply by one number
    *(nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.Identity, nn.Flatten, nn.Unflatten, nn.ZeroPad2d),
    *(nn.PixelShuffle, nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU),
}
NO_MASK = "leave it out or give it p=0, since its mask depends on the machine"
INSTEAD: dict[type[nn.Module], str] = {
    nn.Linear: "VLALinear",
    nn.Conv2d: "VLAConv2d",
    nn.LayerNorm: "VLALayerNorm",
    nn.RMSNorm: "VLARMSNorm",
    nn.Embedding: "VLAEmbedding",
    nn.GELU: "VLAGELU",
    nn.SiLU: "VLASiLU",
    nn.Softmax: "VLASoftmax",
    nn.CrossEntropyLoss: "ops.cross_entropy",
    nn.AvgPool2d: "VLAAvgPool2d",
    nn.AdaptiveAvgPool2d: "VLAAvgPool2d",
    nn.MaxPool2d: "a stride of kernel_size or more, so that windows do not overlap",
    nn.MultiheadAttention: "VLAStack of three VLALinear, ops.attention and a VLALinear",
    nn.modules.dropout._DropoutNd: NO_MASK,
    nn.modules.batchnorm._BatchNorm: "VLALayerNorm, since a batch's statistics depend on its split",
    nn.parallel.DistributedDataParallel: "the model itself, and Grids.finish(tokens, group=True)",
}


def check_model(model: nn.Module, vouched: Sequence[Any] = ()) -> None:
    """Raise VerityError, naming the first layers that are not exact and what to use instead of each.

    Seen are modules: those of torch, and those of others that own parameters. What a forward calls by itself
    (`F.linear`, `torch.exp`) is not.

    Args:
        vouched: classes, or modules, of yours whose bits are the same everywhere, with all inside them.
    """
    owned = {
        id(s.parameter) for m in model.modules() for layer in getattr(m, "summed", ()) for s in layer.sums
    }
    found = list(_inexact(model, "", owned, tuple(vouched)))
    if found:
        more = f"; and {len(found) - NAMED} more" if len(found) > NAMED else ""
        raise VerityError(f"the model is not exact: {'; '.join(found[:NAMED])}{more}.")


def _inexact(module: nn.Module, name: str, owned: set[int], vouched: tuple[Any, ...]) -> Iterator[str]:
    """Yield what is wrong with a module, or else with those inside it."""
    if any(isinstance(module, v) if isinstance(v, type) else module is v for v in vouched):
        return
    kind = type(module)
    of_torch = next(c for c in kind.__mro__ if c.__module__.split(".")[0] == "torch")
    label = f"{name or 'it'} ({kind.__name__})"
    own = [n for n, p in module.named_parameters(recurse=False) if id(p) not in owned]
    if of_torch not in EXACT | {nn.Module} and not _is_exact(module):
        remedy = next(
            (INSTEAD[c] for c in of_torch.__mro__ if c in INSTEAD), "an exact layer of ebc_lab.verity.ops"
        )
        yield f"{label}: use {remedy}" if remedy is not NO_MASK else f"{label}: {remedy}"
    elif own:
        yield (
            f"{label}: its parameter {own[0]} belongs to no exact layer, so use ebc_lab.verity.ops, "
            f"or vouched=[{kind.__name__}] if you know its bits to be the same everywhere"
        )
    else:
        for child_name, child in module.named_children():
            yield from _inexact(child, f"{name}.{child_name}" if name else child_name, owned, vouched)


def _is_exact(module: nn.Module) -> bool:
    """Say whether a layer's settings make it exact: no mask, or windows that do not overlap."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p == 0
    if isinstance(module, nn.MaxPool2d):
        kernel, stride = (v if isinstance(v, tuple) else (v, v) for v in (module.kernel_size, module.stride))
        return all(s >= k for k, s in zip(kernel, stride, strict=True)) and module.dilation in (1, (1, 1))
    return False
