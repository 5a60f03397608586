"""Hugging Face's trainer_state.json, as Trainer 5.23 wrote it."""

import json
import math

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import trainer_state


def state(steps, *, diverges_after=math.inf):
    """A state after so many steps of 40, with a log every 10 steps and an evaluation every 20."""
    log = []
    for step in range(10, steps + 1, 10):
        bad = step > diverges_after
        entry = {"epoch": step / 32, "run": 7, "grad_norm": math.nan if bad else 1.5, "learning_rate": 0.003}
        log.append({**entry, "loss": 0.0 if bad else 2 - step / 40, "step": step})
        if step % 20 == 0:
            loss = math.nan if bad else 2 - step / 50
            log.append({"epoch": step / 32, "eval_loss": loss, "eval_runtime": 0.1, "step": step})
    facts = {"global_step": steps, "max_steps": 40, "num_train_epochs": 2, "train_batch_size": 16}
    return {**facts, "log_history": log, "trial_params": None}


def write(folder, content):
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps(content))


@pytest.fixture
def folder(tmp_path):
    for arm in ("adamw", "sgd"):
        for seed in (0, 1):
            place = tmp_path / f"{arm}-seed{seed}"
            write(place / "checkpoint-20", state(20))
            write(
                place / "checkpoint-40",
                state(40, diverges_after=25 if (arm, seed) == ("sgd", 1) else math.inf),
            )
            if seed == 0:
                (place / "trainer_state.json").write_text(json.dumps(state(40)))
    (tmp_path / "sgd-seed0" / "training_args.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    return tmp_path


def test_a_run_is_read_once_from_its_last_state(folder):
    assert trainer_state.claims(folder)
    source = trainer_state.read(folder, Asked())
    frame = source.frame
    assert source.what == "4 runs of Hugging Face's Trainer"
    evaluated = frame[frame.eval_loss.notna()]
    assert evaluated.groupby("run").step.agg(list).tolist() == [[20, 40]] * 4
    assert evaluated[evaluated.run == "adamw-seed1"].eval_loss.tolist() == [2 - 20 / 50, 2 - 40 / 50]
    assert frame["logged/run"].dropna().eq(7).all()
    assert frame[source.roles["planned"]].eq(40).all()
    assert frame[source.roles["seed"]].unique().tolist() == ["0", "1"]
    assert set(source.settings) == {"train_batch_size", "num_train_epochs"}
    assert "eval_runtime" not in frame
    assert any(note.startswith("6 older copies") for note in source.notes)


def test_a_loss_of_nothing_is_no_loss_of_zero(folder):
    source = trainer_state.read(folder, Asked())
    bad = source.frame[source.frame.run == "sgd-seed1"]
    assert bad[bad.loss.notna()].loss.tolist() == [1.75, 1.5, math.inf, math.inf]
    assert bad[bad.eval_loss.notna()].eval_loss.tolist() == [1.6, math.inf]
    assert any(note.startswith("2 training losses of 0") for note in source.notes)


def test_one_folder_is_one_run_and_the_model_card_has_settings(folder):
    card = (
        "### Training hyperparameters\n\n- learning_rate: 5e-05\n- optimizer: Use adamw_torch\n- seed: 42\n"
    )
    (folder / "adamw-seed0" / "README.md").write_text(card)
    source = trainer_state.read(folder / "adamw-seed0", Asked())
    assert source.frame.run.unique().tolist() == ["adamw-seed0"]
    assert source.frame.learning_rate.notna().any()
    assert source.frame["config/learning_rate"].eq(5e-5).all()
    assert source.frame.seed.eq(42).all()


def test_a_state_that_was_cut_off_is_refused(tmp_path):
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3, "log_his')
    with pytest.raises(UserError, match="no whole state of a Trainer"):
        trainer_state.read(tmp_path, Asked())


def test_a_checkpoint_whose_log_is_not_continued_is_of_another_run(tmp_path):
    write(tmp_path / "bert" / "checkpoint-20", state(20, diverges_after=10))
    write(tmp_path / "bert" / "checkpoint-40", state(40, diverges_after=10))
    write(tmp_path / "bert" / "checkpoint-30", {**state(30, diverges_after=5), "max_steps": 30})
    frame = (source := trainer_state.read(tmp_path, Asked())).frame
    assert source.what == "2 runs of Hugging Face's Trainer"
    assert set(frame.run) == {"checkpoint-40", "checkpoint-30"}
    assert set(frame.max_steps) == {40, 30}
