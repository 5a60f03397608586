"""One run of a study, trained again apart from the study, and compared with its recording."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict, run_part
from ebc_lab.config.errors import UserError, any_of, count, nearest, require, shown
from ebc_lab.config.identity import identity, run_id
from ebc_lab.config.machine import git_revision, hardware, versions
from ebc_lab.config.overrides import FROM
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import read_regular
from ebc_lab.records.json_files import read_json
from ebc_lab.records.paths import RunFiles, SpecRecord
from ebc_lab.records.streams import MOST_BYTES, read_columns

from ..stages.rules import untimed
from ..store import attempts
from ..store.changes import Change, differences
from ..store.study import Study, run_again
from .compare import unequal
from .reproduce import override_value

if TYPE_CHECKING:
    import numpy as np

SOURCE = "lr_schedule.source"  # of a replay: a run's name in a study, its folder outside of it
NAMES = ("run_id", "identity", "corpus_warning")  # in a result, but no figures of it
LOSSES = ("val_loss", "test_loss")  # shown in any case
TIMED = ("train_s",)  # columns of evals.csv that differ each time
OTHER_RUN = (
    "{} would make it another run: give only what says where its text, its weights or its own parts are, or "
    "train that run with `ebc-lab train from=…`."
)
MOST_FIGURES = 6  # that differ, shown one by one


class Named(NamedTuple):
    """A training run as a stage of its study knows it. A run that several stages use has several names."""

    stage: str
    arm: str
    seed: int
    run_id: str


# -- which run -----------------------------------------------------------------------------------------------


def chosen(
    study: Study, *, arm: str | None, seed: int | None, stage: str | None, run: str | None
) -> SpecRecord:
    """Return the spec of the one training run with this arm and seed in a stage (by default the last that has
    any), or of the run with this id or the ten digits that end it. Raises UserError, naming what there is, if
    no run fits or several do."""
    stages = study.header()["config"]["study"]["stages"]
    if stage is not None:
        study.must_have(stage, stages)
    every = _named_runs(study)
    require(bool(every), f"study {study.name} has no training run yet: its command trains them.")
    if run is not None:
        alone = arm is None and seed is None and stage is None
        require(alone, "--run names one run by itself: leave --arm, --seed and --stage out.")
        fitting = [one for one in every if one.run_id == run or one.run_id.endswith(f"-{run}")]
        if not fitting:
            raise UserError(_no_such_run(study, run, every))
        return study.spec(fitting[0].run_id)
    stage = stage or next(s for s in reversed(stages) if any(one.stage == s for one in every))
    of_stage = [one for one in every if one.stage == stage]
    place = f"stage {stage} of study {study.name}"
    require(bool(of_stage), f"{place} has no training run: choose another --stage, {any_of(stages)}.")
    arms = list(dict.fromkeys(one.arm for one in of_stage))
    if arm is not None and arm not in arms:
        others = list(dict.fromkeys(one.stage for one in every if one.arm == arm))
        elsewhere = f"; --stage {others[0]} has it" if others else ""
        near = "" if others else nearest(arm, arms)
        raise UserError(f"{place} has no arm {shown(arm)}{near}: it has {any_of(arms)}{elsewhere}.")
    of_arm = [one for one in of_stage if arm in (None, one.arm)]
    seeds = sorted({one.seed for one in of_arm})
    if seed is not None and seed not in seeds:
        whose = place if arm is None else f"arm {arm} in {place}"
        raise UserError(f"{whose} has no seed {seed}: it has {any_of(list(map(str, seeds)))}.")
    fitting = [one for one in of_arm if seed in (None, one.seed)]
    if (number := len({one.run_id for one in fitting})) > 1:
        named = {"--arm": [one.arm for one in fitting], "--seed": [str(one.seed) for one in fitting]}
        apart = ((option, list(dict.fromkeys(values))) for option, values in named.items())
        by = ((option, values) for option, values in apart if len(values) > 1)
        option, values = next(by, ("--run", [one.run_id for one in fitting]))
        raise UserError(f"{number} runs of {place} fit: tell them apart by {option}, {any_of(values)}.")
    return study.spec(fitting[0].run_id)


def _named_runs(study: Study) -> list[Named]:
    """Return the training runs under the names of the stages that planned them, then under those of the other
    stages whose decisions rest on them. Runs with a damaged spec are left out."""
    found: dict[Named, None] = {}
    for run in study.run_ids():
        with suppress(FileNotFoundError, UserError):
            spec = study.spec(run)
            if spec["kind"] == "train":
                found[Named(spec["stage"], spec["arm"], spec["config"]["seed"], run)] = None
    trained = {one.run_id for one in found}
    with study.blame_files():
        for stage, decision in study.decisions().items():
            used = [c for c in decision["candidates"] if c["run_id"] in trained]
            found |= dict.fromkeys(Named(stage, c["arm"], c["seed"], c["run_id"]) for c in used)
    return list(found)


def _no_such_run(study: Study, run: str, every: Sequence[Named]) -> str:
    if run in study.run_ids():
        with suppress(FileNotFoundError):
            if study.spec(run)["kind"] != "train":  # UserError where it is damaged
                return f"{run} is a measurement of time, which comes out differently each time: choose a run."
    near = nearest(run, [one.run_id for one in every])
    return f"study {study.name} has no training run {shown(run)}{near}: its page lists them all."


# -- its settings, and the name that they have here ----------------------------------------------------------


def settings_of(study: Study, spec: SpecRecord, overrides: Sequence[str] = ()) -> Config:
    """Return the settings that train a recorded run again, with overrides that say where its text, weights or
    own parts lie on this machine. Raises UserError for what is missing here, and for overrides that would
    make it another run."""
    _refuse_lacking(study, spec, overrides)
    if whole := [one for one in overrides if "." not in one.partition("=")[0]]:
        raise UserError(OTHER_RUN.format(any_of([one.partition("=")[0] for one in whole])))
    recorded = f"{FROM}={override_value(str(study.run_files(spec['run_id']).spec))}"
    config = compose([recorded, *overrides], study=False)
    if overrides:
        named, asked = identity(from_dict(RunConfig, spec["config"])), identity(run_part(config))
        other = [key for key, _, _ in differences(named, asked) if key != SOURCE]
        if other:
            raise UserError(OTHER_RUN.format(any_of(other)))
    return config


def _refuse_lacking(study: Study, spec: SpecRecord, overrides: Sequence[str]) -> None:
    """Raise UserError if a run starts from another run of its study, or replays one, whose files are not in
    the recording, unless an override says where they are."""
    config = spec["config"]
    sources = {"init.run": config.get("init", {}).get("run"), SOURCE: config["lr_schedule"]["source"]}
    for key, source in sources.items():
        if source not in study.run_ids() or any(o.startswith(f"{key}=") for o in overrides):
            continue
        files = study.run_files(source)
        file = files.steps if key == SOURCE else files.weights
        if not file.is_file():
            again = run_again(study.called, source)
            raise UserError(
                f"it needs the {file.name} of {source}, which the recording does not hold: "
                f"`{again}` trains that run again; then give its folder here as {key}=FOLDER."
            )


def renamed(spec: SpecRecord) -> tuple[str, list[Change]]:
    """Return the name that this version gives to a recorded run, and (what, recorded, now) for everything in
    which its identity differs; nothing if the name is the recorded one."""
    run: RunConfig = from_dict(RunConfig, spec["config"])
    return run_id("train", run), differences(spec["identity"], identity(run))


def recorded_result(study: Study, spec: SpecRecord) -> RunResult:
    """Return the result that a run is compared with. Raises UserError if the run has none yet."""
    result = study.result(spec["run_id"])
    if result is None:
        raise UserError(f"{spec['run_id']} has no result yet to compare with: the study's command trains it.")
    return result


def processes_of(study: Study, spec: SpecRecord) -> int:
    """Return how many processes trained a run together; of a bundle without its log, the study's number."""
    begun = attempts.last_begin(study.run_dir(spec["run_id"]))
    together = study.header()["config"]["launcher"].get("processes_per_run", 1)
    return int(begun.get("processes", 1) if begun else together)


# -- the two compared ----------------------------------------------------------------------------------------


def compare(study: Study, spec: SpecRecord, folder: Path) -> dict[str, Any]:
    """Return what the run trained again in `folder` has in common with its recording.

    `same`: all that can be compared is equal. `steps` and `evals`: by what they were compared (`bytes`,
    `sha256`, `numbers`; None: not at all), how many `rows`, and where they `part`: the step, the column and
    both values; None if they do not, or it is not known where. `figures`: the compared number, and those that
    differ; `losses`: both values of each. `causes`: what differs of versions, code and machine.
    """
    run, here = spec["run_id"], RunFiles(folder)
    recorded, again = recorded_result(study, spec), RunResult(**read_json(here.result))
    there = study.run_files(run)
    steps = _steps(there, here, recorded, again)
    evals = _evals(there, here, recorded, again)
    old, new = ({k: v for k, v in untimed(r).items() if k not in NAMES} for r in (recorded, again))
    both = [k for k in old if k in new and None not in (old[k], new[k])]
    differ = unequal({k: old[k] for k in both}, {k: new[k] for k in both})
    same = steps["same"] is not False and evals["same"] and not differ
    name, changes = renamed(spec)
    return {
        "study": study.name,
        "run_id": run,
        "arm": spec.get("arm"),
        "seed": spec["config"]["seed"],
        "stage": spec.get("stage"),
        "folder": str(folder),
        "named_here": name,
        "renamed": [list(change) for change in changes],
        "same": same,
        "steps": steps,
        "evals": evals,
        "figures": {"compared": len(both), "differ": differ},
        "losses": {k: [old.get(k), new.get(k)] for k in LOSSES if old.get(k) or new.get(k)},
        "outcomes": [recorded.get("outcome"), again.get("outcome")],
        "causes": [] if same else list(_causes(study, spec)),
    }


def _steps(there: RunFiles, here: RunFiles, recorded: RunResult, again: RunResult) -> dict[str, Any]:
    """Compare the steps, byte by byte where the recording has them, else by their checksum."""
    known, now = (result.get("streams", {}).get(there.steps.name) for result in (recorded, again))
    same, by = None, None
    if there.steps.is_file():
        if read_regular(there.steps, MOST_BYTES) != read_regular(here.steps, MOST_BYTES):
            return _by_numbers(read_columns(there.steps), read_columns(here.steps))
        same, by = True, "bytes"
    elif known is not None:
        same, by = known == now, "sha256"
    return {"same": same, "by": by, "rows": again["steps"], "part": None}


def _evals(there: RunFiles, here: RunFiles, recorded: RunResult, again: RunResult) -> dict[str, Any]:
    """Compare the evaluations without their times, as evals.csv has them, else the losses in the results."""
    import numpy as np

    if there.evals.is_file() and here.evals.is_file():
        return _by_numbers(read_columns(there.evals), read_columns(here.evals))
    curves = (np.array(result.get("curve") or [], float).reshape(-1, 3) for result in (recorded, again))
    return _by_numbers(*({"step": curve[:, 0], "val_loss": curve[:, 1]} for curve in curves))


def _by_numbers(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Compare two streams in the columns that both have; a cell that is empty in both is equal."""
    import numpy as np

    rows = min(len(a["step"]), len(b["step"]))
    part: dict[str, Any] | None = None
    first = rows
    for column in (c for c in a if c in b and c not in TIMED):
        x, y = a[column][:first], b[column][:first]
        if len(differ := np.flatnonzero((x != y) & ~(np.isnan(x) & np.isnan(y)))):
            first = int(differ[0])
            values = {"recorded": float(x[first]), "again": float(y[first])}
            part = {"step": int(a["step"][first]), "column": column, **values}
    if part is None and len(a["step"]) != len(b["step"]):
        part = {"step": rows, "column": None, "recorded": len(a["step"]), "again": len(b["step"])}
    return {"same": part is None, "by": "numbers", "rows": rows, "part": part}


def _causes(study: Study, spec: SpecRecord) -> Iterator[tuple[str, Any, Any]]:
    """Yield (what, as recorded, as here) for what differs and can change bits. A run's threads are settings
    of it, so they are the recorded ones."""
    header = study.header()
    begun = attempts.last_begin(study.run_dir(spec["run_id"]))
    code = {**header["versions"], "ebc_lab": header["ebc_lab"], "git": header["git"]}
    code |= attempts.code_of(begun) or {}
    code |= {"numerics_version": spec["identity"].get("numerics_version")}
    now = {**versions(), **attempts.code_here(), "git": git_revision()}
    for name in ("numerics_version", "torch", "ebc_lab", "git", "numpy"):
        if code.get(name) != now.get(name):
            yield name, code.get(name), now.get(name)
    known, machine = header["hardware"], hardware()
    part = "gpus" if spec["config"]["device"] == "cuda" else "cpu"
    if begun and begun.get("host") != known["host"]:
        yield part, f"not recorded, that of {begun.get('host')}", machine[part]
    elif known[part] != machine[part]:
        yield part, known[part], machine[part]


# -- in words ------------------------------------------------------------------------------------------------


def renamed_in_words(spec: SpecRecord) -> list[str]:
    """Return a line if this version gives a recorded run another name, which says why."""
    name, changes = renamed(spec)
    why = "; ".join(f"{key} was {old} and is {now}" for key, old, now in changes)
    return [f"this ebc-lab no longer calls it that, but {name}: {why}"] if changes else []


def in_words(found: Mapping[str, Any]) -> list[str]:
    """Return a comparison as lines: whether the two are the same, where they part, the likely causes."""
    steps, evals, figures = found["steps"], found["evals"], found["figures"]
    ways = {
        "bytes": ", byte by byte",
        "sha256": " by the sha256 of steps.csv",
        "numbers": " by their numbers",
    }
    parts = [f"{count(steps['rows'], 'step')}{ways[steps['by']]}"] if steps["by"] else []
    parts += [count(evals["rows"], "evaluation"), f"{count(figures['compared'], 'figure')} of result.json"]
    what = f"{', '.join(parts[:-1])} and {parts[-1]}"
    lacking = [] if steps["by"] else ["the recording has neither steps.csv nor its sha256: no step compared"]
    if found["same"]:
        return [f"the same {'bits' if steps['by'] else 'numbers'} as recorded: {what}", *lacking]
    lines = [f"not the same as recorded: compared were {what}", *lacking]
    lines += [_parting(name, found[key]) for key, name in (("steps", "steps.csv"), ("evals", "evaluations"))]
    before, after = found["outcomes"]
    lines += [f"outcome: {before} recorded, {after} now"] if before != after else []
    lines += [f"{name}: {_values(*pair)}" for name, pair in found["losses"].items()]
    others = {k: pair for k, pair in figures["differ"].items() if k not in (*found["losses"], "outcome")}
    for name, pair in list(others.items())[:MOST_FIGURES]:
        lines.append(f"{name}: {_values(*pair)}")
    more = len(others) - MOST_FIGURES
    lines += [f"{count(more, 'figure')} more: --json has all"] if more > 0 else []
    causes = [f"{name} {old} there, {now} here" for name, old, now in found["causes"]]
    known = "nothing that is recorded differs: versions, code and model of the processor are the same"
    return [*filter(None, lines), f"may be why: {'; '.join(causes)}" if causes else known]


def _parting(name: str, stream: Mapping[str, Any]) -> str:
    """Return where a stream parts from the recorded one; empty if it does not."""
    part = stream["part"]
    if part is None:
        alone = f"{name}: other bytes; the recording has their sha256 alone"
        return alone if stream["same"] is False else ""
    if part["column"] is None:
        return f"{name}: {part['recorded']} rows recorded, {part['again']} now, the same as far as both go"
    values = _values(part["recorded"], part["again"])
    return f"{name}: first at step {part['step']}, {part['column']}: {values}"


def _values(recorded: Any, again: Any) -> str:
    """Return two values and, of numbers, their difference: `2.4451 recorded, 2.4453 now (+0.0002)`."""
    both = f"{_exact(recorded)} recorded, {_exact(again)} now"
    numbers = isinstance(recorded, int | float) and isinstance(again, int | float)
    return f"{both} ({again - recorded:+.3g})" if numbers and again - recorded == again - recorded else both


def _exact(value: Any) -> str:
    """Return a value in full; a cell without one, which is NaN, as `nothing`."""
    return "nothing" if value is None or value != value else shown(value)
