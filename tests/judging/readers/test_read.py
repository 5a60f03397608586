"""Which reader reads what lies at a path, and how several files become one table."""

from __future__ import annotations

import gzip
import math
import os
import re
from pathlib import Path

import pytest
from support.runs_of_others import written

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.readers import read


def test_folders_of_csv_files_are_runs_named_by_their_places(tmp_path: Path) -> None:
    for arm in ("adam", "muon"):
        for seed in (0, 1):
            written(tmp_path / arm / f"seed{seed}" / "metrics.csv", f"step,val_loss\n1,3\n2,{2 + seed}\n")
    written(tmp_path / ".git" / "old.csv", "step,val_loss\n1,9\n")
    (source,) = read([tmp_path], Asked())
    frame = source.frame
    assert len(frame) == 8
    assert list(frame.run.unique()) == ["adam/seed0", "adam/seed1", "muon/seed0", "muon/seed1"]
    assert list(frame.folder1.unique()) == ["adam", "muon"]
    assert list(frame.groupby("run", observed=True).seed.first()) == ["0", "1", "0", "1"]
    assert source.roles == {"run": "run", "arm": "folder1"}


def test_a_file_an_arm_with_its_seeds_in_a_column(tmp_path: Path) -> None:
    files = [
        written(tmp_path / f"{arm}.csv", "seed,step,val_loss\n0,1,3\n1,1,2\n") for arm in ("adam", "muon")
    ]
    (source,) = read(files, Asked())
    assert list(source.frame.file) == ["adam", "adam", "muon", "muon"]
    assert "run" not in source.frame


def test_rows_that_are_runs_stay_runs_when_files_are_joined(tmp_path: Path) -> None:
    files = [written(tmp_path / f"{arm}.csv", "seed,val_loss\n0,3\n1,2\n") for arm in ("adam", "muon")]
    (source,) = read(files, Asked())
    assert "run" not in source.roles
    assert len(source.frame) == 4


def test_the_most_specific_format_is_read_and_the_others_are_named(tmp_path: Path) -> None:
    written(tmp_path / "chart.csv", '"Step","a - loss","a - loss__MIN"\n1,2,2\n')
    written(tmp_path / "other.csv", "step,val_loss\n1,2\n")
    (source,) = read([tmp_path], Asked())
    assert list(source.frame.run) == ["a"]
    assert any("other.csv" in note and "not" in note for note in source.notes)


def test_files_of_two_formats_that_are_both_named_are_both_read(tmp_path: Path) -> None:
    files = [
        written(tmp_path / "a.csv", "step,val_loss\n1,2\n"),
        written(tmp_path / "b.jsonl", '{"step": 1, "val_loss": 2}\n'),
    ]
    assert len(read(files, Asked())) == 2


def test_logs_by_pattern_are_a_run_a_file(tmp_path: Path) -> None:
    for name in ("adam_0", "adam_1", "muon_0", "muon_1"):
        written(tmp_path / f"{name}.txt", "begin\nstep:1/2 val_loss:3\nstep:2/2 val_loss:nan\n")
    written(tmp_path / "README.md", "how these were made\n")
    pattern = r"step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<loss>\S+)"
    (source,) = read([tmp_path], Asked(pattern=pattern))
    assert list(source.frame.loss) == [3, math.inf] * 4
    assert list(source.frame.file.unique()) == ["adam", "muon"]
    assert list(source.frame.run.unique()) == ["adam_0", "adam_1", "muon_0", "muon_1"]
    assert any("README.md" in note for note in source.notes)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("log.txt", "step:1 val_loss:3\n", "--pattern"),
        ("config.json", '{"lr": 1}', "none of the formats"),
        ("", "", "none of the formats"),
    ],
)
def test_what_no_reader_claims_is_said_in_a_sentence(
    tmp_path: Path, name: str, text: str, sentence: str
) -> None:
    if name:
        written(tmp_path / name, text)
    with pytest.raises(UserError, match=sentence):
        read([tmp_path / name], Asked())


LAUGHS = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9) if n else 1}]\n" for n in range(12))
DAMAGED = {  # what no writer writes, though it begins as its format does
    "entries": ("trainer_state.json", b'{"global_step": 1, "log_history": [[1]]}'),
    "nested": ("runs.jsonl", b'{"loss":' * 9999 + b"1" + b"}" * 9999),
    "nested array": ("runs.json", b"[ " * 9999),
    "deflated": ("runs.csv.gz", gzip.compress(b"arm,val_loss\n" * 99)[:10] + b"\xff" * 40),
    "aliases": ("mlruns/7/ab/meta.yaml", b"run_id: ab\n" + LAUGHS.encode()),
    "levels": ("mlruns/7/ab/meta.yaml", b"run_id: " + b"[" * 99_999),
    "itself": ("mlruns/7/ab/meta.yaml", b"run_id: &a [*a]"),
    "settings": ("0/.hydra/config.yaml", LAUGHS.encode()),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_named_in_a_sentence(tmp_path: Path, kind: str) -> None:
    name, content = DAMAGED[kind]
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    if kind == "settings":
        written(tmp_path / "0" / ".hydra" / "overrides.yaml", "[]")
        written(tmp_path / "0" / "metrics.csv", "step,val_loss\n1,3\n")
    with pytest.raises(UserError, match=re.escape(path.name)) as caught:
        read([tmp_path], Asked())
    assert "\n" not in str(caught.value)


def test_settings_of_lightning_that_stand_for_too_much_are_left_out_and_said_so(tmp_path: Path) -> None:
    written(tmp_path / "version_0" / "metrics.csv", "step,val_loss\n1,3\n")
    written(tmp_path / "version_0" / "hparams.yaml", LAUGHS)
    (source,) = read([tmp_path], Asked())
    assert source.notes[0].startswith("everything in ")


def test_a_place_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no file or folder"):
        read([tmp_path / "nowhere.csv"], Asked())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_a_folder_is_passed_over_and_a_pipe_itself_is_refused(tmp_path: Path) -> None:
    written(tmp_path / "a.csv", "arm,val_loss\nadam,1\n")
    names = ["b.csv", "c.jsonl", "metrics.csv", "run-1.wandb", "d.db", "trainer_state.json", "x.tfevents.1"]
    for name in names:
        os.mkfifo(tmp_path / name)
    (source,) = read([tmp_path], Asked())
    assert len(source.frame) == 1
    with pytest.raises(UserError, match="is no file, but a pipe"):
        read([tmp_path / "b.csv"], Asked())
