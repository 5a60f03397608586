"""Energy budgets: every layer's gradient against the norm of its output, in any loop and in the lab."""

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from support.perceptron import backward, backward_on, batch, floats, grads, joint, same, small_model
from torch import nn

from ebc_lab.ebc import EBCWarning, energy_budget_clip, monitor_ebc_ratio
from ebc_lab.ebc.energy.record import output_norm

LAYERS = ["0", "2"]


def sizes(model, x, norm="rms"):
    """The norms of what the two layers of `small_model` give."""
    first = model[0](x)
    return [float(output_norm(z.detach(), norm)) for z in (first, model[2](first.tanh()))]


# -- how an output is measured -------------------------------------------------------------------------------


def test_the_two_norms_of_an_output():
    x = torch.arange(12.0).reshape(2, 3, 2)
    rows = [float(row.square().sum()) for row in x.reshape(6, 2)]
    assert float(output_norm(x, "raw")) == pytest.approx(math.sqrt(sum(rows)))
    assert float(output_norm(x, "rms")) == pytest.approx(math.sqrt(sum(rows) / 6))
    assert output_norm(torch.tensor(-3.0), "rms") == 3
    assert output_norm(torch.zeros(0, 4), "rms") == 0
    low = torch.full((300, 300), 0.1, dtype=torch.bfloat16)  # summed in float32
    assert float(output_norm(low, "raw")) == pytest.approx(300 * float(low[0, 0]), rel=1e-4)


# -- the limit -----------------------------------------------------------------------------------------------


@given(st.integers(0, 999), st.floats(1e-4, 10), st.floats(1e-3, 1e4), st.sampled_from(["raw", "rms"]))
def test_the_limit_holds_for_every_layer(seed, ratio, factor, norm):
    model = small_model(seed)
    clip = energy_budget_clip(model, ratio, norm)
    x = backward(model, seed, factor=factor)
    before = grads(model)
    whole = [joint(model[0].parameters()), joint(model[2].parameters())]
    measured = clip()
    budgets = [ratio * size for size in sizes(model, x, norm)]
    assert list(measured) == LAYERS
    assert list(floats(measured).values()) == pytest.approx(
        [w / b for w, b in zip(whole, budgets, strict=True)], rel=1e-4
    )
    for i, (w, b) in enumerate(zip(whole, budgets, strict=True)):
        now = [p.grad for p in model[2 * i].parameters()]
        scale = min(1.0, b / w)
        torch.testing.assert_close(now, [scale * g for g in before[2 * i : 2 * i + 2]], rtol=1e-4, atol=1e-9)
        assert scale < 1 or same(now, before[2 * i : 2 * i + 2])


def test_a_ratio_for_each_layer():
    model = small_model()
    clip = energy_budget_clip(model, {"2": 1e-3})
    x = backward(model)
    before = grads(model)
    assert list(clip()) == ["2"]
    assert same(grads(model)[:2], before[:2])
    assert joint(model[2].parameters()) == pytest.approx(1e-3 * sizes(model, x)[1], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"ratio": 0.0}, "ratio must be > 0"),
        ({"ratio": math.nan}, "ratio must be > 0"),
        ({"ratio": {"0": -1.0}}, "ratio of '0' must be > 0"),
        ({"ratio": {"1": 0.1}}, "'1', which is no layer; those are 0, 2"),
        ({"norm": "l1"}, "norm='l1' is unknown"),
        ({"non_finite": "ignore"}, "non_finite='ignore' is unknown"),
    ],
)
def test_impossible_settings_are_refused_and_leave_no_hooks(options, why):
    model = small_model()
    with pytest.raises(ValueError, match=why):
        energy_budget_clip(model, **options)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_zero_gradient_or_a_zero_output_makes_no_nan():
    model = small_model()
    clip = energy_budget_clip(model)
    monitor = monitor_ebc_ratio(model)
    backward(model, factor=0.0)
    assert floats(clip()) == floats(monitor()) == {"0": 0, "2": 0}
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    backward(model)
    assert floats(clip())["2"] == math.inf
    assert joint(model[2].parameters()) == 0  # a layer that gives nothing is allowed nothing


# -- which forward counts ------------------------------------------------------------------------------------


def test_evaluations_and_probes_do_not_count():
    model = small_model()
    monitor = monitor_ebc_ratio(model)
    x = backward(model)
    measured = floats(monitor())
    with torch.no_grad():
        model(100 * x)
    model.eval()(100 * x)
    assert floats(monitor()) == measured
    model.train()(100 * x)
    assert floats(monitor())["0"] < measured["0"]


@pytest.mark.parametrize("evaluating", [("0",), ("",), ("", "0", "1", "2")])
def test_in_evaluation_mode_all_is_limited_as_in_training(evaluating):
    model, plain = small_model(), small_model()
    clips = [energy_budget_clip(m, 1e-3) for m in (model, plain)]
    for name, module in model.named_modules():
        module.training = name not in evaluating
    for step in range(2):
        x, y = batch(step)
        for m, clip in zip((model, plain), clips, strict=True):
            m.zero_grad()
            backward_on(m, x, y)
            if len(evaluating) > 1:
                model(100 * x)  # an evaluation that forgot torch.no_grad()
            clip()
    assert same(grads(model), grads(plain))


@pytest.mark.parametrize("made_late", [True, False])
def test_a_clip_that_can_limit_nothing_says_so(made_late):
    model = small_model()
    x, y = batch()
    logits = model(x)
    clip = energy_budget_clip(model)
    if made_late:
        F.cross_entropy(logits, y).backward()
    else:  # no backward goes through it
        model.eval()(x)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    before = grads(model)
    with pytest.raises(RuntimeError, match=r"no gradient can be limited: .* before the forward"):
        clip()
    assert same(grads(model), before)
    model.zero_grad()
    backward_on(model, *batch())
    assert list(clip()) == LAYERS


def test_weights_that_came_later_are_named():
    model = small_model()
    clip = energy_budget_clip(model)
    model[2] = nn.Linear(7, 4)
    backward_on(model, *batch())
    with pytest.warns(EBCWarning, match=r"^2 weight\(s\) \(2.weight, 2.bias\) came into the model after"):
        assert list(clip()) == ["0"]
    model[0] = nn.Linear(5, 7)
    model.zero_grad()
    backward_on(model, *batch())
    with pytest.raises(RuntimeError, match=r"^4 weight\(s\) .* make it anew, after the last change"):
        clip()


def test_weights_that_are_shared_out_are_refused():
    model = small_model()
    model[0].weight.device_mesh = "as a DTensor has one"
    with pytest.raises(ValueError, match="cannot limit weights that fully_shard has shared out"):
        energy_budget_clip(model)


def test_of_several_calls_the_last_counts():
    model = small_model()
    x, y = batch()
    monitor = monitor_ebc_ratio(model)
    other, _ = batch(1)
    F.cross_entropy(model(7 * x) + model(other), y).backward()
    expected = [joint(model[2 * i].parameters()) / size for i, size in enumerate(sizes(model, other))]
    assert list(floats(monitor()).values()) == pytest.approx(expected, rel=1e-5)


# -- which parameters are a layer ----------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding whose weights are also the head's, and a scale that the model itself owns."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.embedding = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)
        self.head.weight = self.embedding.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, tokens):
        logits = self.head(self.scale * self.norm(self.embedding(tokens)))
        return {"likeliest": logits.argmax(-1), "logits": logits}


def test_tied_weights_are_the_first_modules_and_own_parameters_count():
    torch.manual_seed(0)
    model = Tied()
    tokens = torch.randint(11, (4, 5))
    clip = energy_budget_clip(model, ratio=1e-4)
    logits = model(tokens)["logits"]
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    assert list(clip()) == ["", "embedding", "norm", "head"]  # `unused` has no gradient
    own = {
        model.scale: logits,
        model.embedding.weight: model.embedding(tokens),
        model.head.bias: logits,  # its weight is the embedding's
    }
    for p, output in own.items():
        assert joint([p]) == pytest.approx(1e-4 * float(output_norm(output.detach(), "rms")), rel=1e-5)


def test_frozen_layers_and_layers_out_of_reach():
    model = small_model()
    model[0].requires_grad_(False)
    spare = nn.ModuleDict({"used": model, "spare": nn.Linear(2, 2)})  # the outermost module is never called
    for p in spare["spare"].parameters():
        p.grad = torch.full_like(p, 1e3)
    clip = energy_budget_clip(spare, ratio=1e-4)
    backward(model)
    with pytest.warns(EBCWarning, match=r"does not limit 1 of 2 layers \(spare\)"):
        assert list(clip()) == ["used.2"]
    assert list(clip()) == ["used.2"]  # said once
    assert spare["spare"].weight.grad[0, 0] == 1e3
    assert model[0].weight.grad is None


def test_a_layer_that_is_only_read_goes_by_the_module_around_it():
    model = nn.Sequential(nn.Linear(5, 4))
    model.forward = lambda x: F.linear(x, model[0].weight, model[0].bias)  # as fused attention does
    clip = energy_budget_clip(model, ratio=1e-3)
    x = backward(model)
    assert list(clip()) == ["0"]
    limit = 1e-3 * float(output_norm(model(x).detach(), "rms"))
    assert joint(model.parameters()) == pytest.approx(limit, rel=1e-5)


def test_torchs_attention_owns_some_weights_and_reads_others():
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.randn(2, 3, 8)
    clip = energy_budget_clip(model, ratio=1e-3)
    out, _ = model(x, x, x)
    out.square().mean().backward()
    assert list(clip()) == ["", "out_proj"]
    limit = 1e-3 * float(output_norm(out.detach(), "rms"))
    assert joint(model.parameters(recurse=False)) <= limit * (1 + 1e-5)
    assert joint(model.out_proj.parameters()) <= limit * (1 + 1e-5)


def test_parametrised_weights_belong_to_their_layer():
    model = small_model()
    nn.utils.parametrizations.weight_norm(model[0])
    clip = energy_budget_clip(model, ratio=1e-3)
    x = backward(model)
    assert list(clip()) == LAYERS
    limit = 1e-3 * sizes(model, x)[0]
    assert joint(model[0].parameters()) == pytest.approx(limit, rel=1e-5)
    assert len(list(model[0].parameters())) == 3


# -- non-finite gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_skip_leaves_nothing_for_the_optimizer(value):
    model = small_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, weight_decay=0.1)
    clip = energy_budget_clip(model)
    for bad in (False, True, True, False):
        old = [p.detach().clone() for p in model.parameters()]
        backward(model)
        if bad:
            model[0].bias.grad[1] = value
        assert list(clip()) == LAYERS
        optimizer.step()
        assert same(list(model.parameters()), old) == bad
    assert clip.skipped == 2
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_zero_takes_out_the_bad_layer_and_limits_the_others(value):
    model = small_model()
    clip = energy_budget_clip(model, ratio=1e-3, non_finite="zero")
    x = backward(model)
    model[0].weight.grad[0, 0] = value
    measured = floats(clip())
    assert not math.isfinite(measured["0"])
    assert joint(model[0].parameters()) == 0
    assert joint(model[2].parameters()) == pytest.approx(1e-3 * sizes(model, x)[1], rel=1e-5)
    assert clip.skipped == 0


def test_raise_names_the_layer_and_touches_nothing_but_a_norm_that_overflows_is_no_bad_gradient():
    model = small_model()
    clip = energy_budget_clip(model, ratio=1e-3, non_finite="raise")
    backward_on(model, *batch())
    model[0].weight.grad.fill_(1e30)
    clip()
    assert joint(model.parameters()) < math.inf
    model[2].bias.grad[0] = math.inf
    before = grads(model)
    with pytest.raises(FloatingPointError, match="non-finite gradient in 2\\."):
        clip()
    assert same(grads(model), before)


# -- hooks ---------------------------------------------------------------------------------------------------


def test_the_monitor_changes_nothing():
    model = small_model()
    plain = small_model()
    x, y = batch()
    monitor = monitor_ebc_ratio(model)
    assert monitor() == {}
    backward_on(model, x, y)
    backward_on(plain, x, y)
    expected = [joint(plain[2 * i].parameters()) / size for i, size in enumerate(sizes(plain, x))]
    assert list(floats(monitor()).values()) == pytest.approx(expected, rel=1e-5)
    assert floats(monitor()) == floats(monitor())
    assert same(grads(model), grads(plain))


def test_remove_takes_the_hooks_off():
    model = small_model()
    clip = energy_budget_clip(model, ratio=1e-6)
    monitor = monitor_ebc_ratio(model)
    clip.remove()
    monitor.remove()
    assert not any(module._forward_hooks for module in model.modules())
    backward(model)
    before = grads(model)
    assert clip() == monitor() == {}
    assert same(grads(model), before)


@pytest.mark.parametrize("used", [False, True])
def test_a_watched_model_can_be_copied_and_pickled(used):
    model = small_model()
    x, y = batch()
    clip = energy_budget_clip(model)
    if used:
        backward_on(model, x, y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    measured = floats(clip())
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.zero_grad()
        backward_on(other, 50 * x, y)
        assert floats(clip()) == (measured if not used else pytest.approx(floats(clip())))
        assert set(clip.record.energies) == (
            set(LAYERS) if used else set()
        )  # the copy's forward is not the model's
    pair, copied = copy.deepcopy((model, clip))
    pair.zero_grad()
    backward_on(pair, x, y)
    assert list(copied()) == LAYERS
