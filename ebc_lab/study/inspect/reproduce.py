"""Command lines that repeat a study or a run from the file in which its settings are recorded."""

from __future__ import annotations

import functools
import itertools
import re
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ebc_lab.config.choices import groups, read_choice
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import flat, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import GONE, Config, LauncherConfig, RunConfig
from ebc_lab.records.decisions import Decision, TuningNeeded

from ..stages.stage import decision_that_shows
from ..stages.verdict import MOST_GIVEN, seeds_to_pass
from ..store.changes import Change, as_this_version_says, differences
from ..store.changes import requested as asked_for
from ..store.neighbours import seeds_taken
from ..store.reuse import environment_changes
from ..store.study import Study, StudyHeader, recorded_config

# texts that need no quotes on Hydra's command line
PLAIN = re.compile(r"[\w-]+|[\w./-]*/[\w./-]*|[\w./-]*[A-Za-z_]\w*(\.py)?:[A-Za-z_][\w.]*")
CONFIRMS = re.compile(r"(_tuned_\d+)?_seeds_\d+_to_\d+$")  # the suffix that names a study on fresh seeds
MOST_NAMED = 80  # characters in the name of such a study
Ways = list[int | TuningNeeded | None]


def again(study: Study, *overrides: str, portable: bool = False) -> str:
    """Return the command line that runs a study with the settings of `study`, changed by `overrides`.

    `portable`: give the path relative to the folder that holds the study, for use on any machine.
    """
    file = study.header_file
    if portable or not study.resumable:  # of a bundle, the path that the file has after unpacking
        name = study.header(checked=False)["study"] if portable else study.name
        file = Path(name) / file.name
    return shlex.join(["ebc-lab", "autopilot", f"from={override_value(str(file))}", *overrides])


def continuing(study: Study, header: StudyHeader) -> str:
    """Return the command line that continues a study: the recorded command that last ran it. If none was
    recorded, or the study has been moved since, return a command line with the same settings. Where the
    versions here would train every run anew, it does so in another study, beside this one."""
    anew = bool(environment_changes(recorded_config(header, checked=False), header))
    noted = study.noted_command()
    if noted is not None and not anew:
        return noted
    here = f"{study.root.name}_again" if anew else study.root.name
    renamed = here != header["requested"]["study"]["name"]
    name = [f"study.name={override_value(here)}"] if renamed else []
    return again(study, *name, *_place(study, header))


def deciding(study: Study, header: StudyHeader, decisions: Mapping[str, Decision]) -> str | None:
    """Return the command line of a new study in the same folder that would settle undecided answers on fresh
    seeds alone, tuned on more seeds where the luck of the tuning keeps one open. It copies the runs that
    tuned the arms. Return None if no answer is undecided, or the number of seeds needed is unknown."""
    fresh = fresh_seeds(study, header, ways_to_decide(decisions))
    place = _place(study, header) if study.resumable else ()
    return again(study, *fresh, *place) if fresh else None


def fresh_seeds(study: Study, header: StudyHeader, ways: Ways) -> list[str]:
    """Return the overrides for the new study that `deciding` describes: a new name, and as many seeds as are
    needed, none of which was used in this folder before. Empty if `deciding` returns None. `ways`: what
    `ways_to_decide` returns."""
    tuned = [way for way in ways if isinstance(way, Mapping)]
    needed = [way for way in ways if isinstance(way, int)] + [more["seeds"] for more in tuned]
    if not needed:
        return []
    config = recorded_config(header, checked=False)
    of_points, of_finalists = (max((m[k] for m in tuned), default=0) for k in ("tune_seeds", "final_seeds"))
    tuning: dict[str, Any] = {k: n for k, n in (("seeds", of_points), ("final_seeds", of_finalists)) if n}
    taken = seeds_taken(study, replace(config, tune=replace(config.tune, **tuning)))
    fresh = list(itertools.islice((s for s in itertools.count() if s not in taken), max(needed)))
    tail = f"_tuned_{tuning['seeds']}" if tuning else ""
    tail += f"_seeds_{fresh[0]}_to_{fresh[-1]}"
    name = CONFIRMS.sub("", header["requested"]["study"]["name"])[: MOST_NAMED - len(tail)] + tail
    settings = [f"tune.{key}={count}" for key, count in tuning.items()]
    return [f"seeds={override_value(fresh)}", *settings, f"study.name={override_value(name)}"]


def decides_all(ways: Ways) -> bool:
    """Return whether the study that `deciding` describes would settle everything that is undecided. `ways`:
    what `ways_to_decide` returns."""
    return None not in ways


def ways_to_decide(decisions: Mapping[str, Decision]) -> Ways:
    """Return, for each undecided answer and line of a verdict, how many fresh seeds would decide it or, if no
    number does, which tuning would as well; None where neither is known."""
    decision = decision_that_shows("arms", decisions) or decision_that_shows("verdict", decisions)
    ways: Ways = []
    for track in decision["tracks"].values() if decision else ():
        for answer in (track.get("answers") or {}).values():
            if answer["verdict"] == "undecided":
                tuning = (answer["difference"] or {}).get("tuning_needed")
                ways.append(answer["seeds_needed"] if answer["seeds"] else tuning)
        for line in track.get("verdict") or ():
            if line["verdict"] == "undecided":
                seeds = seeds_to_pass(line) if "difference" in line else None
                ways.append(seeds if seeds and seeds <= MOST_GIVEN else None)
    return ways


def _place(study: Study, header: StudyHeader) -> list[str]:
    """Return the overrides for a study's launcher and output folder, where they are not the defaults."""
    launcher = flat({"launcher": header["config"]["launcher"]})
    default = flat({"launcher": to_dict(LauncherConfig())})
    gone = {f"launcher.{name}" for name in GONE[LauncherConfig]}
    settings = {k: v for k, v in launcher.items() if default.get(k) != v and k not in gone}
    words = [f"{k.removesuffix('.name')}={override_value(v)}" for k, v in settings.items()]
    if str(study.root.parent) != Config.output_dir:
        words.append(f"output_dir={override_value(str(study.root.parent.resolve()))}")
    return words


def override_value(value: Any) -> str:
    """Return a value in the syntax of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{','.join(map(override_value, value))}]"
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {override_value(inner)}' for key, inner in value.items())}}}"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        # double quotes, because the shell's are single; backslashes are special only before a quote
        escaped = re.sub(r'(\\*)("|\Z)', lambda m: m[1] * 2 + ('\\"' if m[2] else ""), value)
        return f'"{escaped}"'
    return str(value)


# -- departures from the defaults ----------------------------------------------------------------------------


def departures(study: Study, header: StudyHeader) -> list[Change]:
    """Return (setting, default, requested) for the requested settings of a study that differ from the
    defaults of its scale and suite. A whole arm is represented by its description."""
    requested = as_this_version_says(header["requested"])
    copy = study.own / str(header["own"]["suite"]) if "own" in header else study.own
    try:
        base = _defaults(requested["scale"], str(copy.resolve()) if copy.is_file() else _suite(requested))
    except UserError:  # a suite of another version
        base = _defaults(requested["scale"], _suite(requested))
    found_out = ("study.name", "data.name") if requested["data"]["name"] == "auto" else ("study.name",)
    return [
        (key, _in_short(old), _in_short(here))
        for key, old, here in differences(base, requested)
        if key not in found_out and not key.endswith(".sha256")
    ]


def _in_short(value: Any) -> Any:
    """Return a value unchanged unless it is a whole arm; then return the arm's description, or `given`."""
    return value.get("about") or "given" if isinstance(value, dict) else value


@functools.cache
def _defaults(scale: str, suite: str) -> dict[str, Any]:
    """Return the default values of all settings for a scale and a suite. The result is cached because
    composing is slow and a watched page is rendered often."""
    chosen = [f"scale={scale}", f"study={override_value(suite)}"]
    return asked_for(compose(chosen, here=False, sources=False, trains=False))


def _suite(requested: Mapping[str, Any]) -> str:
    """Return the choice in `conf/study` that agrees best with these settings, apart from those of runs."""
    asked = flat(requested)

    def agreement(choice: str) -> int:
        try:
            whole = read_choice("study", choice)
        except UserError:
            return 0
        settings = flat({k: v for k, v in whole.items() if k not in RunConfig.__dataclass_fields__})
        settings.pop("study.name", None)
        return sum(1 if asked.get(k) == v else -1 for k, v in settings.items() if v != {})

    return max(["default", *groups()["study"]], key=agreement)
