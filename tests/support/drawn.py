"""Small invented studies for the tests of the pictures, and their figures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

from ebc_lab.records.columns import EVAL_COLUMNS, STEP_COLUMNS
from ebc_lab.report import pictures
from ebc_lab.report.pictures.catalogue import PHONE
from ebc_lab.report.pictures.drawing.sheet import STYLE, Facts, Sheet
from ebc_lab.study.stages.statistics import paired, window

STEPS = 40
SPEC = {"kind": "train", "identity": {}, "config": {}}  # what pictures do not look at
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
        "run_id": f"{role}_{scale:g}",
        "role": role,
        "arm": f"adam_none_{role}_x{scale:g}",
        "lr": 0.004 * scale,
        "lr_scale": scale,
        "seed": 100,
        "outcome": "completed",
        "val_loss": 2.0 + 0.1 * scale,
        "val_se": 0.01,
        "c_median": 0.6,
        "inert": False,
        "cause": None,
    }
    return row | changed


def write_study(
    root: Path,
    *,
    tracks: tuple[str, ...] = ("adam_none",),
    outcomes: Mapping[tuple[str, int], str] = {},
    name: str = "tiny",
    title: str = "tiny Shakespeare",
    warning: str | None = None,
    choose: str = "loss",
) -> Path:
    """A finished study of three final arms and two seeds a track; `outcomes`: (arm, seed) -> what became of
    a run; `choose`: what δ* is chosen by."""
    decisions: dict[str, Any] = {s: {"tracks": {}} for s in ("lr_sweep", "calibrate", "lr_scale", "finals")}
    pairs = [{"track": track, "triaged": False} for track in tracks]
    decisions["lr_sweep"] |= {"pairs": pairs, "candidates": []}
    decisions["calibrate"]["candidates"] = []
    decisions["finals"] |= {"rule": "test loss, paired by seed", "measurements": []}
    for track in tracks:
        _choose(decisions, track)
        for run_id in ("none_1", "ebc_1", "ebc_2", "fixed_tau_1"):
            found = {"eta_eff_median": 0.003, "c_p10": 0.4, "c_median": 0.6, "c_p90": 0.9}
            _write_result(root, run_id, found)
        decisions["finals"]["tracks"][track] = _final(root, track, outcomes)
        overhead = f"overhead_{track}_ebc_x2_n80_s0"
        decisions["finals"]["measurements"].append({"run_id": overhead, "role": "overhead"})
        _write_result(root, overhead, {"overhead_pct": 6.0, "overhead_iqr_pct": [5.0, 7.0], "pairs": 6})
    config = {
        "batch_size": 4,
        "model": {"context": 8},
        "scale": "smoke",
        "eval_windows": 64,
        "finals": {"margin": 0.01},
        "lr_sweep": {"grids": {"adam": [0.002, 0.004]}, "steps": 20, "long_steps": 40},
        "calibrate": {"choose": choose},
        "study": {"band": [0.5, 0.7], "stages": ["lr_sweep", "calibrate", "lr_scale", "finals"]},
    }
    header = {"study": name, "config": config, "corpus": {"title": title, "warning": warning}}
    (root / "study.json").write_text(json.dumps(header))
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    return root


def _write_result(root: Path, run_id: str, found: Mapping[str, Any]) -> None:
    (root / "runs" / run_id).mkdir(parents=True, exist_ok=True)
    (root / "runs" / run_id / "result.json").write_text(json.dumps(found))


def _choose(decisions: dict[str, Any], track: str) -> None:
    """Decide the stages before the finals for a track."""
    points = [
        {"run_id": "control_1", "lr": 0.004, "schedule": "trapezoid", "warmup_steps": 10, "val_loss": 2.0},
        {"run_id": "control_2", "lr": 0.008, "schedule": "trapezoid", "warmup_steps": 10, "val_loss": 2.05},
        {
            "run_id": "control_4",
            "lr": 0.004,
            "schedule": "warmup_linear",
            "warmup_steps": 20,
            "val_loss": None,
        },
    ]
    schedule = {"name": "trapezoid", "warmup_steps": 10, "decay_share": 0.4}
    control = {"run_id": "control_1", "lr": 0.004, "val_loss": 2.0, "lr_schedule": schedule, "grid": points}
    swept = {"lr": 0.004, "natural_kl": 0.009, "val_loss": 2.1, "sigma": 0.03, "edge": "high"}
    decisions["lr_sweep"]["tracks"][track] = {**swept, "control": control}
    plain = {"arm": f"{track}_baseline_x1"}
    decisions["lr_sweep"]["candidates"] += [
        *(scale_row("grid", scale, **plain) for scale in (0.5, 1.0, 2.0)),
        scale_row("grid", 4.0, **plain, outcome="diverged", val_loss=None),
        scale_row("baseline", 0.5, **plain, val_loss=2.15),
        scale_row("baseline", 1.0, **plain, val_loss=2.1),
        scale_row("baseline", 2.0, **plain, val_loss=9.0),
        *(scale_row("replicate", 1.0, **plain, seed=seed) for seed in (101, 102)),
        scale_row("control", 1.0, **plain, val_loss=2.0),
        scale_row("control", 2.0, **plain, val_loss=2.05),
        scale_row("control", 4.0, **plain, lr=0.004, outcome="diverged", val_loss=None),
    ]
    decisions["calibrate"]["tracks"][track] = {
        "delta_star": 0.018,
        "lr_scale": 2.0,
        "run_id": "ebc_2",
        "c_median": 0.6,
        "val_loss": 2.2,
        "in_band": True,
        "delta_window": window({0.009: 2.3, 0.018: 2.2}),
    }
    lost = {"outcome": "oom", "val_loss": None}
    for scale, changed in ((1.0, {"c_median": 0.3}), (2.0, {}), (4.0, lost)):
        about = {"arm": f"{track}_ebc_d0p0{9 * scale:.0f}_shadow_x2", "delta_star": 0.009 * scale}
        decisions["calibrate"]["candidates"].append(scale_row("ebc", scale, **about, **changed))
    decisions["lr_scale"]["tracks"][track] = {
        "lr_scale": 2.0,
        "run_id": "ebc_2",
        "baseline_val_loss": 2.1,
        "sigma": 0.03,
        "headroom": {"none": None, "ebc": 2.0, "fixed_tau": 1.0},
        "lr_window": {
            "none": window({1.0: 2.1, 2.0: math.inf}),
            "ebc": window({1.0: 2.1, 2.0: 2.2}),
            "fixed_tau": None,
        },
        "headroom_is_tautology": True,
        "arms": {
            "none": [scale_row("none", 1.0), scale_row("none", 2.0, outcome="diverged", val_loss=None)],
            "ebc": [scale_row("ebc", 1.0), scale_row("ebc", 2.0, inert=True)],
            "fixed_tau": [scale_row("fixed_tau", 1.0), scale_row("fixed_tau", 2.0, **lost)],
        },
    }


def _final(root: Path, track: str, outcomes: Mapping[tuple[str, int], str]) -> dict[str, Any]:
    """The finals of a track, and their runs."""
    arms: dict[str, Any] = {}
    for tail, role in ARMS.items():
        arm, ebc = f"{track}_{tail}", "ebc" in tail
        runs = {str(seed): f"{arm}_s{seed}" for seed in (0, 1)}
        ends = [outcomes.get((tail, int(seed)), "completed") for seed in runs]
        mean = 2.205 if "completed" in ends else None
        counted = {o: ends.count(o) for o in {*ends} - {"missing"}}
        about = {"roles": [role], "track": track, "lr": 0.004, "lr_scale": 2.0, "ebc": ebc, "runs": runs}
        arms[arm] = {**about, "test_loss": mean, "val_loss": mean, "outcomes": counted}
        for (seed, run_id), outcome in zip(runs.items(), ends, strict=True):
            steps = STEPS if outcome == "completed" else STEPS // 2
            write_run(root / "runs" / run_id, ebc=ebc, seed=int(seed), outcome=outcome, steps=steps)
    reached = {"steps": 30.0, "tokens": 960.0, "train_s": 0.3, "seeds": 1}
    roles = {role: f"{track}_{tail}" for tail, role in ARMS.items()}
    difference = {"seeds": 2, "method": "t", "mean": 0.1, "low": 0.05, "high": 0.15, "detectable": 0.04}
    differences = {r: {a: difference for a in arms if a != roles[r]} for r in ("baseline", "control")}
    efficiency = dict.fromkeys(arms) | {f"{track}_{FALLING}": reached}
    return {"roles": roles, "arms": arms, "efficiency": efficiency, "differences": differences}


SEEDS = (0, 1, 2)
PLAIN, GOOD, TRAP, BROKEN = "plain_arm", "good_arm", "trap_arm", "broken_arm"
GAIN = {
    PLAIN: (0.0, 0.0, 0.0),
    GOOD: (-0.05, -0.04, -0.03),
    TRAP: (0.06, 0.05, 0.07),
    BROKEN: (0.1, 0.1, 0.1),
}


def write_suite(
    root: Path,
    *,
    gains: Mapping[str, Sequence[float]] = GAIN,
    versus: Mapping[str, str] = {TRAP: GOOD},
    outcomes: Mapping[tuple[str, int], str] = {(BROKEN, 0): "diverged"},
    more: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {},
    tracks: tuple[str, ...] = ("adam_none",),
    asked: Sequence[str] = (),
    ebc: Sequence[str] = (GOOD, TRAP),
    finals: bool = False,
) -> Path:
    """A finished suite.

    `gains`: an arm's test loss minus 2, seed by seed; `more`: by arm, what its results and settings hold
    besides; `finals`: a study's too.
    """
    write_study(root)
    found: dict[str, Any] = {}
    for track in tracks:
        losses: dict[str, dict[str, float]] = {}
        arms: dict[str, Any] = {}
        for label, own in gains.items():
            ends = [outcomes.get((label, seed), "completed") for seed in SEEDS[: len(own)]]
            runs = {str(seed): f"{track}_{label}_s{seed}" for seed in range(len(own))}
            result, config = more.get(label, ({}, {}))
            figures = {"c_early": 0.5, "c_late": 0.5 + own[0], "kl_ratio_median": 1.0} if label in ebc else {}
            losses[label] = {}
            for (seed, run_id), outcome, gain in zip(runs.items(), ends, own, strict=True):
                folder = root / "runs" / run_id
                write_run(folder, ebc=label in ebc, seed=int(seed), outcome=outcome)
                if outcome == "missing":
                    continue
                loss = 2 + gain if outcome == "completed" else None
                ended = json.loads((folder / "result.json").read_text()) | {
                    "test_loss": loss,
                    **figures,
                    **result,
                }
                (folder / "result.json").write_text(json.dumps(ended))
                spec = {**SPEC, "run_id": run_id, "config": {"steps": 40, **config}}
                (folder / "spec.json").write_text(json.dumps(spec))
                if outcome in ("completed", "diverged"):
                    losses[label][seed] = math.inf if loss is None else loss
            known = [loss for loss in losses[label].values() if math.isfinite(loss)]
            mean = float(np.mean(known)) if known else None
            about = {"roles": [label], "track": track, "lr": 0.004, "lr_scale": 1.0, "ebc": label in ebc}
            arms[label] = {
                **about,
                "runs": runs,
                "point": None,
                "delta_star": 0.01 if label in ebc else None,
                "about": f"what {label} is",
                "figures": figures,
                "outcomes": {o: ends.count(o) for o in sorted({*ends} - {"missing"})},
                "test_loss": mean,
                "val_loss": mean,
            }
        reference = next(iter(gains))
        for label, arm in arms.items():
            arm["versus"] = versus.get(label, reference) if label != reference else None
            rival = losses.get(arm["versus"])
            arm["difference"] = None if rival is None else paired(losses[label], rival)
        found[track] = {"reference": reference, "arms": arms}
    decisions = {"lr_sweep": {"tracks": {track: {"lr": 0.004, "natural_kl": 0.009} for track in tracks}}}
    if finals:
        decisions = json.loads((root / "auto_decisions.json").read_text())
    decisions["ablation"] = {"tracks": found, "rule": "test loss after 40 steps", "notes": []}
    (root / "auto_decisions.json").write_text(json.dumps(decisions))
    header = json.loads((root / "study.json").read_text())
    arms_asked = {label: {} for label in (*gains, *asked)}
    header["config"]["ablation"] = {"question": "Does it pay?", "arms": arms_asked}
    (root / "study.json").write_text(json.dumps(header))
    return root


def words_of(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def drawn(root: Path, *only: str, phone: Container[str] = ()) -> dict[str, Any]:
    """The figures of a study by name, in the study's style.

    `only`: no others than these; `phone`: those that are drawn for one, too.
    """
    decisions = json.loads((root / "auto_decisions.json").read_text())
    facts = pictures.facts_of(json.loads((root / "study.json").read_text()), decisions)
    figures = {}
    with matplotlib.rc_context(fname=STYLE):
        for picture in pictures.pictures(root, facts, decisions):
            if picture.name == "lr_sweep" and "candidates" not in decisions["lr_sweep"]:
                continue  # of a written suite, whose sweep is only tracks
            if only and picture.name not in only:
                continue
            if sheet := picture.sheet():
                figures[picture.name] = sheet
            if picture.name in phone:
                figures[picture.name + PHONE] = picture.sheet(narrow=True)
            if only and set(only) <= figures.keys():
                break
    return figures


def settled(draw: Callable[..., Sheet | None], facts: Facts, *of: Any, **more: Any) -> Sheet:
    """A picture drawn by itself, in the study's style."""
    with matplotlib.rc_context(fname=STYLE):
        sheet = draw(facts, *of, **more)
        assert sheet
        sheet.settle()
    return sheet


OF_A_TRACK = ("lr_scale", "calibrate", "curves", "steps", "tightness")


def expected_names(*tracks: str) -> set[str]:
    """The pictures of a finished study."""
    arms = {f"{t}_{FALLING}_groups" for t in tracks}
    own = {name + f"_{t}" * (len(tracks) > 1) for t in tracks for name in OF_A_TRACK}
    return arms | own | {"lr_sweep"}


def sweep(losses: Mapping[float, float | None], label: str, **more: Any) -> dict[str, Any]:
    """What a decision says of a swept arm: its loss by the setting's value, None where a seed diverged."""
    points = [
        {
            "value": value,
            "arm": f"{label}{value:g}",
            "lr": 0.001 * value,
            "delta_star": more.get("delta_star", 0.01 * value),
            "loss": loss,
            "seeds": {"0": loss, "1": None if loss is None else loss + 0.01},
            "rate": None,
        }
        for value, loss in losses.items()
    ]
    span = window({value: math.inf if loss is None else loss for value, loss in losses.items()})
    found = {"about": label, "shape": "", "points": points, "window": span, "left_out": []}
    return found | {"regret_x4": None, "rate_octaves": None} | more


def check_sheet(sheet: Sheet, name: str) -> None:
    """Assert that all of a picture is on its sheet, and that title, panels, key and source stand apart."""
    sheet.draw_without_rendering()
    used = sheet.get_tightbbox()
    assert 0 <= used.x0 < used.x1 <= sheet.get_figwidth(), name
    assert 0 <= used.y0 < used.y1 <= sheet.get_figheight(), name
    assert not any("…" in text for text in words_of(sheet)), name
    title, source = (text.get_window_extent() for text in sheet.alone)
    panels = [axes.get_tightbbox() for axes in sheet.axes]
    assert title.y0 >= max(box.y1 for box in panels), name
    bottom = min(box.y0 for box in panels)
    for legend in sheet.legends:
        box = legend.get_window_extent()
        assert source.y1 - 1 <= box.y0 < box.y1 <= bottom + 1, name
