"""What is typed here for the commands and flags of other programs: one sentence with the line to type.

Such a line is refused, and the one that is offered instead has the user's own values, quoted for a shell.
"""

from __future__ import annotations

import itertools
import re
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ebc_lab.config.errors import any_of
from ebc_lab.config.hints import IMPOSSIBLE, OWN_CHOICES, SETTING_MEANT, STUDY_DECIDES

# a word that is no command -> the commands that do that here, and what stands for what they need
SAME = {
    **dict.fromkeys(("run", "start"), "train or autopilot"),
    **dict.fromkeys(("compare", "cmp"), "diff STUDY OTHER"),
    **dict.fromkeys(("ls", "ps", "studies"), "list"),
    **dict.fromkeys(("show", "info", "describe", "progress", "log", "logs", "tail"), "status"),
    **dict.fromkeys(("monitor", "dashboard", "ui", "server", "view", "open", "top", "attach"), "watch"),
    **dict.fromkeys(("stop", "kill", "abort", "terminate"), "cancel STUDY"),
    **dict.fromkeys(("plot", "visualize", "summary", "results", "page", "html", "table"), "report"),
    **dict.fromkeys(("leaderboard", "rank", "best", "best-trial", "best-trials"), "board"),
    **dict.fromkeys(("import", "analyze", "analyse", "stats"), "judge RUNS"),
    **dict.fromkeys(("init", "create", "scaffold", "create-study"), "new NAME"),
    **dict.fromkeys(("launch", "optimize", "search", "hpo", "agent", "repro"), "autopilot"),
    **dict.fromkeys(("fit", "pretrain"), "train"),
    **dict.fromkeys(("check", "validate", "fsck"), "verify"),
    **dict.fromkeys(("explain", "reason", "blame"), "why"),
    "replay": "why --replay",
    "reproduce": "rerun STUDY",
    **dict.fromkeys(("pack", "archive", "save"), "export"),
    **dict.fromkeys(("download", "clone", "fetch"), "pull ADDRESS"),
    **dict.fromkeys(("estimate", "forecast", "dry-run"), "plan"),
    **dict.fromkeys(("debug", "env", "system"), "doctor"),
    **dict.fromkeys(("profile", "speed", "timeit"), "bench"),
    **dict.fromkeys(("dataset", "datasets", "corpus"), "data"),
    **dict.fromkeys(("config", "cfg", "print_config", "print-config", "params"), "train --cfg=job"),
    "version": "--version",
    "help": "--help",
}
# a word that is no command -> what does that here, in a sentence; {} is what followed it
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
    "multirun": "`ebc-lab train -m optimizer.lr=1e-3,2e-3`; docs/running.md",
    **dict.fromkeys(
        ("resume", "continue", "retry", "restart"),
        "the command that began a study or a run (in its own folder) continues it, and `ebc-lab status` "
        "prints it; docs/running.md",
    ),
    "pause": "`ebc-lab cancel STUDY` ends it, and its command continues from there; docs/running.md",
    **dict.fromkeys(
        ("rm", "remove", "delete", "clean", "gc", "prune"),
        "`ebc-lab list` shows the studies, each a folder of outputs/ebc_ablation or of its output_dir that "
        "you may delete; docs/running.md",
    ),
    **dict.fromkeys(
        ("runs", "experiments", "experiment", "exp", "trials"),
        "`ebc-lab list` shows the studies, and `ebc-lab status` the runs of one; docs/commands.md",
    ),
    **dict.fromkeys(
        ("push", "sync", "upload"),
        "`ebc-lab autopilot study.mirror=ADDRESS` keeps a copy there while a study runs; docs/beyond.md",
    ),
    **dict.fromkeys(
        ("test", "eval"),
        "what `ebc-lab autopilot` answers is by test loss, and `ebc-lab ebm evaluate MODEL` evaluates "
        "an energy-based model; docs/stages.md",
    ),
    **{
        tracker: f"`ebc-lab autopilot tracker={tracker}` sends a study there, `ebc-lab judge RUNS` answers "
        "from runs that are there; docs/judge.md"
        for tracker in ("wandb", "mlflow", "tensorboard", "trackio")
    },
    **dict.fromkeys(
        ("optuna", "ray", "hyperopt"),
        "`ebc-lab autopilot study=optimizers` tunes by itself, and `ebc-lab judge RUNS` answers from trials "
        "that Optuna made; docs/papers.md",
    ),
    **dict.fromkeys(
        ("hydra", "dvc", "git", "guild", "sacred"),
        "`ebc-lab train -m` sweeps, and `ebc-lab autopilot` runs a study, whose settings it records "
        "by itself; docs/running.md",
    ),
    **dict.fromkeys(
        ("submit", "sbatch", "slurm"),
        "`ebc-lab autopilot launcher=slurm device=cuda` submits; docs/beyond.md",
    ),
    **dict.fromkeys(
        ("metrics", "history"),
        "`ebc-lab columns` says which file of a study holds them, and `ebc_lab.load` reads them in Python; "
        "docs/results.md",
    ),
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
OF_FILES = dict.fromkeys(
    ("--config-path", "--config-name", "--config-dir"),
    Flag("", f"{OWN_CHOICES}; a study's `study=./mine.yaml`, a part `my_opt.py:Mine`"),
)
RUN_FLAGS = {
    "--hydra-help": Flag("--help", "it lists the flags of Hydra that work here", switch=True),
    "--shell-completion": Flag("", "`ebc-lab --install-completion` completes in your shell", switch=True),
    "--experimental-rerun": Flag(
        "", "`ebc-lab train from=FOLDER/spec.json` trains a run again; with hydra.run.dir=FOLDER it continues"
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


def explain_misuse(error: Any) -> str:
    """Say in one sentence what is wrong in how a command is called. `error`: typer's."""
    what = " ".join(error.format_message().split()).rstrip(".")
    what = re.sub(r"\. Did you mean '(.*)'\?", r" (did you mean \1?)", what[:1].lower() + what[1:])
    what = what.replace("', '", " or ")
    words, context = sys.argv[1:], error.ctx
    path = words[: 2 if words[:1] == ["ebm"] else 1]
    called = context.command_path if context else " ".join(["ebc-lab", *path])
    if found := re.match("no such command '(.*?)'", what):
        commands = ", ".join(context.command.list_commands(context))
        meant = explain_command(found[1], called, context.find_root().command, words)
        return meant or f"{what}; the commands are {commands}."
    if what.startswith("no such option"):
        options = options_of(context.command)
        if meant := explain_flags(path, options, words[len(path) :]):
            return meant
        dashes = "settings are given without dashes: scale=smoke, optimizer.lr=1e-3"
        return f"{what}; {dashes}; `{called} --help` lists the options."
    return f"{what or 'a command is missing'}: `{called} --help` says what it takes."


# -- commands ------------------------------------------------------------------------------------------------


def explain_command(word: str, group: str, root: Any, words: Sequence[str]) -> str | None:
    """Say what is typed for a word that is no command of `group`, "ebc-lab" or "ebc-lab ebm".

    `root` is the whole program, `words` what was typed after its name. None where it means nothing here.
    """
    from ebc_lab.config.schema import STAGES

    rest = list(words[words.index(word) + 1 :])
    name = word.removesuffix(".py")
    refused = f"{word} is no command of {group}"
    places = [([], root.commands), (["ebm"], root.commands["ebm"].commands)]
    for path, commands in sorted(places, key=lambda place: shlex.join(["ebc-lab", *place[0]]) != group):
        if name in commands:
            return f"{refused}: type {_same([*path, name], commands[name], rest)}."
    if name in STAGES:
        return f"{word} is a stage of a study: type `{shlex.join(['ebc-lab', 'stage', name, *rest])}`."
    if name in SAME:
        lines = []
        for command, *needed in (line.split() for line in SAME[name].split(" or ")):
            flags = [part for part in needed if part.startswith("-")]
            wanted = [*flags, *(rest or needed[len(flags) :])]
            found = root.commands.get(command)
            lines.append(_same([command], found, wanted) if found else f"`ebc-lab {command}`")
        return f"{refused}: type {' or '.join(lines)}."
    if name in COMMANDS:
        return f"{word} is no command of its own: {COMMANDS[name].format(shlex.join(rest) or '--help')}."
    return None


def _same(path: Sequence[str], command: Any, rest: Sequence[str]) -> str:
    """Return, in quotes, the line that does with `rest` what was meant, up to a flag unknown here."""
    options = options_of(command)
    if typed := retyped(path, options, rest):
        return _in_quotes(typed)
    model = ["MODEL"] if "--arm" in options and not rest else []
    known = itertools.takewhile(lambda x: not x.startswith("-") or x.partition("=")[0] in options, rest)
    return _in_quotes((shlex.join(["ebc-lab", *path, *model, *known]), []))


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
    if path[:1] == ["bench"] and plain == "--record":  # of 1.0
        return Flag("--json", "`> FILE` after it keeps the figures", switch=True)
    if flag := (OF_FILES | RUN_FLAGS if trains else OF_FILES).get(plain):
        return flag
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
