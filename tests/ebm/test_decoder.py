"""The mixture of experts: against the golden file, and against one token at a time."""

import pytest
import torch
from support.ebm_states import GOLDEN

from ebc_lab.ebm.decoder import Decoder, MixtureOfExperts, balance_loss, route, router_z_loss


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def mixture(width=12, hidden=7, experts=4, active=2, dtype=torch.float64, seed=0):
    """One whose router prefers, so that routes differ from token to token."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = MixtureOfExperts(width, hidden, experts, active).to(dtype)
    made.router.weight.data *= 50
    return made


def one_by_one(moe, u):
    """Each token through the experts that its softmax favours, in Python."""
    results = []
    for row in u:
        p = torch.softmax(moe.router(row), 0)
        chosen = sorted(range(len(p)), key=lambda e: -p[e].item())[: moe.active]
        total = sum(p[e] for e in chosen)
        results.append(sum(p[e] / total * moe.experts[e](row) for e in chosen))
    return torch.stack(results)


# -- routing and its losses ----------------------------------------------------------------------------------


def test_routes_and_losses_are_those_of_the_golden_file():
    logits = torch.tensor(GOLDEN["moe"]["logits"], dtype=torch.float64)
    gates, indices, probabilities = route(logits, 2)
    assert indices.tolist() == GOLDEN["moe"]["indices"]
    assert gates.tolist() == [pytest.approx(row, rel=1e-12) for row in GOLDEN["moe"]["gates"]]
    assert float(balance_loss(indices, probabilities)) == pytest.approx(GOLDEN["moe"]["balance"], rel=1e-12)
    assert float(router_z_loss(logits)) == pytest.approx(GOLDEN["moe"]["z"], rel=1e-12)


def test_of_equal_experts_the_first_are_chosen():
    gates, indices, _ = route(torch.tensor([[1.0, 1, 1, 1], [0, 2, 0, 2]]), 3)
    assert indices.tolist() == [[0, 1, 2], [1, 3, 0]]
    assert gates[0].tolist() == pytest.approx([1 / 3] * 3)


def test_gates_of_experts_without_probability_are_still_gates():
    gates, indices, _ = route(torch.tensor([[0.0, -1000, -1001]]), 3)
    assert indices.tolist() == [[0, 1, 2]]
    assert gates.tolist() == [[1, 0, 0]]
    assert float(route(torch.tensor([[-3e4, -3e4, -9e4]]), 2)[0][0, 1]) == 0.5


def test_the_balance_is_one_for_equal_shares_and_the_number_of_experts_for_one_favourite():
    everyone = torch.tensor([[0, 1], [2, 3], [1, 0], [3, 2]])
    assert float(balance_loss(everyone, torch.full((4, 4), 0.25))) == GOLDEN["moe"]["balanced_value"]
    favourite = torch.zeros(5, 3)
    favourite[:, 1] = 1
    assert float(balance_loss(torch.full((5, 1), 1), favourite)) == 3


# -- the experts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("experts", [1, 2, 4, 7])
@pytest.mark.parametrize("tokens", [1, 2, 65])
def test_tokens_sorted_by_expert_give_what_each_token_alone_gives(experts, tokens):
    for active in range(1, experts + 1):
        moe = mixture(experts=experts, active=active, dtype=torch.float32)
        u = draws(tokens, 12, dtype=torch.float32, seed=active)
        torch.testing.assert_close(moe(u)[0], one_by_one(moe, u), rtol=0, atol=1e-6)


def test_an_expert_that_nobody_visits_has_a_gradient_of_zero():
    moe = mixture(experts=3, active=1)
    moe.router.weight.data.zero_()  # equal probabilities: expert 0
    moe(draws(5, 12))[0].sum().backward()
    assert [bool(expert.up.weight.grad.any()) for expert in moe.experts] == [True, False, False]


def test_a_token_that_is_not_finite_spoils_no_other():
    moe = mixture()
    u = draws(10, 12)
    clean = moe(u)[0]
    u[3, 5] = torch.nan
    spoiled = moe(u)[0]
    assert spoiled[3].isnan().all()
    rest = [i for i in range(10) if i != 3]
    torch.testing.assert_close(spoiled[rest], clean[rest])


# -- the decoder ---------------------------------------------------------------------------------------------


def test_under_autocast_tokens_go_where_they_went_before():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        made = Decoder(12, 7, 9)
    made.moe.router.weight.data *= 50
    u = draws(200, 12, dtype=torch.float32)
    logits, routing = made(u)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, same = made(u)
    assert rounded.dtype == torch.bfloat16
    assert same.logits.dtype == torch.float32
    assert torch.equal(same.indices, routing.indices)
    torch.testing.assert_close(rounded.float(), logits, rtol=0, atol=0.05)


# -- refusals ------------------------------------------------------------------------------------------------


def test_impossible_sizes_and_inputs_are_refused():
    assert MixtureOfExperts(1, 1, 1, 1)(torch.ones(2, 1))[0].shape == (2, 1)  # the smallest
    for settings, message in (
        ((8, 4, 2, 3), "active=3 of experts=2 is impossible"),
        ((8, 4, 2, 0), "active=0 of experts=2 is impossible"),
        ((8, 0, 2, 1), "must both be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            MixtureOfExperts(*settings)
    with pytest.raises(ValueError, match="active=5 of 4 experts is impossible: choose 1 to 4"):
        route(torch.zeros(2, 4), 5)
    with pytest.raises(ValueError, match=r"must be \(tokens, experts\), not \(2, 3, 4\)"):
        route(torch.zeros(2, 3, 4))
    for wrong in (torch.zeros(2, 3, 12), torch.zeros(3, 11)):
        with pytest.raises(ValueError, match=r"take \(tokens, 12\)"):
            mixture(dtype=torch.float32)(wrong)
    with pytest.raises(ValueError, match="no token"):
        balance_loss(torch.zeros(0, 2, dtype=torch.int64), torch.zeros(0, 4))
    with pytest.raises(ValueError, match="no token"):
        router_z_loss(torch.zeros(0, 4))
