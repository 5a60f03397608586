"""What is typed here for the commands and flags of other programs: one sentence, with the whole line to type.

Nothing is guessed silently: such a line is refused, and the one that is offered has the user's own values.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence, Set
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from ebc_lab.config.hints import IMPOSSIBLE, OF_NAME, STUDY_DECIDES

# a word that is no command -> what does that here; {} is what follows it
COMMANDS = {
    "axiom": "`ebc-lab train optimizer=axiom memory=hooks stabilizer=none`, or `python -m ebc_lab.axiom {}`; "
    "docs/axiom.md",
    "verity": "`ebc-lab train determinism=verity`, or `python -m ebc_lab.verity {}`; docs/verity.md",
    "lowbit": "`ebc-lab train quantizer=ternary stabilizer=none`, or `python -m ebc_lab.lowbit {}`; "
    "docs/lowbit.md",
    "ternary": "`ebc-lab train quantizer=ternary stabilizer=none`; docs/lowbit.md",
    "hybrid": "`from ebc_lab.lowbit import HybridLLMTrainer, HybridDispatcher` in Python; docs/lowbit.md",
    "energy": "`ebc-lab train stabilizer=energy_rms`, docs/energy.md; of the energy-based language model "
    "`ebc-lab ebm train`, docs/ebm.md",
    "splats": "`ebc-lab ebm train`; docs/ebm.md",
    "ebc": "`ebc-lab train`, where EBC is the default; docs/method.md, and docs/own_loop.md for your own loop",
    "benchmark": "`ebc-lab bench`, or of low-bit operations `python -m ebc_lab.lowbit bench`; docs/speed.md",
    "ablate": "`ebc-lab autopilot study=mechanism`, or another suite of docs/suites.md",
    "sweep": "`ebc-lab train -m optimizer.lr=1e-3,2e-3`, or of a study `ebc-lab stage lr_sweep`; "
    "docs/running.md",
    "resume": "the command that began a study or a run continues it; docs/start.md",
}


class Flag(NamedTuple):
    """How a flag of other programs is written here: {} is its value; "" leaves it out, and says why."""

    here: str
    why: str = ""
    switch: bool = False  # it takes no value


Meaning = Callable[[str, str], Flag | None]  # of a flag and its value

OF_A_MODEL = {
    "--checkpoint": Flag("{}"),
    "--ckpt": Flag("{}"),
    "--model": Flag("{}"),
    "--max-tokens": Flag("--tokens {}"),
    "--max-new-tokens": Flag("--tokens {}"),
    "--n-samples": Flag("--samples {}"),
    "--n-steps": Flag("--langevin-steps {}"),
    "--checkpoint-dir": Flag("--batch {}"),
    "--device": Flag("", "a model is loaded onto its run's device"),
}
OF_A_RUN = {
    "--epochs": Flag(
        "tokens={}e6",
        "{0} passes over tiny Shakespeare's 1.0 million tokens; another text's number is the train split of "
        "`ebc-lab data`",
    ),
    "--checkpoint-dir": Flag("hydra.run.dir={}"),
    "--config": Flag("", "settings are words of the line"),
    "--max-samples": Flag("", "windows are drawn from the whole text, and tokens= says how many"),
    "--validate": Flag("", "`ebc-lab ebm diagnose RUN` judges what is kept of a run", switch=True),
}


# -- commands ------------------------------------------------------------------------------------------------


def of_command(word: str, group: str, root: Any, words: Sequence[str]) -> str | None:
    """Say what is typed for a word that is no command of `group` ("ebc-lab" or "ebc-lab ebm"), None where it
    means nothing here. `root`: the whole program; `words`: what was typed after its name."""
    from ebc_lab.config.schema import STAGES

    rest = words[words.index(word) + 1 :] if word in words else ()
    name = word.removesuffix(".py")
    groups = [((), root.commands), (("ebm",), root.commands["ebm"].commands)]
    for path, commands in sorted(groups, key=lambda one: ["ebc-lab", *one[0]] != group.split()):
        if name in commands:
            line = shlex.join(["ebc-lab", *path, name, *rest])
            told = retyped([*path, name], commands[name], rest)
            offered = told or f"`{line}`"
            return f"{word} is no command of `{group}`: type {offered}."
    if name in STAGES:
        return f"{word} is a stage of a study: type `{shlex.join(['ebc-lab', 'stage', name, *rest])}`."
    if name in COMMANDS:
        return f"{word} is no command of its own: {COMMANDS[name].format(shlex.join(rest) or '--help')}."
    return None


# -- flags ---------------------------------------------------------------------------------------------------


def of_flag(path: Sequence[str], command: Any, words: Sequence[str]) -> str | None:
    """Say what is typed for a line of `ebc-lab PATH` whose flags are another program's; None where one of
    them means nothing here."""
    offered = retyped(path, command, words)
    return None if offered is None else f"those are no options of `{shlex.join(['ebc-lab', *path])}`: type {offered}."
