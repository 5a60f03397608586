"""The table at the end of `ebc-lab train -m`."""

import io
import re

import pytest
from rich.console import Console
from support.called import SMALL_RUN, answered, called

from ebc_lab.cli import sweep_view
from ebc_lab.config.compose import compose
from ebc_lab.records.json_files import read_json, write_checksummed

KEYS = ["optimizer.lr", "stabilizer"]


@pytest.fixture(scope="module")
def small(text_file):
    how = ["eval_every=1000", "dtype=float32", "threads_per_run=1"]
    return [*SMALL_RUN, *how, "data=path", f"data.file={text_file}"]


def rows(text: str) -> list[list[str]]:
    """The cells of the table's lines, from its head on."""
    lines = text.splitlines()
    [head] = [i for i, line in enumerate(lines) if line.startswith("job ")]
    return [re.split(r" {2,}", line.strip()) for line in lines[head:]]


def test_a_sweep_ends_in_a_table_of_its_runs(small, tmp_path):
    asked = ["tokens=3200,6400", "stabilizer=ebc,none", "budget.target_kl=50", "hydra.sweep.dir=many"]
    named = "hydra.sweep.subdir=job_${hydra.job.num}"
    done = answered("train", "-m", *small, *asked, named, cwd=tmp_path)
    head, *found, note = rows(done.stdout)
    assert head == ["job", "train_tokens", "stabilizer", "val loss", "c", "KL/δ*", "time"]
    results = [read_json(tmp_path / f"many/job_{i}/result.json") for i in range(4)]
    assert [result["steps"] for result in results] == [20, 20, 40, 40]
    losses = [result["val_loss"] for result in results]
    for i, row in enumerate(found):
        tokens, stabilizer = ("3200", "6400")[i // 2], ("ebc", "none")[i % 2]
        c = "1" if stabilizer == "ebc" else "–"
        last = "completed, best" if i == losses.index(min(losses)) else "completed"
        assert row == [str(i), tokens, stabilizer, f"{losses[i]:.4f}", c, "–", row[6], last]
    assert note == ["c = 1: the budget never limited an update"]


@pytest.mark.thorough
def test_a_sweep_that_a_failure_ends_shows_what_there_is(small, tmp_path):
    asked = ["steps=12", "controller=fixed,energy,log_pi", "hydra.sweep.dir=many"]
    done = called("train", "-m", *small, *asked, cwd=tmp_path)
    assert done.returncode == 2
    assert "controller=energy needs controller.a" in done.stderr
    found = rows(done.stdout)[1:4]
    assert [row[-1] for row in found] == ["completed, best", "not finished", "not begun"]


RESULTS = (
    {"outcome": "completed", "val_loss": 2.5, "clip_rate": 0.9, "c_median": 0.4567, "kl_ratio_median": 1.02},
    {"outcome": "diverged", "cause": "the loss is not finite", "val_loss": None, "clip_rate": 1.0},
    {"outcome": "failed", "cause": "RuntimeError: a sentence that is far too long for one line of a table"},
)


COMBINATIONS = [["scale=smoke", f"optimizer.lr={lr}", "steps=9"] for lr in (0.01, 0.1, 1)]


def record(folder, overrides, result) -> None:
    """A job as Hydra and a run leave it."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra/overrides.yaml").write_text("".join(f"- {o}\n" for o in overrides))
    write_checksummed(folder / "result.json", result | {"wall_s": 100.0})


def shown(combinations, runs, folder, width) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    sweep_view.show(console, sweep_view.jobs(combinations, runs, folder), folder)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_it_fits_a_terminal_and_says_how_runs_ended(width, tmp_path):
    runs = [compose(c, study=False) for c in COMBINATIONS]
    for i, (overrides, result) in enumerate(zip(COMBINATIONS, RESULTS, strict=True)):
        record(tmp_path / str(i), overrides, result)
    text = shown(COMBINATIONS, runs, tmp_path, width)
    assert max(map(len, text.splitlines()[2:])) <= width
    table = rows(text)
    assert table[1] == ["0", "0.01", "2.5000", "0.46", "1.02", "1 min 40 s", "completed, best"]
    assert table[2][:5] == ["1", "0.1", "–", "–", "–"]
    assert "diverged: the loss is not finite" in text
    assert "failed: RuntimeError" in text
    (tmp_path / "0/result.json").write_text("{}")  # damaged
    assert sweep_view.jobs(COMBINATIONS, runs, tmp_path)[0].result == {}


def test_values_are_shown_as_they_were_given_and_a_small_c_is_not_0(tmp_path):
    combinations = [["scale=smoke", f"data.file=a\\ {name}\\:1"] for name in "bc"]
    record(tmp_path / "0", combinations[0], RESULTS[0] | {"c_median": 0.0031})
    runs = [compose(["scale=smoke"], study=False)] * 2
    table = rows(shown(combinations, runs, tmp_path, 120))
    assert table[1][:4] == ["0", "a b:1", "2.5000", "0.003"]


def test_one_run_and_runs_without_a_result_have_no_table(tmp_path):
    runs = [compose(c, study=False) for c in COMBINATIONS[:2]]
    assert shown(COMBINATIONS[:2], runs, tmp_path, 80) == ""
    record(tmp_path / "0", COMBINATIONS[0], RESULTS[0])
    assert shown(COMBINATIONS[:1], runs[:1], tmp_path, 80) == ""
    assert shown(COMBINATIONS[:2], runs, tmp_path, 80) != ""


def test_keys_that_end_alike_are_written_out():
    keys = ["model.name", "optimizer.name", "optimizer.lr"]
    assert [sweep_view._short(key, keys) for key in keys] == ["model.name", "optimizer.name", "lr"]
