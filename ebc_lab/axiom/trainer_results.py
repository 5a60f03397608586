"""The reports of `AXIOM_Trainer`: the course of training, its figures, and a picture of them."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .trainer_files import replaced

GIGABYTE = 1e9
SMOOTHED = 25  # points of the smoothed training curve that share no step
FAR = 10  # the ratio of perplexities from which their axis is logarithmic
TRAINED, SMOOTH, VALIDATED = "#B5D1E6", "#0072B2", "#D55E00"  # Okabe and Ito's, safe for the colour-blind
LOOK: dict[Any, Any] = {  # of the picture
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
}


@dataclass
class Course:
    """The course of training, over all calls of `fit` and all resumptions."""

    train_losses: list[float] = field(default_factory=list)  # of each step
    val_losses: list[float] = field(default_factory=list)
    val_steps: list[int] = field(default_factory=list)
    val_ppls: list[float] = field(default_factory=list)
    tokens: int = 0
    train_s: float = 0.0  # seconds of training steps
    wall_s: float = 0.0  # and with validation and checkpoints
    peak_gradient_bytes: int = 0
    peak_vram_bytes: int | None = None  # None on a CPU


def check_course(course: Course) -> None:
    """Raise ValueError unless all of it is numbers and lists of numbers, as in a new one."""
    for name, first in vars(Course()).items():
        value = getattr(course, name)
        values = value if isinstance(first, list) and isinstance(value, list) else [value]
        kinds = (int, float) if first is not None else (int, type(None))
        if isinstance(first, list) != isinstance(value, list) or not all(
            isinstance(v, kinds) for v in values
        ):
            raise ValueError(f"its {name} are no numbers")


def figures(course: Course, usage: Mapping[str, float]) -> dict[str, Any]:
    """Return the results of a course and of `AXIOM.memory_usage`; None for what is not finite."""
    results = {
        "train_losses": list(course.train_losses),
        **progress("train", "loss", course.train_losses),
        "val_losses": list(course.val_losses),
        "val_steps": list(course.val_steps),
        "val_ppls": list(course.val_ppls),
        **progress("val", "ppl", course.val_ppls),
        "peak_vram_gb": (course.peak_vram_bytes or 0) / GIGABYTE,
        "peak_gradient_bytes": course.peak_gradient_bytes,
        "tokens_per_sec": course.tokens / course.train_s if course.train_s else None,
        "total_time_min": course.wall_s / 60,
        "compression_state": usage["state_compression"],
        "compression_gradients": usage["gradient_compression"],
        "compression_total": usage["total_compression"],
        "steps": len(course.train_losses),
    }
    return {name: only_finite(value) for name, value in results.items()}


def progress(kind: str, figure: str, curve: list[float]) -> dict[str, float]:
    """Return the first and the last value of a curve, and how far it has fallen in percent of the first."""
    first, last = (curve[0], curve[-1]) if curve else (math.nan, math.nan)
    return {
        f"initial_{kind}_{figure}": first,
        f"final_{kind}_{figure}": last,
        f"{kind}_improvement_pct": 100 * (first - last) / first if first else math.nan,
    }


def only_finite(value: Any) -> Any:
    """Return the value, or the values of a list, with None for what JSON has no number for."""
    if isinstance(value, list):
        return [only_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_results(results: Mapping[str, Any], folder: Path, prefix: str) -> None:
    """Write `<prefix>.json` and `<prefix>.png`, each whole or not at all. Raises OSError."""
    with replaced(folder / f"{prefix}.json") as f:
        f.write(json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
    with replaced(folder / f"{prefix}.png") as f:
        f.write(picture(results, prefix))


# -- the picture ---------------------------------------------------------------------------------------------


def picture(results: Mapping[str, Any], title: str) -> bytes:
    """Draw a PNG of the training loss and, where there was validation, of its loss and perplexity."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    headline = (
        f"{title}: {results['steps']:,} steps, optimizer state and gradients "
        f"{results['compression_total']:.1f}× smaller than AdamW's"
    )
    panels = 2 if results["val_steps"] else 1
    out = io.BytesIO()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style may need what is not installed
        matplotlib.rcParams.update(LOOK)
        figure = Figure(figsize=(2.5 + 4 * panels, 4.2), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_losses(axes[0], results)
        if panels == 2:
            draw_perplexities(axes[1], results)
        for one in axes:
            one.set_xlabel("step")
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(headline, x=0.015, ha="left", fontsize=10, wrap=True)
        figure.savefig(out, format="png")
    return out.getvalue()


def draw_losses(axes: Any, results: Mapping[str, Any]) -> None:
    losses = results["train_losses"]
    few = "o" if len(losses) < 2 else None
    axes.plot(range(1, len(losses) + 1), losses, color=TRAINED, linewidth=0.8, marker=few, label="training")
    window = len(losses) // SMOOTHED
    if window > 1:
        means = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
        label = f"training, mean of the last {window}"
        axes.plot(range(window, len(losses) + 1), means, color=SMOOTH, label=label)
    if results["val_steps"]:
        validated = with_gaps(results["val_losses"])
        axes.plot(results["val_steps"], validated, color=VALIDATED, marker="o", label="validation")
    axes.set_title("Loss")
    axes.legend()


def draw_perplexities(axes: Any, results: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ppls = with_gaps(results["val_ppls"])
    axes.plot(results["val_steps"], ppls, color=VALIDATED, marker="o")
    axes.set_title("Validation perplexity")
    known = [x for x in ppls if x > 0]
    ratio = max(known) / min(known) if known else 1
    if ratio > FAR:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < FAR**4 else (1.0,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if ppls[-1] > 0:
        last = (results["val_steps"][-1], ppls[-1])
        axes.annotate(f"{ppls[-1]:.4g}", last, xytext=(0, 7), textcoords="offset points", ha="right")


def with_gaps(curve: list[float | None]) -> list[float]:
    """Put NaN, which leaves a gap, for None."""
    return [math.nan if x is None else x for x in curve]
