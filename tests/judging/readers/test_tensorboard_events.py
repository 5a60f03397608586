"""TensorBoard's event files, written by torch."""

import math

import pytest

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import read, tensorboard_events

torch_board = pytest.importorskip("torch.utils.tensorboard")


def write(folder, steps, *, new_style=False, hparams=None, **values):
    with torch_board.SummaryWriter(folder) as writer:
        for step in steps:
            for tag, value in values.items():
                writer.add_scalar(tag.replace("__", "/"), value(step), step, new_style=new_style)
        if hparams:
            writer.add_hparams(hparams, {"hparam/best": 1.0})


def test_every_scalar_of_both_kinds_is_read_and_none_is_sampled(tmp_path):
    for arm in ("sgd", "adam"):
        for seed in (0, 1):
            write(
                tmp_path / arm / f"seed{seed}",
                range(10_500 if arm == "sgd" and seed == 0 else 20),
                new_style=arm == "adam",
                hparams={"lr": 0.5 if arm == "sgd" else 0.25, "opt": arm},
                loss__val=lambda step, seed=seed: step / 4 + seed,
            )
    assert tensorboard_events.claims(tmp_path)
    source = tensorboard_events.read(tmp_path, Asked())
    frame = source.frame
    assert source.what == "4 runs of TensorBoard"
    assert frame.groupby("run").size().to_dict() == {
        "adam/seed0": 20,
        "adam/seed1": 20,
        "sgd/seed0": 10_500,
        "sgd/seed1": 20,
    }
    assert frame[frame.run == "sgd/seed0"]["loss/val"].tolist() == [step / 4 for step in range(10_500)]
    assert frame[frame.run == "adam/seed1"]["loss/val"].tolist() == [step / 4 + 1 for step in range(20)]
    assert list(source.settings) == ["lr", "opt"]
    assert frame[frame.opt == "adam"].lr.eq(0.25).all()
    assert frame[source.roles["seed"]].tolist() == [str(run[-1]) for run in frame.run]
    assert frame.started.notna().all()


def test_a_tag_is_a_scalar_where_its_first_event_says_so(tmp_path):
    """As TensorFlow writes them: what a tag is stands in its first event only."""
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    metadata = create_summary_metadata("", "")
    with torch_board.SummaryWriter(tmp_path) as writer:
        for step in range(3):
            told = {"metadata": metadata} if step == 0 else {}
            values = [Summary.Value(tag="val", tensor=make_tensor_proto(step / 2), **told)]
            values.append(Summary.Value(tag="weights", tensor=make_tensor_proto([1.0, 2.0])))
            writer.file_writer.add_summary(Summary(value=values), step)
    frame = tensorboard_events.read(tmp_path, Asked()).frame
    assert frame.val.tolist() == [0.0, 0.5, 1.0]
    assert "weights" not in frame


def test_a_scalar_that_claims_many_values_is_refused_before_they_are_made(tmp_path):
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.scalar.metadata import create_summary_metadata
    from tensorboard.util.tensor_util import make_tensor_proto

    value = Summary.Value(tag="val", tensor=make_tensor_proto(0.5), metadata=create_summary_metadata("", ""))
    value.tensor.tensor_shape.dim.add().size = 2**40
    with torch_board.SummaryWriter(tmp_path) as writer:
        writer.file_writer.add_summary(Summary(value=[value]), 0)
    with pytest.raises(UserError, match=r"val is a scalar of shape \[1099511627776\]"):
        read([tmp_path], Asked())


def test_a_resumed_run_keeps_both_values_of_a_step_and_nan_is_inf(tmp_path):
    write(tmp_path / "a", range(6), val=float)
    write(tmp_path / "a", range(4, 8), val=lambda step: math.nan if step == 7 else -step)
    write(tmp_path / "b", range(3), val=float)
    frame = tensorboard_events.read(tmp_path, Asked()).frame
    one = frame[frame.run == "a"]
    assert one.step.tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert one.val.tolist() == [0, 1, 2, 3, 4, 5, -4, -5, -6, math.inf]


def test_keras_folders_of_splits_are_one_run(tmp_path):
    for name in ("one", "two"):
        write(tmp_path / name / "train", range(3), loss=float)
        write(tmp_path / name / "validation", range(3), loss=float)
    frame = tensorboard_events.read(tmp_path, Asked()).frame
    assert frame.run.unique().tolist() == ["one", "two"]
    assert {"train/loss", "validation/loss"} <= set(frame)
    assert frame.notna().all(axis=None)


def test_a_file_that_is_cut_off_is_read_as_far_as_it_goes(tmp_path):
    write(tmp_path / "a", range(50), val=float)
    [file] = (tmp_path / "a").iterdir()
    file.write_bytes(file.read_bytes()[:-20])
    source = tensorboard_events.read(tmp_path, Asked())
    assert source.frame.val.tolist() == list(range(len(source.frame)))
    assert 40 < len(source.frame) < 50
    assert "cut off" in source.notes[0]


def test_files_without_a_scalar_are_refused(tmp_path):
    write(tmp_path, [], val=float)
    with pytest.raises(UserError, match="hold no scalar"):
        tensorboard_events.read(tmp_path, Asked())


def test_a_record_of_another_kind_is_named_though_its_checksums_are_right(tmp_path):
    from tensorboard.summary.writer.record_writer import RecordWriter

    write(tmp_path, range(2), loss=float)
    [file] = tmp_path.iterdir()
    with file.open("ab") as log:
        RecordWriter(log).write(b"no event")
    with pytest.raises(UserError, match="is damaged, or of an unknown version of TensorBoard's event files"):
        read([tmp_path], Asked())
