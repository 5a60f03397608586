"""What Lightning's CSVLogger writes."""

import math

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import lightning_logs

loggers = pytest.importorskip("lightning.pytorch.loggers")


@pytest.fixture
def folder(tmp_path):
    for number, (arm, seed) in enumerate([("sgd", 0), ("sgd", 1), ("adam", 0)]):
        logger = loggers.CSVLogger(tmp_path, name="lightning_logs")
        logger.log_hyperparams({"optimizer": arm, "seed": seed, "betas": (0.9, 0.99), "model": {"width": 8}})
        for step in (9, 19):
            logger.log_metrics({"train_loss": 2.0 + number, "epoch": step // 10, "run": 7}, step)
            logger.log_metrics({"val_loss": math.nan if number == 1 and step == 19 else 1 / step}, step)
        logger.finalize("success")
    return tmp_path


def test_every_version_is_a_run_with_its_hyperparameters(folder):
    assert lightning_logs.claims(folder)
    source = lightning_logs.read(folder, Asked())
    frame = source.frame
    assert source.what == "3 runs of Lightning"
    assert set(source.settings) == {"optimizer", "seed", "betas", "model.width"}
    runs = frame.groupby("run", sort=False)
    assert runs.optimizer.first().tolist() == ["sgd", "sgd", "adam"]
    assert runs[source.roles["seed"]].first().tolist() == [0, 1, 0]
    one = frame[frame.run == frame.run.iloc[0]]
    assert one[one.val_loss.notna()].step.tolist() == [9, 19]
    assert one.val_loss.dropna().tolist() == [1 / 9, 1 / 19]
    assert one.train_loss.dropna().tolist() == [2.0, 2.0]
    assert one["logged/run"].dropna().tolist() == [7, 7]


def test_a_version_without_hyperparameters_is_a_run_without_settings(folder):
    for hparams in folder.rglob("hparams.yaml"):
        hparams.unlink()
    source = lightning_logs.read(folder, Asked())
    assert (source.what, list(source.settings)) == ("3 runs of Lightning", [])


def test_a_logged_nan_is_told_from_an_empty_cell(folder):
    frame = lightning_logs.read(folder, Asked()).frame
    bad = frame[(frame.optimizer == "sgd") & (frame.seed == 1)]
    assert bad.val_loss.dropna().tolist() == [1 / 9, math.inf]


def test_objects_of_python_are_named_and_not_made(folder):
    hparams = folder / "lightning_logs/version_0/hparams.yaml"
    harmful = "!!python/object/apply:os.system ['touch made']"
    hparams.write_text(f"lr: 0.1\nseed: 0\nnet: {harmful}\nmodel: {{width: 8, act: {harmful}}}\n")
    source = lightning_logs.read(folder, Asked())
    assert source.frame.lr.iloc[0] == 0.1
    assert not {"net", "model.act"} & set(source.frame)
    assert source.notes[0].startswith("net, model.act in ")


def test_a_word_among_numbers_is_named_with_its_line(folder):
    metrics = folder / "lightning_logs/version_0/metrics.csv"
    metrics.write_text(f"step,val_loss\n1,0.5\n2,oops{'!' * 5000}\n")
    with pytest.raises(UserError, match="line 3: val_loss is oops!") as caught:
        lightning_logs.read(folder, Asked())
    assert len(str(caught.value)) < 300


def test_another_table_called_metrics_is_not_claimed(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,val_loss\n1,0.5\n")
    assert not lightning_logs.claims(tmp_path)
