"""S: golden values, and which aggregates bound the movement."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.ebc import aggregate, centre, rms_norm
from ebc_lab.ebc.options import AGGREGATES

contributions = st.lists(st.one_of(st.just(0.0), st.floats(1e-3, 1e3)), min_size=1, max_size=20)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6))
def test_bounds_hold_on_a_linear_model(seed, layers):
    generator = torch.Generator().manual_seed(seed)
    draw = {"dtype": torch.float64, "generator": generator}
    x = torch.randn(layers, 7, 4, **draw)
    dw = torch.randn(layers, 4, 5, **draw)
    moves = x @ dw  # each layer's share of the logits' movement
    s = torch.stack([rms_norm(centre(move)) for move in moves])
    movement = rms_norm(centre(moves.sum(0)))
    assert aggregate(s, "l1") >= movement * (1 - 1e-12)
    assert aggregate(s, "sqrtl_l2") >= movement * (1 - 1e-12)


@given(contributions)
def test_order_of_the_aggregates(values):
    s = torch.tensor(values, dtype=torch.float64)
    l1, sqrtl_l2, l2 = (aggregate(s, kind) for kind in ("l1", "sqrtl_l2", "l2"))
    assert l2 <= l1 * (1 + 1e-12)
    assert l1 <= sqrtl_l2 * (1 + 1e-12)


@given(contributions, st.integers(1, 5), st.floats(1e-3, 1e3))
def test_groups_at_rest_do_not_count_and_all_scale(values, resting, factor):
    s = torch.tensor(values, dtype=torch.float64)
    for kind in AGGREGATES:
        assert aggregate(torch.cat([s, torch.zeros(resting)]), kind).item() == pytest.approx(
            aggregate(s, kind).item()
        )
        assert aggregate(factor * s, kind).item() == pytest.approx(factor * aggregate(s, kind).item())
