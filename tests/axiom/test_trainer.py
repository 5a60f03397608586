"""The trainer: that it trains as a plain loop does and resumes to the bit, what it writes and refuses."""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import json
import math
import os
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ebc_lab.axiom import trainer as module
from ebc_lab.axiom.checks import AnomalyError
from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.axiom.trainer import AXIOM_Trainer, picture

WORDS = 12
RESULTS = [
    *("train_losses", "initial_train_loss", "final_train_loss", "train_improvement_pct"),
    *("val_losses", "val_steps", "val_ppls", "initial_val_ppl", "final_val_ppl", "val_improvement_pct"),
    *("peak_vram_gb", "peak_gradient_bytes", "tokens_per_sec", "total_time_min"),
    *("compression_state", "compression_gradients", "compression_total", "steps"),
]


class Tiny(nn.Module):
    """An embedding and a linear map: the next word from this one."""

    def __init__(self, width: int = 6, dropout: float = 0.0):
        super().__init__()
        self.embedding = nn.Embedding(WORDS, width)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(width, WORDS)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
        logits = self.out(self.dropout(self.embedding(input_ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def tiny(width: int = 6, dropout: float = 0.0) -> Tiny:
    torch.manual_seed(1)
    return Tiny(width, dropout)


def batches(count: int = 4, rows: int = 3, length: int = 5) -> list[tuple[Tensor, Tensor]]:
    """Batches of a text in which every word is followed by the one three further on."""
    draw = torch.Generator().manual_seed(2)
    starts = torch.randint(WORDS, (count, rows, 1), generator=draw)
    text = (starts + 3 * torch.arange(length + 1)) % WORDS
    return [(rows[:, :-1], rows[:, 1:]) for rows in text]


def quiet(model: nn.Module, loader: Any, val_loader: Any = None, **settings: Any) -> AXIOM_Trainer:
    given = {"lr": 0.05, "log_interval": 0, "save_results": False, "warmup_steps": 3}
    return AXIOM_Trainer(model, loader, val_loader, **(given | settings))


def bits(x: Any) -> Any:
    """Something to compare to the bit: tensors as bytes, whatever holds them."""
    if isinstance(x, Tensor):
        return (str(x.dtype), tuple(x.shape), x.detach().reshape(-1).view(torch.uint8).tolist())
    if isinstance(x, dict):
        return {name: bits(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [bits(value) for value in x]
    return x


def everything(trainer: AXIOM_Trainer) -> Any:
    """Whatever a failed load must leave as it is."""
    return bits(
        {
            "model": trainer.model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "results": trainer.results(),
            "hooked": trainer.optimizer.hooked,
            "rng": torch.get_rng_state(),
        }
    )


# -- training ------------------------------------------------------------------------------------------------


def test_the_signature_is_the_documented_one():
    expected = (
        "(model, train_loader, val_loader=None, lr=0.0005, weight_decay=0.01, max_grad_norm=None, "
        "eval_interval=200, log_interval=100, checkpoint_interval=0, checkpoint_dir='checkpoints', "
        "save_results=True, results_prefix='axiom', device=None, *, hooks=True, warmup_steps=100, "
        "lr_scale=1.0, rank=4, results_dir='.')"
    )
    signature = inspect.signature(AXIOM_Trainer)
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(signature.replace(parameters=bare, return_annotation=inspect.Signature.empty)) == expected


def by_hand(
    model: nn.Module, loader: list[Any], steps: int, warmup: int, hooks: bool, **settings: Any
) -> Any:
    """The loop that everyone would write. -> losses."""
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


@given(
    first=st.integers(1, 4),
    second=st.integers(1, 4),
    warmup=st.integers(0, 6),
    hooks=st.booleans(),
    rank=st.integers(0, 2),
    limit=st.sampled_from([None, 0.05]),
)
def test_it_trains_as_a_loop_written_by_hand(first, second, warmup, hooks, rank, limit):
    """However the steps are divided among calls of `fit`, and with validation in between."""
    loader = batches(3)
    plain = tiny()
    losses = by_hand(plain, loader, first + second, warmup, hooks, rank=rank, max_grad_norm=limit)
    model = tiny()
    settings = {"hooks": hooks, "rank": rank, "max_grad_norm": limit, "eval_interval": 2}
    with quiet(model, loader, loader, warmup_steps=warmup, **settings) as trainer:
        trainer.fit(first)
        results = trainer.fit(second)
    assert results["train_losses"] == losses
    assert bits(model.state_dict()) == bits(plain.state_dict())


def test_hooks_change_no_bit_but_the_height_of_the_gradients():
    models = [tiny(), tiny()]
    found = [quiet(m, batches(), hooks=h).fit(5) for m, h in zip(models, (True, False), strict=True)]
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())
    sizes = [4 * p.numel() for p in models[0].parameters()]
    assert [r["peak_gradient_bytes"] for r in found] == [max(sizes), sum(sizes)]
    elements = sum(sizes) // 4
    assert [r["compression_gradients"] for r in found] == [4 * elements / max(sizes), 1]


def test_it_learns():
    results = quiet(tiny(), batches(), batches(2), lr=0.1).fit(80)
    assert results["initial_val_ppl"] > WORDS * 0.8
    assert results["final_val_ppl"] < 1.5
    assert results["train_improvement_pct"] > 90


def test_frozen_parameters_stay():
    model = tiny()
    model.embedding.weight.requires_grad_(False)
    before = bits(model.embedding.weight)
    quiet(model, batches()).fit(2)
    assert bits(model.embedding.weight) == before


def test_it_trains_where_the_model_is_in_train_mode():
    model = tiny(dropout=0.5).eval()
    quiet(model, batches()).fit(1)
    assert model.dropout.training


def test_the_loader_takes_no_random_number_of_the_model():
    """A DataLoader draws a seed for each pass, a list nothing: dropout is the same."""
    pairs = batches()
    data = TensorDataset(*(torch.cat(column) for column in zip(*pairs, strict=True)))
    models = [tiny(dropout=0.5), tiny(dropout=0.5)]
    for model, loader in zip(models, (pairs, DataLoader(data, 3)), strict=True):
        torch.manual_seed(3)
        quiet(model, loader, pairs, eval_interval=1).fit(9)
    assert bits(models[0].state_dict()) == bits(models[1].state_dict())


def test_a_shuffled_loader_has_another_order_in_each_pass():
    order: list[list[int]] = []

    class Listening(Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            order.append(input_ids.flatten().tolist())
            return super().forward(input_ids % WORDS, labels)

    data = TensorDataset(torch.arange(16)[:, None], torch.arange(16)[:, None] % WORDS)
    torch.manual_seed(4)
    quiet(Listening(), DataLoader(data, 4, shuffle=True)).fit(8)
    for epoch in (order[:4], order[4:]):
        assert sorted(chain(*epoch)) == list(range(16))
    assert order[:4] != order[4:]


# -- batches and losses --------------------------------------------------------------------------------------


class Answering(Tiny):
    """Tiny, whose answer has another form, and which also takes a mask."""

    def __init__(self, answer: Any, masks: list[Any] | None = None):
        super().__init__()
        self.answer = answer
        self.masks = masks

    def forward(self, input_ids: Tensor, labels: Tensor, mask: Any = None) -> Any:
        if self.masks is not None:
            self.masks.append(mask)
        return self.answer(super().forward(input_ids, labels))


ANSWERS = {
    "scalar": lambda loss: loss,
    "one element": lambda loss: loss[None],
    "attribute": lambda loss: SimpleNamespace(loss=loss, logits=None),
    "tuple": lambda loss: (loss, torch.zeros(3)),
    "dict": lambda loss: {"loss": loss, "logits": None},
}


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
def test_losses_come_in_every_form(answer):
    torch.manual_seed(1)
    found = quiet(Answering(answer), batches()).fit(2)["train_losses"]
    assert found == quiet(tiny(), batches()).fit(2)["train_losses"]


@pytest.mark.parametrize(
    "answer",
    [
        lambda loss: None,
        lambda loss: loss.expand(2),
        lambda loss: (torch.zeros(2, 3), loss),
        lambda loss: {"logits": loss},
        lambda loss: SimpleNamespace(loss=None),
        lambda loss: (),
        lambda loss: 1.5,
    ],
)
def test_a_model_without_a_loss_is_refused(answer):
    with pytest.raises(ValueError, match=r"returned no scalar loss .*: return one, or an object with \.loss"):
        quiet(Answering(answer), batches()).fit(1)


def test_a_dict_gives_the_model_its_other_keys():
    masks: list[Any] = []
    model = Answering(ANSWERS["scalar"], masks)
    x, y = batches(1)[0]
    quiet(model, [{"input_ids": x, "labels": y, "mask": torch.ones(2)}, {"labels": y, "input_ids": x}]).fit(2)
    assert bits(masks) == bits([torch.ones(2), None])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (torch.zeros(3), "a batch is a Tensor"),
        ((torch.zeros(3),), "a batch is a tuple"),
        ({"input_ids": torch.zeros(3)}, "labels is missing in a batch.*it has input_ids"),
        (([1, 2], [2, 3]), "input_ids is missing in a batch, or is no tensor"),
    ],
)
def test_other_batches_are_refused(batch, message):
    with pytest.raises(ValueError, match=message):
        quiet(tiny(), [batch]).fit(1)


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


def test_evaluate_weighs_rows_where_labels_are_no_whole_numbers():
    class Mean(Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return labels.mean() + 0 * self.out.bias.sum()

    pairs = [(torch.zeros(1, 1), torch.tensor([[1.0]])), (torch.zeros(3, 1), torch.tensor([[2.0]] * 3))]
    assert quiet(Mean(), pairs, pairs).evaluate()[0] == (1 + 3 * 2) / 4


def test_evaluate_takes_only_the_batches_it_is_asked_for():
    taken = []

    class Counting:
        def __iter__(self):
            for pair in batches(4):
                taken.append(pair)
                yield pair

    trainer = quiet(tiny(), batches(), Counting())
    assert trainer.evaluate(2) == quiet(tiny(), batches(), batches(4)[:2]).evaluate()
    assert len(taken) == 2


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


def test_evaluate_restores_the_mode_when_the_model_fails():
    model = tiny().train()
    with pytest.raises(ValueError, match="a batch is"):
        quiet(model, batches(), [None]).evaluate()
    assert model.training


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True])
def test_evaluate_refuses_what_is_no_number_of_batches(wrong):
    with pytest.raises(ValueError, match="max_batches must be a whole number of at least 1"):
        quiet(tiny(), batches(), batches()).evaluate(wrong)


def test_evaluate_needs_data():
    with pytest.raises(ValueError, match="there is no val_loader"):
        quiet(tiny(), batches()).evaluate()
    with pytest.raises(ValueError, match="no batch with labels"):
        quiet(tiny(), batches(), iter([])).evaluate()


# -- what goes wrong in training -----------------------------------------------------------------------------


class Failing(Tiny):
    """Tiny, which at one of its forwards in training gives a loss, or a gradient, that is not finite."""

    def __init__(self, at: int, what: str):
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


def failing(at: int, what: str) -> Failing:
    torch.manual_seed(1)
    return Failing(at, what)


@pytest.mark.parametrize("hooks", [True, False])
def test_after_a_loss_that_is_not_finite_nothing_has_moved(tmp_path, hooks):
    model = failing(3, "loss")
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
    model = failing(3, what)
    trainer = quiet(model, batches(), hooks=hooks)
    with pytest.raises(error):
        trainer.fit(5)
    assert trainer.step == 2
    assert all(p.grad is None for p in model.parameters())
    assert trainer.optimizer.hooked == hooks
    results = trainer.fit(3)
    assert results["steps"] == 5
    assert all(map(math.isfinite, results["train_losses"]))


def test_a_loader_that_cannot_be_iterated_again_ends_training():
    trainer = quiet(tiny(), iter(batches(2)))
    with pytest.raises(ValueError, match=r"no batch \(more\) after 2 steps: .* can be iterated again"):
        trainer.fit(5)
    assert trainer.results()["steps"] == 2


# -- what is refused before it -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_loader": []}, "train_loader is empty"),
        ({"val_loader": []}, "val_loader is empty"),
        (
            {"val_loader": DataLoader(TensorDataset(torch.zeros(3, 2)), 4, drop_last=True)},
            "val_loader is empty",
        ),
        ({"eval_interval": -1}, "eval_interval must be a whole number of at least 0, not -1"),
        ({"log_interval": 2.5}, "log_interval must be a whole number"),
        ({"checkpoint_interval": True}, "checkpoint_interval must be a whole number"),
        ({"warmup_steps": "no"}, "warmup_steps must be a whole number"),
        ({"max_grad_norm": 0}, "max_grad_norm must be above 0"),
        ({"lr": -1.0}, "lr must be"),
        ({"weight_decay": math.nan}, "weight_decay must be"),
        ({"rank": -1}, "rank must be"),
        ({"lr_scale": 0.0}, "lr_scale must be above 0"),
        ({"lr_scale": 25.0, "hooks": False}, "lr_scale=25.0 acts under hooks only"),
        ({"results_prefix": ""}, "results_prefix='' must be the beginning of a file's name"),
        ({"results_prefix": "a/b"}, "name that in results_dir"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    given = {"model": tiny(), "train_loader": batches(), "save_results": False}
    with pytest.raises(ValueError, match=message):
        AXIOM_Trainer(**(given | settings))


@pytest.mark.parametrize("steps", [0, -3, 1.0, True, None])
def test_a_number_of_steps_below_one_is_refused(steps):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1"):
        quiet(tiny(), batches()).fit(steps)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="unfreeze what is to be trained"):
        quiet(tiny().requires_grad_(False), batches())


def test_folders_that_cannot_be_written_are_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    with pytest.raises(OSError, match=r"results_dir=.* cannot be written: .*file is no folder"):
        quiet(tiny(), batches(), save_results=True, results_dir=place)
    with pytest.raises(OSError, match="checkpoint_dir="):
        quiet(tiny(), batches(), checkpoint_interval=1, checkpoint_dir=place)
    quiet(tiny(), batches(), checkpoint_dir=place, results_dir=place).fit(1)  # neither is needed
    folder = tmp_path / "later"
    trainer = quiet(tiny(), batches(), save_results=True, results_dir=folder)
    assert not folder.exists()
    folder.touch()
    with pytest.raises(OSError, match="results_dir="):
        trainer.fit(1)
    assert trainer.step == 0


def test_a_missing_matplotlib_is_found_before_training(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="install it, or set save_results=False"):
        quiet(tiny(), batches(), save_results=True)
    quiet(tiny(), batches()).fit(1)


# -- results -------------------------------------------------------------------------------------------------


@pytest.fixture
def undrawn(monkeypatch):
    """Results are written without drawing, which takes a while."""
    monkeypatch.setattr(module, "picture", lambda results, title: b"a picture")


def test_results_before_training_have_no_figures():
    results = quiet(tiny(), batches()).results()
    assert list(results) == RESULTS
    assert results["steps"] == 0
    assert [results[name] for name in RESULTS[1:4]] == [None] * 3
    assert results["tokens_per_sec"] is None
    assert results["peak_vram_gb"] is None


def test_results_are_drawn_and_written_whole(tmp_path):
    from matplotlib import image, rc_context

    folder = tmp_path / "new" / "results"
    trainer = quiet(
        tiny(), batches(), batches(2), save_results=True, results_dir=folder, results_prefix="a $x"
    )
    with rc_context({"text.usetex": True, "savefig.dpi": 1000}):  # of a reader without LaTeX
        results = trainer.fit(60)
    assert sorted(p.name for p in folder.iterdir()) == ["a $x.json", "a $x.png"]
    assert json.loads((folder / "a $x.json").read_text()) == results == trainer.results()
    assert list(results) == RESULTS
    losses = results["train_losses"]
    assert results["initial_train_loss"] == losses[0]
    assert results["final_train_loss"] == losses[59]
    assert results["train_improvement_pct"] == 100 * (losses[0] - losses[59]) / losses[0]
    ppls = results["val_ppls"]
    assert results["val_improvement_pct"] == 100 * (ppls[0] - ppls[-1]) / ppls[0]
    assert results["tokens_per_sec"] * results["total_time_min"] * 60 > 60 * 3 * 5
    drawn = image.imread(folder / "a $x.png")
    assert drawn.shape[:2] == (504, 1260)
    assert len({tuple(pixel) for pixel in drawn[::3, ::3].reshape(-1, 4).tolist()}) > 20


def test_figures_that_are_not_finite_are_null(tmp_path, undrawn):
    class Far(Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return super().forward(input_ids, labels) + 1000

    trainer = quiet(Far(), batches(), batches(), save_results=True, results_dir=tmp_path)
    results = trainer.fit(1)
    assert results["val_ppls"] == [None, None]
    assert results["final_val_ppl"] is None
    assert results["val_improvement_pct"] is None
    text = (tmp_path / "axiom.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == results


@pytest.mark.parametrize("ppls", [[None, None], [2000.0, 20.0]])
def test_curves_with_gaps_are_drawn_too(ppls):
    results = quiet(tiny(), batches(), batches()).fit(1)
    assert picture(results | {"val_ppls": ppls}, "gaps").startswith(b"\x89PNG")


def test_a_write_that_fails_leaves_the_old_results(tmp_path, undrawn, monkeypatch):
    trainer = quiet(tiny(), batches(), save_results=True, results_dir=tmp_path)
    trainer.fit(1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.fit(1)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert trainer.results()["steps"] == 2


def test_a_line_is_printed_every_interval(capsys):
    AXIOM_Trainer(tiny(), batches(), batches(), log_interval=2, eval_interval=4, save_results=False).fit(5)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["0", "2/5", "4/5", "4", "5"]
    assert "validation loss" in lines[0]
    assert "tokens/s" in lines[1]
    quiet(tiny(), batches(), batches()).fit(5)
    assert capsys.readouterr().out == ""


# -- checkpoints ---------------------------------------------------------------------------------------------


class From:
    """The batches of a list, from one of them on in the first pass: a loader that a test positions."""

    def __init__(self, pairs: list[Any], start: int):
        self.pairs = pairs
        self.start = start

    def __iter__(self):
        start, self.start = self.start, 0
        return iter(self.pairs[start:])


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("limit", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(tmp_path, hooks, limit, dtype):
    pairs = batches(4)
    settings = {"hooks": hooks, "max_grad_norm": limit, "eval_interval": 3, "warmup_steps": 5}
    straight = quiet(tiny(dropout=0.5).to(dtype), pairs, pairs, **settings)
    torch.manual_seed(5)
    straight.fit(6)

    torch.manual_seed(5)
    model = tiny(dropout=0.5).to(dtype)
    torch.manual_seed(5)
    first = quiet(model, pairs, pairs, **settings)
    first.fit(3)
    path = first.save_checkpoint(path=tmp_path / "new" / "there.pt")
    torch.manual_seed(99)
    resumed = quiet(Tiny(dropout=0.5).to(dtype), From(pairs, 3), pairs, **settings)
    resumed.load_checkpoint(path)
    assert resumed.step == 3
    resumed.fit(3)
    assert bits(resumed.model.state_dict()) == bits(straight.model.state_dict())
    assert bits(resumed.optimizer.state_dict()) == bits(straight.optimizer.state_dict())
    curves = ("train_losses", "val_losses", "val_steps", "steps", "peak_gradient_bytes")
    assert [resumed.results()[c] for c in curves] == [straight.results()[c] for c in curves]


def test_a_loaded_checkpoint_brings_its_hooks_and_leaves_the_settings(tmp_path):
    written = quiet(tiny(), batches(), hooks=True)
    written.fit(2)
    path = written.save_checkpoint(path=tmp_path / "a.pt")
    other = quiet(tiny(), batches(), hooks=False, lr=0.01, weight_decay=0.5, warmup_steps=0)
    other.load_checkpoint(path)
    assert other.optimizer.hooked
    other.fit(1)
    assert other.optimizer.get_lr() == 0.01
    assert other.optimizer.param_groups[0]["weight_decay"] == 0.5
    path = quiet(tiny(), batches(), hooks=False).save_checkpoint(path=path)
    other.load_checkpoint(path)
    assert not other.optimizer.hooked
    assert other.step == 0


def test_loading_begins_the_loader_anew(tmp_path):
    trainer = quiet(tiny(), batches())
    path = trainer.save_checkpoint(path=tmp_path / "a.pt")
    losses = trainer.fit(2)["train_losses"]
    trainer.load_checkpoint(path)
    assert trainer.fit(2)["train_losses"] == losses


def test_checkpoints_are_written_at_their_interval(tmp_path):
    trainer = quiet(
        tiny(), batches(), checkpoint_interval=2, checkpoint_dir=tmp_path / "c", results_prefix="run"
    )
    trainer.fit(5)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["run_step_2.pt", "run_step_4.pt"]
    assert trainer.save_checkpoint() == tmp_path / "c" / "run_step_5.pt"
    assert trainer.save_checkpoint(7) == tmp_path / "c" / "run_step_7.pt"
    trainer.load_checkpoint(tmp_path / "c" / "run_step_2.pt")
    assert trainer.results()["steps"] == 2
    assert trainer.results()["total_time_min"] > 0
    trainer.load_checkpoint(str(tmp_path / "c" / "run_step_7.pt"))
    assert trainer.step == 5  # the number of the name says nothing of the content


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    trainer = quiet(tiny(), batches())
    path = trainer.save_checkpoint(path=tmp_path / "a.pt")
    before = path.read_bytes()
    trainer.fit(1)

    def halfway(state: Any, f: Any) -> None:
        f.write(b"the beginning")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", halfway)
    with pytest.raises(OSError, match="No space left"):
        trainer.save_checkpoint(path=path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.pt"]
    assert path.read_bytes() == before


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> bytes:
    """The content of a good checkpoint of three steps."""
    trainer = quiet(tiny(), batches(), batches())
    trainer.fit(3)
    return trainer.save_checkpoint(path=tmp_path_factory.mktemp("written") / "good.pt").read_bytes()


@pytest.fixture(scope="module")
def receiver(tmp_path_factory) -> tuple[AXIOM_Trainer, Path]:
    """A trainer that has come elsewhere, and a file for it to load."""
    trainer = quiet(tiny(), batches(3, rows=2), hooks=False)
    trainer.fit(2)
    return trainer, tmp_path_factory.mktemp("receiver") / "a.pt"


def refused(receiver: tuple[AXIOM_Trainer, Path], content: bytes, message: str) -> None:
    trainer, path = receiver
    path.write_bytes(content)
    before = everything(trainer)
    with pytest.raises(ValueError, match=message) as caught:
        trainer.load_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert everything(trainer) == before


@given(data=st.data())
def test_any_damaged_byte_is_found(written, receiver, data):
    at = data.draw(st.integers(0, len(written) - 1))
    other = data.draw(st.integers(1, 255))
    content = bytearray(written)
    content[at] ^= other
    refused(receiver, bytes(content), "is damaged, or no checkpoint of AXIOM_Trainer")


@given(data=st.data())
def test_any_truncation_is_found(written, receiver, data):
    kept = data.draw(st.integers(0, len(written) - 1))
    refused(receiver, written[:kept], "is damaged, or no checkpoint of AXIOM_Trainer")


def test_what_is_appended_is_found(written, receiver):
    refused(receiver, written + b"\0", "is damaged")


def sealed(content: bytes) -> bytes:
    return module.header(hashlib.sha256(content).hexdigest()) + content


def saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Evil:
    def __reduce__(self) -> Any:
        return (os.mkdir, ("executed",))


def test_nothing_in_a_file_is_executed(receiver, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(receiver, sealed(saved({"model": Evil()})), "is damaged, or no checkpoint")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"hello\n", saved({"model": {}})], ids=["empty", "text", "torch's"])
def test_files_of_others_are_refused(receiver, content):
    refused(receiver, content, "is damaged, or no checkpoint of AXIOM_Trainer")


def state_of(content: bytes) -> dict[str, Any]:
    content = content.split(b"\n", 1)[1]
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


def change(state: dict[Any, Any], path: str, value: Any) -> None:
    """Set an entry, such as "curves.tokens", of nested dicts; None removes it."""
    *above, last = path.split(".")
    for name in above:
        state = state[int(name) if name.isdigit() else name]
    if value is None:
        del state[last]
    else:
        state[last] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("rng", torch.zeros(3, dtype=torch.uint8), "is not of this trainer"),
        ("loader_rng", torch.zeros(5056), "is not of this trainer"),
        ("step", 4, "its curve has another number of steps"),
        ("curves", {"unknown": 1}, "is not of this trainer"),
        ("curves", None, "is not of this trainer"),
        ("optimizer", {}, "is not of this trainer"),
        ("optimizer.param_groups", [], "is not of this trainer"),
        ("optimizer.state.0.row", torch.zeros(WORDS + 1), "state of embedding.weight"),
        ("optimizer.state.0.row", torch.zeros(WORDS).double(), "state of embedding.weight"),
        ("optimizer.state.0.left", None, "state of embedding.weight"),
        ("model", None, "is not of this trainer"),
        ("hooks", None, "is not of this trainer"),
    ],
)
def test_a_whole_file_with_other_content_is_refused(written, receiver, path, value, message):
    state = state_of(written)
    change(state, path, value)
    refused(receiver, sealed(saved(state)), message)


FOREIGN = {
    "shapes": (lambda: quiet(tiny(width=7), batches()), r"its embedding.weight is \(12, 7\).*not \(12, 6\)"),
    "dtype": (lambda: quiet(tiny().bfloat16(), batches()), "bfloat16, not .*float32"),
    "rank": (lambda: quiet(tiny(), batches(), rank=2), "its rank is 2, not 4"),
    "missing": (lambda: quiet(nn.Linear(2, 2), batches()), "it has no embedding.weight"),
    "more": (lambda: quiet(with_more(tiny()), batches()), "the model has no more.weight"),
    "frozen": (lambda: quiet(with_frozen(tiny()), batches()), "other parameters were trained"),
}


def with_more(model: nn.Module) -> nn.Module:
    model.more = nn.Linear(1, 1).requires_grad_(False)
    return model


def with_frozen(model: Tiny) -> nn.Module:
    model.out.requires_grad_(False)
    return model


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_another_model_are_refused(receiver, tmp_path, kind):
    build, message = FOREIGN[kind]
    path = build().save_checkpoint(path=tmp_path / "foreign.pt")
    refused(receiver, path.read_bytes(), message)


def test_a_file_that_is_not_there_is_an_os_error(receiver, tmp_path):
    with pytest.raises(FileNotFoundError):
        receiver[0].load_checkpoint(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError):
        receiver[0].load_checkpoint(tmp_path)


def test_time_between_two_calls_of_fit_does_not_count(tmp_path, monkeypatch):
    clock = [0.0]

    def tick() -> float:
        clock[0] += 1
        return clock[0]

    monkeypatch.setattr(module.time, "perf_counter", tick)
    trainer = quiet(tiny(), batches())
    trainer.fit(1)
    minutes = trainer.results()["total_time_min"]
    clock[0] += 1000
    path = trainer.save_checkpoint(path=tmp_path / "a.pt")
    trainer.load_checkpoint(path)
    assert trainer.results()["total_time_min"] == minutes
    assert trainer.fit(1)["total_time_min"] == 2 * minutes
    assert trainer.results()["tokens_per_sec"] == 3 * 5  # two ticks are a second


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
    assert bits(model.state_dict()) == bits(before)
    assert not trainer.optimizer.state
    assert trainer.results() == results
    assert trainer.evaluate()[0] == results["val_losses"][-1]
    with pytest.raises(RuntimeError, match="make a new one"):
        trainer.fit(1)
    with pytest.raises(RuntimeError, match="make a new one"):
        trainer.save_checkpoint()
    with quiet(model.requires_grad_(True), batches(), hooks=False) as again:
        again.fit(1)


def test_cleanup_follows_an_error():
    trainer = quiet(tiny(), batches())
    with pytest.raises(ZeroDivisionError), trainer:
        raise ZeroDivisionError
    assert not trainer.optimizer.hooked


# -- slow, and on a GPU --------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
sys.path[:0] = [{here!r}, {root!r}]
import torch
torch.set_num_threads(1)
from test_trainer import batches, quiet, tiny

class Dying(list):
    def __iter__(self):
        for pair in super().__iter__():
            yield pair
        os.kill(os.getpid(), signal.SIGKILL)

model = tiny(dropout=0.5)
torch.manual_seed(5)
quiet(model, Dying(batches(4)), checkpoint_interval=3, checkpoint_dir={folder!r}).fit(6)
"""


@pytest.mark.slow
def test_a_killed_run_is_resumed_to_the_bit(tmp_path):
    here = Path(__file__)
    script = KILLED.format(here=str(here.parent), root=str(here.parents[2]), folder=str(tmp_path))
    ended = subprocess.run([sys.executable, "-c", script], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == ["axiom_step_3.pt"]
    straight = tiny(dropout=0.5)
    torch.manual_seed(5)
    quiet(straight, batches(4)).fit(6)
    resumed = quiet(Tiny(dropout=0.5), From(batches(4), 3))
    resumed.load_checkpoint(tmp_path / "axiom_step_3.pt")
    resumed.fit(3)
    assert bits(resumed.model.state_dict()) == bits(straight.state_dict())


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
