"""EBC as a Lightning callback, in real trainers on a CPU."""

from __future__ import annotations

import csv
import os
import sys
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn

from ebc_lab.ebc import attach, energy_budget_clip
from ebc_lab.integrations.lightning import EBC, EnergyClip

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning|pytorch_lightning"),
    pytest.mark.filterwarnings("error::ebc_lab.ebc.given.checks.EBCWarning"),
]
STEPS = 12
OPTIONS = {"target_kl": 1e-3, "audit_every": 4}
RATIO = 0.003  # of the energy clip


class Loader:
    """Batches of tokens (16, 51) that begin again where a checkpoint says, which DataLoader does not."""

    def __init__(self, count: int = STEPS):
        draw = torch.Generator().manual_seed(0)
        self.batches = [torch.randint(64, (16, 51), generator=draw) for _ in range(count)]
        self.given = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for i in range(self.given % len(self), len(self)):
            self.given = i + 1
            yield self.batches[i]

    def state_dict(self):
        return {"given": self.given}

    def load_state_dict(self, state):
        self.given = state["given"]


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))


def one_optimizer(net):
    return [torch.optim.Adam(net.parameters(), lr=0.02)]


def two_optimizers(net):
    embedding, linear = net
    return [torch.optim.Adam(embedding.parameters(), 0.02), torch.optim.AdamW(linear.parameters(), 0.03)]


class Steps:
    """What a LightningModule does; `through`: whether training_step calls the module itself, or its `net`."""

    def __init__(self, through: bool = True, manual: bool = False):
        super().__init__()
        self.net = make_net()
        self.through = through
        self.automatic_optimization = not manual

    def forward(self, tokens):
        return self.net(tokens)

    def loss(self, batch):
        logits = (self if self.through else self.net)(batch[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    def training_step(self, batch, index):
        loss = self.loss(batch)
        self.log("loss", loss)
        if not self.automatic_optimization:
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
        return loss

    def validation_step(self, batch, index):
        self.log("val_loss", self.loss(batch))

    def configure_optimizers(self):
        if self.automatic_optimization:
            return torch.optim.Adam(self.parameters(), lr=0.02)
        return two_optimizers(self.net)


class Model(Steps, pl.LightningModule):
    pass


def fit(model, folder, *callbacks, trainer=pl.Trainer, loader=None, ckpt_path=None, **options):
    given = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
    given |= {"default_root_dir": folder, "log_every_n_steps": 1, "max_epochs": 2}
    own = trainer(callbacks=list(callbacks), **{**given, "logger": CSVLogger(folder), **options})
    own.fit(model, loader or Loader(), Loader(2), ckpt_path=ckpt_path)


def logged(folder, key="ebc/c"):
    [path] = folder.glob("lightning_logs/version_0/metrics.csv")
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get(key)]


def same(a, b):
    return all(
        torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def by_hand(steps, clip=None, accumulate=1, make_optimizers=one_optimizer, energy=False):
    """The same training in a plain loop -> (net, c or the largest share of each step)."""
    net = make_net()
    optimizers = make_optimizers(net)
    ebc = None if energy else attach(net, optimizers, **OPTIONS)
    energy_clip = energy_budget_clip(net, RATIO) if energy else None
    batches = (Loader().batches * 2)[: steps * accumulate]
    found = []
    for i, batch in enumerate(batches, 1):
        loss = F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        (loss / accumulate).backward()
        if i % accumulate == 0:
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            if energy:
                found.append(max(map(float, energy_clip().values())))
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            if ebc:
                found.append(float(ebc.last.clip_coefficient))
    return net, found


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}])
def test_a_fit_with_validation_is_the_loop_by_hand_and_its_numbers_are_logged(tmp_path, options):
    model = Model()
    callback = EBC(**OPTIONS)
    fit(model, tmp_path, callback, val_check_interval=6, **options)
    every = options.get("accumulate_grad_batches", 1)
    net, clipped = by_hand(2 * STEPS // every, options.get("gradient_clip_val"), every)
    assert same(model.net, net)
    assert min(clipped) < 0.9
    rows = logged(tmp_path)
    assert [float(row["ebc/c"]) for row in rows if row["loss"]] == pytest.approx(clipped)
    assert float(rows[-1]["ebc/applied_kl"]) == pytest.approx(1e-3, rel=0.9)
    assert float(rows[-1]["ebc/delta"]) == pytest.approx(1e-3)
    assert not model._forward_hooks


def test_a_resumed_fit_ends_at_the_same_bits_from_the_middle_of_an_epoch_too(tmp_path):
    whole = Model()
    keep = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=6, save_top_k=-1)
    fit(whole, tmp_path / "a", EBC(**OPTIONS), keep)
    for step in (6, 12, 18):
        again = Model()
        callback = EBC(**OPTIONS)
        fit(again, tmp_path / str(step), callback, ckpt_path=tmp_path / f"step={step}.ckpt")
        assert same(whole, again), step
        assert callback.attached.state_dict()["step_index"] == 2 * STEPS


def test_of_two_optimizers_by_hand_both_are_limited_by_one_c(tmp_path):
    limited = Model(manual=True)
    fit(limited, tmp_path / "a", EBC(**OPTIONS), max_epochs=1)
    net, clipped = by_hand(STEPS, make_optimizers=two_optimizers)
    assert same(limited.net, net)
    assert [float(row["ebc/c"]) for row in logged(tmp_path / "a")] == pytest.approx(clipped)
    assert min(clipped) < 0.9


def test_the_submodule_that_is_called_has_to_be_named(tmp_path):
    named = Model(through=False)
    fit(named, tmp_path, EBC(module="net", **OPTIONS), max_epochs=1)
    assert same(named.net, by_hand(STEPS)[0])
    with pytest.raises(ValueError, match=r"has not called self\(…\).*EBC\(module=…\), among net"):
        fit(Model(through=False), tmp_path, EBC(**OPTIONS), logger=False)
    with pytest.raises(ValueError, match=r"EBC\(module='nett'\): .*no attribute `nett`"):
        fit(Model(), tmp_path, EBC(module="nett", **OPTIONS), logger=False)


def test_mixed_precision_is_measured_in_the_precision_of_training(tmp_path, monkeypatch):
    monkeypatch.setattr(Model, "forward", lambda self, tokens: self.net(tokens).float())  # which hides it
    callback = EBC(**OPTIONS)
    fit(Model(), tmp_path, callback, precision="bf16-mixed")
    assert callback.attached.clip.budget.floor == 1e-5
    rows = [row for row in logged(tmp_path) if row["loss"]]
    clipped = [float(row["ebc/c"]) for row in rows]
    assert clipped[:8] == pytest.approx(by_hand(STEPS)[1][:8], rel=0.1)
    with pytest.raises(ValueError, match="ten times 1e-05"):
        fit(Model(), tmp_path, EBC(target_kl=5e-5), precision="bf16-mixed", logger=False)


def test_an_optimizer_that_trains_more_than_the_submodule_is_refused(tmp_path):
    model = Model()
    model.head = nn.Linear(64, 2)
    with pytest.raises(ValueError, match="needs an optimizer of its own"):
        fit(model, tmp_path, EBC(module="net", **OPTIONS), logger=False)


@pytest.fixture
def as_before():
    """Lightning leaves a process group, its address in the environment and other threads behind."""
    threads = torch.get_num_threads()
    with mock.patch.dict(os.environ):
        yield
    torch.set_num_threads(threads)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def test_under_ddp_which_calls_training_step_as_the_modules_forward(tmp_path, as_before):
    model = Model()
    fit(model, tmp_path, EBC(**OPTIONS), strategy="ddp", devices=1)
    assert same(model.net, by_hand(2 * STEPS)[0])


# -- the energy clip -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("manual", "accumulate", "optimizers"), [(False, 2, one_optimizer), (True, 1, two_optimizers)]
)
def test_the_energy_clip_limits_the_steps_of_the_loop_by_hand(tmp_path, manual, accumulate, optimizers):
    model = Model(manual=manual, through=False)
    options = {"accumulate_grad_batches": accumulate, "val_check_interval": 6, "max_epochs": 1}
    fit(model, tmp_path, EnergyClip(RATIO), **options)
    steps = STEPS // accumulate
    net, worst = by_hand(steps, accumulate=accumulate, make_optimizers=optimizers, energy=True)
    assert same(model.net, net)
    shares = [float(row["energy/worst"]) for row in logged(tmp_path, "energy/worst")]
    assert shares == pytest.approx(worst)
    assert max(worst) > 1
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("fused", [False, True])
def test_the_energy_clip_sees_gradients_that_are_not_scaled(tmp_path, fused):
    scaled = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))
    model = Model()
    model.configure_optimizers = lambda: torch.optim.Adam(model.parameters(), lr=0.02, fused=fused)
    fit(model, tmp_path, EnergyClip(RATIO), plugins=[scaled], max_epochs=1)
    shares = [float(row["energy/worst"]) for row in logged(tmp_path, "energy/worst")]
    assert shares[:4] == pytest.approx(by_hand(4, energy=True)[1], rel=0.02)


def test_the_energy_clip_wants_one_process():
    with pytest.raises(ValueError, match="the weights of 2 would drift apart"):
        EnergyClip().on_fit_start(SimpleNamespace(world_size=2), Model())


@pytest.mark.slow
def test_the_trainer_of_pytorch_lightning_takes_it_too(tmp_path):
    other = pytest.importorskip("pytorch_lightning")

    class Other(Steps, other.LightningModule):
        pass

    model = Other()
    logger = other.loggers.CSVLogger(tmp_path)
    fit(model, tmp_path, EBC(**OPTIONS), trainer=other.Trainer, logger=logger)
    assert same(model.net, by_hand(2 * STEPS)[0])
    assert len(logged(tmp_path)) >= 2 * STEPS


def test_without_lightning_a_sentence_says_what_to_install(monkeypatch):
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "ebc_lab.integrations.lightning")
    import_module("ebc_lab.integrations")
    with pytest.raises(ImportError, match=r"pip install 'ebc-lab\[lightning\]'"):
        import_module("ebc_lab.integrations.lightning")
