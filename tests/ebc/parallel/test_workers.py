"""Two processes under DDP: one c and one set of weights, whatever each of them sees; and what is refused."""

import pickle

import pytest
import torch
from support.ebc_gloo_cases import CASES, HALF, SLOW_CASES, Results, agree, apart
from support.ebc_gloo_worker import REFUSED, Case, trained
from torch import Tensor

from ebc_lab.ebc.parallel.workers import Workers


def test_all_ranks_take_the_same_c_and_keep_the_same_weights(results: Results) -> None:
    for name in CASES.keys() - {"alone"}:
        agree(results, name)


@pytest.mark.slow
def test_so_they_do_in_rarer_cases(rarer_results: Results) -> None:
    for name in SLOW_CASES:
        agree(rarer_results, name)


def test_without_a_group_ranks_follow_their_own_kl_and_drift_apart(results: Results) -> None:
    first, second = (rank["alone"] for rank in results)
    assert all(a != b for a, b in zip(first["c"], second["c"], strict=True))
    assert apart(first, second) > 1e-3


@pytest.mark.parametrize("name", ["looked at", "inner", "clip", "clip inner", "given"])
def test_the_module_may_be_given_with_or_without_ddp(results: Results, name: str) -> None:
    assert results[0][name]["c"] == results[0]["ddp"]["c"][:5]


def test_two_processes_are_one_with_the_whole_batch(results: Results) -> None:
    whole = {name: 2 * value for name, value in HALF.items()}
    one = trained(Case(wrap="none", options=whole, steps=9), 0, 1)
    two = results[0]["half"]
    assert two["c"] == pytest.approx(one["c"], rel=1e-4)
    assert two["tokens"] == one["tokens"]
    audits = [0, 4, 8]
    assert [two["kl"][t] for t in audits] == pytest.approx([one["kl"][t] for t in audits], rel=1e-3)
    assert apart(one, two) < 1e-5


def test_a_rank_whose_probe_is_padding_has_no_say(results: Results) -> None:
    own = results[0]["masked"]
    assert own["c"] == results[0]["masked clip"]["c"]
    assert all(kl is None or kl > 0 for kl in own["trial_kl"])


@pytest.mark.parametrize("name", ["bad", "bad on one", "scaled"])
def test_bad_gradients_of_one_rank_are_a_skipped_step_of_all(results: Results, name: str) -> None:
    for rank in results:
        assert rank[name]["skipped"] == [0, 0, 1, 0, 0]
        assert rank[name]["c"][:2] == pytest.approx(results[0]["ddp"]["c"][:2], rel=1e-5)  # fused Adam rounds
        assert all(bool(w.isfinite().all()) for w in rank[name]["weights"])


def test_resumed_is_as_if_never_stopped(results: Results) -> None:
    """Under FSDP by torch.distributed.checkpoint, whose loading takes a step of zero gradients."""
    for name in ("ddp", "fsdp"):
        resumed = results[0]["resumed" if name == "ddp" else "fsdp resumed"]
        assert resumed["c"] == results[0][name]["c"]
        assert apart(resumed, results[0][name]) == 0.0


def test_a_step_costs_two_messages_and_an_audit_two_more(results: Results) -> None:
    """One of a flag, one for each measurement; whether all can audit, and the audit. Under FSDP one more."""
    own = results[0]["accumulated"]
    assert [t for t, kl in enumerate(own["kl"]) if kl is not None] == [t for t in range(0, 40, 4) if t % 5]
    for t in range(21, 40):
        audited = 2 if own["kl"][t] is not None else 1 if t % 4 == 0 else 0
        assert own["all_reduces"][t] == 1 + own["measured"][t] + audited
    ddp, fsdp = (results[0][name]["all_reduces"] for name in ("ddp", "fsdp"))
    more = [b - a for a, b, kl in zip(ddp, fsdp, results[0]["ddp"]["kl"], strict=True) if kl is None]
    assert set(more) == {1}


def test_what_cannot_be_limited_is_refused_in_a_sentence(results: Results) -> None:
    for rank in results:
        for name, (_, words) in REFUSED.items():
            said = rank["refused"][name]
            assert said.startswith(("ValueError: ", words)), (name, said)
            assert words in said, (name, said)
            assert "\n" not in said, (name, said)


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
