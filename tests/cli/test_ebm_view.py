"""What `ebc-lab train workload=ebm` shows while it trains, on a terminal and off it."""

import io
import json
import re
import shutil

import pytest
from rich.console import Console
from support.ebm_runs import eventful, tiny_ebm

from ebc_lab.cli import ebm_view
from ebc_lab.cli.train import train_one
from ebc_lab.cli.train_view import RunView
from ebc_lab.records.paths import RunFiles
from ebc_lab.records.streams import NewRows, read_columns
from ebc_lab.training.outcome import run_and_record

ALERT = {"step": 20, "cause": "load_max", "figure": 0.7, "threshold": 0.6, "verdict": "alert"}
ALERT["recommendation"] = "raise ebm.balance: one expert takes most places"


@pytest.fixture(scope="module")
def run(text_file):
    return eventful(tiny_ebm(text_file))


def shown(run, directory, *, terminal: bool = False, **hooks) -> str:
    """What a view prints of a run that is trained with it."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=150, highlight=False)
    directory.mkdir(exist_ok=True)
    with RunView(run, directory, console).shown() as view:
        run_and_record(run, directory, "run", on_progress=view, **hooks)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def trained(run, tmp_path_factory):
    """(The folder of a finished run, which tests must not change; what was printed off a terminal.)"""
    folder = tmp_path_factory.mktemp("ebm") / "run"
    return folder, shown(run, folder)


@pytest.mark.thorough
def test_off_a_terminal_each_evaluation_is_a_line(trained):
    folder, text = trained
    lines = text.splitlines()
    files = RunFiles(folder)
    evals, steps = read_columns(files.evals), read_columns(files.steps)
    lines = [line for line in lines if not line.startswith("alert")]
    assert len(lines) == len(evals["step"]) == 3
    assert not any("\x1b" in line for line in lines)
    last, told = evals["val_loss"][-1], lines[-1]
    assert told.startswith("step 30/30  ")
    assert f"val loss {last:.4f}  bits/char {last / 0.693147:.3f}  " in told
    since = steps["loss"][20:]
    assert f"ce {since.mean():.3g}," in told
    for level, name in (("0.05", "0p05"), ("0.5", "0p5")):
        pair = [f"{evals[f'{kind}_{name}'][-1]:.3g}".replace("-", "−") for kind in ("r2", "matched")]
        assert f"{level}: {pair[0]}/{pair[1]}" in told
    loads = ", ".join(f"{steps[f'load_{e}'][20:].mean():.0%}" for e in range(4))
    assert f"experts {loads}" in told
    for name in ("steps/s", "mle", "dsm", "noised", "balance", "z ", "energy", "κ", "covered", "soc_rate"):
        assert name in told, name


def test_on_a_terminal_each_evaluation_stays_above_the_bar(run, tmp_path):
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown(run, tmp_path, terminal=True))
    steps = re.findall(r"step (\d+)/30  steps/s \S+  val loss ", text)
    assert steps == ["10", "20", "30"]
    assert "━" in text


@pytest.mark.thorough
def test_a_model_without_splats_and_experts_shows_what_it_has(text_file, tmp_path):
    run = tiny_ebm(text_file, "ebm.splats=0", "decoder=transformer")
    line = shown(run, tmp_path / "plain").splitlines()[-1]
    assert "val " in line
    assert not re.search("energy|R²|κ|covered|soc_rate|experts|dsm", line)


def test_alerts_are_shown_with_the_evaluation_that_raised_them(run, trained, tmp_path):
    console = Console(file=io.StringIO(), width=150, highlight=False)
    folder = shutil.copytree(trained[0], tmp_path / "run")
    files = RunFiles(folder)
    files.alerts.write_text(f"{json.dumps(ALERT | {'step': 10})}\n{json.dumps(ALERT)}\n")
    rows = files.evals.read_text().splitlines(keepends=True)
    files.evals.unlink()
    with RunView(run, folder, console).shown() as view:
        view(5)
        files.evals.write_text("".join(rows[:3]))
        view(20)
    text = console.file.getvalue()
    said = "alert at step 20: load_max 0.7, threshold 0.6: raise ebm.balance: one expert takes most places"
    assert said in text
    assert text.count("alert") == 1


def test_a_line_that_is_still_being_written_waits(tmp_path):
    path = tmp_path / "evals.csv"
    path.write_text("step,val_loss\n10,2.5\n20,2.")
    rows = NewRows(path)
    assert rows.read() == [{"step": 10, "val_loss": 2.5}]
    assert rows.read() == []
    with path.open("a") as file:
        file.write("25\n")
    assert rows.read() == [{"step": 20, "val_loss": 2.25}]
    other = tmp_path / "other"
    other.write_text("step,val_loss\n10,\n")
    other.replace(path)  # another attempt begins
    [row] = rows.read()
    assert row["step"] == 10
    assert row["val_loss"] != row["val_loss"]


@pytest.mark.thorough
def test_bits_per_character_divide_by_the_characters_of_a_token(text_file, tmp_path, capsys):
    pytest.importorskip("tokenizers")
    result = train_one(tiny_ebm(text_file, "tokens=bpe", "tokens.size=300"), tmp_path, 1e9)
    line = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")][-1]
    loss, bits = map(float, re.search(r"val loss (\S+)  bits/char (\S+)", line).groups())
    of_test = result["test_loss"] / result["test_bits_per_char"]  # nats a token over bits a character
    assert loss / bits == pytest.approx(of_test, rel=0.1)
    assert of_test > 1.2  # of characters it is ln 2


def test_of_a_model_without_splats_only_losses_are_shown(capsys):
    sampled = {"tokens": 64, "sampled": None, "problem": "nothing to sample from"}
    losses = {"loss": 2.0, "loss_se": 0.1, "sampled_loss": sampled, "baselines": {"unigram": 3.0}}
    about = {"model": "x", "step": 3, "split": "val", "tokens": 64, "characters_per_token": 1.0}
    ebm_view.show_measured({**about, **losses, "levels": []})
    *table, last = capsys.readouterr().out.splitlines()
    assert re.search(r"^loss +2\.0000 +7\.39 +2\.885 +± 0\.1000", "\n".join(table), re.MULTILINE)
    assert "nothing to sample from" in "\n".join(table)
    assert last == "no splats: no energy, no score"
