"""The runs of the stage profiles: a method at a point of its grid, on a workload.

A workload's settings come first and a method's after them, so that a method means the same on every workload.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ebc_lab.config.choices import changed, settings_of, shaped
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.identity import canonical_json, digest, number, study_environment
from ebc_lab.config.schema import HORIZON, Config, MethodConfig, ProfiledWorkloadConfig, RunConfig
from ebc_lab.records.spec import RunSpec

NAME = "profiles"
Point = dict[str, Any]  # of a method's grid, setting -> value
Key = tuple[str, str, str, float, int]  # method, point, workload, length over that of the targets, seed


def points_of(method: MethodConfig) -> list[Point]:
    """List every combination of a method's grid, one without settings where it has none."""
    keys = list(method.grid)
    return [dict(zip(keys, values, strict=True)) for values in itertools.product(*method.grid.values())]


def steps_of(config: Config, workload: ProfiledWorkloadConfig, times: float = 1.0) -> int:
    """Return the length of a workload's runs, `times` that of those that set its target."""
    return max(1, round(config.profiles.steps * workload.steps * times))


def run_of(
    config: Config, method: MethodConfig, workload: ProfiledWorkloadConfig, point: Point, times: float
) -> RunConfig:
    """Build a method's run on a workload, `times` as long as those that set the target."""
    base = run_part(config)
    plain = replace(base, evaluate=["val"], stabilizer=replace(base.stabilizer, name="none"))
    run = shaped(changed(plain, with_text(base, workload.settings)), workload)
    run = changed(run, method.at(point))
    every = steps_of(config, workload, 1 / config.profiles.evaluations)
    return replace(run, steps=steps_of(config, workload, times), eval_every=every)


def _own_text(base: RunConfig, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the data and tokens of a workload that has its own of either; empty where it has none. Tokens of
    another text have another checksum, which is open where the workload does not give it."""
    if not {"data", "tokens"} & set(settings):
        return {}
    data, tokens = to_dict(base.data), {**to_dict(base.tokens), "sha256": None}
    if "data" in settings:
        own = settings["data"]
        data |= {"file": None, "sha256": None, **settings_of("data", own["name"]), **own}
    return {"data": data, "tokens": tokens | settings.get("tokens", {})}


def with_text(base: RunConfig, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a workload's settings with the checksums of its own data and tokens. In a plan, where nobody has
    looked at them yet, that of their name stands for one."""
    own = _own_text(base, settings)
    for group, of in own.items():
        if not of["sha256"] and of["name"] != "characters":
            of["sha256"] = digest([group, of["name"], of.get("file"), of.get("size")])
    return {**settings, **own}


def resolved(config: Config, say: Callable[[str], None]) -> Config:
    """Fill in the checksums of those workloads that have data or tokens of their own."""
    from ebc_lab.workloads.text import checked_text, pinned

    base = run_part(config)
    workloads = dict(config.profiles.workloads)
    for name, workload in workloads.items():
        if own := _own_text(base, workload.settings):
            run = shaped(changed(base, {**workload.settings, **own}), workload)
            run = pinned(run, *checked_text(run))
            settings = {**workload.settings, "data": to_dict(run.data), "tokens": to_dict(run.tokens)}
            workloads[name] = replace(workload, settings=settings)
            say(f"{NAME}: {name} has data of its own, {run.data.name} in {run.tokens.name}")
    return replace(config, profiles=replace(config.profiles, workloads=workloads))


@functools.lru_cache(maxsize=4)
def _made(key: str) -> dict[Key, RunSpec]:
    """Return where the runs of a configuration are kept once they are made: naming hundreds of them takes a
    second, and a study asks for all of them whenever a run ends."""
    return {}


@dataclass(frozen=True)
class Maker:
    """Makes the runs of one configuration."""

    config: Config
    made: dict[Key, RunSpec]

    @classmethod
    def of(cls, config: Config) -> Maker:
        named = {"run": to_dict(run_part(config)), NAME: to_dict(config.profiles)}
        return cls(config, _made(canonical_json({**named, "environment": study_environment(config)})))

    def runs(
        self, name: str, point: Point, workload: str, seeds: Sequence[int], *, targets: bool = False
    ) -> list[RunSpec]:
        """Return a method's runs on a workload at a point, one for each seed. `targets`: as long as
        those that set the targets, whatever the point's horizon."""
        profiles = self.config.profiles
        times = 1.0 if targets else profiles.longest * point.get(HORIZON, 1.0)
        keys = [(name, _in_short(point), workload, times, seed) for seed in seeds]
        if lacking := [key for key in keys if key not in self.made]:
            method, of = profiles.methods[name], profiles.workloads[workload]
            run = run_of(self.config, method, of, point, times)
            track = f"{self.config.optimizer.name}_{self.config.projection.name}"
            label = f"{name}_{workload}{_in_short(point)}" + "_target" * targets
            for key in lacking:
                seeded = replace(run, seed=key[-1])
                self.made[key] = RunSpec(NAME, name, label, 1.0, seeded, of_track=track)
        return [self.made[key] for key in keys]


def _in_short(point: Point) -> str:
    """Write a point as names of runs have it: `_lr0p001_horizon0p5`."""
    values = {key.rpartition(".")[2]: value for key, value in point.items()}
    return "".join(f"_{k}{v if isinstance(v, str) else number(v)}" for k, v in values.items())
