"""Every flag of Hydra's own command line works under `ebc-lab train`, or is refused in one sentence."""

import re

import pytest
from support.called import answered, refused

from ebc_lab.cli.hydra import flags as hydra_flags
from ebc_lab.cli.hydra.flags import given
from ebc_lab.config.errors import UserError

WORKS = {  # flag as given -> what it prints on stdout
    "--cfg job": "stabilizer:\n  name: ebc",
    "-c job": "stabilizer:\n  name: ebc",
    "--cfg hydra": "  launcher:",
    "--cfg all": "  launcher:",
    "--cfg job --resolve": "stabilizer:\n  name: ebc",
    "--cfg job --package optimizer": "name: adam\n",
    "-c job -p optimizer": "name: adam\n",
    "--info config": "stabilizer:\n  name: ebc",
    "--info defaults": "optimizer",
    "--info defaults-tree": "optimizer: adam",
    "--info plugins": "BasicSweeper",
    "--info searchpath": "structured://",
    "--info": "optimizer: adam",
    "-i all": "optimizer: adam",
    "--version": "Hydra 1.",
    "--help": "stabilizer=none",
    "-h": "stabilizer=none",
}
REFUSED = {  # flag as given -> what is said on stderr
    "--hydra-help": "`ebc-lab train --help` lists the flags",
    "--shell-completion": "--install-completion",
    "-sc install=bash": "--install-completion",
    "--config-path conf": "study=./mine.yaml",
    "-cp conf": "study=./mine.yaml",
    "--config-name other": "study=./mine.yaml",
    "-cn=other": "study=./mine.yaml",
    "--config-dir=conf": "study=./mine.yaml",
    "-cd conf": "study=./mine.yaml",
    "--experimental-rerun a.pickle": "hydra.run.dir=",
    "--resolve": "belongs to --cfg",
    "--package optimizer": "belongs to --cfg",
    "--cfg nothing": "invalid choice",
    "--info nothing": "it takes all, config",
    "--multirun --cfg job": "exclude each other",
    "--run --multirun": "exclude each other",
    "--run --info": "exclude each other",
    "--cfg job --json": "without --cfg",
    "--multrun": "did you mean --multirun",
    "--seed=3": "settings are given without dashes",
}


def test_no_flag_of_hydras_is_forgotten():
    from hydra.main import get_args_parser  # theirs, for this test alone

    flags = {flag for action in get_args_parser()._actions for flag in action.option_strings}
    tried = {word.partition("=")[0] for line in (*WORKS, *REFUSED) for word in line.split()}
    tried |= {"--multirun", "-m", "--run", "-r"}  # below and in test_commands.py
    assert flags <= tried


@pytest.mark.parametrize("flags", WORKS)
def test_a_flag_that_is_offered_works_and_writes_nothing(flags, tmp_path):
    done = answered("train", "scale=smoke", *flags.split(), cwd=tmp_path)
    assert WORKS[flags] in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", REFUSED)
def test_a_flag_that_is_not_offered_is_refused_in_a_sentence(flags, tmp_path):
    assert REFUSED[flags] in refused("train", "scale=smoke", *flags.split(), cwd=tmp_path)


def test_flags_and_settings_may_stand_in_any_order():
    asked = given(["optimizer=adam", "-m", "seed=1,2", "--json", "steps=3"])
    assert asked.overrides == ["optimizer=adam", "seed=1,2", "steps=3"]
    assert asked.multirun
    assert asked.as_json
    assert given(["--info", "scale=smoke"]).overrides == ["scale=smoke"]
    assert given(["-r", "seed=1"]).words == []
    with pytest.raises(UserError, match="no flag of train"):
        given(["--nothing"])


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_names_the_default_every_group_and_fits(width):
    text = hydra_flags.help_text(width)
    assert "stabilizer=none" in text
    assert re.search(r"stabilizer +\[ebc\], ", text)
    assert re.search(r"optimizer +\[adam\], ", text)
    assert all(flag in text for flag in hydra_flags.HELP)
    examples = tuple(hydra_flags.EXAMPLES)
    assert max(len(line) for line in text.splitlines() if not line.strip().startswith(examples)) <= width
    refused = [flag for flag in hydra_flags.REFUSED if flag in text]
    assert refused == []


def test_a_name_has_a_line_of_its_own_only_where_it_is_wider_than_its_column():
    fits, too_long = "a" * 26, "b" * 27
    lines = hydra_flags._listed({fits: "first", too_long: "second"}, 80)
    assert lines == [f"  {fits}  first", f"  {too_long}", f"{'':30}second"]
