"""What a platform must get right and a model be made of, each shown to be noticed where it is not so."""

import pytest
import torch
from support.exact_gpt import gpt
from torch import nn
from torch.overrides import TorchFunctionMode

from ebc_lab.verity import VerityError, check_model, check_platform, checks, ops


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


# -- models --------------------------------------------------------------------------------------------------


class Scale(nn.Module):
    """A module of somebody's own, with a parameter."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.ones(1))


class Tower(nn.Sequential):
    """A container of somebody's own."""


@pytest.mark.parametrize(
    ("layer", "remedy"),
    [
        (nn.Linear(2, 2), "use VLALinear"),
        (nn.Linear(2, 2).requires_grad_(False), "use VLALinear"),
        (nn.Conv2d(1, 1, 3), "use VLAConv2d"),
        (nn.LayerNorm(2), "use VLALayerNorm"),
        (nn.MultiheadAttention(4, 2), "use VLAStack of three VLALinear, ops.attention"),
        (nn.BatchNorm2d(2), "statistics depend on its split"),
        (nn.Dropout(0.1), "p=0"),
        (nn.MaxPool2d(3, stride=2), "windows do not overlap"),
        (nn.MaxPool2d((2, 3), stride=2), "windows do not overlap"),
        (nn.MaxPool2d(2, dilation=(1, 2)), "windows do not overlap"),
        (nn.Tanh(), "an exact layer of"),
        (Scale(), "its parameter factor belongs to no exact layer, so use .* or vouched=.Scale. if"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_a_layer_that_is_not_exact_is_refused_by_name(layer, remedy):
    model = nn.Sequential(Tower(ops.VLALinear(2, 2), layer), nn.ReLU(), *(nn.GELU() for _ in range(4)))
    first = rf"not exact: 0\.1 \({type(layer).__name__}\): .*{remedy}"
    with pytest.raises(VerityError, match=rf"{first}.*; 2 \(GELU\): use VLAGELU; .* and 2 more\.$"):
        check_model(model)


def test_exact_models_and_what_somebody_vouches_for_pass():
    tied = ops.VLALinear(3, 5, bias=False)
    tied.weight = (table := ops.VLAEmbedding(5, 3)).weight
    windows = nn.MaxPool2d(2), nn.MaxPool2d((2, 3), stride=(2, 4), dilation=(1, 1))
    check_model(Tower(gpt(), nn.ReLU(), nn.Flatten(), nn.Dropout(0.0), *windows, table, tied, ops.VLAGELU()))
    scale, linear = Scale(), nn.Linear(2, 2)
    check_model(nn.Sequential(scale, Tower(linear)), vouched=[Scale, linear])
    with pytest.raises(VerityError, match=r"0 \(Scale\)"):
        check_model(nn.Sequential(scale, Tower(linear)), vouched=[Scale(), Tower])
