"""W&B's offline folders, written by W&B itself."""

import math
import os
import shutil
import struct
import subprocess
import sys
import zlib

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import wandb_offline

WRITE = """
import math, os, sys
import wandb
for arm, seed in (("sgd", 0), ("sgd", 1), ("adam", 0)):
    config = {"optimizer": arm, "seed": seed, "model": {"width": 8}, "loss": "mse"}
    run = wandb.init(project="p", name=f"{arm}_{seed}", group=arm, config=config)
    for step in range(1, int(sys.argv[1]) + 1):
        row = {"loss": 2 / step, "norm": {"w": float(step)}, "run": 7}
        if step % 4 == 0:
            row["val/loss"] = 1 / step if (arm, seed) != ("sgd", 1) or step < 8 else math.nan
        run.log(row, step=step)
    run.summary["test_loss"] = 0.25
    run.finish(exit_code=3 if arm == "adam" else 0)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three runs of 1,500 steps: their logs are of several blocks."""
    place = tmp_path_factory.mktemp("wandb")
    quiet = {"WANDB_MODE": "offline", "WANDB_DIR": str(place), "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}
    environment = {**os.environ, **quiet}
    subprocess.run([sys.executable, "-c", WRITE, "1500"], check=True, env=environment, cwd=place)
    return place


def test_every_run_is_read_with_its_config_and_whole_history(folder):
    assert wandb_offline.claims(folder)
    source = wandb_offline.read(folder, Asked())
    frame = source.frame
    assert source.what == "3 offline runs of W&B"
    assert frame.groupby("run").size().to_dict() == {"adam_0": 1500, "sgd_0": 1500, "sgd_1": 1500}
    one = frame[frame.run == "sgd_0"]
    assert one[source.roles["step"]].tolist() == list(range(1, 1501))
    assert one["loss"].tolist() == [2 / step for step in range(1, 1501)]
    assert one["val/loss"].dropna().tolist() == [1 / step for step in range(4, 1501, 4)]
    assert one["norm.w"].iloc[-1] == 1500
    assert one["logged/run"].eq(7).all()
    assert set(source.settings) == {"optimizer", "seed", "model.width", "config/loss"}
    assert (one["config/loss"] == "mse").all()
    assert one["model.width"].eq(8).all()
    assert one["group"].eq("sgd").all()
    assert one["test_loss"].dropna().tolist() == [0.25]  # of the summary alone: in the last row
    assert frame[source.roles["started"]].notna().all()


def test_a_logged_nan_is_told_from_a_value_that_was_not_logged(folder):
    frame = wandb_offline.read(folder, Asked()).frame
    one = frame[frame.run == "sgd_1"].set_index("_step")["val/loss"]
    assert (one[4], one[8]) == (0.25, math.inf)
    assert math.isnan(one[9])


def test_runs_that_ended_badly_are_named(folder):
    [note] = wandb_offline.read(folder, Asked()).notes
    assert note.startswith("1 of 3 runs did not end well")
    assert "adam_0" in note


def test_of_a_log_that_was_cut_off_what_is_whole_is_read(folder, tmp_path):
    whole = next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    part = tmp_path / "run-cut.wandb"
    part.write_bytes(whole[:100_000])
    source = wandb_offline.read(part, Asked())
    assert 100 < len(source.frame) < 1500
    assert source.frame["_step"].tolist() == list(range(1, len(source.frame) + 1))
    part.write_bytes(whole[:99_999])  # one of two neighbouring cuts is not between two records
    notes = [*source.notes, *wandb_offline.read(part, Asked()).notes]
    assert any("ends in the middle" in note for note in notes)
    part.write_bytes(whole[:80_000] + b"?" + whole[80_001:])
    assert len(wandb_offline.read(part, Asked()).frame) < len(source.frame)


@pytest.mark.parametrize("kind", ["no record", "no JSON"])
def test_what_stands_before_a_record_of_another_kind_is_read(folder, tmp_path, kind):
    from wandb.proto import wandb_internal_pb2 as protocol

    record = protocol.Record()
    record.history.item.add(key="loss", value_json="{")
    content = b"\xff\xff" if kind == "no record" else record.SerializeToString()
    log = tmp_path / "run-odd.wandb"
    whole = next(folder.glob("wandb/offline-run-*/*.wandb")).read_bytes()
    log.write_bytes(
        whole + struct.pack("<IHB", zlib.crc32(content, zlib.crc32(b"\1")), len(content), 1) + content
    )
    source = wandb_offline.read(log, Asked())
    assert len(source.frame) == 1500
    assert source.notes[0].startswith("run-odd.wandb holds a record of another kind")


def test_a_run_that_was_resumed_is_one_run(folder, tmp_path):
    log = next(folder.glob("wandb/offline-run-*/*.wandb"))
    for time in ("20260102_000000", "20260101_000000"):
        later = tmp_path / f"offline-run-{time}-x" / log.name
        later.parent.mkdir()
        later.write_bytes(log.read_bytes())
    frame = wandb_offline.read(tmp_path, Asked()).frame
    assert frame["run"].nunique() == 1
    assert frame["_step"].tolist() == [*range(1, 1501)] * 2


def test_another_file_is_refused(tmp_path):
    other = tmp_path / "run-x.wandb"
    other.write_bytes(b"something else")
    assert not wandb_offline.claims(other)
    with pytest.raises(UserError, match="no run of W&B that can be read"):
        wandb_offline.read(other, Asked())


def test_a_log_that_is_empty_is_left_out_and_said_so(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    whole = wandb_offline.read(tmp_path / "copy", Asked())  # latest-run, a link, is a folder in it
    assert len(whole.frame) == 3 * 1500
    shutil.rmtree(tmp_path / "copy" / "wandb" / "latest-run")
    first, *_ = sorted((tmp_path / "copy").rglob("*.wandb"))
    first.write_bytes(b"")
    assert wandb_offline.claims(tmp_path / "copy")
    source = wandb_offline.read(tmp_path / "copy", Asked())
    assert source.what == "2 offline runs of W&B"
    assert any(note.startswith("1 logs are empty") and first.name in note for note in source.notes)


def test_changes_of_a_config_and_nested_values_are_read_as_wandb_writes_them():
    from wandb.proto import wandb_internal_pb2 as protocol

    def record(kind, part, key, value=None, nested=()):
        made = protocol.Record()
        item = getattr(getattr(made, kind), part).add(key=key, nested_key=nested)
        if value is not None:
            item.value_json = value
        return made

    runs = {}
    for one in (
        record("config", "update", "lr", "0.1"),
        record("config", "update", "", "8", ["model", "width"]),
        record("config", "update", "_wandb", "{}"),
        record("config", "update", "seed", "3"),
        record("config", "remove", "seed"),
        record("history", "item", "loss", '{"val": 1.5, "text": "a", "deep": {"er": 2}}'),
        record("history", "item", "picture", '{"_type": "image-file", "width": 8}'),
        record("history", "item", "_runtime", "4"),
        record("summary", "update", "best", "2.5"),
    ):
        wandb_offline._take(runs, "run-x", one)
    run = runs["run-x"]
    assert run.config == {"lr": 0.1, "model": {"width": 8}}
    assert run.rows == [{"_step": 0, "loss.val": 1.5, "loss.deep.er": 2}, {"_step": 0}, {"_step": 0}]
    assert run.summary == {"best": "2.5"}
