"""Two processes under FSDP2, where each holds parts of the weights: the bits of DDP."""

from contextlib import suppress

import pytest
import torch
from support.ebc_gloo_cases import RARER, Results, apart
from torch import nn

from ebc_lab.ebc.parallel.shards import swapped, unwrapped


def same_bits(results: Results, name: str, like: str) -> None:
    own, other = results[0][name], results[0][like]
    steps = len(own["c"])
    assert own["c"] == other["c"][:steps]
    # on some CPUs a product's last bits depend on where its factors lie, and gathering puts them elsewhere
    pairs = list(zip(own["kl"], other["kl"], strict=False))
    assert all(a == b or a == pytest.approx(b, rel=1e-6) for a, b in pairs), pairs
    if steps == len(other["c"]):
        assert apart(own, other) == 0.0


SAME = {
    "fsdp": "ddp",
    "fsdp not resharding": "ddp",
    "fsdp clip": "ddp",
    "fsdp looked at": "ddp",
    "fsdp masked": "masked",
    "fsdp bad on one": "bad on one",
    "fsdp after attach": "ddp",
    "fsdp resumed": "ddp",
    "fsdp bfloat16 fresh": "fsdp bfloat16",
}


@pytest.mark.thorough
@pytest.mark.parametrize(("name", "like"), SAME.items())
def test_fsdp_takes_the_bits_of_ddp(results: Results, name: str, like: str) -> None:
    same_bits(results, name, like)


@pytest.mark.thorough
def test_a_radius_is_of_all_parts_of_the_weights(results: Results) -> None:
    """The norms are summed in another order than under DDP: not the same last bits."""
    assert results[0]["fsdp double"]["c"] == pytest.approx(results[0]["double"]["c"], rel=1e-5)


NEARLY = ("clipped", "sparing", "scaled")  # where a norm of all weights matters, which FSDP adds up otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RARER if name not in NEARLY])
def test_fsdp_takes_them_in_rarer_cases_too(rarer_results: Results, name: str) -> None:
    same_bits(rarer_results, f"fsdp {name}", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columns", "compiled inside", "compiled around", "fsdp compiled"])
def test_columns_may_be_shared_out_and_models_compiled(rarer_results: Results, name: str) -> None:
    same_bits(rarer_results, name, "ddp")


def nearly_equal(results: Results, name: str) -> None:
    own, other = results[0][f"fsdp {name}"], results[0][name]
    assert own["c"] == pytest.approx(other["c"], rel=1e-4)
    assert apart(own, other) < 1e-5


def test_tracked_is_equal_up_to_rounding(results: Results) -> None:
    nearly_equal(results, "tracked")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEARLY)
def test_norms_are_equal_up_to_rounding(rarer_results: Results, name: str) -> None:
    nearly_equal(rarer_results, name)


def test_the_gradient_norm_is_that_of_the_whole(results: Results) -> None:
    assert results[0]["fsdp"]["norm"] == pytest.approx(results[0]["ddp"]["norm"], rel=1e-5)
    assert results[0]["fsdp"]["norm"] == results[1]["fsdp"]["norm"]
    assert min(results[0]["fsdp"]["c"]) > 0.1  # c falls and falls where a trial is not seen by the forward


def test_a_mixed_precision_policy_sets_the_floor(results: Results) -> None:
    assert results[0]["fsdp"]["floor"] == 1e-7
    assert results[0]["fsdp bfloat16"]["floor"] == 1e-5
    assert results[0]["fsdp bfloat16"]["c"] == pytest.approx(results[0]["ddp"]["c"][:5], rel=0.05)


@pytest.mark.slow
def test_so_it_does_where_the_logits_are_float32_again(rarer_results: Results) -> None:
    own = rarer_results[0]["fsdp bfloat16 to float32"]
    assert own["floor"] == 1e-5
    assert own["c"] == pytest.approx(rarer_results[0]["ddp"]["c"][:5], rel=0.05)


@pytest.mark.slow
def test_weights_of_several_types_are_measured_as_they_are_trained(rarer_results: Results) -> None:
    same_bits(rarer_results, "mixed fresh", "mixed")


def test_exchanged_values_are_put_back_also_after_an_error() -> None:
    part, other = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    with suppress(RuntimeError), swapped([part], [other]):
        assert part.tolist() == [3, 4]
        raise RuntimeError
    assert part.tolist() == [1, 2]
    assert other.tolist() == [3, 4]


def test_a_plain_module_has_nothing_around_it() -> None:
    model = nn.Linear(1, 1)
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(model)) is model
