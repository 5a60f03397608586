"""The GPT of exact layers beside the lab's."""

import pytest
import torch
import torch.nn.functional as F

from ebc_lab.verity import VerityGPT, ops
from ebc_lab.workloads import gpt


@pytest.mark.usefixtures("engine")
def test_its_gradients_are_within_1e_5_of_float64():
    exact = VerityGPT(13, 16, 32, 2, 4, torch.Generator().manual_seed(0))
    plain = gpt.plain(13, 16, 32, 2, 4, seed=0).double()
    plain.load_state_dict(exact.state_dict())
    rows = torch.randint(0, 13, (8, 17), generator=torch.Generator().manual_seed(1))
    x, y = rows[:, :-1], rows[:, 1:]
    ops.cross_entropy(exact(x), y).backward()
    F.cross_entropy(plain(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    assert torch.equal(exact(x)[2:4], exact(x[2:4]))  # no sequence depends on its neighbours
    for (name, p), (other, q) in zip(exact.named_parameters(), plain.named_parameters(), strict=True):
        assert name == other
        assert (p.grad - q.grad).norm() < 1e-5 * q.grad.norm(), name


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="multiple of heads"):
        VerityGPT(5, 4, 10, 1, 3)
