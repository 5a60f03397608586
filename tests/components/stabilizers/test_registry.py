"""The contract of everything between backward and the applied update, on every optimizer and projection.

One table: a new optimizer, stabilizer or projection is in it as soon as it is in its registry.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.low_bit import saved_and_loaded
from support.pairwise import contract
from support.perceptron import same, values

from ebc_lab.components import stabilizers
from ebc_lab.components.optimizer import OPTIMIZERS
from ebc_lab.components.optimizer import build as build_optimizers
from ebc_lab.components.projection import PROJECTIONS
from ebc_lab.components.projection import build as build_projection
from ebc_lab.components.stabilizers import STABILIZERS, build
from ebc_lab.config.choices import groups, optimizer_defaults, read_choice
from ebc_lab.config.fields import CUSTOM
from ebc_lab.config.identity import with_derived_settings
from ebc_lab.config.own.parts import with_sources
from ebc_lab.config.parts.budget import BudgetConfig
from ebc_lab.config.parts.controller import ControllerConfig
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.projection import ProjectionConfig
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import hidden_matrices

VOCABULARY = 11
RUN = RunConfig(
    steps=12,
    audit_every=4,
    audit_tokens=16,
    model=ModelConfig(blocks=1, width=8, heads=2, context=8),
    budget=BudgetConfig(target_kl=2e-3),
)
OWN = {  # parts by a target of their own
    "optimizer": "torch.optim:NAdam",
    "stabilizer": "ebc_lab.components.stabilizers.rivals:RMSClip",
}
TABLE = (
    ("optimizer", "stabilizer", "projection"),
    [*OPTIMIZERS, CUSTOM],
    [*STABILIZERS, CUSTOM],
    list(PROJECTIONS),
)
RARE = (  # other libraries', and the rivals of other papers
    "galore", "adam8bit", "adam4bit", "prodigy", "adopt", "hyperball", "lionar", "scion", "normuon",
    "muonclip", "d_adaptation", "dog", "ldog", "mechanic",
)  # fmt: skip
every_pair = contract(*TABLE, rare=RARE)
every = contract(*TABLE, pairs=False)


def run_of(optimizer, stabilizer, projection, **changes):
    own = optimizer_defaults(optimizer)
    shrunk = stabilizer in ("gen", "adaptive_warmup")  # then 10 in a million is lost beside a weight of 1
    millionths = 1000.0 if shrunk else 10.0  # from 1 on lr is a factor on 1e-6
    own = replace(own, lr=0.02 if own.lr < 1 else millionths, weight_decay=0.0)
    run = replace(
        RUN, optimizer=own, stabilizer=StabilizerConfig(stabilizer), projection=ProjectionConfig(projection)
    )
    for group, target in OWN.items():
        part = getattr(run, group)
        run = replace(run, **{group: replace(part, target=target)}) if part.name == CUSTOM else run
    return with_derived_settings(with_sources(replace(run, **changes)))


def prepare(run, prepare_model=lambda model: None, prepare_base=lambda base: None):
    """-> the model and the stabilizer around its base optimizers."""
    model = build_model(run.model, VOCABULARY, run.seed)
    prepare_model(model)
    bases = build_optimizers(model, run.optimizer, hidden_matrices(model))
    for base in bases:
        prepare_base(base)
    return model, build(model, bases, build_projection(hidden_matrices(model), run.projection), run)


def gradients(model, step):
    tokens = torch.randint(VOCABULARY, (6, 8), generator=torch.Generator().manual_seed(step))
    model.zero_grad()
    logits = model(tokens)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return tokens, logits


def step_on(stabilizer, tokens, logits):
    return stabilizer.step(tokens, logits, targets=tokens.roll(-1, 1))


def take(model, stabilizer, steps):
    return [step_on(stabilizer, *gradients(model, step)) for step in steps]


@every_pair
def test_steps_are_bounded_finite_repeatable_and_resume_bit_for_bit(optimizer, stabilizer, projection):
    run = run_of(optimizer, stabilizer, projection)
    model, wrapped = prepare(run)
    assert isinstance(wrapped, torch.optim.Optimizer)
    before = copy.deepcopy(dict(model.named_parameters()))
    stats = take(model, wrapped, range(5))
    for t, s in enumerate(stats):
        assert not s.skipped
        assert 0 < s.clip_coefficient <= 1
        assert s.grad_norm > 0
        assert s.gradient_scale is None or 0 < s.gradient_scale <= 1
        assert (s.applied_kl is not None) == (t % 4 == 0)
        assert s.applied_kl is None or s.applied_kl >= 0
        assert s.audit_tokens == (16 if t % 4 == 0 else 0)
    for name, p in model.named_parameters():
        assert p.isfinite().all()
        assert (p.shape, p.dtype) == (before[name].shape, before[name].dtype)
        assert not torch.equal(p, before[name]), name

    twin, other = prepare(run)
    take(twin, other, range(3))
    kept = copy.deepcopy(twin.state_dict())
    state = saved_and_loaded(other.state_dict())
    take(twin, other, range(3, 5))
    assert same(model.parameters(), twin.parameters())  # the same from the start

    third, resumed = prepare(run)
    third.load_state_dict(kept)
    resumed.load_state_dict(state)
    take(third, resumed, range(3, 5))
    assert same(model.parameters(), third.parameters())  # the same from a checkpoint


@pytest.mark.parametrize("part", range(4))
def test_a_state_that_was_loaded_is_the_callers_own(part):
    for name in list(STABILIZERS)[part::4]:
        run = run_of("adam", name, "none")
        model, wrapped = prepare(run)
        take(model, wrapped, range(2))
        state = wrapped.own_state_dict()
        kept = saved_and_loaded(state)
        other, resumed = prepare(run)
        other.load_state_dict(model.state_dict())
        resumed.load_own_state_dict(state)
        take(other, resumed, range(2, 4))
        assert bits(state) == bits(kept), name


def bits(state):
    """Something to compare to the bit, of a state that holds tensors."""
    if isinstance(state, torch.Tensor):
        return state.dtype, state.reshape(-1).view(torch.uint8).tolist()
    if isinstance(state, dict):
        return {name: bits(value) for name, value in state.items()}
    return [bits(value) for value in state] if isinstance(state, list | tuple) else repr(state)


@every
def test_frozen_and_tied_parameters_and_two_parameter_groups(optimizer, stabilizer, projection):
    def freeze_and_tie(model):
        model.position_embedding.weight.requires_grad_(False)
        model.head.weight = model.token_embedding.weight

    def split(base):
        for group in list(base.param_groups):
            half = len(group["params"]) // 2
            base.param_groups.append({**group, "params": group["params"][half:], "lr": 0.0})
            group["params"] = group["params"][:half]

    model, wrapped = prepare(run_of(optimizer, stabilizer, projection), freeze_and_tie, split)
    apart = {"galore": 1, "muonclip": 2}.get(optimizer, 0)  # groups beside the first of each base
    assert len(wrapped.param_groups) == 2 * (len(wrapped.bases) + apart)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    take(model, wrapped, range(3))
    assert torch.equal(model.position_embedding.weight, start["position_embedding.weight"])
    assert model.head.weight is model.token_embedding.weight
    still = {id(p) for group in wrapped.param_groups if group["lr"] == 0 for p in group["params"]}
    projected = {id(p) for p in hidden_matrices(model)} if projection == "stiefel" else set()
    for name, p in model.named_parameters():
        if id(p) in still:
            tolerance = 1e-5 if id(p) in projected else 0.0
            torch.testing.assert_close(p.detach(), start[name], rtol=0, atol=tolerance, msg=name)
    moving = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in still]
    assert moving
    assert all(not torch.equal(dict(model.named_parameters())[n], start[n]) for n in moving)


@every
def test_zero_gradients_move_nothing_and_bad_ones_touch_nothing(optimizer, stabilizer, projection):
    model, wrapped = prepare(run_of(optimizer, stabilizer, projection))
    start = values(model)
    tokens, logits = gradients(model, 0)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    stats = step_on(wrapped, tokens, logits)
    assert not stats.skipped
    assert stats.grad_norm == 0
    for p, old in zip(model.parameters(), start, strict=True):
        torch.testing.assert_close(p.detach(), old, rtol=0, atol=1e-5 if projection == "stiefel" else 0.0)

    take(model, wrapped, range(1, 3))
    for bad in (math.nan, math.inf):
        before = values(model)
        state = saved_and_loaded(wrapped.state_dict())["bases"]
        tokens, logits = gradients(model, 3)
        model.head.weight.grad[0, 0] = bad
        stats = step_on(wrapped, tokens, logits)
        assert stats.skipped
        assert stats.clip_coefficient == 0
        assert same(model.parameters(), before)
        flat, kept = map(torch.utils._pytree.tree_leaves, (wrapped.state_dict()["bases"], state))
        assert all(
            torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in zip(flat, kept, strict=True)
        )
    assert not take(model, wrapped, [4])[0].skipped


# -- how a run becomes a stabilizer --------------------------------------------------------------------------


def test_every_stabilizer_has_its_file_and_the_other_way_round():
    assert {*STABILIZERS, CUSTOM} == set(groups()["stabilizer"])
    for name in set(STABILIZERS) - {"none", "ebc"}:
        _, wrapped = prepare(run_of("adam", name, "none"))
        assert read_choice("stabilizer", name) == {"name": name, "strength": wrapped.strength}, name


@pytest.mark.parametrize("name", [*STABILIZERS, CUSTOM])
def test_the_runs_projection_is_applied(name):
    run = replace(run_of("adam", name, "none"), projection=ProjectionConfig("spectral", bound=1.1))
    model, wrapped = prepare(replace(run, budget=replace(run.budget, target_kl=0.05)))
    first = model.blocks[0].q.weight
    limit = 1.1 * torch.linalg.matrix_norm(first.detach(), ord=2)
    for step in range(6):
        take(model, wrapped, [step])
        assert torch.linalg.matrix_norm(first.detach(), ord=2) <= limit * (1 + 1e-5)
    assert torch.linalg.matrix_norm(first.detach(), ord=2) > 0.9 * limit


def test_ebc_is_built_as_the_run_says():
    given = {
        "target_kl": 0.02,
        "schedule": "linear",
        "aggregate": "sqrtl_l2",
        "grouping": "type",
        "probe": "fd",
    }
    given |= {"guard": "shrink", "cadence": "published", "beta_init": "zero", "units": "per_lr"}
    budget = BudgetConfig("surrogate", probe_sequences=3, sensitivity_every=7, **given)
    controller = ControllerConfig("log_pi", kp=0.5)
    model, wrapped = prepare(run_of("adam", "ebc", "none", budget=budget, controller=controller, steps=100))
    chosen = wrapped.settings
    assert {key: getattr(chosen, key) for key in given} == given
    assert (chosen.budget, chosen.total_steps, chosen.sensitivity_every) == ("surrogate", 100, 7)
    assert (wrapped.probe_sequences, wrapped.audit_every) == (3, 4)
    assert set(wrapped.groups) == {"embedding", "norm", "attention", "mlp", "head"}
    assert all((f.published, f.zero) == (True, True) for f in wrapped.sensitivities.filters.values())
    assert wrapped.controller.gain == {"kp": 0.5, "ki": 0.3}  # what is not given is the kind's own
    assert sum(len(members) for members in wrapped.groups.values()) == len(list(model.parameters()))


@pytest.mark.parametrize(
    ("budget", "controller", "kind", "audit_every"),
    [
        ("shadow", ControllerConfig("auto"), "Fixed", 4),
        ("surrogate", ControllerConfig("auto"), "LogPI", 4),
        ("calibrated", ControllerConfig("auto"), "Fixed", 4),
        ("surrogate", ControllerConfig("pi"), "PI", 20),
        ("shadow", ControllerConfig("log_pi"), "LogPI", 4),
        ("surrogate", ControllerConfig("rsl"), "RSL", 4),
        ("fisher", ControllerConfig("agreement"), "Agreement", 4),
        ("shadow", ControllerConfig("energy", a=0.1), "Energy", 4),
        ("shadow", ControllerConfig("confidence"), "Confidence", 4),
    ],
)
def test_controllers(budget, controller, kind, audit_every):
    _, wrapped = prepare(run_of("adam", "ebc", "none", budget=BudgetConfig(budget), controller=controller))
    assert type(wrapped.controller).__name__ == kind
    assert wrapped.audit_every == audit_every


def test_a_refused_combination_says_why():
    for changes, words in (
        ({"controller": ControllerConfig("fixed", kp=0.5)}, "Fixed has no gain kp"),
        ({"controller": ControllerConfig("energy")}, "needs the gain a"),
        ({"budget": BudgetConfig("shadow", guard="shrink")}, "goes with budget='surrogate'"),
    ):
        with pytest.raises(ValueError, match=words):
            prepare(run_of("adam", "ebc", "none", **changes))
    with pytest.raises(ValueError, match="strength must be > 0"):
        prepare(replace(run_of("adam", "agc", "none"), stabilizer=StabilizerConfig("agc", strength=-1.0)))
    assert stabilizers.build is build
