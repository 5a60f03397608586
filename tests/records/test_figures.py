import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ebc_lab.config.errors import UserError
from ebc_lab.ebc.options import CURVE_SCALES
from ebc_lab.records.columns import CURVE_COLUMNS, STEP_COLUMNS
from ebc_lab.records.figures import kl_law, longest_streak, summarise
from ebc_lab.records.files import write_atomic
from ebc_lab.records.streams import Stream, holds, read_columns


def rows(n=40, **columns):
    base = {c: np.full(n, np.nan) for c in STEP_COLUMNS}
    base |= {
        "step": np.arange(n, dtype=float),
        "loss": np.linspace(4, 2, n),
        "skipped": np.zeros(n),
        "c": np.ones(n),
    }
    base["eta_eff"] = base["c"] * 1e-3
    return base | {k: np.asarray(v, dtype=float) for k, v in columns.items()}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_atomic(path, "whole")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "half")
    assert path.read_text() == "whole"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_a_stream_is_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "steps.csv"
    stream = Stream(path, ("step", "loss"))
    for step in range(5):
        if step == 3:
            mark = stream.mark()
        stream.append({"step": step, "loss": 1 / (step + 1)})
    stream.close()
    with open(path, "a") as f:
        f.write("5,0.1")  # a row that a killed run was still writing
    assert holds(path, mark)
    assert not holds(path, mark, to_the_end=True)
    again = Stream(path, ("step", "loss"), mark)
    again.append({"step": 3, "loss": None})
    again.close()
    assert holds(path, again.mark(), to_the_end=True)
    found = read_columns(path)
    assert found["step"].tolist() == [0, 1, 2, 3]
    assert np.isnan(found["loss"][3])


@pytest.mark.parametrize("damage", ["gone", "truncated", "edited", "a folder"])
def test_a_stream_that_lost_what_was_recorded_does_not_hold(tmp_path, damage):
    path = tmp_path / "steps.csv"
    stream = Stream(path, ("step", "loss"))
    stream.append({"step": 0, "loss": 1.5})
    stream.close()
    content = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes(content[:-1] if damage == "truncated" else content.replace(b"1.5", b"1.4"))
    assert not holds(path, stream.mark())


def test_a_stream_with_other_columns_is_refused(tmp_path):
    stream = Stream(tmp_path / "s.csv", ("step", "x"))
    stream.close()
    with pytest.raises(UserError, match="other columns"):
        Stream(tmp_path / "s.csv", ("step", "y"), stream.mark())


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_float32_survives_the_file(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("s") / "s.csv"
    stream = Stream(path, ("step", "x"))
    stream.append({"step": 0, "x": value})
    stream.close()
    assert np.float32(read_columns(path)["x"][0]) == np.float32(value)


def test_a_stream_is_read_by_column_and_an_incomplete_last_line_is_left_out(tmp_path):
    path = tmp_path / "steps.csv"
    path.write_text("step,loss\n0,2.5\n1,\n2")
    found = read_columns(path, ["loss"])
    assert found["step"].tolist() == [0, 1]
    assert found["loss"][0] == 2.5
    assert math.isnan(found["loss"][1])
    path.write_text("step,loss\n")
    assert {name: len(column) for name, column in read_columns(path).items()} == {"step": 0, "loss": 0}
    assert read_columns(path)["step"].dtype == np.float64


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "list index out of range"),
        (b"step,loss\n0,x\n", "could not convert"),
        (b"step,loss\n0,\0\n", "is damaged"),
        (b"step,loss\n0,\xff\n", "is damaged"),
        (b"step,lost\n0,1\n", "it has no column loss"),
        (b'"' + b"x" * 200_000, "is damaged"),
    ],
)
def test_a_damaged_stream_is_named_with_the_remedy(tmp_path, content, words):
    path = tmp_path / "steps.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as error:
        read_columns(path, ["loss"])
    assert "steps.csv is damaged" in str(error.value)
    assert "delete its run folder" in str(error.value)


def test_kl_figures_use_audited_clipped_steps_and_leave_out_the_first_20():
    applied, target, c = np.full(40, np.nan), np.full(40, 0.01), np.full(40, 0.5)
    applied[[0, 10, 20, 30]] = [0.2, 0.012, 0.009, 0.02]
    c[30] = 1.0  # audited but not clipped
    found = summarise(rows(applied_kl=applied, target_kl=target, c=c))
    assert found["kl_median"] == pytest.approx(0.0145)
    assert (found["kl_audits"], found["kl_clipped_audits"]) == (4, 3)
    assert found["kl_within_30pct"] == pytest.approx(2 / 3)
    assert found["kl_ratio_median"] == pytest.approx(1.2)
    assert found["clip_rate"] == pytest.approx(39 / 40)


def test_an_unclipped_run_says_nothing_about_its_target_and_a_skipped_step_is_not_clipped():
    found = summarise(rows())
    assert (found["kl_within_30pct"], found["clip_rate"], found["kl_median"]) == (None, 0, None)
    early = np.arange(40) < 10
    found = summarise(rows(skipped=early, c=~early))
    assert (found["skipped_steps"], found["c_mean"]) == (10, 1)


def test_last_loss_is_over_all_steps_of_a_short_run():
    assert summarise(rows(n=20, loss=np.arange(20)))["last_loss"] == pytest.approx(9.5)
    assert summarise(rows(n=100, loss=np.arange(100)))["last_loss"] == pytest.approx(74.5)


@pytest.mark.parametrize(("flags", "longest"), [([], 0), ([0, 1, 1, 0, 1], 2), ([1, 1, 1], 3), ([0, 0], 0)])
def test_longest_streak(flags, longest):
    assert longest_streak(map(bool, flags)) == longest


def test_drift_compares_the_two_ends_of_a_run_where_something_was_measured():
    c, bound, beta = np.linspace(1.0, 0.0, 200), np.full(200, np.nan), np.full(200, np.nan)
    bound[::2] = np.arange(0, 200, 2)
    beta[[30, 190]] = [3.0, 6.0]
    twice = np.full(200, np.nan)
    twice[30] = 5.0
    found = summarise(rows(n=200, c=c, surrogate=bound, beta_a=beta, beta_b=twice))
    assert found["c_early"] == pytest.approx(np.median(c[20:40]))
    assert found["c_late"] == pytest.approx(np.median(c[180:]))
    assert (found["surrogate_early"], found["surrogate_late"]) == (29, 189)
    # all groups, each as last measured: 4, then 5.5
    assert (found["beta_early"], found["beta_late"]) == (4, 4.75)


def test_statistics_from_logged_steps_alone_can_differ_from_the_truth():
    c = np.full(100, 0.9)
    c[::20] = 0.1  # what is measured every 20th step is not like the rest
    found = summarise(rows(n=100, c=c))
    assert (found["c_median"], found["c_median_logged"]) == (0.9, 0.1)


def test_the_norms_quantiles_and_the_promised_decrease():
    slope = np.full(40, np.nan)
    slope[[0, 10, 20, 30]] = [-9.0, -8.0, -0.2, -0.4]
    scale = np.ones(40)
    scale[:10] = 0.5
    found = summarise(rows(grad_norm=np.arange(40), slope=slope, grad_scale=scale))
    assert found["descent_median"] == pytest.approx(0.3)  # from step 20 on
    assert found["grad_norm_quantiles"] == pytest.approx(list(np.arange(41) * 39 / 40))
    assert found["grad_clip_rate"] == 0.25
    assert summarise(rows(grad_norm=np.arange(40)))["grad_clip_rate"] is None


@pytest.mark.filterwarnings("error")
def test_a_run_that_diverged_is_summarised_without_warnings():
    found = summarise(rows(grad_norm=np.where(np.arange(40) > 20, np.inf, 1.0)))
    assert found["grad_norm_quantiles"] == [1] * 41  # others than finite ones are in no result
    assert summarise(rows(grad_norm=np.full(40, np.nan)))["grad_norm_quantiles"] is None


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.0), (0.007, 0.002), (0.0, 0.003)])
def test_the_law_of_kl_is_found_from_its_curve(a, b):
    curve = [[c, a * c * c + b * c] for c in CURVE_SCALES]
    assert kl_law(curve) == pytest.approx([a, b], abs=1e-12)


def test_the_law_has_no_negative_part_and_needs_two_points():
    assert kl_law([[c, c**3] for c in CURVE_SCALES])[1] == 0
    assert kl_law([[1.0, 0.01]]) is None


def test_a_curve_is_the_median_of_what_was_measured_above_the_floor():
    n = 30
    measured = {name: np.full(n, np.nan) for name in CURVE_COLUMNS}
    for name, c in zip(CURVE_COLUMNS, CURVE_SCALES, strict=True):
        measured[name][10:13] = np.array([1, 2, 9]) * 0.01 * c * c
    found = summarise(rows(n=n, **measured), 1e-6)
    assert found["kl_curve"] == [[c, pytest.approx(0.02 * c * c)] for c in CURVE_SCALES[1:]]
    assert found["kl_law"] == pytest.approx([0.02, 0.0], abs=1e-9)
    assert "kl_curve" not in summarise(rows())
