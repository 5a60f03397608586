"""The pictures of a small invented study: the right files, whole, the same each time, whatever became of its runs."""

from __future__ import annotations

import io
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest

from ebc_lab.records.columns import EVAL_COLUMNS, STEP_COLUMNS
from ebc_lab.report import pictures
from ebc_lab.report.pictures.render import png
from ebc_lab.report.pictures.sheet import STYLE, spread

STEPS = 40
BASELINE, CONTROL, FALLING = "baseline_x1", "baseline_x2_lrdecay", "ebc_d0p02_shadow_x4_lindelta"
ARMS = {BASELINE: "baseline", CONTROL: "control", FALLING: "ebc_lindelta"}


def write_run(folder: Path, *, ebc: bool, seed: int, outcome: str = "completed", steps: int = STEPS) -> None:
    """A run's streams and result; a run that is missing leaves an empty folder."""
    folder.mkdir(parents=True)
    if outcome == "missing":
        return
    rng = np.random.default_rng(seed)
    columns = [*STEP_COLUMNS, "s_small", "s_large"] if ebc else STEP_COLUMNS
    rows, evals = [",".join(columns)], [",".join(EVAL_COLUMNS)]
    for step in range(steps):
        audited = step % 10 == 0
        broken = outcome == "diverged" and step == steps - 1
        row = {
            "step": step,
            "loss": math.nan if broken else 2 + 2 * math.exp(-step / 8) + 0.05 * rng.random(),
            "c": 0.4 + 0.4 * rng.random() if ebc else 1,
            "target_kl": 0.01 * (1 - step / steps) if ebc else "",
            "applied_kl": 0.008 + 0.004 * rng.random() if audited else "",
            "skipped": int(broken),
        }
        if ebc:
            row |= {"s_small": 0.1, "s_large": 0.3, "surrogate": 0.4, "radius": 0.2}
            row |= {"tightness": 0.5 + 0.1 * seed} if audited else {}
        rows.append(",".join(str(row.get(column, "")) for column in columns))
        if (step + 1) % 10 == 0:
            evals.append(f"{step + 1},{2.1 + 1 / (step + 1)},0.01,{step * 100},{step / 100}")
    (folder / "steps.csv").write_text("\n".join(rows) + "\n")
    (folder / "evals.csv").write_text("\n".join(evals) + "\n")
    found = {"outcome": outcome, "cause": None if outcome == "completed" else "the loss is not finite"}
    if outcome in ("completed", "diverged"):
        found |= {
            "val_loss": 2.1 + 0.01 * seed if outcome == "completed" else None,
            "test_loss": 2.2 + 0.01 * seed if outcome == "completed" else None,
            "curve": [[step, 2.1 + 1 / step, step / 100] for step in range(10, steps + 1, 10)],
            "probe_pct": 5.0 + seed if ebc else None,
            "c_mean": 0.6 if ebc else 1.0,
            "c_median": 0.62 if ebc else 1.0,
            "clip_rate": 0.95 if ebc else 0.0,
            "plateau_steps": 0,
            "kl_median": 0.009,
            "kl_clipped_audits": 4 if ebc else 0,
            "kl_within_30pct": 0.75 if ebc else None,
            "kl_ratio_median": 0.95 if ebc else None,
        }
    (folder / "result.json").write_text(json.dumps(found))


def scale_row(role: str, scale: float, **changed: Any) -> dict[str, Any]:
    row = {
        "run_id": f"{role}_{scale:g}", "role": role, "arm": f"adam_none_{role}_x{scale:g}",
        "lr": 0.004 * scale, "lr_scale": scale, "seed": 100,
        "outcome": "completed", "val_loss": 2.0 + 0.1 * scale, "val_se": 0.01, "c_median": 0.6, "inert": False, "cause": None,
    }  # fmt: skip
    return row | changed


def write_study(
    root: Path,
    *,
    tracks: tuple[str, ...] = ("adam_none",),
    outcomes: Mapping[tuple[str, int], str] = {},
    name: str = "tiny",
    title: str = "tiny Shakespeare",
    warning: str | None = None,
) -> Path:
    """A finished study of three final arms and two seeds a track; `outcomes`: (arm, seed) -> what became of a run."""
    decisions: dict[str, Any] = {
        stage: {"tracks": {}} for stage in ("lr_sweep", "calibrate", "lr_scale", "finals")
    }
    decisions["lr_sweep"] |= {
        "pairs": [{"track": track, "triaged": False} for track in tracks],
        "candidates": [],
    }
    decisions["calibrate"]["candidates"] = []
    decisions["finals"] |= {"rule": "test loss, paired by seed", "measurements": []}
    for track in tracks:
        swept = {"lr": 0.004, "natural_kl": 0.009, "val_loss": 2.1, "sigma": 0.03, "edge": "high"}
        decisions["lr_sweep"]["tracks"][track] = swept
        plain = {"arm": f"{track}_baseline_x1"}
        decisions["lr_sweep"]["candidates"] += [
            *(scale_row("grid", scale, **plain) for scale in (0.5, 1.0, 2.0)),
            scale_row("grid", 4.0, **plain, outcome="diverged", val_loss=None),
            *(scale_row("replicate", 1.0, **plain, seed=seed) for seed in (101, 102)),
            scale_row("control", 1.0, **plain),
        ]
        decisions["calibrate"]["tracks"][track] = {
            "delta_star": 0.018, "lr_scale": 2.0, "run_id": "ebc_2", "c_median": 0.6, "val_loss": 2.2, "in_band": True,
        }  # fmt: skip
        decisions["calibrate"]["candidates"] += [
            scale_row(
                "ebc",
                scale,
                arm=f"{track}_ebc_d0p0{9 * scale:.0f}_shadow_x2",
                delta_star=0.009 * scale,
                **changed,
            )
            for scale, changed in (
                (1.0, {"c_median": 0.3}),
                (2.0, {}),
                (4.0, {"outcome": "oom", "val_loss": None}),
            )
        ]
        decisions["lr_scale"]["tracks"][track] = {
            "lr_scale": 2.0, "run_id": "ebc_2", "baseline_val_loss": 2.1, "sigma": 0.03,
            "headroom": {"none": None, "ebc": 2.0, "fixed_tau": 1.0}, "headroom_is_tautology": True,
            "arms": {
                "none": [scale_row("none", 1.0), scale_row("none", 2.0, outcome="diverged", val_loss=None)],
                "ebc": [scale_row("ebc", 1.0), scale_row("ebc", 2.0, inert=True)],
                "fixed_tau": [scale_row("fixed_tau", 1.0), scale_row("fixed_tau", 2.0, outcome="oom", val_loss=None)],
            },
        }  # fmt: skip
        for run_id in ("none_1", "ebc_1", "ebc_2", "fixed_tau_1"):
            (root / "runs" / run_id).mkdir(parents=True, exist_ok=True)
            found = {"eta_eff_median": 0.003, "c_p10": 0.4, "c_p90": 0.9}
            (root / "runs" / run_id / "result.json").write_text(json.dumps(found))
        arms = {}
        for tail, role in ARMS.items():
            arm, ebc = f"{track}_{tail}", "ebc" in tail
            runs = {str(seed): f"{arm}_s{seed}" for seed in (0, 1)}
            arms[arm] = {
                "roles": [role],
                "track": track,
                "lr": 0.004,
                "lr_scale": 2.0,
                "ebc": ebc,
                "runs": runs,
            }
            ends = [outcomes.get((tail, int(seed)), "completed") for seed in runs]
            mean = 2.205 if "completed" in ends else None
            arms[arm] |= {
                "test_loss": mean,
                "val_loss": mean,
                "outcomes": {o: ends.count(o) for o in {*ends} - {"missing"}},
            }
            for seed, run_id in runs.items():
                outcome = outcomes.get((tail, int(seed)), "completed")
                steps = STEPS if outcome == "completed" else STEPS // 2
                write_run(root / "runs" / run_id, ebc=ebc, seed=int(seed), outcome=outcome, steps=steps)
        reached = dict.fromkeys(arms) | {
            f"{track}_{FALLING}": {"steps": 30.0, "tokens": 960.0, "train_s": 0.3, "seeds": 1}
        }
        roles = {role: f"{track}_{tail}" for tail, role in ARMS.items()}
        difference = {"seeds": 2, "method": "t", "mean": 0.1, "low": 0.05, "high": 0.15, "detectable": 0.04}
        differences = {
            role: {arm: difference for arm in arms if arm != roles[role]} for role in ("baseline", "control")
        }  # fmt: skip
        decisions["finals"]["tracks"][track] = {
            "roles": roles, "arms": arms, "efficiency": reached, "differences": differences,
        }  # fmt: skip
        overhead = f"overhead_{track}_ebc_x2_n80_s0"
        decisions["finals"]["measurements"].append({"run_id": overhead, "role": "overhead"})
        (root / "runs" / overhead).mkdir(parents=True)
        measured = {"overhead_pct": 6.0, "overhead_iqr_pct": [5.0, 7.0], "pairs": 6}
        (root / "runs" / overhead / "result.json").write_text(json.dumps(measured))
    config = {
        "batch_size": 4,
        "model": {"context": 8},
        "scale": "smoke",
        "eval_windows": 64,
        "finals": {"margin": 0.01},
    }
    config["lr_sweep"] = {"grids": {"adam": [0.002, 0.004]}}
    config["study"] = {"band": [0.5, 0.7]}
    header = {"study": name, "config": config, "corpus": {"title": title, "warning": warning}}
    (root / "study.json").write_text(json.dumps(header))
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    return root


def drawn(root: Path) -> dict[str, Any]:
    """Every figure of a study by name, in the study's style, not yet rendered."""
    facts = pictures.facts_of(json.loads((root / "study.json").read_text()))
    with matplotlib.rc_context(fname=STYLE):
        found = pictures.pictures(root, facts, json.loads((root / "auto_decisions.json").read_text()))
        return {picture.name: picture.sheet for picture in found}


OF_A_TRACK = ("lr_scale", "eta_eff", "calibrate", "finals", "efficiency", "tightness")


def expected_names(*tracks: str) -> set[str]:
    """The pictures of a finished study."""
    arms = {f"{t}_{arm}_{kind}" for t in tracks for arm in ARMS for kind in ("loss", "clip", "kl")}
    arms |= {f"{t}_{FALLING}_groups" for t in tracks}
    own = {name + f"_{t}" * (len(tracks) > 1) for t in tracks for name in OF_A_TRACK}
    return arms | own | {"lr_sweep", "pareto", "overhead"}


def test_draws_every_picture_of_a_study_the_same_each_time(tmp_path):
    root = write_study(tmp_path)
    before, settings = set(tmp_path.iterdir()), dict(matplotlib.rcParams)
    written = pictures.draw_study(root)
    names = expected_names("adam_none")
    assert {path.name for path in written} == {
        f"{n}.{ending}" for n in names for ending in ("png", "svg")
    } | {"figures.json"}
    assert set(tmp_path.iterdir()) == before | set(written)
    first = {path: path.read_bytes() for path in written}
    for path in (path for path in written if path.suffix == ".png"):
        image = matplotlib.image.imread(path)
        assert 300 < image.shape[0] < image.shape[1] < 1400
        assert 0.01 < (image[:, :, :3].min(axis=2) < 0.95).mean() < 0.6, f"{path.name} is blank, or all ink"
    assert {path: path.read_bytes() for path in pictures.draw_study(root)} == first
    assert dict(matplotlib.rcParams) == settings


TROUBLES = {
    "some of each kind": {
        (BASELINE, 1): "oom",
        (FALLING, 1): "diverged",
        **{(CONTROL, s): "missing" for s in (0, 1)},
    },
    "no baseline": {(BASELINE, 0): "diverged", (BASELINE, 1): "failed", (FALLING, 0): "missing"},
    "nothing at all": {(arm, seed): "missing" for arm in ARMS for seed in (0, 1)},
}


@pytest.mark.parametrize("outcomes", TROUBLES.values(), ids=TROUBLES.keys())
@pytest.mark.filterwarnings("error")
def test_draws_whatever_became_of_the_runs_and_says_so(tmp_path, outcomes):
    figures = drawn(write_study(tmp_path, outcomes=outcomes))
    for (arm, seed), outcome in outcomes.items():
        said = {"diverged": "diverged", "missing": "has no result"}.get(outcome, "did not finish")
        for kind in ("loss", "clip", "kl"):
            header = [text.get_text() for text in figures[f"adam_none_{arm}_{kind}"].texts]
            assert any(f"seed {seed} {said}" in line for line in header)
    together = ("pareto", "efficiency", "finals", "overhead")
    for name in (*(f"adam_none_{FALLING}_{kind}" for kind in ("loss", "clip", "kl")), *together):
        image = matplotlib.image.imread(io.BytesIO(png(figures[name])), format="png")
        assert image.shape[:2] == (round(figures[name].bbox.height), round(figures[name].bbox.width))


AWKWARD = ("adam_spectral", "muon_spectral")


@pytest.fixture(scope="module")
def awkward(tmp_path_factory):
    """The figures of a study with two tracks, and with names and warnings that nobody foresaw."""
    root = write_study(
        tmp_path_factory.mktemp("awkward"), tracks=AWKWARD, outcomes={(FALLING, 1): "diverged"},
        name="a_study_$with_money$_" + "x" * 60, title="a $file$ with\na very long name.txt" * 3,
        warning="NOT Shakespeare: " + "it could not be had, " * 9,
    )  # fmt: skip
    return drawn(root)


def test_each_track_has_pictures_of_its_own(awkward):
    assert set(awkward) == expected_names(*AWKWARD)


def test_no_text_leaves_the_page_or_covers_another(awkward):
    shown = [f"muon_spectral_{arm}_{kind}" for arm in (CONTROL, FALLING) for kind in ("loss", "clip", "kl")]
    shown += [f"{name}_muon_spectral" for name in OF_A_TRACK]
    for name in (*shown, f"muon_spectral_{FALLING}_groups", "lr_sweep", "pareto", "overhead"):
        figure = awkward[name]
        figure.draw_without_rendering()
        used = figure.get_tightbbox()
        assert 0 <= used.x0 < used.x1 <= figure.get_figwidth(), name
        assert 0 <= used.y0 < used.y1 <= figure.get_figheight(), name
        header = [text.get_window_extent() for text in figure.texts]
        assert all(above.y0 >= below.y1 for above, below in itertools.pairwise(header))
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        assert header[-1].y0 >= max(box.y1 for box in boxes), f"{name}: the header reaches into the axes"
        for legend in figure.legends:
            assert legend.get_window_extent().y1 <= min(box.y0 for box in boxes), (
                f"{name}: the key covers the axes"
            )


def test_needs_neither_torch_nor_pandas_nor_pyplot():
    banned = "{'torch', 'pandas', 'matplotlib.pyplot'}"
    script = f"import sys, ebc_lab.report.pictures; print(sorted({banned} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_labels_are_spread_in_order_and_stay_on_the_page():
    places = spread([0.1, 0.11, 0.12, 0.98, 0.99], 0.05)
    assert places == pytest.approx([0.1, 0.15, 0.2, 0.95, 1.0])
