"""Numbers, points on the sphere and state dicts for the tests of the energy-based model's library."""

import json
from pathlib import Path

import torch

from ebc_lab.ebm.sphere import normalise
from ebc_lab.ebm.vmf import bessel_ratio

GOLDEN = json.loads((Path(__file__).parents[1] / "ebm" / "golden.json").read_text())


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def unit(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return normalise(torch.randn(*shape, generator=generator(seed), dtype=dtype))


def cosine_variance(n: int, raw: float) -> float:
    """Of mu.x under vMF(mu, raw): the slope of the Bessel ratio."""
    ratio = float(bessel_ratio(n, raw))
    return 1 - ratio * ratio - (n - 1) * ratio / raw


def assert_same(first, second) -> None:
    """The same bits in two state dicts, extra state included."""
    assert first.keys() == second.keys()
    for name, value in first.items():
        if isinstance(value, dict):
            assert_same(value, second[name])
        else:
            assert torch.equal(value, second[name]), name
