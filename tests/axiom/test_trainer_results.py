"""Results of the trainer: their names, their files, and the picture."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from axiom.trainer_helpers import Tiny, batches, quiet, tiny
from torch import Tensor

from ebc_lab.axiom import trainer as module
from ebc_lab.axiom import trainer_results

RESULTS = [
    *("train_losses", "initial_train_loss", "final_train_loss", "train_improvement_pct"),
    *("val_losses", "val_steps", "val_ppls", "initial_val_ppl", "final_val_ppl", "val_improvement_pct"),
    *("peak_vram_gb", "peak_gradient_bytes", "tokens_per_sec", "total_time_min"),
    *("compression_state", "compression_gradients", "compression_total", "steps"),
]


@pytest.fixture
def undrawn(monkeypatch):
    """Results are written without drawing, which takes a while."""
    monkeypatch.setattr(trainer_results, "picture", lambda results, title: b"a picture")


def test_results_before_training_have_no_figures():
    results = quiet(tiny(), batches()).results()
    assert list(results) == RESULTS
    assert results["steps"] == 0
    assert [results[name] for name in RESULTS[1:4]] == [None] * 3
    assert results["tokens_per_sec"] is None
    assert f"{results['peak_vram_gb']:.2f}" == "0.00"


def test_results_are_drawn_and_written_whole(tmp_path):
    from matplotlib import image, rc_context

    folder = tmp_path / "new" / "results"
    trainer = quiet(
        tiny(), batches(), batches(2), save_results=True, results_dir=folder, results_prefix="a $x"
    )
    with rc_context({"text.usetex": True, "savefig.dpi": 1000}):  # of a reader without LaTeX
        results = trainer.fit(50)
    assert sorted(p.name for p in folder.iterdir()) == ["a $x.json", "a $x.png"]
    assert json.loads((folder / "a $x.json").read_text()) == results == trainer.results()
    assert list(results) == RESULTS
    losses = results["train_losses"]
    assert results["initial_train_loss"] == losses[0]
    assert results["final_train_loss"] == losses[49]
    assert results["train_improvement_pct"] == 100 * (losses[0] - losses[49]) / losses[0]
    ppls = results["val_ppls"]
    assert results["val_improvement_pct"] == 100 * (ppls[0] - ppls[-1]) / ppls[0]
    assert results["tokens_per_sec"] * results["total_time_min"] * 60 > 50 * 3 * 5
    drawn = image.imread(folder / "a $x.png")
    assert drawn.shape[:2] == (504, 1260)
    assert len(set(map(tuple, drawn[::5, ::5].reshape(-1, 4).tolist()))) > 20


def test_figures_that_are_not_finite_are_null(tmp_path, undrawn):
    class Far(Tiny):
        def forward(self, input_ids: Tensor, labels: Tensor) -> Any:
            return super().forward(input_ids, labels) + 1000

    trainer = quiet(Far(), batches(), batches(), save_results=True, results_dir=tmp_path)
    results = trainer.fit(1)
    assert results["val_ppls"] == [None, None]
    assert results["final_val_ppl"] is None
    assert results["val_improvement_pct"] is None
    text = (tmp_path / "axiom.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == results


def test_a_missing_matplotlib_is_found_before_training(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    trainer = quiet(tiny(), batches(), save_results=True, results_dir=tmp_path)
    with pytest.raises(ImportError, match="install it, or set save_results=False"):
        trainer.fit(1)
    assert trainer.step == 0
    quiet(tiny(), batches()).fit(1)


def test_time_between_two_calls_of_fit_does_not_count(tmp_path, monkeypatch):
    clock = itertools.count(0, 1.0)
    monkeypatch.setattr(module.time, "perf_counter", clock.__next__)
    trainer = quiet(tiny(), batches())
    trainer.fit(1)
    minutes = trainer.results()["total_time_min"]
    for _ in range(1000):
        next(clock)
    path = trainer.save_checkpoint(path=tmp_path / "a.pt")
    trainer.load_checkpoint(path)
    assert trainer.results()["total_time_min"] == minutes
    assert trainer.fit(1)["total_time_min"] == 2 * minutes
    assert trainer.results()["tokens_per_sec"] == 3 * 5  # two ticks are a second


@pytest.mark.parametrize(
    ("ppls", "scale"), [([25.0, 20.0], "linear"), ([2000.0, 20.0], "log"), ([None, None], "linear")]
)
def test_perplexities_that_lie_far_apart_have_a_logarithmic_axis(ppls, scale):
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    trainer_results.draw_perplexities(axes, {"val_ppls": ppls, "val_steps": [0, 10]})
    assert axes.get_yscale() == scale


@pytest.mark.usefixtures("undrawn")
def test_results_lie_in_lines_and_their_time_grows(tmp_path):
    trainer = quiet(tiny(), batches(), save_results=True, results_dir=tmp_path, results_prefix="a")
    times = [trainer.fit(steps)["total_time_min"] for steps in (3, 6, 9)]
    assert 0 < times[0] < times[1] < times[2]
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert [line.startswith(' "') for line in (lines[1], lines[-2])] == [True, True]
