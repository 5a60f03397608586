"""The flags of `ebc-lab train`: those of Hydra's that work here, why others do not, and `train --help`."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from ebc_lab.config.errors import UserError, any_of, nearest, shown

from ..familiar import is_script, of_flags

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
OWN_FILES = (
    "settings are those of ebc-lab; a study of your own is `study=./mine.yaml`, a part `my_opt.py:Mine`"
)
REFUSED = {  # a flag of Hydra's -> why it is none of ours, and what is
    "--hydra-help": "`ebc-lab train --help` lists the flags of Hydra that work here",
    "--shell-completion": "`ebc-lab --install-completion` completes commands and settings in your shell",
    "--config-path": OWN_FILES,
    "--config-name": OWN_FILES,
    "--config-dir": OWN_FILES,
    "--experimental-rerun": "the same command with hydra.run.dir= the run's folder continues a run, and "
    "`ebc-lab train from=FOLDER/spec.json` trains it again",
}
SHORT = {"-sc": "--shell-completion", "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir"}
HELP = {  # flag as it is written -> what it does
    "-m, --multirun": "one run per combination: optimizer.lr=1e-3,2e-3 or range(…), glob(…)",
    f"-c, --cfg {'|'.join(CFG)}": "print the settings instead of training",
    "--resolve": "with --cfg: references between settings filled in",
    "-p, --package PATH": "with --cfg: print only this part of the settings, such as optimizer",
    "-i, --info [WHAT]": f"how Hydra composed them: {', '.join(INFO)}",
    "-r, --run": "train one run, which is the default",
    "--json": "print one JSON object at the end; progress goes to stderr",
    "--version": "print the versions of ebc-lab and Hydra",
    "-h, --help": "print this",
}
FLAGS = [word for flag in HELP for word in flag.replace(",", "").split() if word.startswith("-")]
EXAMPLES = {
    "ebc-lab train scale=smoke": "a few seconds, to see it work",
    "ebc-lab train stabilizer=none optimizer=muon": "Muon alone, without EBC",
    "ebc-lab train budget.target_kl=0.02 seed=1": "EBC with another budget, another seed",
    "ebc-lab train optimizer=custom optimizer.target=./my_opt.py:Mine": "an optimizer of your own",
    "ebc-lab train -m scale=smoke stabilizer=none,ebc optimizer.lr=1e-3,2e-3": "four runs and their table",
    "ebc-lab train scale=smoke --cfg job": "its settings, and nothing trained",
}


@dataclass(frozen=True)
class Given:
    """What a command line of `train` asks for."""

    overrides: list[str]
    run: bool = False
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    package: str | None = None
    info: str | None = None
    as_json: bool = False
    version: bool = False
    help: bool = False

    @property
    def trains(self) -> bool:
        return self.cfg is None and self.info is None

    @property
    def words(self) -> list[str]:
        """The flags as Hydra takes them, to stand before all overrides."""
        flags = ["--multirun"] if self.multirun else []
        flags += ["--cfg", self.cfg] if self.cfg else []
        flags += ["--resolve"] if self.resolve else []
        flags += ["--package", self.package] if self.package else []
        return [*flags, *(["--info", self.info] if self.info else [])]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.replace('argument ', '')}: `ebc-lab train --help` lists the flags.")


def given(arguments: Sequence[str]) -> Given:
    """Read the arguments of `train`; flags and overrides may stand in any order. Raises UserError."""
    for word in arguments:
        flag = word.partition("=")[0]
        if flag := next((f for f in (flag, SHORT.get(flag, "")) if f in REFUSED), ""):
            raise UserError(f"{flag} of Hydra is not offered: {REFUSED[flag]}.")
    known, unknown = _parser().parse_known_intermixed_args(list(arguments))
    ebm = arguments[:1] == ["workload=ebm"]  # as `ebc-lab ebm train` hands it on
    path, words = ["ebm"] * ebm + ["train"], arguments[ebm:]
    if (unknown or is_script(words)) and (told := of_flags(path, FLAGS, words)):
        raise UserError(told)
    for word in [word for word in unknown if not of_flags(path, FLAGS, [word])]:
        near = nearest(word, FLAGS) or ": settings are given without dashes, as scale=smoke"
        raise UserError(f"{shown(word)} is no flag of train{near}; `ebc-lab train --help` lists them.")
    asked = Given(**vars(known))
    if asked.info is not None and "=" in asked.info:  # an override behind --info without a word of its own
        asked = Given(**{**vars(asked), "info": "all", "overrides": [asked.info, *asked.overrides]})
    if asked.info not in (None, *INFO):
        raise UserError(f"--info {shown(asked.info)} is unknown: it takes {any_of(INFO)}.")
    return _consistent(asked)


def _consistent(asked: Given) -> Given:
    """The same, unless its flags contradict each other. Raises UserError."""
    one_of = {"--run": asked.run, "--multirun": asked.multirun, "--cfg": asked.cfg, "--info": asked.info}
    together = [flag for flag, value in one_of.items() if value]
    if len(together) > 1:
        raise UserError(f"{' and '.join(together)} exclude each other: give one of them.")
    for flag, value in (("--resolve", asked.resolve), ("--package", asked.package)):
        if value and asked.cfg is None:
            raise UserError(f"{flag} belongs to --cfg job, which prints the settings: give both.")
    if asked.as_json and not asked.trains:
        raise UserError("--json tells what a run came to: without --cfg and --info.")
    return asked


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="ebc-lab train", add_help=False, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*")
    for flags in (("-r", "--run"), ("-m", "--multirun"), ("--resolve",), ("--version",), ("-h", "--help")):
        parser.add_argument(*flags, action="store_true")
    parser.add_argument("--json", action="store_true", dest="as_json")
    parser.add_argument("-c", "--cfg", choices=CFG)
    parser.add_argument("-p", "--package")
    parser.add_argument("-i", "--info", nargs="?", const="all")
    return parser


def versions() -> str:
    """What `ebc-lab train --version` prints."""
    from hydra import __version__ as of_hydra

    from ebc_lab import __version__

    return f"ebc-lab {__version__}, Hydra {of_hydra}"


# -- help ----------------------------------------------------------------------------------------------------

FIRST = ("scale", "optimizer", "stabilizer", "budget", "lr_schedule", "data", "tokens", "model", "workload")
NOT_OF_A_RUN = ("study", "ebm")  # a study's; what follows `scale`


def help_text(width: int) -> str:
    """What `ebc-lab train --help` prints, in lines of at most `width` characters."""
    from ebc_lab.config.choices import groups

    default = _defaults()
    names = [*FIRST, *(g for g in groups() if g not in (*FIRST, *NOT_OF_A_RUN))]
    choices = {}
    for group in names:
        first = default.get(group, "")
        others = [choice for choice in groups()[group] if choice != first]
        choices[group] = ", ".join([f"[{first}]" if first else "", *others]).lstrip(", ")
    return "\n".join([
        "usage: ebc-lab train [FLAGS] [KEY=VALUE …]",
        "",
        *textwrap.wrap(
            "Train one run. EBC is on unless you say otherwise (stabilizer=ebc is the default): "
            "stabilizer=none trains the optimizer alone.",
            width,
        ),
        "",
        "examples:",
        *_listed(EXAMPLES, width),
        "",
        "groups of settings and their choices, [the default]:",
        *_listed(choices, width),
        "",
        *textwrap.wrap(
            "Every other setting, as optimizer.lr=1e-3, steps=600 or tokens=2e6: --cfg job prints them, "
            "docs/settings.md explains them.",
            width,
        ),
        "",
        "flags, those of Hydra that work here:",
        *_listed(HELP, width),
    ])  # fmt: skip


def _listed(entries: Mapping[str, str], width: int) -> list[str]:
    """Two columns; a left one that is too long has a line of its own."""
    left = min(max(map(len, entries)), 26)
    lines = []
    for name, text in entries.items():
        wrapped = textwrap.wrap(text, max(20, width - left - 4)) or [""]
        first = f"  {name:<{left}}  "
        if len(name) > left:
            lines.append(f"  {name}")
            first = " " * (left + 4)
        lines += [first + wrapped[0], *(" " * (left + 4) + line for line in wrapped[1:])]
    return lines


def _defaults() -> dict[str, str]:
    """Group -> the choice that it has unless another is given; of `scale`, what suits this machine."""
    from ebc_lab.config.choices import further_choices, listed_choices
    from ebc_lab.config.compose import default_scale

    return further_choices() | listed_choices() | {"scale": default_scale().partition("=")[2]}
