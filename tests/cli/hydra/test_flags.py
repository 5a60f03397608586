"""Every flag of Hydra's own command line works under `ebc-lab train`, or is refused in one sentence."""

import re
from argparse import ArgumentParser

import pytest
from support.called import answered, refused

from ebc_lab import __version__
from ebc_lab.cli.hydra.flags import EXAMPLES

WORKS = {  # flag as given -> what it prints on stdout
    "--cfg job": "stabilizer:\n  name: ebc",
    "--cfg all": "  launcher:",
    "--cfg job --resolve": "stabilizer:\n  name: ebc",
    "--cfg job --package optimizer": "name: adam\n",
    "-c job -p optimizer": "name: adam\n",
    "--info config": "stabilizer:\n  name: ebc",
    "--info defaults-tree": "optimizer: adam",
    "--info plugins": "BasicSweeper",
    "--info searchpath": "structured://",
    "-i all": "optimizer: adam",
    "--version": f"ebc-lab {__version__}\n",
    "--help": "stabilizer=none",
    "-h": "stabilizer=none",
}
REFUSED = {  # flag as given -> what is said on stderr
    "--hydra-help": "type `ebc-lab train scale=smoke --help`",
    "--shell-completion": "--install-completion",
    "-sc install=bash": "no such option: -s",
    "--config-path conf": "study=./mine.yaml",
    "--config-name other": "study=./mine.yaml",
    "--config-dir=conf": "launcher=mine for conf/launcher/mine.yaml, or named by their path",
    "--experimental-rerun a.pickle": "hydra.run.dir=",
    "--resolve": "belongs to --cfg",
    "--package optimizer": "belongs to --cfg",
    "--cfg nothing": "it takes job, hydra or all",
    "--info": "requires an argument",
    "--info nothing": "it takes all, config",
    "--multirun --cfg job": "exclude each other",
    "--run --multirun": "exclude each other",
    "--run --info all": "exclude each other",
    "--cfg job --json": "without --cfg",
    "--multrun": "--multirun",
    "--seed=3": "settings are given without dashes",
    "hydra.searchpath=[file://conf] launcher=mine": "launcher=mine for conf/launcher/mine.yaml",
}


def test_no_flag_of_hydras_is_forgotten(monkeypatch):
    from hydra.main import get_args_parser  # theirs, for this test alone

    monkeypatch.setattr(ArgumentParser, "_check_help", lambda *_: None, raising=False)  # as `train`

    flags = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    tried = {word.partition("=")[0] for line in (*WORKS, *REFUSED) for word in line.split()}
    tried |= {"--multirun", "-m", "--run", "-r"}  # below and in test_commands.py
    assert flags - {"-cp", "-cn", "-cd"} <= tried  # which are -c p, -c n and -c d here


@pytest.mark.parametrize("flags", WORKS)
def test_a_flag_that_is_offered_works_and_writes_nothing(flags, tmp_path):
    done = answered("train", "scale=smoke", *flags.split(), cwd=tmp_path)
    assert WORKS[flags] in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_that_is_not_offered_is_refused_in_a_sentence(flags, tmp_path):
    assert REFUSED[flags] in refused("train", "scale=smoke", *flags.split(), cwd=tmp_path)


def test_flags_and_settings_may_stand_in_any_order(tmp_path):
    words = ["optimizer=sgd", "--cfg", "job", "seed=3", "-p", "optimizer", "scale=smoke"]
    assert "name: sgd" in answered("train", *words, cwd=tmp_path).stdout


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_names_the_default_every_group_and_fits(width, tmp_path):
    text = answered("train", "--help", cwd=tmp_path, COLUMNS=str(width)).stdout
    assert re.search(r"stabilizer +\[ebc\], ", text)
    assert re.search(r"optimizer +\[adam\], ", text)
    assert all(example in text for example in EXAMPLES)
    examples = tuple(EXAMPLES)
    assert max(len(line) for line in text.splitlines() if not line.strip().startswith(examples)) <= width
