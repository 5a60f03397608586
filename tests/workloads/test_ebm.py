"""The energy-based model as a workload: what chance decides, what its events do, its groups and columns."""

import math
from dataclasses import replace

import pytest
import torch
from support.ebm_runs import eventful, tiny_ebm
from support.runs import made

from ebc_lab.config.choices import changed
from ebc_lab.ebc import StepStats
from ebc_lab.records.paths import RunFiles
from ebc_lab.training.run import Training
from ebc_lab.workloads import load
from ebc_lab.workloads.ebm import step_columns

KINDS = {
    "moe": [],
    "gradient": ["ebm.adapt=gradient"],
    "dense": ["decoder.experts=1", "decoder.active=1"],
    "transformer": ["encoder=transformer", "decoder=transformer"],
    "no splats": ["ebm.splats=0"],
}
every = pytest.mark.parametrize("given", KINDS.values(), ids=KINDS)


@pytest.fixture(scope="module")
def run(text_file):
    return tiny_ebm(text_file)


def test_what_a_norm_is_given_under_autocast_is_in_float32(text_file, tmp_path):
    """On a CPU LayerNorm adds up the gradient of its weights in the dtype of its input."""
    training = Training(tiny_ebm(text_file, *KINDS["transformer"], "dtype=bfloat16"), tmp_path)
    given = []
    for module in training.model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0].dtype))
    training.advance(1)
    assert set(given) == {torch.float32}


def loaded(run):
    workload = load(run, torch.device("cpu"))
    return workload, workload.build()


def stats(**changes):
    base = StepStats(
        torch.ones(()), torch.ones(()), torch.tensor(False), torch.tensor(False), torch.tensor(False)
    )
    return replace(base, **changes)


def losses(workload, step):
    """The loss of a step on ten rows of the text, its parts, and the tape of its forward."""
    rows = workload.tokens["train"][:170].view(10, 17)
    logits, tape = workload.forward(workload.model, rows[:, :-1])
    return *workload.loss(logits, rows[:, 1:], tape, step), tape


def weights_of(model):
    return {n: v.clone() for n, v in model.state_dict().items() if isinstance(v, torch.Tensor)}


def same(first, second):
    return set(first) == set(second) and all(torch.equal(v, second[n]) for n, v in first.items())


# -- the model -----------------------------------------------------------------------------------------------


def test_first_splats_lie_among_the_states_of_the_text(run):
    workload, model = loaded(run)
    store = model.store
    assert len(store) == 16  # never fewer
    states = model.encode(workload.tokens["train"][:1600].view(100, 16))[0].detach()
    away = torch.acos((states @ store.directions()[store.active].T).amax(1).clamp(max=1))
    strangers = torch.nn.functional.normalize(torch.randn(1600, 8), dim=-1)
    far = torch.acos((strangers @ store.directions()[store.active].T).amax(1).clamp(max=1))
    assert away.mean() < 0.7 * far.mean()


# -- chance --------------------------------------------------------------------------------------------------


def test_a_steps_chance_is_a_function_of_seed_and_step_alone(run):
    workload, _ = loaded(run)
    first = [losses(workload, step)[1] for step in (3, 4, 3)]
    torch.manual_seed(5)
    again, _ = loaded(run)
    assert same(losses(again, 3)[1], first[0])  # by another process, which took no step before
    assert same(first[0], first[2])
    assert first[0]["loss"] == first[1]["loss"]
    assert first[0]["loss_dsm"] != first[1]["loss_dsm"]
    assert first[0]["loss_noised"] != first[1]["loss_noised"]
    other, _ = loaded(replace(run, seed=1))
    assert losses(other, 3)[1]["loss_dsm"] != first[0]["loss_dsm"]


@pytest.mark.thorough
def test_noised_tokens_of_blocks_are_whole_rows(text_file):
    run = tiny_ebm(text_file, "decoder=transformer", "ebm.states=40")
    workload, _ = loaded(run)
    total, _, tape = losses(workload, 3)
    draws = workload._draws(3, tape)
    rows = draws.noised.view(2, 16)
    assert torch.equal(rows - rows[:, :1], torch.arange(16).expand(2, 16))
    assert (rows[:, 0] % 16 == 0).all()
    assert len(draws.scored.unique()) == 40
    assert total.isfinite()


def test_no_more_states_are_noised_than_there_are(text_file):
    run = tiny_ebm(text_file, "ebm.states=10000")
    workload, _ = loaded(run)
    assert len(workload._draws(0, losses(workload, 0)[2]).scored) == 160


# -- what comes after a step ---------------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize(("skipped", "first"), [(None, 3), (2, 4)])
def test_the_curriculum_opens_places_at_each_third_and_a_skipped_step_only_delays_them(
    text_file, tmp_path, skipped, first
):
    run = tiny_ebm(text_file, "ebm.splats=160", "ebm.soc=false", "ebm.temperature=[4,2,1]", "eval_every=60")
    training = Training(replace(run, steps=9), made(tmp_path / "run"))
    after_step = training.workload.after_step

    def skipping(step, taken, *given):
        return after_step(step, replace(taken, skipped=torch.tensor(step == skipped)), *given)

    training.workload.after_step = skipping
    store = training.model.store
    splats, divisors = [], []
    for _ in range(9):
        splats.append(len(store))
        divisors.append(store.kappa_divisor)
        training.advance(1)
    assert splats == [16] * first + [96] * (6 - first) + [160] * 3
    assert divisors == [4.0] * first + [2.0] * (6 - first) + [1.0] * 3


def test_a_skipped_step_changes_nothing_and_an_audit_where_no_weight_moved_sees_the_events_alone(run):
    workload, model = loaded(run)
    _, _, tape = losses(workload, 1)
    before = weights_of(model)

    def after(**given):
        return workload.after_step(1, stats(**given), tape, lambda parameter, rows: None)

    assert after(skipped=torch.tensor(True)) == {}
    assert same(before, weights_of(model))
    found = after(applied_kl=torch.tensor(0.01), audit_tokens=48)
    assert found["route_flips"] == found["splat_flips"] == found["score_shift"] == 0
    assert found["event_kl"] > 0  # the widths followed the states


@pytest.mark.thorough
def test_rows_that_hold_something_new_are_told(run):
    workload, model = loaded(eventful(replace(run, steps=15)))
    told = []

    def tell(parameter, rows):
        assert parameter is model.store.mu
        told.append(set(rows.tolist()))

    for step in range(13):
        _, _, tape = losses(workload, step)
        before = model.store.mu.detach().clone()
        workload.after_step(step, stats(), tape, tell)
        moved = set((model.store.mu.detach() != before).any(1).nonzero().flatten().tolist())
        assert moved == set().union(*told)
        told.clear()
    assert len(model.store) == 24  # of the third phase


def test_the_rows_of_splats_that_a_pile_makes_are_told(run):
    """Their optimizer's state is that of another splat, which won least."""
    workload, model = loaded(eventful(run))
    store, told = model.store, []
    _, _, tape = losses(workload, 6)
    before = store.mu.detach().clone()
    store.frequency.zero_()
    found = workload.after_step(6, stats(), tape, lambda _, rows: told.extend(rows.tolist()))
    assert found["consolidations"] > 0
    assert set(told) == set((store.mu.detach() != before).any(1).nonzero().flatten().tolist()) != set()


# -- what it is to the rest of the lab -----------------------------------------------------------------------


@pytest.mark.thorough
@every
def test_recorded_columns_are_those_that_are_named(text_file, tmp_path, given):
    workload, model = loaded(eventful(tiny_ebm(text_file, *given)))
    audited = stats(applied_kl=torch.tensor(0.01), audit_tokens=48)
    seen = set()
    for step in range(9):
        _, parts, tape = losses(workload, step)
        seen |= {*parts, *workload.after_step(step, audited, tape, lambda parameter, rows: None)}
    unnamed = seen - {"loss"} - set(workload.step_columns)
    assert unnamed <= {"dropped_mass", "load_max"}  # 0 without splats; of evals.csv
    assert set(workload.step_columns) <= seen
    with torch.no_grad():
        found = workload.evaluated(model.eval(), 30, 2.0, RunFiles(tmp_path))
    assert tuple(found) == workload.eval_columns
    assert workload.curve[-1]["val_loss"] == 2.0


def test_what_a_loss_without_a_part_does_not_record(run):
    bare = changed(run, {"ebm": {"mle": 0.0, "score": 0.0, "noised": 0.0, "soc": False}})
    left_out = {"loss_mle", "energy", "loss_dsm", "loss_noised", "soc_rate", "r2_0p05"}
    assert left_out.isdisjoint(step_columns(bare))
    _, parts, tape = losses(loaded(bare)[0], 0)
    assert left_out.isdisjoint(parts)
    assert tape.scored is None


@every
@pytest.mark.parametrize("kind", ["block", "type"])
def test_groups_hold_every_parameter_once(text_file, given, kind):
    workload, model = loaded(tiny_ebm(text_file, *given))
    names = [name for name, _ in model.named_parameters()]
    groups = workload.groups(names, kind)
    assert sorted(name for members in groups.values() for name in members) == sorted(names)
    assert groups["embeddings"] == ["embeddings"]
    assert ("store.mu" in groups["splats"]) == (model.store is not None)
    assert {"log_tether", "pair_a", "pair_b", "pair_weight", "gains"} <= set(groups["splats"])
    assert workload.groups(names, "tensor") is None
    experts = ["expert0"] if "decoder.experts=1" in given else ["expert0", "expert1", "expert2", "expert3"]
    parts = {"block": [*experts, "head"], "type": ["experts", "norm", "head"]}
    if "decoder=transformer" in given:
        parts = {"block": ["block0", "block1", "head"], "type": ["block", "norm", "head"]}
    assert set(groups) == {"embeddings", "encoder", "splats", *parts[kind]}


@every
def test_matrices_are_hidden_and_directions_are_unit_vectors(text_file, given):
    workload, model = loaded(tiny_ebm(text_file, *given))
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in workload.matrices(model)}
    directions = {names[id(p)] for p in workload.directions(model)}
    assert directions == {"embeddings", "pair_a", "pair_b"} | (
        {"store.mu"} if model.store is not None else set()
    )
    assert not matrices & directions
    outside = ("router", "head", "positions", "norm", "into", "out.weight")
    assert all(p.ndim == 2 for p in workload.matrices(model))
    assert not [name for name in matrices if name.split(".", 1)[1].startswith(outside)]
    if "encoder=transformer" not in given:
        assert {"encoder.mix.0", "encoder.mix.1"} <= matrices
        assert sum(".experts." in name for name in matrices) == 2 * (1 if "decoder.experts=1" in given else 4)
    else:
        assert sum(name.startswith("decoder.blocks") for name in matrices) == 12


@pytest.mark.thorough
def test_figures_of_a_finished_run(text_file, tmp_path):
    training = Training(
        tiny_ebm(text_file, "steps=12", "eval_every=4", "ebm.keep_every=8"), made(tmp_path / "run")
    )
    result = training.run()
    found = result["workload"]
    assert found["bigram"] < found["unigram"] < math.log(training.workload.vocabulary)
    assert found["settled"] == pytest.approx(result["val_loss"], abs=0.3)
    assert found["sampled"] <= found["settled"] + 0.1
    assert found["energy_trend"] in ("decreasing", "increasing", "fluctuating", "stable")
    assert sorted(p.name for p in training.files.models.iterdir()) == ["step_8.pt"]
    assert training.files.model.exists()
    assert [row["step"] for row in training.workload.curve] == [4.0, 8.0, 12.0]
