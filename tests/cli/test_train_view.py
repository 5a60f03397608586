"""What `ebc-lab train` shows of a run while it trains and at its end, on a terminal and off it."""

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console
from support.runs import plain as plain_run
from support.runs import short_run

from ebc_lab.cli import train_view
from ebc_lab.cli.train import train_one
from ebc_lab.cli.train_view import RunView
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import read_columns
from ebc_lab.training.outcome import run_and_record


@pytest.fixture(scope="module")
def run(tiny):
    """A run of 120 steps whose every step is clipped, resolved."""
    settled = ("dtype=float32", "threads_per_run=1", "compile=off")
    asked = ("optimizer.lr=2e-2", "steps=120", "audit_every=10", "budget.target_kl=1e-3")
    return short_run(tiny, *settled, *asked)


def lines_of(run, directory, *, terminal: bool, width: int = 80) -> list[str]:
    """What a view of a run shows while it trains, drawn as often as it is told of a step."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=width, highlight=False)
    view = RunView(run, directory, console)
    view.every_s = 0.0
    with view.shown():
        run_and_record(run, directory, "run", on_progress=view)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]


@pytest.mark.thorough
def test_off_a_terminal_a_line_says_how_far_the_run_is(run, tmp_path):
    last = lines_of(run, tmp_path, terminal=False)[-1]
    steps = read_columns(RunFiles(tmp_path).steps)
    audits = steps["applied_kl"][steps["applied_kl"] == steps["applied_kl"]] / 1e-3
    shown = re.fullmatch(
        r"step 120/120, \d+\.\d steps/s, 0 s left: loss (\S+), val (\S+), c (\S+), KL/δ\* (\S+)", last
    )
    assert shown, last
    assert float(shown[2]) == pytest.approx(read_columns(RunFiles(tmp_path).evals)["val_loss"][-1], abs=6e-4)
    assert 0 < float(shown[3]) < 1
    assert float(shown[4]) in [pytest.approx(ratio, abs=0.006) for ratio in audits]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("width", "shown"), [(60, r"loss .*…"), (80, r"loss \d\.\d+, val \d\.\d+, c 0\.\d+, KL/δ\* \S+")]
)
def test_on_a_terminal_a_line_keeps_step_and_speed_and_has_a_bar_below(run, tmp_path, width, shown):
    *_, line, bar = lines_of(run, tmp_path, terminal=True, width=width)
    assert len(line) <= width
    assert re.fullmatch(rf"step 120/120, \d+\.\d steps/s, 0 s left: {shown}", line), line
    assert bar == "━" * 40


def test_a_plain_run_shows_no_c(run, tmp_path):
    plain = replace(plain_run(run), steps=60)
    assert re.search(r": loss \S+, val \d\.\d+$", lines_of(plain, tmp_path, terminal=False)[-1])


def closing(run, directory, capsys) -> list[str]:
    train_one(run, directory, 1e9)
    return capsys.readouterr().out.splitlines()


def test_a_run_that_was_clipped_says_c_and_kl_and_says_it_again(run, tmp_path, capsys):
    first = closing(run, tmp_path, capsys)
    assert first[0].startswith("completed after 120 steps; val ")
    assert re.fullmatch(
        r"c: median 0\.\d\d, \d+% of the steps clipped; applied KL: median \d\.\d\d times the target "
        r"\(target_kl=0\.001\), on \d+% of \d+ audited clipped steps within ±30% of it\.",
        first[1],
    )
    assert closing(run, tmp_path, capsys) == [f"trained before: {first[0]}", first[1]]


@pytest.mark.thorough
def test_a_run_that_was_never_clipped_says_so_and_what_that_means(run, tmp_path, capsys):
    free = replace(run, budget=replace(run.budget, target_kl=50.0))
    said = closing(free, tmp_path / "free", capsys)[1]
    assert said.startswith(
        "c = 1 throughout: the budget never limited an update; updates moved the predictions"
    )
    assert said.endswith("nats/token, less than target_kl=50, so this is the optimizer without EBC.")
    assert len(closing(plain_run(run), tmp_path / "plain", capsys)) == 1


RESULT = {"outcome": "completed", "steps": 9, "val_loss": 2.5, "test_loss": None, "c_median": 1.0}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (
            {"clip_rate": 0.001, "kl_within_30pct": None},
            "c: median 1.00, less than 1% of the steps clipped; none of them was audited (audit_every=10).",
        ),
        ({"clip_rate": 1.0, "c_median": 0.00042, "kl_within_30pct": None}, "c: median 0.0004, 100% of"),
        ({"clip_rate": 0.0, "kl_median": None}, "c = 1 throughout: the budget never limited an update."),
        (
            {"clip_rate": 0.0, "kl_median": 0.02},
            "updates moved the predictions by a median of 0.02 nats/token, target_kl=0.001.",
        ),
    ],
)
def test_a_closing_line_says_no_more_than_was_measured(run, tmp_path, result, words):
    lines = list(train_view.closing_lines(run, RESULT | result, tmp_path, earlier=False))
    assert lines[0] == f"completed after 9 steps; val 2.5000; {tmp_path}"
    assert words in lines[1]


def test_a_run_that_failed_says_its_cause_alone(run, tmp_path):
    for steps, said in ((0, "0 steps"), (1, "1 step")):
        result = {"outcome": "oom", "cause": "MemoryError", "steps": steps}
        lines = list(train_view.closing_lines(run, result, tmp_path, earlier=False))
        assert lines == [f"oom after {said}; MemoryError; {tmp_path}"]
