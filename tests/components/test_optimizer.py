"""The base optimizers, on one contract, and what each of them does in one step."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pytorch_optimizer import Lion
from support.low_bit import saved_and_loaded
from support.rival_reference import AUTHORS, WRITTEN_OUT

from ebc_lab.components import optimizer as optimizers
from ebc_lab.components.library_optimizers import ScheduleFree
from ebc_lab.components.optimizer import OPTIMIZERS
from ebc_lab.components.torch_optimizers import StackedMuon, UncappedAdafactor, orthogonal
from ebc_lab.config.choices import optimizer_defaults
from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.parts.optimizer import OptimizerConfig
from ebc_lab.workloads.gpt import build as build_model
from ebc_lab.workloads.gpt import drawn, hidden_matrices
from ebc_lab.workloads.modern import ModernGPT

LR = 1e-2
GIVEN = {  # beside the optimizer's defaults, a common rate and a decay
    "axiom": {"rank": 2},
    "galore": {"rank": 4},
    "muonclip": {"logit_bound": 0.01},
    "prodigy": {"lr": 1.0},
    "d_adaptation": {"lr": 0.3},
    "dog": {"lr": 3.0},
    "ldog": {"lr": 3.0},
    "mechanic": {"lr": 1.0},
}
CONFIGS = {
    name: replace(optimizer_defaults(name), **{"lr": LR, "weight_decay": 0.1, **GIVEN.get(name, {})})
    for name in OPTIMIZERS
}
# at which a step is as long as its rate: on a sphere it is so for short ones, and others begin at 1e-6
RATES = {
    **dict.fromkeys(("hyperball", "lionar"), (5e-4, 1e-3)),
    **dict.fromkeys(("prodigy", "d_adaptation", "dog", "ldog", "mechanic"), (1e3, 2e3)),
}
every = pytest.mark.parametrize("name", CONFIGS)


def build(model, config):
    return optimizers.build(model, config, hidden_matrices(model))


@pytest.fixture
def model():
    return build_model(ModelConfig(blocks=2, width=16, heads=2, context=8), 11, seed=0)


def take_steps(model, bases, count, start=0):
    for i in range(start, start + count):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(i))
        model.zero_grad()
        model(tokens).logsumexp(-1).mean().backward()
        for base in bases:
            base.step()


def test_every_parameter_belongs_to_exactly_one_optimizer(model):
    for name, config in CONFIGS.items():
        groups = [group for base in build(model, config) for group in base.param_groups]
        held = [id(p) for group in groups for p in group["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters()), name
        assert all(group["lr"] == config.lr for group in groups), name


@every
def test_a_step_leaves_the_gradients_as_they_were(model, name):
    bases = build(model, CONFIGS[name])
    for _ in range(2):
        model.zero_grad()
        model(torch.arange(8)[None]).logsumexp(-1).mean().backward()
        held = [p.grad for p in model.parameters()]
        values = [g.clone() for g in held]
        for base in bases:
            base.step()
        assert all(p.grad is g for p, g in zip(model.parameters(), held, strict=True))
        assert all(torch.equal(g, v) for g, v in zip(held, values, strict=True))


# a length that is found by growing from a millionth is another in bfloat16, or none
@pytest.mark.parametrize(
    "name", ["sgd", *sorted(set(CONFIGS) - {"sgd", "dog", "ldog", "prodigy", "mechanic"})]
)
def test_bfloat16_weights_go_about_as_far_as_float32_ones(model, name):
    lengths = []
    for dtype in (torch.float32, torch.bfloat16):
        stepped = copy.deepcopy(model).to(dtype)
        take_steps(stepped, build(stepped, CONFIGS[name]), 12)
        pairs = zip(stepped.parameters(), model.parameters(), strict=True)
        lengths.append(math.hypot(*(float((p - q).detach().norm()) for p, q in pairs)))
    assert 0.5 < lengths[1] / lengths[0] < 2


# torch 2.13's fused SGD with momentum raises here
@pytest.mark.parametrize("name", sorted(set(CONFIGS) - {"sgd"}))
def test_a_first_gradient_may_come_late(model, name):
    bases = build(model, CONFIGS[name])
    before = copy.deepcopy(model)
    for p in model.blocks[0].parameters():
        p.requires_grad_(False)
    take_steps(model, bases, 2)
    for p, q in zip(model.blocks[0].parameters(), before.blocks[0].parameters(), strict=True):
        assert torch.equal(p, q)
    for p in model.blocks[0].parameters():
        p.requires_grad_(True)
    take_steps(model, bases, 1, start=2)
    for p, q in zip(model.blocks[0].parameters(), before.blocks[0].parameters(), strict=True):
        assert p.isfinite().all()
        assert not torch.equal(p, q)


@every
def test_the_learning_rate_of_the_group_is_the_one_used(model, name):
    """At twice the rate a step is twice as long, also at a large rate and later in a run."""
    bases = build(model, replace(CONFIGS[name], weight_decay=0.0))
    take_steps(model, bases, 12)
    # a step at nearly no rate: the steps before still move the weights of these
    least = 1e-9 if name in ("d_adaptation", "mechanic") else None
    ends = []
    for lr in (least, *RATES.get(name, (0.25, 0.5))):
        stepped = copy.deepcopy(model)
        others = build(stepped, replace(CONFIGS[name], weight_decay=0.0))
        for p in stepped.parameters():
            p.grad = torch.ones_like(p)
        for base, other in zip(bases, others, strict=True):
            other.load_state_dict(copy.deepcopy(base.state_dict()))
            if lr is not None:
                for group in other.param_groups:
                    group["lr"] = lr
                other.step()
        # a mean weighted by the rates depends on them in other ways too: there the newest term is compared
        newest = [others[0].state[p]["z"] if name == "schedule_free" else p for p in stepped.parameters()]
        ends.append([p.detach() for p in newest])
    lengths = [[(a - b).norm() for a, b in zip(end, ends[0], strict=True)] for end in ends[1:]]
    torch.testing.assert_close(lengths[1], [2 * n for n in lengths[0]], rtol=1e-3, atol=0)


@pytest.mark.thorough
@every
def test_state_round_trip_is_exact(model, name):
    goes_on(model, CONFIGS[name], 11)


@pytest.mark.parametrize("part", range(4))
def test_states_of_two_steps_go_on_where_they_were(model, part):
    for name in [name for name in CONFIGS if "bit" not in name][part::4]:  # those compile their kernels
        goes_on(copy.deepcopy(model), CONFIGS[name], 2)


def goes_on(model, config, steps):
    """Assert that a state, through a file as a checkpoint writes it, takes the steps that would have come."""
    bases = build(model, config)
    take_steps(model, bases, steps)
    twin = copy.deepcopy(model)
    others = build(twin, config)
    for base, other in zip(bases, others, strict=True):
        other.load_state_dict(saved_and_loaded(base.state_dict()))
    take_steps(model, bases, steps, start=steps)
    take_steps(twin, others, steps, start=steps)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs), config.name


MOMENTS = {"betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
LIBRARY = {  # the class that it is, and what that is given for the config below
    "adam": (torch.optim.Adam, MOMENTS),
    "adamw": (torch.optim.AdamW, MOMENTS),
    "nadamw": (torch.optim.NAdam, {**MOMENTS, "decoupled_weight_decay": True}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
    "lion": (Lion, {"betas": (0.8, 0.9), "weight_decay": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"eps": (1e-15, 1e-3), "weight_decay": 0.1}),
}


@pytest.mark.parametrize("name", LIBRARY)
def test_it_is_the_librarys_with_the_numbers_of_its_config(model, name):
    kind, given = LIBRARY[name]
    twin = copy.deepcopy(model)
    config = OptimizerConfig(name, lr=LR, beta1=0.8, beta2=0.9, eps=1e-6, momentum=0.9, weight_decay=0.1)
    drawn = torch.Generator().manual_seed(0)
    gradients = [  # at first as small as they are deep in a large model: no floor may act
        [size * torch.randn(p.shape, generator=drawn) for p in model.parameters()]
        for size in (1e-6, 1e-4, 1e-2, 1.0)
    ]
    take(model, build(model, config), gradients, 4 * [LR])
    take(twin, [kind(twin.parameters(), lr=LR, **given)], gradients, 4 * [LR])
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize(("precision", "rounding"), [(torch.bfloat16, 0.01), (torch.float32, 0.03)])
def test_stacked_muon_is_torchs_muon_up_to_bfloat16_rounding(model, precision, rounding, adjust):
    plain = copy.deepcopy(model)
    stacked = copy.deepcopy(model)
    options = {"lr": LR, "momentum": 0.9, "weight_decay": 0.1, "adjust_lr_fn": adjust}
    reference = torch.optim.Muon(hidden_matrices(plain), **options)
    fast = StackedMuon(hidden_matrices(stacked), **options)
    fast.precision = precision
    for i in range(4):
        for p, q in zip(hidden_matrices(plain), hidden_matrices(stacked), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        reference.step()
        fast.step()
    start = dict(model.named_parameters())
    for (name, p), q in zip(plain.named_parameters(), stacked.parameters(), strict=True):
        moved = (p - start[name]).norm()
        assert (p - q).norm() <= rounding * moved, name
    for p, q in zip(hidden_matrices(plain), hidden_matrices(stacked), strict=True):
        assert torch.equal(fast.state[q]["momentum_buffer"], reference.state[p]["momentum_buffer"])


@settings(max_examples=20)
@given(
    st.integers(0, 2**20),
    st.sampled_from([(8, 8), (8, 12), (8, 16), (16, 80)]),
    st.floats(0, 6),
    st.booleans(),
)
def test_newton_schulz_in_float32_is_the_plain_iteration(seed, shape, decades, lacking):
    """On matrices of any condition, short of a rank, too; in float64, one product after the other."""
    drawn = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(0, -decades, shape[0])[:, None]
    stack = torch.randn(3, *shape, generator=drawn) * sizes
    if lacking:
        stack[0, 1:3] = stack[0, 0]
    group = torch.optim.Muon([torch.zeros(2, 2)]).param_groups[0]
    a, b, c = group["ns_coefficients"]
    expected = stack.double() / torch.linalg.matrix_norm(stack.double(), keepdim=True)
    for _ in range(group["ns_steps"]):
        gram = expected @ expected.mT
        expected = a * expected + (b * gram + c * gram @ gram) @ expected
    found = orthogonal(stack, group).double()
    assert torch.linalg.matrix_norm(found - expected).max() < 1e-3 * math.sqrt(shape[0])


def test_muon_orthogonalises_in_the_precision_of_the_run(model):
    config = CONFIGS["muon"]
    matrices = hidden_matrices(model)
    for dtype, precision in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        muon, _ = optimizers.build(model, config, matrices, dtype)
        assert muon.precision == precision


GROUPED = OptimizerConfig(
    "muon",
    lr=LR,
    momentum=0.95,
    beta1=0.8,
    beta2=0.95,
    weight_decay=0.05,
    update_size="shape",
    embedding_scale=28.0,
    head_scale=0.16,
    vector_scale=0.6,
    rest_decay=0.001,
)


def test_muon_and_adamw_have_a_rate_and_a_decay_for_each_kind_of_parameter():
    """Against torch's own optimizers, each with its kind of parameters and the rate that it comes to."""
    model = drawn(lambda: ModernGPT(ModelConfig("modern", blocks=2, width=16, heads=2, context=8), 11), 0)
    twin = copy.deepcopy(model)
    named = dict(twin.named_parameters())
    hidden = hidden_matrices(twin)
    vectors = [p for p in named.values() if p.ndim == 1]
    adamw = {"betas": (0.8, 0.95), "eps": 1e-8, "weight_decay": 0.001}
    reference = [
        torch.optim.Muon(hidden, lr=LR, momentum=0.95, weight_decay=0.05, adjust_lr_fn="original"),
        torch.optim.AdamW([named["token_embedding.weight"]], lr=28 * LR, **adamw),
        torch.optim.AdamW([named["head.weight"]], lr=0.16 * LR, **adamw),
        torch.optim.AdamW(vectors, lr=0.6 * LR, **adamw),
    ]
    assert len(hidden) + 2 + len(vectors) == len(named)
    start = copy.deepcopy(model)
    bases = build(model, GROUPED)
    for i in range(3):
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
            q.grad = p.grad.clone()
        for base in (*bases, *reference):
            base.step()
    for (name, p), q, old in zip(
        model.named_parameters(), twin.parameters(), start.parameters(), strict=True
    ):
        rounding = 0.03 if "blocks" in name and p.ndim == 2 else 1e-5  # torch's Muon takes bfloat16 products
        assert (p - q).norm() <= rounding * (q - old).norm(), name


def test_without_a_decay_of_its_own_the_rest_is_adam_and_at_one_rate_it_is_one(model):
    coupled = build(model, replace(GROUPED, rest_decay=None))
    assert [type(base).__mro__[2] for base in coupled[1:]] == [torch.optim.Adam] * 3
    assert {group["weight_decay"] for base in coupled for group in base.param_groups} == {0.05}
    plain = replace(GROUPED, rest_decay=None, embedding_scale=1.0, head_scale=1.0, vector_scale=1.0)
    assert [type(base) for base in build(model, plain)] == [StackedMuon, torch.optim.Adam]


def test_adafactors_rate_is_not_capped_and_below_the_cap_it_is_torchs():
    for lr, agrees in ((0.1, True), (0.9, False)):  # torch's cap is 1/sqrt(4) at the last step
        p, q = (torch.nn.Parameter(torch.ones(4, 3)) for _ in range(2))
        ours = UncappedAdafactor([p], lr=lr, weight_decay=0.1)
        torchs = torch.optim.Adafactor([q], lr=lr, weight_decay=0.1)
        for _ in range(4):
            before = p.detach().clone()
            p.grad = -torch.ones(4, 3)
            q.grad = -torch.ones(4, 3)
            ours.step()
            torchs.step()
        torch.testing.assert_close(
            p.detach(), before * (1 - 0.1 * lr + lr)
        )  # all elements alike: their rms is their size
        assert torch.equal(p, q) == agrees


def test_soap_is_adam_in_the_eigenbases_of_its_gradient(model):
    """At the first step m/sqrt(v) is the gradient's sign in its singular bases: a matrix moves by lr·U V^T.

    One of full rank does: elsewhere the sign of rounding errors is taken. A vector has no bases: there SOAP
    is Adam.
    """
    bases = build(model, OptimizerConfig("soap", lr=LR, beta1=0.95, beta2=0.95, eps=1e-12))
    matrix = model.blocks[0].q.weight
    vector = model.norm.weight
    old = matrix.detach().clone(), vector.detach().clone()
    u, _, vh = torch.linalg.svd(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))
    matrix.grad = u @ torch.diag(torch.linspace(1, 3, 16)) @ vh
    vector.grad = torch.randn(16, generator=torch.Generator().manual_seed(1))
    bases[0].step()
    moved = (old[0] - matrix.detach()) / LR
    in_bases = u.T @ moved @ vh.T
    torch.testing.assert_close(in_bases.diagonal(), torch.ones(16), rtol=1e-3, atol=0)
    torch.testing.assert_close(old[1] - LR * vector.grad.sign(), vector.detach())
    gram = bases[0].state[matrix]["GG"][0]
    torch.testing.assert_close(gram, 0.05 * matrix.grad @ matrix.grad.T)  # the first gradient is counted once


def test_schedule_free_evaluates_the_mean_and_returns(model):
    """z takes Adam's steps without momentum, x is the mean of the z, and y = 0.9 x + 0.1 z is what trains."""
    base = build(model, OptimizerConfig("schedule_free", lr=LR, beta1=0.9, beta2=0.99))[0]
    assert isinstance(base, ScheduleFree)
    weights = list(model.parameters())
    start = [p.detach().clone() for p in weights]
    path = []
    for i in range(4):
        take_steps(model, [base], 1, start=i)
        assert all(set(base.weight_copies) <= set(base.state[p]) for p in weights)
        path.append([base.state[p]["z"].clone() for p in weights])
        if i == 0:
            for p, w, z in zip(weights, start, path[0], strict=True):
                torch.testing.assert_close(z, w - LR * p.grad / ((p.grad**2 + 1e-15).sqrt() + 1e-8))
                torch.testing.assert_close(p.detach(), z)
    y = [p.detach().clone() for p in weights]
    mean = [torch.stack(zs).mean(0) for zs in zip(*path, strict=True)]
    torch.testing.assert_close(
        y, [0.9 * x + 0.1 * z for x, z in zip(mean, path[-1], strict=True)], rtol=1e-5, atol=1e-6
    )
    base.eval()
    torch.testing.assert_close([p.detach() for p in weights], mean, rtol=1e-5, atol=1e-6)
    base.eval()  # again is nothing
    with pytest.raises(RuntimeError, match="train"):
        base.step()
    base.train()
    torch.testing.assert_close([p.detach() for p in weights], y, rtol=1e-6, atol=1e-7)


def test_schedule_free_takes_the_weights_as_they_are_at_its_first_step(model):
    """What moves them between construction and the first step, a retraction say, is no step back."""
    base = build(model, OptimizerConfig("schedule_free", lr=LR))[0]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
    moved = [p.detach().clone() for p in model.parameters()]
    base.eval()
    base.train()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    base.step()
    for p, w in zip(model.parameters(), moved, strict=True):
        assert torch.equal(p, w)
        assert torch.equal(base.state[p]["z"], w)


# |difference| over |movement| of a tensor; 0 where all operations have one order. Two sum a distance in
# float32, their authors in float64; in bfloat16 a stack of matrices may round otherwise than each by itself
ROUNDING = {"prodigy": 1e-5, "d_adaptation": 1e-5, "scion": 1e-3, "normuon": 1e-3, "muonclip": 1e-3}


REFERENCES = [*AUTHORS, *WRITTEN_OUT, "scion one by one", "normuon one by one", "muonclip one by one"]


@pytest.mark.thorough
@pytest.mark.parametrize("name", REFERENCES)
def test_fifty_steps_are_the_references(name):
    assert apart_from_reference(name, 50) <= (0.0 if " " in name else ROUNDING.get(name, 0.0))


@pytest.mark.parametrize("part", range(4))
def test_six_steps_are_the_references(part):
    for name in REFERENCES[part::4]:
        apart = apart_from_reference(name, 6)
        assert apart <= (0.0 if " " in name else ROUNDING.get(name, 0.0)), name


def apart_from_reference(name, steps):
    """Return how far weights lie from the authors' package or the paper's steps, over how far those went.

    Gradients drift, and rates rise and fall."""
    name, _, alone = name.partition(" ")
    model = build_model(ModelConfig(blocks=1, width=16, heads=2, context=8), 11, seed=0)
    drawn = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(model)
    start = [p.detach().clone() for p in model.parameters()]
    drift = [torch.randn(w.shape, generator=drawn) for w in start]
    gradients = [[1e-2 * (d + torch.randn(d.shape, generator=drawn)) for d in drift] for _ in range(steps)]
    config = optimizer_defaults(name)
    rates = [config.lr * min(1, (i + 1) / (steps / 5), (steps - i) / (steps / 2.5)) for i in range(steps)]
    bases = build(model, config)
    for group in (group for base in bases for group in base.param_groups if alone):
        group["foreach"] = False
    take(model, bases, gradients, rates)
    if name in AUTHORS:
        take(twin, [AUTHORS[name](list(twin.parameters()))], gradients, rates)
        expected = [p.detach() for p in twin.parameters()]
    else:
        hidden = {id(p) for p in hidden_matrices(model)}
        each = zip(model.parameters(), start, zip(*gradients, strict=True), strict=True)
        expected = [WRITTEN_OUT[name](w, gs, rates, id(p) in hidden) for p, w, gs in each]
    compared = [(p.detach(), w, e) for p, w, e in zip(model.parameters(), start, expected, strict=True)]
    return max(((p - e).norm() / (e - w).norm()).item() for p, w, e in compared if e is not None)


@pytest.mark.parametrize("steps", [5, pytest.param(50, marks=pytest.mark.thorough)])
def test_muonclip_shrinks_the_queries_and_keys_of_each_head_whose_logits_exceed_the_bound(model, steps):
    """Each step against Muon's from the same weights, whose heads are then shrunk one by one."""
    bound = 0.004
    ours = build(model, replace(CONFIGS["muonclip"], logit_bound=bound))
    twin = copy.deepcopy(model)
    reference = build(twin, replace(CONFIGS["muonclip"], logit_bound=1e6))
    shrunk = 0
    for i in range(steps):
        tokens = torch.randint(11, (4, 8), generator=torch.Generator().manual_seed(i))
        twin.load_state_dict(model.state_dict())
        with torch.no_grad():
            largest = plain_logits(twin, tokens)
        for m, bases in ((model, ours), (twin, reference)):
            m.zero_grad()
            m(tokens).logsumexp(-1).mean().backward()
            with torch.no_grad():
                m(tokens * 0)  # no training forward: not heeded
            for base in bases:
                base.step()
        with torch.no_grad():
            for (block, head), logit in largest.items():
                if logit > bound:
                    shrunk += 1
                    for layer in (twin.blocks[block].q, twin.blocks[block].k):
                        layer.weight[8 * head : 8 * head + 8] *= (bound / logit) ** 0.5
        torch.testing.assert_close(list(model.parameters()), list(twin.parameters()), rtol=1e-5, atol=1e-8)
    assert 0.4 * steps < shrunk < 3.6 * steps  # of 2 blocks and 2 heads


def plain_logits(model, tokens):
    """(block, head) -> the largest logit of a query and an earlier key, or its own, over a batch."""
    found = {}
    x = model.token_embedding(tokens) + model.position_embedding.weight  # (B, T, C)
    for i, block in enumerate(model.blocks):
        q, k = (layer(block.attention_norm(x)) for layer in (block.q, block.k))
        for head in range(2):
            of = slice(8 * head, 8 * head + 8)
            logits = q[..., of] @ k[..., of].mT / 8**0.5
            found[i, head] = max(logits[:, t, s].max().item() for t in range(8) for s in range(t + 1))
        x = block(x.flatten(0, 1), len(tokens)).view_as(x)
    return found


def take(model, bases, gradients, rates):
    for step, rate in zip(gradients, rates, strict=True):
        for p, g in zip(model.parameters(), step, strict=True):
            p.grad = g.clone()
        for base in bases:
            for group in base.param_groups:
                group["lr"] = rate
            base.step()


@pytest.mark.parametrize("name", optimizers.CAPTURABLE)
def test_a_rate_on_the_device_takes_the_same_steps_and_a_bad_gradient_changes_nothing(name):
    """As a CUDA graph needs it: `lr` is read where it lies, and `found_inf` says whether to take a step."""
    config = CONFIGS[name]
    sides = []
    for on_device in (False, True):
        model = build_model(ModelConfig(blocks=2, width=16, heads=2, context=8), 11, seed=0)
        bases = build(model, config)
        for t in range(4):
            for group in (g for base in bases for g in base.param_groups):
                group["lr"] = torch.tensor(config.lr / (t + 1)) if on_device else config.lr / (t + 1)
            take_steps(model, bases, 1, start=t)
        sides.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(sides[1], sides[0], rtol=1e-5, atol=1e-6)

    def states():
        counted = [v for base in bases for g in base.param_groups for v in g.values() if torch.is_tensor(v)]
        return copy.deepcopy([base.state_dict()["state"] for base in bases]), copy.deepcopy(counted)

    before = states()
    for p in model.parameters():
        p.grad = torch.full_like(p, torch.nan)
    for base in bases:
        base.found_inf = torch.ones(())
        base.step()
    torch.testing.assert_close([p.detach() for p in model.parameters()], sides[1], rtol=0, atol=0)
    torch.testing.assert_close(states(), before, rtol=0, atol=0)
