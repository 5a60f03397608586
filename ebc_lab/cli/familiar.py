"""What is typed here for the commands and flags of other programs: one sentence with the line to type.

Such a line is refused, and the one that is offered instead has the user's own values, quoted for a shell.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ebc_lab.config.errors import any_of
from ebc_lab.config.hints import IMPOSSIBLE, SETTING_MEANT, STUDY_DECIDES

# a word that is no command -> what does that here; {} is what followed it
COMMANDS = {
    "axiom": "`ebc-lab train optimizer=axiom memory=hooks stabilizer=none`, or `python -m ebc_lab.axiom {}`; "
    "docs/axiom.md",
    "verity": "`ebc-lab train determinism=verity stabilizer=none`, or `python -m ebc_lab.verity`; "
    "docs/verity.md",
    "lowbit": "`ebc-lab train quantizer=ternary stabilizer=none`, or `python -m ebc_lab.lowbit {}`; "
    "docs/lowbit.md",
    "hybrid": "`from ebc_lab.lowbit import HybridLLMTrainer, HybridDispatcher` in Python; docs/lowbit.md",
    "benchmark": "`ebc-lab bench`, or for operations `python -m ebc_lab.lowbit bench`; docs/running.md",
    "ablate": "`ebc-lab autopilot study=mechanism`, or another suite; docs/suites.md",
    "sweep": "`ebc-lab train -m optimizer.lr=1e-3,2e-3`, or of a study `ebc-lab stage lr_sweep`; "
    "docs/running.md",
    "resume": "the command that began a study or a run (in its own folder) continues it; docs/running.md",
}


class Flag(NamedTuple):
    """How a flag of others is written here: {} is its value, "" leaves it out; `why` is said of it."""

    here: str
    why: str = ""


OWN_FILES = Flag(
    "",
    "settings are those of ebc-lab; a study of your own is `study=./mine.yaml`, a part `my_opt.py:Mine`",
)
RUN_FLAGS = {
    **dict.fromkeys(("config-path", "config-name", "config-dir"), OWN_FILES),
    "hydra-help": Flag("--help", "it lists the flags of Hydra that work here"),
    "shell-completion": Flag("", "`ebc-lab --install-completion` completes in your shell"),
    "experimental-rerun": Flag(
        "",
        "`ebc-lab train from=FOLDER/spec.json` trains a run again; with hydra.run.dir=FOLDER it continues",
    ),
    "epochs": Flag(
        "tokens={}e6",
        "{} passes over tiny Shakespeare's 1.0 million training tokens; `ebc-lab data` counts another text's",
    ),
}


def explain_command(word: str, group: str, root: Any, words: Sequence[str]) -> str | None:
    """Say what is typed for a word that is no command of `group`, "ebc-lab" or "ebc-lab ebm".

    `root` is the whole program, `words` what was typed after its name. None where it means nothing here.
    """
    from ebc_lab.config.schema import STAGES

    rest = list(words[words.index(word) + 1 :])
    name = word.removesuffix(".py")
    places = [([], root.commands), (["ebm"], root.commands["ebm"].commands)]
    for path, commands in sorted(places, key=lambda place: shlex.join(["ebc-lab", *place[0]]) != group):
        if name in commands:
            path, options = [*path, name], options_of(commands[name])
            model = ["MODEL"] if "--arm" in options and not rest else []
            plain = f"`{shlex.join(['ebc-lab', *path, *model, *rest])}`"
            return f"{word} is no command of {group}: type {retyped(path, options, rest) or plain}."
    if name in STAGES:
        return f"{word} is a stage of a study: type `{shlex.join(['ebc-lab', 'stage', name, *rest])}`."
    if name in COMMANDS:
        return f"{word} is no command of its own: {COMMANDS[name].format(shlex.join(rest) or '--help')}."
    return None


def options_of(command: Any) -> set[str]:
    """Name the options that a command takes, in every way that they are written."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def explain_flags(path: Sequence[str], options: Collection[str], words: Sequence[str]) -> str | None:
    """Say what is typed for `ebc-lab PATH WORDS`, whose flags are another program's; None where one of them
    means nothing here. `options` are the command's own."""
    foreign = [word.partition("=")[0] for word in words if _foreign(word, options)]
    if not foreign or (typed := retyped(path, options, words)) is None:
        return None
    named = any_of(list(dict.fromkeys(foreign)))
    return f"{' '.join(path)} takes no {named}, and settings are given without dashes: type {typed}."


def retyped(path: Sequence[str], options: Collection[str], words: Sequence[str]) -> str | None:
    """Return `ebc-lab PATH WORDS` as it is typed here, in quotes, and in brackets what is said of its flags;
    None where one of them means nothing here."""
    line, notes, rest = ["ebc-lab", *path], [], list(words)
    while rest:
        word = rest.pop(0)
        if not _foreign(word, options):
            line.append(word)
            continue
        name, equals, value = word.partition("=")
        if not equals and rest and "=" not in rest[0] and not rest[0].startswith("-"):
            value = rest.pop(0)
        model = "--arm" in options  # a command about a kept model takes no settings
        flag = None if model else _meant(path[-1] == "train", name[2:].replace("_", "-"), value)
        if flag is None:
            return None
        line += [part.replace("{}", value or "VALUE") for part in shlex.split(flag.here)]
        if flag.why:
            notes.append(f"{name}: {flag.why.replace('{}', value)}")
    return f"`{shlex.join(line)}`" + (f" ({'; '.join(notes)})" if notes else "")


def _foreign(word: str, options: Collection[str]) -> bool:
    return len(word) > 2 and word.startswith("--") and word.partition("=")[0] not in options


def _meant(trains: bool, name: str, value: str) -> Flag | None:
    """Return what a flag is here, for `train` or a command about a study; None if it means nothing."""
    from ebc_lab.config.choices import groups
    from ebc_lab.config.overrides import schema_keys

    if name == "resume" and trains:
        place = Path(value or "FOLDER")
        folder = place.parent if place.suffix else place
        return Flag(shlex.join([f"from={folder}/spec.json", f"hydra.run.dir={folder}"]))
    if name == "resume":
        return Flag("", "the same command continues")
    if trains and name in RUN_FLAGS:
        return RUN_FLAGS[name]
    key = name.replace("-", "_")
    setting = SETTING_MEANT.get(key, key)
    if setting not in schema_keys() and setting not in groups():
        return None
    if not trains and setting in STUDY_DECIDES:
        return Flag("", f"of a study that is {STUDY_DECIDES[setting]}")
    if why := IMPOSSIBLE.get((setting, value)):
        return Flag(f"{setting}=auto", why)
    return Flag(f"{setting}={{}}")
