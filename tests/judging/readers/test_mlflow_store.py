"""MLflow's stores, written by MLflow itself."""

import hashlib
import math
import sqlite3

import pytest
from mlflow.entities import Metric, Param
from mlflow.tracking import MlflowClient

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import mlflow_store


def fill(uri):
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("compare")
    parent = client.create_run(experiment, run_name="sweep").info.run_id
    for arm, seed in (("sgd", 0), ("sgd", 1), ("adam", 0)):
        tags = {"mlflow.parentRunId": parent}
        run = client.create_run(experiment, run_name=f"{arm}-{seed}", tags=tags).info.run_id
        bad = (arm, seed) == ("sgd", 1)
        rows = [Metric("loss", 4 / step, 1000 + step, step) for step in range(1, 9)]
        rows += [Metric("val/loss", math.nan if bad and n == 8 else 1 / n, 1000 + n, n) for n in (4, 8)]
        rows += [Metric("norm", math.inf, 1008, 8)]
        rows += [Metric("loss", 9.0, 2000, 4)]  # resumed: goes back
        params = [Param("optimizer", arm), Param("lr", "1e-3"), Param("seed", str(seed)), Param("odd", "2x")]
        client.log_batch(run, metrics=rows, params=params)
        client.set_terminated(run, "FAILED" if bad else "FINISHED")
    client.set_terminated(client.create_run(experiment, run_name="muon-0").info.run_id, "FAILED")
    typo = client.create_run(experiment, run_name="typo").info.run_id
    client.log_metric(typo, "loss", 1.0, step=1)
    client.delete_run(typo)


@pytest.fixture(scope="module", params=["database", "files"])
def store(request, tmp_path_factory):
    place = tmp_path_factory.mktemp("mlflow")
    if request.param == "database":
        fill(f"sqlite:///{place / 'mlflow.db'}")
        return place / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        fill(f"file:{place / 'mlruns'}")
    return place / "mlruns"


def content(store):
    files = [store] if store.is_file() else sorted(store.rglob("*"))
    return [
        (str(file), hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "") for file in files
    ]


def test_full_histories_params_and_names_are_read_and_the_store_is_as_it_was(store):
    before = content(store)
    assert mlflow_store.claims(store)
    source = mlflow_store.read(store, Asked())
    assert content(store) == before
    assert sorted(file.name for file in store.parent.iterdir()) == [store.name]
    frame = source.frame
    assert source.what == "4 runs of MLflow"
    assert list(frame.run.unique()) == ["sgd-0", "sgd-1", "adam-0", "muon-0"]
    assert frame[frame.run == "muon-0"].loss.isna().tolist() == [True]  # it ended before it logged anything
    one = frame[frame.run == "sgd-0"]
    assert one.step.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 4]
    assert one.loss.tolist() == [*(4 / step for step in range(1, 9)), 9.0]
    assert one["val/loss"].dropna().tolist() == [0.25, 0.125]
    assert set(source.settings) == {"optimizer", "lr", "seed", "odd"}
    assert one.lr.eq(0.001).all()
    assert one.odd.eq("2x").all()
    assert one.experiment.eq("compare").all()
    assert frame.started.notna().all()


def test_values_that_are_not_finite_are_told_from_those_that_were_not_logged(store):
    frame = mlflow_store.read(store, Asked()).frame
    one = frame[frame.run == "sgd-1"].drop_duplicates("step").set_index("step")
    assert one["val/loss"][8] == math.inf
    assert math.isnan(one["val/loss"][7])
    assert one["norm"][8] == math.inf


def test_what_was_left_out_is_said(store):
    notes = " ".join(mlflow_store.read(store, Asked()).notes)
    assert "1 deleted run left out" in notes
    assert "1 parent run without a metric left out" in notes
    assert "2 of 4 runs did not finish, by MLflow: sgd-1 and muon-0" in notes


def test_another_or_a_damaged_database_is_refused(store, tmp_path):
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("create table metrics (x)")
        database.execute("create table params (x)")
    assert mlflow_store.claims(other)
    with pytest.raises(UserError, match="damaged store of MLflow"):
        mlflow_store.read(other, Asked())
    (tmp_path / "plain.db").write_text("no database")
    assert not mlflow_store.claims(tmp_path / "plain.db")


def test_a_store_without_its_empty_folders_is_read(tmp_path):
    """Git keeps no empty folder: a run without params has none."""
    for number in (1, 2):
        run = tmp_path / "mlruns" / "0" / (f"{number}" * 32)
        (run / "metrics").mkdir(parents=True)
        (run / "metrics" / "test loss").write_text("1000 0.5 1\n1001 0.25 2\n")
        (run / "meta.yaml").write_text(f"run_id: {run.name}\nstatus: 3\nstart_time: {number}\n")
    model = tmp_path / "mlruns" / "0" / "models" / "m-1"
    model.mkdir(parents=True)
    (model / "meta.yaml").write_text("model_id: m-1\nsource_run_id: 1\n")
    assert mlflow_store.claims(tmp_path)
    frame = mlflow_store.read(tmp_path, Asked()).frame
    assert list(frame["test loss"]) == [0.5, 0.25] * 2
    assert list(frame["name"].unique()) == ["1" * 8, "2" * 8]
    (run / "meta.yaml").write_text("run_id: [1")
    with pytest.raises(UserError, match="damaged, or is being written"):
        mlflow_store.read(tmp_path, Asked())
