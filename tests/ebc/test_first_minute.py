"""What an author of the earlier study, or of ebc-clip, types first works, or a sentence says what does."""

import re

import pytest
import torch
from support.perceptron import backward_on, batch, joint, small_model
from torch import nn
from transformers import GPT2Config, GPT2Model

from ebc_lab.axiom import AXIOM
from ebc_lab.components import stabilizers
from ebc_lab.ebc import EBCWarning, EllipsotopeClip, attach, energy_budget_clip, monitor_ebc_ratio


def made():
    model = nn.Sequential(nn.Embedding(64, 8), nn.Linear(8, 64))
    return model, torch.optim.Adam(model.parameters())


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({}, "needs target_kl="),
        ({"delta": 0.05}, "EBC takes no delta: type target_kl=…, nats per token."),
        ({"ebc_target_kl": 0.05}, "no ebc_target_kl (did you mean target_kl?)."),
        ({"target_kl": "0.05"}, "target_kl='0.05' is no number: type target_kl=0.005."),
        ({"controller": "pi"}, "only ForensicClip of ebc_lab.components.forensics has it; log_pi is"),
        ({"cadence": "published"}, "only ForensicClip of ebc_lab.components.forensics has it; 'warm' is"),
        ({"guard": "shrink"}, "no guard: only ForensicClip of ebc_lab.components.forensics"),
        ({"ebc_enable": True}, "no ebc_enable: EBC is on from attach(…) to detach()."),
        ({"ebc_update_every": 20}, "no ebc_update_every: cadence='warm', 'dense' or 'sweep'"),
        ({"probe_layers": 2}, "cadence='published' of ForensicClip"),
        ({"beta_ema": 0.9}, "at decay 0.95"),
        ({"safety": 1.05}, "type target_kl=delta / safety**2"),
        ({"ebc_aggregate": "l2"}, "'sqrtl_l2' for what is 'l2' there"),
        ({"center_logits": True}, "logits are always centred"),
        ({"include_embed_out": False}, "or 'matrices' to leave embeddings and head free"),
        ({"ctrl_ema_halflife": 250}, "type gains="),
        ({"budjet": "shadow"}, "EBC takes no budjet (did you mean budget?)."),
    ],
)
def test_a_name_of_the_earlier_study_is_answered_by_what_to_type(typed, told):
    if {"delta", "ebc_target_kl", "target_kl"}.isdisjoint(typed) and typed:
        typed = {"target_kl": 0.05, **typed}
    for wrap in (attach, EllipsotopeClip):
        model, optimizer = made()
        with pytest.raises((TypeError, ValueError), match=re.escape(told)):
            wrap(model, optimizer, **typed)
        assert not model._forward_hooks
        attach(model, optimizer, target_kl=0.05).detach()  # nothing is left on either


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        ({"ratio": "0.1"}, "ratio='0.1' is no number: type ratio=0.1."),
        ({"ratio": None}, "ratio=None is no limit: leave it out for the default, 0.1."),
        ({"ratio": {"0": "0.1"}}, "ratio of '0'='0.1' is no number"),
        ({"verbose": True}, "takes no verbose: print(clip()) shows"),
        ({"hook_handles": {}}, "takes no hook_handles: leave it out"),
    ],
)
def test_what_the_energy_clip_does_not_take_is_told(typed, told):
    model = small_model()
    with pytest.raises(TypeError, match=re.escape(told)):
        energy_budget_clip(model, **typed)
    assert not any(module._forward_hooks for module in model.modules())


def test_parameters_in_the_place_of_the_model():
    for make in (energy_budget_clip, monitor_ebc_ratio):
        with pytest.raises(TypeError, match=r"takes the model, .* not a generator: energy_budget_clip"):
            make(small_model().parameters())


def test_the_lines_of_ebc_clips_readme():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=8, n_layer=18, n_head=2, bos_token_id=0, eos_token_id=0
    )
    model = GPT2Model(config)
    clip = energy_budget_clip(model)  # ratio=0.1 by default
    loss = 1000 * model(torch.randint(32, (4, 16))).last_hidden_state.square().mean()
    loss.backward()
    clip()
    ratios = monitor_ebc_ratio(model)  # made after the forward, as in the README
    weight = dict(model.named_parameters())["h.17.mlp.c_proj.weight"]
    energy = clip.record.energies["h.17.mlp.c_proj"]
    assert float(ratios["h.17.mlp.c_proj.weight"]) == pytest.approx(
        float(weight.grad.norm() / energy), rel=1e-5
    )
    assert 0 < ratios["h.17.mlp.c_proj.weight"] <= ratios["h.17.mlp.c_proj"] <= 0.1 * (1 + 1e-5)
    with pytest.raises(KeyError, match=r"did you mean h\.17\.mlp\.c_proj\.weight\?"):
        ratios["h.17.mlp.c_prj.weight"]


def test_iterating_and_printing_go_by_layer_and_a_parameters_name_is_known_all_the_same():
    model = small_model()
    monitor = monitor_ebc_ratio(model)
    backward_on(model, *batch())
    measured = monitor()
    assert list(monitor) == list(measured) == ["0", "2"]
    assert repr(monitor) == repr(dict(measured))
    assert "0.weight" in measured
    assert measured.get("0.weight") == monitor["0.weight"]
    assert measured.get("0.wait") is None
    parts = [float(monitor[f"0.{name}"]) for name in ("weight", "bias")]
    assert joint([model[0].weight]) / parts[0] == pytest.approx(joint([model[0].bias]) / parts[1])
    assert sum(p**2 for p in parts) == pytest.approx(float(monitor["0"]) ** 2)


def test_the_first_place_of_the_names_is_still_one():
    assert stabilizers.energy.energy_budget_clip is energy_budget_clip
    assert stabilizers.energy.monitor_ebc_ratio is monitor_ebc_ratio


def test_an_energy_clip_that_finds_no_gradient_says_so_once():
    clip = energy_budget_clip(small_model())
    with pytest.warns(EBCWarning, match=r"between loss\.backward\(\) and optimizer\.step\(\)"):
        assert clip() == {}
    assert clip() == {}


def test_hooks_that_come_after_attach_do_not_move_the_weights_past_it_in_silence():
    model = small_model()
    optimizer = AXIOM(model.parameters(), lr=1e-2)
    attach(model, optimizer, target_kl=1e-4, probe_sequences="all")
    backward_on(model, *batch())
    optimizer.step()
    optimizer.register_hooks(lr_scale=25.0)
    backward_on(model, *batch())
    with pytest.raises(ValueError, match=r"remove_hooks\(\), or use LaggedClip"):
        optimizer.step()
