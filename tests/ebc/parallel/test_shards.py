"""Two processes under FSDP2: the bits of DDP, the traps of weights in parts, and what is refused there."""

from contextlib import suppress

import pytest
import torch
from support.ebc_gloo_cases import RARER, Told, apart
from torch import nn

from ebc_lab.ebc.parallel.shards import swapped, unwrapped


def same_bits(told: Told, name: str, like: str) -> None:
    own, other = told[0][name], told[0][like]
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
def test_fsdp_takes_the_bits_of_ddp(told: Told, name: str, like: str) -> None:
    same_bits(told, name, like)


@pytest.mark.thorough
def test_a_radius_is_of_all_parts_of_the_weights(told: Told) -> None:
    """The norms are summed in another order than under DDP: not the same last bits."""
    assert told[0]["fsdp double"]["c"] == pytest.approx(told[0]["double"]["c"], rel=1e-5)


NEARLY = ("clipped", "sparing", "scaled")  # where a norm of all weights matters, which FSDP adds up otherwise


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RARER if name not in NEARLY])
def test_fsdp_takes_them_in_rarer_cases_too(slowly_told: Told, name: str) -> None:
    same_bits(slowly_told, f"fsdp {name}", name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["columns", "compiled inside", "compiled around", "fsdp compiled"])
def test_columns_may_be_shared_out_and_models_compiled(slowly_told: Told, name: str) -> None:
    same_bits(slowly_told, name, "ddp")


def nearly_equal(told: Told, name: str) -> None:
    own, other = told[0][f"fsdp {name}"], told[0][name]
    assert own["c"] == pytest.approx(other["c"], rel=1e-4)
    assert apart(own, other) < 1e-5


def test_tracked_is_equal_up_to_rounding(told: Told) -> None:
    nearly_equal(told, "tracked")


@pytest.mark.slow
@pytest.mark.parametrize("name", NEARLY)
def test_norms_are_equal_up_to_rounding(slowly_told: Told, name: str) -> None:
    nearly_equal(slowly_told, name)


def test_the_gradient_norm_is_that_of_the_whole(told: Told) -> None:
    assert told[0]["fsdp"]["norm"] == pytest.approx(told[0]["ddp"]["norm"], rel=1e-5)
    assert told[0]["fsdp"]["norm"] == told[1]["fsdp"]["norm"]
    assert min(told[0]["fsdp"]["c"]) > 0.1  # c falls and falls where a trial is not seen by the forward


def test_a_mixed_precision_policy_sets_the_floor(told: Told) -> None:
    assert told[0]["fsdp"]["floor"] == 1e-7
    assert told[0]["fsdp bfloat16"]["floor"] == 1e-5
    assert told[0]["fsdp bfloat16"]["c"] == pytest.approx(told[0]["ddp"]["c"][:5], rel=0.05)


@pytest.mark.slow
def test_so_it_does_where_the_logits_are_float32_again(slowly_told: Told) -> None:
    own = slowly_told[0]["fsdp bfloat16 to float32"]
    assert own["floor"] == 1e-5
    assert own["c"] == pytest.approx(slowly_told[0]["ddp"]["c"][:5], rel=0.05)


@pytest.mark.slow
def test_weights_of_several_types_are_measured_as_they_are_trained(slowly_told: Told) -> None:
    same_bits(slowly_told, "mixed fresh", "mixed")


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
