"""The trainer: that it trains as a plain loop does, what it says, and what it refuses."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from axiom.trainer_helpers import From, Tiny, batches, bits, everything, quiet, tiny
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ebc_lab.axiom.checks import AnomalyError
from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.axiom.trainer import AXIOM_Trainer

# -- training ------------------------------------------------------------------------------------------------


def by_hand(
    model: nn.Module, loader: list[Any], steps: int, warmup: int, hooks: bool, **settings: Any
) -> list[float]:
    """The losses of the loop that everyone would write."""
    optimizer = AXIOM(model.parameters(), lr=0.05, **settings)
    if hooks:
        optimizer.register_hooks()
    losses = []
    for step in range(steps):
        optimizer.set_lr(0.05 * min(1, (step + 1) / max(1, warmup)))
        x, y = loader[step % len(loader)]
        loss = model(x, labels=y)
        loss.backward()
        optimizer.step(loss=loss)
        optimizer.zero_grad()
        losses.append(loss.item())
    optimizer.remove_hooks()
    return losses


@pytest.mark.parametrize(("hooks", "limit"), [(True, 0.05), (False, None)])
def test_it_trains_as_a_loop_written_by_hand(hooks, limit):
    """However the steps are divided among calls of `fit`, and with validation in between."""
    loader = batches(3)
    settings = {"hooks": hooks, "rank": 2, "max_grad_norm": limit}
    plain = tiny()
    losses = by_hand(plain, loader, 5, 4, **settings)
    model = tiny()
    with quiet(model, loader, loader, warmup_steps=4, eval_interval=2, **settings) as trainer:
        trainer.fit(3)
        results = trainer.fit(2)
    assert results["train_losses"] == losses
    assert bits(model.state_dict()) == bits(plain.state_dict())
    sizes = [4 * p.numel() for p in plain.parameters()]
    peak = max(sizes) if hooks else sum(sizes)
    assert results["peak_gradient_bytes"] == peak
    assert results["compression_gradients"] == sum(sizes) / peak


def test_the_loader_takes_no_random_number_of_the_model():
    """A DataLoader draws a seed for each pass, a list nothing: dropout is the same."""
    pairs = batches()
    data = TensorDataset(*(torch.cat(column) for column in zip(*pairs, strict=True)))
    models = [tiny(dropout=0.5).eval(), tiny(dropout=0.5)]
    for model, loader in zip(models, (pairs, DataLoader(data, 3)), strict=True):
        torch.manual_seed(3)
        quiet(model, loader, pairs, eval_interval=1).fit(5)
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())
    assert models[0].dropout.training  # also where the model came in evaluation mode


def test_a_line_is_printed_every_interval(capsys):
    AXIOM_Trainer(tiny(), batches(), batches(), log_interval=2, eval_interval=4, save_results=False).fit(5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "2/5", "4/5", "4", "5"]
    assert "validation loss" in lines[0]
    assert "tokens/s" in lines[1]
    quiet(tiny(), batches(), batches()).fit(5)
    assert capsys.readouterr().out == ""


# -- batches and losses --------------------------------------------------------------------------------------


class Answering(Tiny):
    """Tiny, whose answer has another form, and which also takes a mask."""

    def __init__(self, answer: Any = lambda loss: loss):
        super().__init__()
        self.answer = answer
        self.masks: list[Any] = []

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Any = None) -> Any:
        self.masks.append(mask)
        return self.answer(super().forward(input_ids, labels))


@pytest.mark.parametrize("answer", [lambda loss: loss[None], lambda loss: SimpleNamespace(loss=loss)])
def test_a_loss_is_a_scalar_or_an_attribute(answer):
    torch.manual_seed(1)
    found = quiet(Answering(answer), batches()).fit(2)["train_losses"]
    assert found == quiet(tiny(), batches()).fit(2)["train_losses"]


@pytest.mark.parametrize(
    "answer", [lambda loss: None, lambda loss: loss.expand(2), lambda loss: SimpleNamespace(loss=None)]
)
def test_a_model_without_a_loss_is_refused(answer):
    with pytest.raises(ValueError, match=r"returned no scalar loss .*: return one, or an object with \.loss"):
        quiet(Answering(answer), batches()).fit(1)


def test_a_dict_gives_the_model_its_other_keys():
    model = Answering()
    x, y = batches(1)[0]
    quiet(model, [{"input_ids": x, "labels": y, "mask": torch.ones(2)}, {"labels": y, "input_ids": x}]).fit(2)
    assert bits(model.masks) == bits([torch.ones(2), None])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("words", "a batch is a str"),
        ((torch.zeros(3),) * 3, "a batch is a tuple"),
        ({"input_ids": torch.zeros(3), "labels": [1]}, "labels is missing in a batch.*it has input_ids"),
        (([1, 2], [2, 3]), "input_ids is missing in a batch, or is no tensor"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        quiet(tiny(), [batch]).fit(1)


@pytest.mark.parametrize("name", ["train_loader", "val_loader"])
def test_empty_loaders_are_refused_before_any_step(name):
    loaders = {"train_loader": batches(), "val_loader": batches()} | {name: []}
    trainer = AXIOM_Trainer(tiny(), **loaders, log_interval=0, save_results=False)
    with pytest.raises(ValueError, match=f"{name} has no batch.*give one that is not empty"):
        trainer.fit(1)
    assert trainer.step == 0


def test_a_loader_that_cannot_be_iterated_again_ends_training():
    trainer = quiet(tiny(), iter(batches(2)))
    with pytest.raises(ValueError, match=r"no batch \(more\): .* can be iterated again"):
        trainer.fit(5)
    assert trainer.results()["steps"] == 2


# -- validation ----------------------------------------------------------------------------------------------


def test_validation_is_at_the_start_at_each_interval_and_at_the_end():
    trainer = quiet(tiny(), batches(), batches(2), eval_interval=2)
    assert trainer.fit(3)["val_steps"] == [0, 2, 3]
    results = trainer.fit(2)
    assert results["val_steps"] == [0, 2, 3, 4, 5]
    assert results["val_ppls"] == [math.exp(x) for x in results["val_losses"]]


def test_evaluate_weighs_tokens():
    model = tiny()
    short, long = batches(1, rows=1)[0], batches(2, rows=4)[1]
    labels = long[1].clone()
    labels[:, :3] = -100
    silent = (short[0], torch.full_like(short[1], -100))
    loss, ppl = quiet(model, batches(), [short, (long[0], labels), silent]).evaluate()
    with torch.no_grad():
        x = torch.cat([short[0].flatten(), long[0].flatten()])
        y = torch.cat([short[1].flatten(), labels.flatten()])
        expected = F.cross_entropy(model.out(model.embedding(x)), y).item()
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ppl == math.exp(loss)
    first = quiet(model, batches(), batches(4)[:2]).evaluate()
    assert quiet(model, batches(), batches(4)).evaluate(2) == first


def test_evaluate_leaves_modes_gradients_and_random_numbers_as_they_were():
    model = tiny(dropout=0.5).train()
    model.embedding.eval()
    modes = [m.training for m in model.modules()]
    trainer = quiet(model, batches(), DataLoader(TensorDataset(*batches(1, rows=9)[0]), 3, shuffle=True))
    before = everything(trainer)
    assert trainer.evaluate() == pytest.approx(trainer.evaluate(), rel=1e-6)
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert everything(trainer) == before
    with pytest.raises(ValueError, match="a batch is"):
        quiet(model, batches(), [None]).evaluate()
    assert [m.training for m in model.modules()] == modes
    with pytest.raises(ValueError, match="there is no val_loader"):
        quiet(model, batches()).evaluate()


# -- what goes wrong -----------------------------------------------------------------------------------------


class Failing(Tiny):
    """Tiny, which at one of its forwards in training gives a loss, or a gradient, that is not finite."""

    def __init__(self, at: int, what: str):
        torch.manual_seed(1)
        super().__init__()
        self.at = at
        self.what = what
        self.calls = 0

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        self.calls += 1
        hidden = self.embedding(input_ids)
        if self.calls == self.at and self.what == "gradient":
            hidden.register_hook(lambda g: g * math.nan)
        if self.calls == self.at and self.what == "interrupt":
            hidden.register_hook(self.interrupted)
        loss = F.cross_entropy(self.out(hidden).flatten(0, 1), labels.flatten())
        return loss * math.inf if self.calls == self.at and self.what == "loss" else loss

    def interrupted(self, g: Tensor) -> None:
        raise KeyboardInterrupt


@pytest.mark.parametrize("hooks", [True, False])
def test_after_a_loss_that_is_not_finite_nothing_has_moved(tmp_path, hooks):
    model = Failing(3, "loss")
    trainer = quiet(model, batches(), hooks=hooks, save_results=True, results_dir=tmp_path)
    with pytest.raises(AnomalyError, match="the loss of step 3 is inf: the weights are those of step 2"):
        trainer.fit(5)
    plain = tiny()
    losses = by_hand(plain, batches(), 2, 3, hooks)
    assert bits(model.state_dict()) == bits(plain.state_dict())
    assert trainer.results()["train_losses"] == losses
    assert trainer.results()["steps"] == 2
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize(("what", "error"), [("gradient", AnomalyError), ("interrupt", KeyboardInterrupt)])
def test_a_step_that_broke_off_leaves_the_trainer_usable(hooks, what, error):
    model = Failing(3, what)
    trainer = quiet(model, batches(), hooks=hooks)
    with pytest.raises(error):
        trainer.fit(5)
    assert trainer.step == 2
    assert all(p.grad is None for p in model.parameters())
    assert trainer.optimizer.hooked == hooks
    results = trainer.fit(3)
    assert results["steps"] == 5
    assert all(map(math.isfinite, results["train_losses"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_interval": -1}, "eval_interval must be a whole number of at least 0, not -1"),
        ({"warmup_steps": "no"}, "warmup_steps must be a whole number"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"rank": -1}, "rank must be"),
        ({"lr_scale": 0.0}, "lr_scale must be above 0"),
        ({"lr_scale": 25.0, "hooks": False}, "lr_scale=25.0 acts under hooks only"),
        ({"results_prefix": "a/b"}, "name that in results_dir"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        quiet(tiny(), batches(), **settings)
    with pytest.raises(ValueError, match="unfreeze what is to be trained"):
        quiet(tiny().requires_grad_(False), batches())


@pytest.mark.parametrize("wrong", [0, 1.0, True])
def test_steps_and_batches_are_whole_numbers_of_at_least_one(wrong):
    trainer = quiet(tiny(), batches(), batches())
    for name, call in (("steps", trainer.fit), ("max_batches", trainer.evaluate)):
        with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1"):
            call(wrong)


# -- the end -------------------------------------------------------------------------------------------------


def test_cleanup_gives_the_model_back():
    model = tiny()
    with quiet(model, batches(), batches()) as trainer:
        results = trainer.fit(2)
        before = copy.deepcopy(model.state_dict())
    trainer.cleanup()
    x, y = batches(1)[0]
    model(x, labels=y).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert bits(model.state_dict()) == bits(before)
    assert not trainer.optimizer.state
    assert trainer.results() == results
    assert trainer.evaluate()[0] == results["val_losses"][-1]
    for use in (lambda: trainer.fit(1), trainer.save_checkpoint):
        with pytest.raises(RuntimeError, match="make a new one"):
            use()
    again = quiet(model, batches())
    with pytest.raises(ZeroDivisionError), again:
        raise ZeroDivisionError
    assert not again.optimizer.hooked


# -- on a GPU ------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_it_trains_there_and_resumes_to_the_bit(tmp_path):
    models = [tiny(dropout=0.5), tiny(dropout=0.5)]
    torch.manual_seed(5)
    straight = quiet(models[0], batches(4), batches(2))
    results = straight.fit(6)
    assert straight.device == torch.device("cuda", torch.cuda.current_device())
    assert results["peak_vram_gb"] > 0
    torch.manual_seed(5)
    first = quiet(models[1], batches(4), batches(2))
    first.fit(3)
    path = first.save_checkpoint(path=tmp_path / "a.pt")
    resumed = quiet(Tiny(dropout=0.5), From(batches(4), 3), batches(2))
    resumed.load_checkpoint(path)
    resumed.fit(3)
    found = [bits({k: v.cpu() for k, v in t.model.state_dict().items()}) for t in (straight, resumed)]
    assert found[0] == found[1]
