"""Optuna's storages, written by Optuna itself."""

import hashlib
import math

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import optuna_storage

optuna = pytest.importorskip("optuna")


def storage_of(path):
    if path.suffix == ".db":
        return optuna.storages.RDBStorage(f"sqlite:///{path}")
    backend = optuna.storages.journal.JournalFileBackend(str(path))
    return optuna.storages.JournalStorage(backend)


def fill(path, *, direction="minimize", final=lambda x: x, arms=("sgd", "adam")):
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = storage_of(path)

    def objective(trial):
        lr = trial.suggest_float("lr", 0.01, 1.0)
        trial.suggest_categorical("schedule", ["linear"])
        trial.set_user_attr("seed", trial.number)
        for step in (10, 20):
            trial.report(lr + 1 / step, step)
            if trial.number == 1:
                raise optuna.TrialPruned()
        return math.nan if trial.number == 2 else final(lr + 1 / 20)

    for arm in arms:
        study = optuna.create_study(
            storage=storage,
            study_name=arm,
            direction=direction,
            sampler=optuna.samplers.RandomSampler(seed=1),
        )
        study.optimize(objective, n_trials=4)
        study.ask()  # a trial that never ends


@pytest.fixture(params=["study.db", "journal.log"])
def storage(request, tmp_path):
    return tmp_path / request.param


def test_trials_are_runs_and_the_storage_is_as_it_was(storage):
    fill(storage)
    before = hashlib.sha256(storage.read_bytes()).hexdigest()
    assert optuna_storage.claims(storage)
    source = optuna_storage.read(storage, Asked())
    assert hashlib.sha256(storage.read_bytes()).hexdigest() == before
    assert [file.name for file in storage.parent.iterdir()] == [storage.name]
    frame = source.frame
    assert (source.better, source.roles["loss"], source.roles["arm"]) == ("lower", "value", "study")
    assert frame.run.nunique() == 8
    assert frame[source.roles["arm"]].unique().tolist() == ["sgd", "adam"]
    assert set(source.settings) == {"lr", "schedule"}
    assert frame[source.roles["seed"]].max() == 3
    one = frame[frame.run == "sgd/0"]
    assert one.step.tolist() == [10, 20]
    assert one.value.tolist() == pytest.approx([one.lr.iloc[0] + 0.1, one.lr.iloc[0] + 0.05])


def test_pruned_and_failed_trials_are_last_and_not_dropped(storage):
    fill(storage)
    source = optuna_storage.read(storage, Asked())
    last = source.frame.groupby("run").value.last()
    assert last["sgd/1"] == last["sgd/2"] == math.inf
    assert math.isfinite(last["sgd/3"])
    assert source.frame[source.frame.run == "sgd/1"].step.tolist() == [10]
    assert (
        source.frame[source.roles["planned"]].eq(20).all()
    )  # the pruned one was to be as long as the others
    notes = " ".join(source.notes)
    assert "2 of 8 trials pruned" in notes
    assert "2 of 8 trials failed" in notes
    assert "2 trials that have not ended were left out" in notes


def test_without_a_trial_that_has_ended_there_is_nothing_to_judge(storage):
    optuna.create_study(storage=storage_of(storage), study_name="adam").ask()
    with pytest.raises(UserError, match="holds no trial of Optuna that has ended"):
        optuna_storage.read(storage, Asked())


def test_a_value_that_is_not_the_curves_end_stands_apart(storage):
    fill(storage, direction="maximize", final=lambda loss: -loss)
    source = optuna_storage.read(storage, Asked())
    assert source.better == "higher"
    one = source.frame[source.frame.run == "adam/0"]
    assert one.value.isna().tolist() == [True, False]
    assert one.value.iloc[1] == -one.intermediate_value.iloc[1]


def test_studies_with_different_directions_are_refused(storage):
    fill(storage, arms=["a"])
    fill(storage, arms=["b"], direction="maximize")
    with pytest.raises(UserError, match="different objectives"):
        optuna_storage.read(storage, Asked())
