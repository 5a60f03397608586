"""EBC in Hugging Face's `Trainer`: real trainers, tiny models from configurations, on a CPU."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ebc_lab.ebc import EBCWarning, attach, energy_budget_clip
from ebc_lab.ebc.energy.record import watching
from ebc_lab.integrations.transformers import EBC, EnergyClip

pytestmark = pytest.mark.filterwarnings("error::ebc_lab.ebc.given.checks.EBCWarning")
STEPS = 8
OPTIONS = {"target_kl": 1e-3, "audit_every": 3, "probe_sequences": 4}


class Text(torch.utils.data.Dataset):
    """Rows of 40 tokens, every third one padded from its 30th on."""

    def __len__(self):
        return 200

    def __getitem__(self, i):
        tokens = torch.randint(64, (40,), generator=torch.Generator().manual_seed(i))
        mask = torch.ones(40, dtype=torch.long)
        mask[30 if i % 3 == 0 else 40 :] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.where(mask.bool(), -100)}


def make_model(dropout=0.1):
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_positions": 40, "n_embd": 32, "n_layer": 2, "n_head": 2}
    dropouts = {"attn_pdrop": dropout, "embd_pdrop": dropout, "resid_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**sizes, **dropouts, bos_token_id=0, eos_token_id=0))


def make_trainer(folder, ebc=None, model=None, callbacks=None, kind=Trainer, **arguments):
    given = {"max_steps": STEPS, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    given |= {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    given |= {"logging_steps": 1, "report_to": "none", "disable_tqdm": True, "seed": 1}
    args = TrainingArguments(str(folder), **{**given, **arguments})
    few = torch.utils.data.Subset(Text(), range(8))
    own = kind(model or make_model(), args, train_dataset=Text(), eval_dataset=few, callbacks=callbacks)
    if ebc is not None:
        ebc.add_to(own)
    return own


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def clipped(trainer):
    return [record["ebc/c"] for record in trainer.state.log_history if "ebc/c" in record]


class AttachedByHand(Trainer):
    """The same without the callback: `attach` as soon as there is an optimizer."""

    def create_optimizer(self, model=None):
        made = super().create_optimizer(model)
        self.ebc = attach(self.model, made, **OPTIONS)
        return made


ACCUMULATED = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "gradient_checkpointing": True}


@pytest.mark.parametrize("arguments", [pytest.param({}, marks=pytest.mark.slow), ACCUMULATED])
def test_it_trains_as_an_optimizer_with_ebc_attached_does(tmp_path, arguments):
    ebc = EBC(**OPTIONS)
    trainer = make_trainer(tmp_path, ebc, **arguments)
    trainer.train()
    other = make_trainer(tmp_path / "other", kind=AttachedByHand, **arguments)
    other.train()
    assert same(trainer.model, other.model)
    assert ebc.attached.state_dict()["step_index"] == STEPS
    assert len(clipped(trainer)) == STEPS
    assert min(clipped(trainer)) < 0.9
    assert clipped(trainer)[-1] == float(other.ebc.last.clip_coefficient)


def test_its_numbers_are_in_the_history_and_in_tensorboards_file(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(tmp_path, EBC(**OPTIONS), report_to="tensorboard", save_strategy="no")
    trainer.train()
    history = trainer.state.log_history
    assert [("loss" in record) == ("ebc/c" in record) for record in history] == [True] * len(history)
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    for name in ("ebc/c", "ebc/delta", "ebc/applied_kl"):
        values = [record[name] for record in history if name in record]
        assert len(values) == STEPS
        assert [event.value for event in read.Scalars(f"train/{name}")] == pytest.approx(values)
    assert history[0]["ebc/delta"] == pytest.approx(1e-3)
    assert 2e-4 < history[-3]["ebc/applied_kl"] < 3e-3


SURROGATE = {"budget": "surrogate", "probe": "fd"}
RESTORING = {"restore_callback_states_from_checkpoint": True}


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ({}, {}),
        ({"budget": "tracked"}, RESTORING),
        pytest.param(SURROGATE, RESTORING, marks=pytest.mark.slow),
    ],
)
def test_a_resumed_training_ends_at_the_same_bits_with_restored_callbacks_too(tmp_path, options, arguments):
    whole = make_trainer(tmp_path, EBC(**OPTIONS, **options))
    whole.train()
    folder = (tmp_path / "checkpoint-3").rename(tmp_path / "moved")
    again = make_trainer(tmp_path / "again", callbacks=[EBC(**OPTIONS, **options)], **arguments)
    again.train(resume_from_checkpoint=str(folder))
    assert same(whole.model, again.model)
    assert clipped(whole) == clipped(again)


def test_an_option_that_a_restored_callback_would_lack_is_not_lost_in_silence(tmp_path):
    options = {**OPTIONS, "logits_of": lambda output: output.logits}
    make_trainer(tmp_path, EBC(**options), max_steps=3).train()
    with pytest.raises(ValueError, match="makes EBC anew without logits_of"):
        make_trainer(tmp_path, EBC(**options), **RESTORING).train(resume_from_checkpoint=True)


def test_training_again_begins_anew(tmp_path):
    ebc = EBC(**OPTIONS)
    trainer = make_trainer(tmp_path, ebc, save_strategy="no")
    for _ in range(2):
        trainer.train()
        assert ebc.attached.state_dict()["step_index"] == STEPS
        trainer.optimizer = None


def test_a_checkpoint_without_ebc_is_resumed_with_a_warning(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path, EBC(**OPTIONS), max_steps=6)
    with pytest.warns(EBCWarning, match="saved without EBC"):
        trainer.train(resume_from_checkpoint=True)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["EBC"]["attributes"]["saved"]["step_index"] == 3


def test_bf16_is_measured_as_what_it_is(tmp_path):
    ebc = EBC(**OPTIONS)
    trainer = make_trainer(tmp_path, ebc, bf16=True, save_strategy="no")
    trainer.train()
    assert ebc.attached.clip.budget.floor == 1e-5
    assert min(clipped(trainer)) < 0.9
    with pytest.raises(ValueError, match="ten times 1e-05"):
        make_trainer(tmp_path, EBC(target_kl=5e-5), bf16=True).train()


def test_among_the_callbacks_it_says_who_does_not_see_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    trainer = make_trainer(
        tmp_path, callbacks=[EBC(**OPTIONS)], report_to="tensorboard", save_strategy="no", max_steps=1
    )
    with pytest.warns(EBCWarning, match=r"tensorboard does not see EBC's numbers.*add_to\(trainer\)"):
        trainer.train()
    assert len(clipped(trainer)) == 1


# -- the energy clip -----------------------------------------------------------------------------------------

RATIO = 0.001


class ClippedByHand(Trainer):
    """The same without the callback: the clip runs at the beginning of the optimizer's step."""

    def create_optimizer(self, model=None):
        made = super().create_optimizer(model)
        clip = energy_budget_clip(self.model, RATIO)
        self.worst = []
        made.register_step_pre_hook(lambda *_: self.worst.append(max(map(float, clip().values()))))
        return made


def test_the_energy_clip_limits_each_step_and_stands_beside_the_loss(tmp_path):
    trainer = make_trainer(tmp_path, EnergyClip(RATIO), save_strategy="no", **ACCUMULATED)
    trainer.train()
    other = make_trainer(tmp_path / "other", kind=ClippedByHand, save_strategy="no", **ACCUMULATED)
    other.train()
    assert same(trainer.model, other.model)
    records = [record for record in trainer.state.log_history if "loss" in record]
    assert [record["energy/worst"] for record in records] == pytest.approx(other.worst)
    assert records[-1]["energy/skipped"] == 0
    assert max(other.worst) > 1
    assert watching(trainer.model) is None


def test_the_energy_clip_unscales_what_the_trainer_has_left_scaled():
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    args = SimpleNamespace(world_size=1, n_gpu=0, torch_compile=False, report_to=[], max_grad_norm=0.0)
    around = SimpleNamespace(optimizer=optimizer, scaler=scaler, param_groups=optimizer.param_groups)
    callback = EnergyClip()
    callback.on_train_begin(args, None, None, model=model, optimizer=around)
    loss = model(torch.ones(2, 4)).square().mean()
    plain = torch.autograd.grad(loss, model.weight, retain_graph=True)[0].norm()
    scaler.scale(loss).backward()
    callback.on_pre_optimizer_step(args, None, None, optimizer=around)
    worst = callback._figures.values()["energy/worst"]
    assert float(model.weight.grad.norm()) == pytest.approx(float(plain / max(1, worst)))
    scaler.step(optimizer)  # which does not unscale again


def test_the_energy_clip_refuses_compiled_training(tmp_path):
    with pytest.raises(ValueError, match="without torch_compile"):
        make_trainer(tmp_path, EnergyClip(), torch_compile=True).train()


def test_without_transformers_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ebc_lab.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'ebc-lab\[transformers\]'"):
        import_module("ebc_lab.integrations.transformers")
