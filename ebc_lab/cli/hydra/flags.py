"""The flags of `ebc-lab train`: those of Hydra's that work here, as Hydra takes them, and `train --help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from typer.core import TyperCommand

from ebc_lab.config.errors import UserError, any_of, require, shown

CFG = ("job", "hydra", "all")
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
EXAMPLES = {
    "ebc-lab train scale=smoke": "a few seconds, to see it work",
    "ebc-lab train stabilizer=none optimizer=muon": "Muon alone, without EBC",
    "ebc-lab train budget.target_kl=0.02 seed=1": "EBC with another budget, another seed",
    "ebc-lab train optimizer=custom optimizer.target=./my_opt.py:Mine": "an optimizer of your own",
    "ebc-lab train -m scale=smoke stabilizer=none,ebc optimizer.lr=1e-3,2e-3": "four runs and their table",
    "ebc-lab train scale=smoke --cfg job": "its settings, and nothing trained",
}
FIRST = ("scale", "optimizer", "stabilizer", "budget", "lr_schedule", "data", "tokens", "model", "workload")
NOT_OF_A_RUN = ("study", "ebm")  # a study's; what follows `scale`


@dataclass(frozen=True)
class Given:
    """What a command line of `train` asks for. Raises UserError where its flags contradict each other."""

    overrides: list[str]
    run: bool = False
    multirun: bool = False
    cfg: str | None = None
    resolve: bool = False
    package: str | None = None
    info: str | None = None
    as_json: bool = False

    def __post_init__(self) -> None:
        for flag, chosen, choices in (("--cfg", self.cfg, CFG), ("--info", self.info, INFO)):
            known = chosen in (None, *choices)
            require(known, f"{flag} {shown(chosen)} is unknown: it takes {any_of(choices)}.")
        one_of = {"--run": self.run, "--multirun": self.multirun, "--cfg": self.cfg, "--info": self.info}
        together = [flag for flag, value in one_of.items() if value]
        if len(together) > 1:
            raise UserError(f"{' and '.join(together)} exclude each other: give one of them.")
        for flag, value in (("--resolve", self.resolve), ("--package", self.package)):
            if value and self.cfg is None:
                raise UserError(f"{flag} belongs to --cfg job, which prints the settings: give both.")
        if self.as_json and not self.trains:
            raise UserError("--json tells what a run came to: without --cfg and --info.")

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


class TrainCommand(TyperCommand):
    """`train`, whose help ends in examples and in the groups of settings with their choices."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from rich.table import Table

        from ..options import console

        super().format_help(ctx, formatter)
        screen = console()
        screen.print("Examples:")
        for command, about in EXAMPLES.items():
            screen.print(f"  {about}:\n    {command}", soft_wrap=True)
        table = Table.grid(padding=(0, 2), pad_edge=True)
        for group, choices in _choices().items():
            table.add_row(group, choices)
        screen.print("\nGroups of settings and their choices, [the default]:", table)
        screen.print(
            "\nEvery other setting, as optimizer.lr=1e-3, steps=600 or tokens=2e6: --cfg job prints them, "
            "docs/settings.md explains them."
        )


def _choices() -> dict[str, str]:
    """Group -> its choices, the default first and in brackets; that of `scale` is what suits this machine."""
    from ebc_lab.config.choices import further_choices, groups, listed_choices, overridable
    from ebc_lab.config.compose import default_scale

    default = further_choices() | listed_choices() | {"scale": default_scale().partition("=")[2]}
    names = [*FIRST, *(g for g in groups() if g not in (*FIRST, *NOT_OF_A_RUN))]
    choices = {}
    for group in names:
        first = [f"[{default[group]}]"] if default.get(group) else []
        others = (c for c in overridable(group, None) if c != default.get(group))
        choices[group] = ", ".join([*first, *others])
    return choices
