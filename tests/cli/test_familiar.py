"""Commands and flags of other programs: refused in one sentence with the line to type here, which works."""

import re
import shlex
from pathlib import Path

import pytest
from support.called import refused

from ebc_lab.cli import familiar
from ebc_lab.cli.commands import app
from ebc_lab.config.overrides import check_overrides, expand

DOCS = Path(__file__).parent.parent.parent / "docs"
COMMANDS = {command.name or command.callback.__name__ for command in app.registered_commands} | {"ebm"}


def offered(sentence: str) -> list[list[str]]:
    """The command lines of a sentence, in words."""
    return [shlex.split(line) for line in re.findall("`(ebc-lab .*?)`", sentence)]


@pytest.mark.parametrize("word", ["finals", "generate", *familiar.COMMANDS, *familiar.SAME])
def test_a_word_that_is_no_command_is_answered_with_commands_and_pages_that_there_are(word, tmp_path):
    said = refused(word, cwd=tmp_path)
    assert said.startswith(f"error: {word} is ")
    pages = re.findall(r"docs/(\w+\.md)", said)
    lines = offered(said)
    assert lines or pages
    assert all((DOCS / page).exists() for page in pages)
    for _, command, *rest in lines:
        assert command in COMMANDS or command in ("--help", "--version")
        if command == "train":
            settings = [word for word in rest if not word.startswith("-")]
            assert all(check_overrides(overrides) for overrides in expand(settings) if overrides)
        if command == "autopilot":
            check_overrides(rest)


@pytest.mark.parametrize(
    ("typed", "line"),
    [
        ("generate --checkpoint run --prompt 'the cat'", "ebm generate run --prompt 'the cat'"),
        ("finals scale=smoke", "stage finals scale=smoke"),
        ("ebm status", "status"),
        ("train.py --batch-size 8", "train batch_size=8"),
        ("train scale=smoke --lr=1e-3 --seq-len 32", "train scale=smoke optimizer.lr=1e-3 model.context=32"),
        ("autopilot --resume --scale smoke", "autopilot scale=smoke"),
        ("bench --batch_size 16", "bench batch_size=16"),
        ("compare one 'my study'", "diff one 'my study'"),
        ("import 'my runs.csv' --arm 'my opt'", "judge 'my runs.csv' --arm 'my opt'"),
        ("logs 'my study' --follow -n 3", "status 'my study'"),
        ("stop", "cancel STUDY"),
        ("config scale=smoke", "train --cfg=job scale=smoke"),
        ("run --lr 1e-3", "train optimizer.lr=1e-3"),
        ("ebm ls", "list"),
    ],
)
def test_a_line_of_other_programs_comes_back_as_it_is_typed_here(typed, line, tmp_path):
    assert f"type `ebc-lab {line}`" in refused(*shlex.split(typed), cwd=tmp_path)


def test_a_rate_of_a_study_is_not_offered_as_a_setting_that_it_refuses(tmp_path):
    assert "lr_sweep.grids" in refused("autopilot", "--lr", "1e-3", cwd=tmp_path)


def test_a_flag_that_means_nothing_here_is_not_translated_with_the_others(tmp_path):
    said = refused("train", "--lr", "1e-3", "--nothing", "3", cwd=tmp_path)
    assert said.startswith("error: no such option: --lr")
