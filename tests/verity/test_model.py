"""The GPT of exact layers beside the lab's."""

import pytest
import torch
import torch.nn.functional as F

from ebc_lab.verity import VerityGPT, ops
from ebc_lab.workloads import gpt


def both() -> tuple[VerityGPT, gpt.GPT]:
    exact = VerityGPT(13, 16, 32, 2, 4, torch.Generator().manual_seed(0))
    plain = gpt.plain(13, 16, 32, 2, 4, seed=0)
    plain.load_state_dict(exact.state_dict())
    return exact, plain


def test_it_is_the_same_model():
    exact, plain = both()
    assert [n for n, _ in exact.named_parameters()] == [n for n, _ in plain.named_parameters()]
    tokens = torch.randint(0, 13, (3, 16), generator=torch.Generator().manual_seed(1))
    assert torch.allclose(exact(tokens), plain(tokens), rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("engine")
def test_its_gradients_are_within_1e_5_of_float64():
    exact, plain = both()
    plain = plain.double()
    rows = torch.randint(0, 13, (8, 17), generator=torch.Generator().manual_seed(1))
    x, y = rows[:, :-1], rows[:, 1:]
    ops.cross_entropy(exact(x), y).backward()
    F.cross_entropy(plain(x).flatten(0, 1), y.flatten(), reduction="sum").backward()
    for (name, p), other in zip(exact.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad - other.grad).norm() < 1e-5 * other.grad.norm(), name


def test_a_sequence_does_not_depend_on_its_neighbours():
    exact, _ = both()
    tokens = torch.randint(0, 13, (5, 16), generator=torch.Generator().manual_seed(1))
    assert torch.equal(exact(tokens)[2:4], exact(tokens[2:4]))


def test_heads_must_share_the_width():
    with pytest.raises(ValueError, match="multiple of heads"):
        VerityGPT(5, 4, 10, 1, 3)
