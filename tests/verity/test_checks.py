"""What a platform must get right, each shown to be noticed where it does not."""

import pytest
import torch
from torch.overrides import TorchFunctionMode

from ebc_lab.components.determinism import flush_subnormals
from ebc_lab.verity import VerityError, check_platform, checks


@pytest.fixture(autouse=True)
def _forget():
    checks._check_once.cache_clear()
    yield
    checks._check_once.cache_clear()


def test_this_machine_passes():
    check_platform()
    check_platform(torch.device("cpu"))


def test_flushing_subnormal_numbers_is_noticed_even_later():
    check_platform()
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormal numbers")
    try:
        with pytest.raises(VerityError, match="subnormal numbers are kept"):
            check_platform()
    finally:
        torch.set_flush_denormal(False)


def test_a_thread_of_the_pool_that_still_flushes_is_noticed(beside_a_pool):
    def checked():
        with pytest.raises(VerityError, match=r"subnormal numbers are kept.* a new process"):
            check_platform()
        flush_subnormals(False)
        check_platform()

    beside_a_pool(checked, flushes=True)


class Wrong(TorchFunctionMode):
    """A platform on which one operation gives something else."""

    def __init__(self, name: str, change):
        super().__init__()
        self.name = name
        self.change = change

    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return self.change(found) if getattr(func, "__name__", "") == self.name else found


@pytest.mark.parametrize(
    ("operation", "change", "test"),
    [
        ("matmul", lambda x: x.float().double(), "matrix products of integers are exact"),
        ("bmm", lambda x: x + 1, "matrix products of integers are exact"),
        ("sqrt", lambda x: x * (1 + 2**-40), "roots and quotients are rounded correctly"),
        ("index_add_", lambda x: x.add_(1), "sums of integers are exact"),
        ("round", lambda x: x + (x == 2), "ties are rounded to even"),
        ("sub", lambda x: x + 2.0**-60, "products and sums are not fused"),
    ],
)
def test_a_wrong_operation_is_named(operation, change, test):
    with Wrong(operation, change), pytest.raises(VerityError, match=test):
        check_platform()


def test_devices_without_float64_are_refused():
    with pytest.raises(VerityError, match="no float64"):
        check_platform("mps")
    with pytest.raises(VerityError, match="failed the test"):
        check_platform("meta")
