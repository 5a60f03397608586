"""The pictures of a small invented study: the right files, whole, the same each time, whatever became of its runs."""

from __future__ import annotations

import io
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
from matplotlib.text import Text

from ebc_lab.report import plots
from ebc_lab.report.sheet import STYLE, Facts
from ebc_lab.telemetry import EVAL_COLUMNS, STEP_COLUMNS

STEPS = 40
BASELINE, TWICE, CONTROL, FALLING = (
    "baseline_x1",
    "ebc_d0p01_shadow_x2",
    "baseline_x2_lrdecay",
    "ebc_d0p02_shadow_x4_lindelta",
)
ARMS = {BASELINE: "baseline", TWICE: "ebc_x2", CONTROL: "control", FALLING: "ebc_lindelta"}


def write_run(folder: Path, *, ebc: bool, seed: int, outcome: str = "completed", steps: int = STEPS) -> None:
    """A run's streams and result; a run that is missing leaves an empty folder."""
    folder.mkdir(parents=True)
    if outcome == "missing":
        return
    rng = np.random.default_rng(seed)
    rows, evals = [",".join(STEP_COLUMNS)], [",".join(EVAL_COLUMNS)]
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
        rows.append(",".join(str(row.get(column, "")) for column in STEP_COLUMNS))
        if (step + 1) % 10 == 0:
            evals.append(f"{step + 1},{2.1 + 1 / (step + 1)},0.01,{step * 100},{step / 100}")
    (folder / "steps.csv").write_text("\n".join(rows) + "\n")
    (folder / "evals.csv").write_text("\n".join(evals) + "\n")
    found = {"outcome": outcome, "cause": None if outcome == "completed" else "the loss is not finite"}
    if outcome in ("completed", "diverged"):
        found |= {
            "val_loss": 2.1 + 0.01 * seed if outcome == "completed" else None,
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
        "run_id": f"{role}_{scale:g}", "role": role, "lr": 0.004 * scale, "lr_scale": scale, "seed": 100,
        "outcome": "completed", "val_loss": 2.0 + 0.1 * scale, "val_se": 0.01, "c_median": 0.6, "inert": False,
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
    """A finished study of four final arms and two seeds a track; `outcomes`: (arm, seed) -> what became of a run."""
    decisions: dict[str, Any] = {stage: {"tracks": {}} for stage in ("lr_sweep", "lr_scale", "finals")}
    for track in tracks:
        decisions["lr_sweep"]["tracks"][track] = {"lr": 0.004, "natural_kl": 0.009}
        decisions["lr_scale"]["tracks"][track] = {
            "lr_scale": 2.0, "run_id": "ebc_2", "baseline_val_loss": 2.1, "sigma": 0.03,
            "headroom": {"none": None, "ebc": 2.0, "fixed_tau": 1.0}, "headroom_is_tautology": True,
            "arms": {
                "none": [scale_row("none", 1.0), scale_row("none", 2.0, outcome="diverged", val_loss=None)],
                "ebc": [scale_row("ebc", 1.0), scale_row("ebc", 2.0, inert=True)],
                "fixed_tau": [scale_row("fixed_tau", 1.0), scale_row("fixed_tau", 2.0, outcome="oom", val_loss=None)],
            },
        }  # fmt: skip
        arms = {}
        for tail, role in ARMS.items():
            arm, ebc = f"{track}_{tail}", "ebc" in tail
            runs = {str(seed): f"{arm}_s{seed}" for seed in (0, 1)}
            arms[arm] = {"roles": [role], "track": track, "lr": 0.004, "lr_scale": 2.0, "ebc": ebc, "runs": runs}
            for seed, run_id in runs.items():
                outcome = outcomes.get((tail, int(seed)), "completed")
                steps = STEPS if outcome == "completed" else STEPS // 2
                write_run(root / "runs" / run_id, ebc=ebc, seed=int(seed), outcome=outcome, steps=steps)
        reached = {arm: None for arm in arms} | {f"{track}_{TWICE}": {"steps": 30.0, "seeds": 1}}
        roles = {role: f"{track}_{tail}" for tail, role in ARMS.items()}
        decisions["finals"]["tracks"][track] = {"roles": roles, "arms": arms, "efficiency": reached}
    config = {"batch_size": 4, "model": {"context": 8}, "scale": "smoke", "study": {"band": [0.5, 0.7]}}
    header = {"study": name, "config": config, "corpus": {"title": title, "warning": warning}}
    (root / "study.json").write_text(json.dumps(header))
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    return root


def expected_names(*tracks: str) -> set[str]:
    return {f"{t}_{arm}_{kind}.png" for t in tracks for arm in ARMS for kind in ("loss", "clip", "kl")}


def test_draws_three_pictures_an_arm_and_two_of_the_study(tmp_path):
    written = plots.draw_study(write_study(tmp_path))
    wanted = expected_names("adam_none") | {"lr_scale.png", "pareto.png"}
    assert {path.name for path in written} == wanted
    assert {path.name for path in tmp_path.iterdir() if path.is_file()} == wanted | {"study.json", "auto_decisions.json"}
    for path in written:
        image = matplotlib.image.imread(path)
        assert 500 < image.shape[0] < image.shape[1] < 1400
        assert 0.01 < (image[:, :, :3].min(axis=2) < 0.95).mean() < 0.6, f"{path.name} is blank, or all ink"


def test_each_track_has_its_own_lr_scale_picture(tmp_path):
    tracks = ("adam_none", "muon_spectral")
    names = {path.name for path in plots.draw_study(write_study(tmp_path, tracks=tracks))}
    assert names == expected_names(*tracks) | {"lr_scale_adam_none.png", "lr_scale_muon_spectral.png", "pareto.png"}


def test_two_draws_are_byte_identical_and_leave_matplotlib_as_it_was(tmp_path):
    write_study(tmp_path)
    before = dict(matplotlib.rcParams)
    first = {path: path.read_bytes() for path in plots.draw_study(tmp_path)}
    assert {path: path.read_bytes() for path in plots.draw_study(tmp_path)} == first
    assert dict(matplotlib.rcParams) == before


TROUBLES = {
    "one diverged": {(TWICE, 1): "diverged"},
    "one missing": {(FALLING, 0): "missing"},
    "an arm all diverged": {(CONTROL, 0): "diverged", (CONTROL, 1): "diverged"},
    "an arm without a step": {(TWICE, 0): "missing", (TWICE, 1): "missing"},
    "failed half-way": {(TWICE, 0): "oom", (BASELINE, 1): "failed"},
    "no baseline": {(BASELINE, 0): "diverged", (BASELINE, 1): "missing"},
    "nothing at all": {(arm, seed): "missing" for arm in ARMS for seed in (0, 1)},
}


@pytest.mark.parametrize("outcomes", TROUBLES.values(), ids=TROUBLES.keys())
@pytest.mark.filterwarnings("error")
def test_draws_whatever_became_of_the_runs_and_says_so(tmp_path, outcomes):
    root = write_study(tmp_path, outcomes=outcomes)
    for (arm, seed), outcome in outcomes.items():
        runs = plots.read_runs(root, {"runs": {str(seed): f"adam_none_{arm}_s{seed}"}})
        said = {"diverged": "diverged", "missing": "has no result"}.get(outcome, "did not finish")
        assert f"seed {seed} {said}" in plots.trouble(runs)
    for _, figure in drawn(root):
        assert plots.png(figure)


@pytest.mark.parametrize("tracks", [("adam_none",), ("adam_none", "adam_spectral", "muon_none", "muon_spectral")])
def test_no_text_leaves_the_page_or_covers_another(tmp_path, tracks):
    """Also with names and warnings that nobody foresaw."""
    root = write_study(
        tmp_path, tracks=tracks, outcomes={(TWICE, 1): "diverged"}, name="a_study_$with_money$_" + "x" * 60,
        title="a $file$ with\na very long name.txt" * 3, warning="NOT Shakespeare: " + "it could not be had, " * 9,
    )  # fmt: skip
    for name, figure in drawn(root):
        figure.canvas.draw()
        page = figure.bbox.padded(1)
        for text in figure.findobj(Text):
            if text.get_visible() and text.get_text():
                box = text.get_window_extent()
                inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
                assert inside, f"{name}: {text.get_text()!r} leaves the page"
        axes = figure.axes[0].get_tightbbox()
        header = [text.get_window_extent() for text in figure.texts]
        assert all(above.y0 >= below.y1 for above, below in zip(header, header[1:], strict=False))
        assert header[-1].y0 >= axes.y1 - 1, f"{name}: the header reaches into the axes"
        for legend in figure.legends:
            assert legend.get_window_extent().y1 <= axes.y0, f"{name}: the key covers the axes"


def drawn(root: Path) -> list[tuple[str, Any]]:
    """Every (name, figure) of a study, in the study's style."""
    header = json.loads((root / "study.json").read_text())
    corpus = header["corpus"]
    facts = Facts(header["study"], corpus["title"], corpus["warning"], "smoke", 32, (0.5, 0.7))
    with matplotlib.rc_context(fname=STYLE):
        return list(plots.pictures(root, facts, json.loads((root / "auto_decisions.json").read_text())))


def test_needs_neither_torch_nor_pandas_nor_pyplot():
    script = "import sys, ebc_lab.report.plots; print(sorted({'torch', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_labels_are_spread_in_order_and_stay_on_the_page():
    places = plots.spread([0.1, 0.11, 0.12, 0.98, 0.99], 0.05)
    assert places == pytest.approx([0.1, 0.15, 0.2, 0.95, 1.0])


def test_png_decodes_to_the_size_of_the_page(tmp_path):
    _, figure = drawn(write_study(tmp_path))[0]
    image = matplotlib.image.imread(io.BytesIO(plots.png(figure)), format="png")
    assert image.shape[:2] == (round(figure.bbox.height), round(figure.bbox.width))
