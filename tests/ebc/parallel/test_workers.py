"""Two processes under DDP: one c and one set of weights, whatever each of them sees."""

import pickle

import pytest
import torch
from support.ebc_gloo_cases import HALF, Told, agree, apart, assert_refused
from support.ebc_gloo_worker import Case, trained
from torch import Tensor

from ebc_lab.ebc.parallel.workers import Workers

AGREEING = (
    "ddp",
    "inner",
    "clip",
    "clip inner",
    "given",
    "accumulated",
    "masked",
    "masked clip",
    "half",
    "bad",
    "bad on one",
    "scaled",
    "resumed",
    "tracked",
    "double",
    "fisher",
    "surrogate",
    "calibrated",
)
SLOWLY_AGREEING = (
    "two",
    "averaged",
    "frozen",
    "mixed",
    "plainly scaled",
    "clipped",
    "rich",
    "sparing",
    "closure",
    "ahead",
    "scaled",
    "attached first",
    "resumed clip",
)


@pytest.mark.parametrize("name", AGREEING)
def test_all_ranks_take_the_same_c_and_keep_the_same_weights(told: Told, name: str) -> None:
    agree(told, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOWLY_AGREEING)
def test_so_they_do_in_rarer_cases(slowly_told: Told, name: str) -> None:
    agree(slowly_told, name)


def test_forty_steps_were_compared_with_accumulation_and_short_batches(told: Told) -> None:
    c = told[0]["accumulated"]["c"]
    assert len(c) == 40
    assert len(set(c)) == 40
    audited = [kl is not None for kl in told[0]["accumulated"]["kl"]]
    assert [t for t, yes in enumerate(audited) if yes] == [t for t in range(0, 40, 4) if t % 5]


@pytest.mark.parametrize("name", ["own kl", "alone"])
def test_ranks_that_follow_their_own_kl_drift_apart(told: Told, name: str) -> None:
    with pytest.raises(AssertionError):
        agree(told, name)
    first, second = (rank[name] for rank in told)
    assert all(a != b for a, b in zip(first["c"], second["c"], strict=True))
    assert apart(first, second) > 1e-3


@pytest.mark.parametrize("name", ["looked at", "inner", "clip", "clip inner", "given"])
def test_the_module_may_be_given_with_or_without_ddp(told: Told, name: str) -> None:
    assert told[0][name]["c"] == told[0]["ddp"]["c"][:5]


def test_two_processes_are_one_with_the_whole_batch(told: Told) -> None:
    whole = {name: 2 * value for name, value in HALF.items()}
    one = trained(Case(wrap="none", options=whole, steps=9), 0, 1)
    two = told[0]["half"]
    assert two["c"] == pytest.approx(one["c"], rel=1e-4)
    assert two["tokens"] == one["tokens"]
    audits = [0, 4, 8]
    assert [two["kl"][t] for t in audits] == pytest.approx([one["kl"][t] for t in audits], rel=1e-3)
    assert apart(one, two) < 1e-5


def test_a_rank_whose_probe_is_padding_has_no_say(told: Told) -> None:
    own = told[0]["masked"]
    assert own["c"] == told[0]["masked clip"]["c"]
    assert all(kl is None or kl > 0 for kl in own["trial_kl"])


@pytest.mark.parametrize("name", ["bad", "bad on one", "scaled"])
def test_bad_gradients_of_one_rank_are_a_skipped_step_of_all(told: Told, name: str) -> None:
    for rank in told:
        assert rank[name]["skipped"] == [0, 0, 1, 0, 0]
        assert rank[name]["c"][:2] == pytest.approx(told[0]["ddp"]["c"][:2], rel=1e-5)  # fused Adam rounds
        assert all(bool(w.isfinite().all()) for w in rank[name]["weights"])


def test_resumed_is_as_if_never_stopped(told: Told) -> None:
    assert told[0]["resumed"]["c"] == told[0]["ddp"]["c"]
    assert apart(told[0]["resumed"], told[0]["ddp"]) == 0.0


def test_a_step_costs_two_messages_and_an_audit_two_more(told: Told) -> None:
    """One of a flag, one for each measurement; whether all can audit, and the audit."""
    own = told[0]["accumulated"]
    for t in range(21, 40):
        audited = 2 if own["kl"][t] is not None else 1 if t % 4 == 0 else 0
        assert own["all_reduces"][t] == 1 + own["measured"][t] + audited


REFUSED = {
    "arithmetic": "process_group=None",
    "agreement": "controller='agreement'",
    "confidence": "controller='confidence'",
    "in backward": "process_group=None",
    "lagged": "process_group=None",
}


@pytest.mark.parametrize(("name", "named"), REFUSED.items())
def test_what_follows_one_process_is_refused(told: Told, name: str, named: str) -> None:
    assert_refused(told, name, named)


def number(value: float) -> Tensor:
    return torch.tensor(value)


def test_alone_nothing_is_summed_and_no_bit_changes() -> None:
    alone = Workers()
    third = number(1 / 3)
    assert alone.mean(third, 7) is third
    assert alone.rms(third, 7) is third
    assert alone.joined_norm(third) is third
    assert alone.any_and_norm(third, third) == (third, third)


def test_others_are_met_again_where_it_is_unpickled() -> None:
    workers = Workers()
    workers.meet(None, torch.device("cpu"))
    assert workers.met
    assert not pickle.loads(pickle.dumps(workers)).met
    assert pickle.loads(pickle.dumps(Workers(None))).asked is None
