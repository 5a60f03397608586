"""What is typed here for the commands and flags of other programs: one sentence with the line to type.

Such a line is refused, and the one that is offered instead has the user's own values, quoted for a shell.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ebc_lab.config.errors import any_of
from ebc_lab.config.hints import IMPOSSIBLE, OWN_CHOICES, SETTING_MEANT, STUDY_DECIDES

# a word that is no command -> what does that here; {} is what followed it
COMMANDS = {
    "axiom": "`ebc-lab train optimizer=axiom memory=hooks stabilizer=none`, or `python -m ebc_lab.axiom {}`; "
    "docs/axiom.md",
    "verity": "`ebc-lab train determinism=verity stabilizer=none`, or `python -m ebc_lab.verity`; "
    "docs/verity.md",
    "lowbit": "`ebc-lab train quantizer=ternary stabilizer=none`, or `python -m ebc_lab.lowbit {}`; "
    "docs/lowbit.md",
    "ternary": "`ebc-lab train quantizer=ternary stabilizer=none`; docs/lowbit.md",
    "hybrid": "`from ebc_lab.lowbit import HybridLLMTrainer, HybridDispatcher` in Python; docs/lowbit.md",
    "energy": "`ebc-lab train stabilizer=energy_rms`, docs/method.md, or the energy-based language model, "
    "`ebc-lab ebm train`; docs/ebm.md",
    "splats": "`ebc-lab ebm train`; docs/ebm.md",
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
    switch: bool = False  # it takes no value


Typed = tuple[str, list[str]]  # a command line of ours, and what is said of it

MODEL_FLAGS = {
    **dict.fromkeys(("--checkpoint", "--ckpt", "--model"), Flag("{}")),
    **dict.fromkeys(("--max-tokens", "--max-new-tokens"), Flag("--tokens {}")),
    "--n-samples": Flag("--samples {}"),
    "--n-steps": Flag("--langevin-steps {}"),
    "--checkpoint-dir": Flag("--batch {}"),
    "--device": Flag("", "a kept model is loaded onto the device of its run"),
}
OWN_FILES = Flag("", f"{OWN_CHOICES}; a study's `study=./mine.yaml`, a part `my_opt.py:Mine`")
RUN_FLAGS = {
    **dict.fromkeys(("--config-path", "--config-name", "--config-dir"), OWN_FILES),
    "--hydra-help": Flag("--help", "it lists the flags of Hydra that work here", switch=True),
    "--shell-completion": Flag("", "`ebc-lab --install-completion` completes in your shell", switch=True),
    "--experimental-rerun": Flag(
        "",
        "`ebc-lab train from=FOLDER/spec.json` trains a run again; with hydra.run.dir=FOLDER it continues",
    ),
    "--epochs": Flag(
        "tokens={}e6",
        "{} passes over tiny Shakespeare's 1.0 million training tokens; `ebc-lab data` counts another text's",
    ),
    "--checkpoint-dir": Flag("hydra.run.dir={}"),
    "--config": Flag("", "settings are words of the line"),
    "--max-samples": Flag("", "a run draws from its whole text"),
    "--validate": Flag("", "`ebc-lab ebm diagnose MODEL` looks at what a run has kept", switch=True),
}


# -- commands ------------------------------------------------------------------------------------------------


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
            plain: Typed = shlex.join(["ebc-lab", *path, *model, *rest]), []
            return (
                f"{word} is no command of {group}: type {_in_quotes(retyped(path, options, rest) or plain)}."
            )
    if name in STAGES:
        return f"{word} is a stage of a study: type `{shlex.join(['ebc-lab', 'stage', name, *rest])}`."
    if name in COMMANDS:
        return f"{word} is no command of its own: {COMMANDS[name].format(shlex.join(rest) or '--help')}."
    return None


def options_of(command: Any) -> set[str]:
    """Name the options that a command takes, in every way that they are written."""
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def _in_quotes(typed: Typed) -> str:
    command, notes = typed
    return f"`{command}`" + (f" ({'; '.join(notes)})" if notes else "")


# -- flags ---------------------------------------------------------------------------------------------------


def explain_flags(path: Sequence[str], options: Collection[str], words: Sequence[str]) -> str | None:
    """Say what is typed for `ebc-lab PATH WORDS`, whose flags are another program's; None where one of them
    means nothing here. `options` are the command's own."""
    if (typed := retyped(path, options, words)) is None:
        return None
    foreign = [word.partition("=")[0] for word in words if _foreign(word, options)]
    dashes = "" if "--arm" in options else ", and settings are given without dashes"
    named = any_of(list(dict.fromkeys(foreign or words[:1])))
    return f"{' '.join(path)} takes no {named}{dashes}: type {_in_quotes(typed)}."


def retyped(path: Sequence[str], options: Collection[str], words: Sequence[str]) -> Typed | None:
    """Return `ebc-lab PATH WORDS` as it is typed here; None where one of its flags means nothing here, or
    none is another program's."""
    script = bool(words) and words[0].endswith(".py") and "=" not in words[0]  # after `python`
    rest = list(words[1:] if script else words)
    first: list[str] = []  # what stands before everything else: MODEL
    kept: list[str] = []
    notes: list[str] = []
    foreign = script
    while rest:
        word = rest.pop(0)
        if not _foreign(word, options):
            kept.append(word)
            continue
        foreign = True
        name, _, value = word.partition("=")
        follows = rest[0] if rest and "=" not in word and not rest[0].startswith("-") else ""
        flag = _meant(path, options, name, value or follows)
        if flag is None:
            return None
        if follows and not flag.switch:
            value = rest.pop(0)
        here = [part.replace("{}", value or "VALUE") for part in shlex.split(flag.here)]
        (first if flag.here == "{}" else kept).extend(here)
        if flag.why:
            notes.append(f"{name}: {flag.why.replace('{}', value)}")
    return (shlex.join(["ebc-lab", *path, *first, *kept]), notes) if foreign else None


def _foreign(word: str, options: Collection[str]) -> bool:
    return len(word) > 2 and word.startswith("--") and word.partition("=")[0] not in options


def _meant(path: Sequence[str], options: Collection[str], name: str, value: str) -> Flag | None:
    plain = "--" + name[2:].replace("_", "-")
    if "--arm" in options:
        flag = Flag(f"{plain} {{}}") if plain in options else MODEL_FLAGS.get(plain)
        here = flag.here.split() if flag else []
        return flag if not here or here[0] in (*options, "{}") else Flag("", f"{path[-1]} has none such")
    trains = path[-1] == "train"
    if plain == "--resume" and not trains:
        return Flag("", "the same command continues", switch=True)
    if plain == "--resume":
        place = Path(value or "FOLDER")
        folder = place.parent if place.suffix else place
        return Flag(shlex.join([f"from={folder}/spec.json", f"hydra.run.dir={folder}"]))
    if trains and plain in RUN_FLAGS:
        return RUN_FLAGS[plain]
    return _setting(plain[2:].replace("-", "_"), value, trains)


def _setting(key: str, value: str, trains: bool) -> Flag | None:
    from ebc_lab.config.choices import groups
    from ebc_lab.config.overrides import schema_keys

    setting = SETTING_MEANT.get(key, key)
    if setting not in schema_keys() and setting not in groups():
        return None
    if not trains and setting in STUDY_DECIDES:
        return Flag("", f"of a study that is {STUDY_DECIDES[setting]}")
    if why := IMPOSSIBLE.get((setting, value)):
        return Flag(f"{setting}=auto", why)
    return Flag(f"{setting}={{}}")
