"""Whether a platform computes as IEEE 754 says, which is what equal bits rest on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

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
