"""Checkpoints of the trainer: resumed to the bit, written whole, and refused when damaged or foreign."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from axiom.trainer_helpers import WORDS, From, Tiny, batches, bits, everything, quiet, tiny
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ebc_lab.axiom.trainer import AXIOM_Trainer
from ebc_lab.axiom.trainer_files import header, read_checkpoint

# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hooks", "limit", "dtype"), [(True, 0.05, torch.bfloat16), (False, None, torch.float32)]
)
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


# -- writing -------------------------------------------------------------------------------------------------


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


def test_folders_that_cannot_be_written_are_found_before_training(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "below"
    for wanted in ({"save_results": True, "results_dir": place}, {"checkpoint_interval": 1}):
        trainer = quiet(tiny(), batches(), checkpoint_dir=place, **wanted)
        name = "results_dir" if "results_dir" in wanted else "checkpoint_dir"
        with pytest.raises(
            OSError, match=rf"{name}=.* cannot be written, .*file is no folder .*: name another"
        ):
            trainer.fit(1)
        assert trainer.step == 0
    quiet(tiny(), batches(), checkpoint_dir=place, results_dir=place).fit(1)  # neither is needed


# -- what is refused -----------------------------------------------------------------------------------------


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


@given(share=st.floats(0, 1, exclude_max=True), other=st.integers(0, 255))
def test_any_damage_is_found(written, tmp_path_factory, share, other):
    """One byte is another one, or the end is missing."""
    at = int(share * len(written))
    content = bytearray(written) if other else written[:at]
    if other:
        content[at] ^= other
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged\.pt is damaged, or no checkpoint of AXIOM_Trainer"):
        read_checkpoint(path)


def sealed(content: bytes) -> bytes:
    return header(hashlib.sha256(content).hexdigest()) + content


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


OTHERS = [lambda whole: b"", lambda whole: whole[:-1], lambda whole: whole + b"\0", lambda _: saved({})]


@pytest.mark.parametrize("change", OTHERS)
def test_files_of_others_and_longer_or_shorter_ones_are_refused(written, receiver, change):
    refused(receiver, change(written), "is damaged, or no checkpoint of AXIOM_Trainer")


def state_of(content: bytes) -> dict[str, Any]:
    content = content.split(b"\n", 1)[1]
    state: dict[str, Any] = torch.load(io.BytesIO(content), weights_only=True)
    return state


@pytest.mark.parametrize(
    "other",
    [
        *({"curves": {"unknown\n": 1}}, {"loader_rng": torch.zeros(5056)}, {"optimizer": {}}),
        *({"curves": {"train_losses": [[1.0]]}}, {"curves": {"tokens": "many"}}),
        {"optimizer": torch.zeros(2, 2)},
    ],
)
def test_a_whole_file_with_other_content_is_refused(written, receiver, other):
    refused(receiver, sealed(saved(state_of(written) | other)), "is not of this trainer")


@pytest.mark.parametrize(
    "other",
    [
        *({"row": row} for row in (torch.zeros(WORDS + 1), torch.zeros(WORDS).double())),
        *({"row": torch.zeros(WORDS).to_sparse()}, {"step": [3]}, {"streak": 1.5}),
    ],
)
def test_another_state_of_a_tensor_is_refused(written, receiver, other):
    state = state_of(written)
    state["optimizer"]["state"][0] |= other
    refused(receiver, sealed(saved(state)), "state of embedding.weight")


def test_a_file_that_does_not_say_whether_hooks_were_there_is_refused(written, receiver):
    state = state_of(written)
    del state["hooks"]
    refused(receiver, sealed(saved(state)), "is not of this trainer")


def with_more(model: nn.Module) -> nn.Module:
    model.more = nn.Linear(1, 1).requires_grad_(False)
    return model


def with_frozen(model: Tiny) -> nn.Module:
    model.out.requires_grad_(False)
    return model


FOREIGN = {
    "shapes": (lambda: quiet(tiny(width=7), batches()), r"its embedding.weight is \(12, 7\).*not \(12, 6\)"),
    "dtype": (lambda: quiet(tiny().bfloat16(), batches()), "bfloat16, not .*float32"),
    "rank": (lambda: quiet(tiny(), batches(), rank=2), "its rank is 2, not 0"),
    "missing": (lambda: quiet(nn.Linear(2, 2), batches()), "it has no embedding.weight"),
    "more": (lambda: quiet(with_more(tiny()), batches()), "the model has no more.weight"),
    "frozen": (lambda: quiet(with_frozen(tiny()), batches()), "other parameters were trained"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_checkpoints_of_another_model_are_refused(receiver, tmp_path, kind):
    build, message = FOREIGN[kind]
    path = build().save_checkpoint(path=tmp_path / "foreign.pt")
    refused(receiver, path.read_bytes(), message)
