"""Questions about a study, answered from its files alone: where it stands, and why it decided."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from ebc_lab.config.dicts import from_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.schema import STAGES, Config, RunConfig
from ebc_lab.records.sealed import read_json

from . import jobs, pace, reuse
from .again import reproduce
from .decide import fault
from .forecast import forecast
from .guards import cause_class
from .inference import noise
from .launch import at_a_time
from .reuse import ResultsOf
from .signature import as_recorded
from .store import FINISHED, Record, Study


def find(name: str | None, output_dir: str) -> Study:
    """A study by name or path, or a bundle of one; without a name, the newest in `output_dir`. Raises UserError."""
    from .bundle import Bundled, is_bundle

    base = Path(output_dir).expanduser()
    if name:
        path = Path(name).expanduser()
        if is_bundle(path):
            return Bundled(path)
        inside = path.parent == Path(".")
        return Study(base / name) if inside and not (path / "study.json").exists() else Study(path)
    headers = sorted(base.glob("*/study.json"), key=lambda p: p.stat().st_mtime)
    if not headers:
        raise UserError(f"there is no study in {base}: start one with `ebc-lab autopilot`.")
    return Study(headers[-1].parent)


def _seen_from(study: Study, header: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Another torch makes decisions stale where a call may go on, and nowhere else."""
    return nullcontext() if study.goes_on else as_recorded(header["environment"])


# -- status ---------------------------------------------------------------------------------------------------------------


def status(study: Study) -> dict[str, Any]:
    """Where a study stands. Raises UserError when there is none, or its study.json cannot be read at all.

    `state` is `running` (somebody holds it), `finished`, `finished_with_failures`, `stale` (decided, but a decision no longer
    follows from the files), `interrupted` (begun, nobody holds it) or `empty` (nothing trained yet). `problems` names damaged
    files. A stage is `decided`, `stale`, `open` or `waiting`; `would_train` counts the runs that the same command would train
    again for a stale one, None where that hangs on how an earlier stage decides.
    """
    problems: list[str] = []
    try:
        header = study.header()
    except UserError as error:
        header = study.header(checked=False)
        if not isinstance(header.get("config"), dict) or "corpus" not in header:
            raise
        problems.append(str(error))
    config: Config = from_dict(Config, header["config"])
    try:
        decisions = study.decisions()
    except UserError as error:
        decisions = {}
        problems.append(str(error))
    holder = study.holder()
    queue, silent = _queue(study, config.launcher.queue_every_s)
    records = study.records()
    problems += [*silent, *(r.problem for r in records if r.problem)]
    runs = [run_status(study, r.run_id, r.spec, r.result) for r in records if r.spec]
    failures = failures_of(study, config, [r for r in runs if r["outcome"] and r["outcome"] not in FINISHED])
    sound = [s for s, d in decisions.items() if not fault(d)]  # the others may lack anything
    with _seen_from(study, header):
        because = reuse.stale(config, header, decisions, records)
    known = reuse.kept(records, finished=config.study.stages[-1] in decisions)
    looks = {look.stage: look.missing for look in reuse.outlook(config, known)} if because else {}
    stages = []
    for stage in config.study.stages:
        own = [r for r in runs if r["stage"] == stage]
        outcomes: dict[str, int] = {}
        for r in own:
            outcomes[r["outcome"] or "open"] = outcomes.get(r["outcome"] or "open", 0) + 1
        state = "stale" if stage in because else "decided" if stage in decisions else "open" if own else "waiting"
        stages.append(
            {
                "stage": stage,
                "state": state,
                "runs": len(own),
                "outcomes": outcomes,
                "decided": headline(stage, decisions[stage]) if stage in sound else [],
                "stale_because": because.get(stage),
                "would_train": looks[stage] if stage in because else None,
            }
        )
    if holder is not None:
        state = "running"
    elif because:
        state = "stale"
    elif config.study.stages[-1] in decisions:
        state = "finished_with_failures" if failures else "finished"
    else:
        state = "interrupted" if runs else "empty"
    if state.startswith("finished"):
        eta: float | None = 0.0
    else:
        eta = _eta(config, records, runs, known) if state != "stale" else None  # it hangs on what is decided again
    return {
        "study": study.name,
        "root": str(study.root),
        "state": state,
        "holder": holder,
        "scale": config.scale,
        "corpus": header["corpus"],
        "stages": stages,
        "running": [r for r in runs if r["outcome"] is None and r["progress"]] if holder is not None or queue else [],
        "queue": queue,
        "eta_s": eta,
        "failures": failures,
        "problems": problems,
    }


def run_status(study: Study, run_id: str, spec: Mapping[str, Any], result: Mapping[str, Any] | None) -> dict[str, Any]:
    """A planned run in a few words: what it is, and what became of it."""
    return {
        "run_id": run_id,
        "stage": spec["stage"],
        "arm": spec["arm"],
        "seed": spec["config"]["seed"],
        "steps": spec["config"]["steps"],
        "outcome": result["outcome"] if result else None,
        "cause": result.get("cause") if result else None,
        "wall_s": result.get("wall_s") if result else None,
        "progress": None if result else study.progress(run_id),
    }


def failures_of(study: Study, config: Config, failed: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Failed runs grouped by cause, with one command that does the first of them again."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for r in failed:
        groups.setdefault(cause_class(r["outcome"], r["cause"]), []).append(r)
    return [
        {
            "outcome": alike[0]["outcome"],
            "cause": alike[0]["cause"] or "",
            "runs": [r["run_id"] for r in alike],
            "log": str(study.run_dir(alike[0]["run_id"]) / "log.txt"),
            "command": _again(study, config, alike[0]["run_id"]),
        }
        for alike in groups.values()
    ]


def _queue(study: Study, every_s: float) -> tuple[dict[str, int], list[str]]:
    """Slurm's states of the study's jobs, and how many are in each; asked no oftener than the launcher would. And problems."""
    try:
        session = jobs.session_of(study)
        known = jobs.looked_up(session, every_s) if session else {}
    except (UserError, jobs.QueueSilent) as error:
        return {}, [str(error)]
    return dict(Counter(job.state for job in known.values() if job.live)), []


def _again(study: Study, config: Config, run_id: str) -> str | None:
    """The command for one failed run as its spec describes it; None for a measurement of time."""
    spec = read_json(study.run_dir(run_id) / "spec.json")
    run = from_dict(RunConfig, spec["config"])
    if run.lr_schedule.source:  # beside this run in the study, and nowhere near a new one
        run.lr_schedule.source = str(study.run_dir(run.lr_schedule.source).resolve())
    return reproduce(config, run) if spec["kind"] == "train" else None


def _eta(config: Config, records: Sequence[Record], runs: Sequence[Mapping[str, Any]], known: ResultsOf) -> float | None:
    """Seconds left, at the pace of the finished runs, for the runs to be expected; None where nothing is known."""
    rate = pace.learned(records)
    if rate is None:
        return None
    expected = [s for specs in forecast(config, ("expected",), known)["expected"].values() for s in specs if s.kind == "train"]
    done = known(expected)
    part = {r["run_id"]: r["progress"].get("step", 0) / r["steps"] for r in runs if r["progress"]}
    left = sum(rate.seconds(s) * (1 - part.get(s.run_id, 0.0)) for s in expected if s.run_id not in done)
    return float(left / at_a_time(config))


# -- why ------------------------------------------------------------------------------------------------------------------


def headline(stage: str, decision: Mapping[str, Any]) -> list[str]:
    """A decision in one line a track."""
    lines = []
    for track, d in decision["tracks"].items():
        if stage == "lr_sweep":
            lines.append(
                f"{track}: lr {d['lr']:g}, val {d['val_loss']:.4f}, σ {d['sigma']:.4f}; natural KL {d['natural_kl']:.4g} nats; "
                f"fair control lr {d['control']['lr']:g} (×{d['control']['lr_scale']:g}), val {d['control']['val_loss']:.4f}"
            )
        elif stage == "calibrate":
            lines.append(
                f"{track}: δ* {d['delta_star']:g} nats ({d['times_natural']:.2f} × natural) by {d['budget']}{d['bound']}, "
                f"median c {d['c_median']:.2f}{'' if d['in_band'] else ' (outside the band)'}, val {d['val_loss']:.4f}"
            )
        elif stage == "controller_search":
            lines.append(
                f"{track}: {d['candidate']} of {len(d['kl_ratios'])}, median KL/δ* {d['kl_ratio']:.2f}, val {d['val_loss']:.4f}"
            )
        elif stage == "tune":
            best = {a: f for a, f in d["arms"].items() if f["val_loss"] is not None}
            first = min(best, key=lambda a: best[a]["val_loss"], default="none")
            margins = [f["margin_sigma"] for f in d["arms"].values() if f["margin_sigma"] is not None]
            least = f"; margins of {min(margins):.1f} to {max(margins):.1f} σ" if margins else ""
            lines.append(f"{track}: {len(d['arms'])} arms tuned; the best is {first}{least}")
        elif stage == "ablation":
            known = {a: f["val_median"] for a, f in d["arms"].items() if f["comparable"]}
            done = {a: x for a, x in known.items() if x is not None}
            first = sorted(done, key=lambda a: done[a])[:1]
            lowest = f"; lowest median validation loss {first[0]}, {done[first[0]]:.4f}" if first else ""
            lines.append(f"{track}: {len(d['arms'])} arms{lowest}")
        elif stage == "lr_scale":
            rooms = ", ".join(f"{arm} {'none' if x is None else f'×{x:g}'}" for arm, x in d["headroom"].items())
            note = " (LR inert under EBC, so its headroom is a tautology)" if d["headroom_is_tautology"] else ""
            lines.append(
                f"{track}: ×{d['lr_scale']:g}, median c {d['c_median']:.2f}, val {d['val_loss']:.4f}; headroom {rooms}{note}"
            )
        else:
            counts = {v: sum(x["verdict"] == v for x in d["verdict"]) for v in ("pass", "fail", "undecided")}
            gap = "" if d["margin_sigma"] is None else f"; best EBC arm from the fair control {d['margin_sigma']:+.1f} σ"
            lines.append(f"{track}: " + ", ".join(f"{n} {v}" for v, n in counts.items()) + gap)
        if "ranked" in d:  # one winner
            margin = d["margin_sigma"]
            lines[-1] += "; no runner-up" if margin is None else f"; margin {margin:.1f} σ"
    return lines


def why(study: Study, stage: str | None) -> dict[str, Any]:
    """Stage -> its decision with what would have changed it, for one stage or all. Raises UserError."""
    if stage is not None and stage not in STAGES:
        raise UserError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}.")
    header, decisions, records = study.header(), study.true_decisions(), study.records()
    asked = [stage] if stage else list(decisions)
    if not asked or any(s not in decisions for s in asked):
        raise UserError(f"{stage or 'no stage'} of study {study.name} is {'not ' if stage else ''}decided yet.")
    with _seen_from(study, header):
        because = reuse.stale(from_dict(Config, header["config"]), header, decisions, records)
    found, floors = {}, noise_floor(decisions)
    for s in asked:
        found[s] = {
            **decisions[s],
            "headline": headline(s, decisions[s]),
            "flips": flips(s, decisions[s]),
            "stale_because": because.get(s),
            "noise": floors,
        }
    return found


def noise_floor(decisions: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Track -> the noise that margins are counted in: see `inference.noise`."""
    return {track: noise(d["replicate_losses"]) for track, d in decisions.get("lr_sweep", {"tracks": {}})["tracks"].items()}


def noise_in_words(floor: Mapping[str, Any]) -> str:
    """The noise floor in a line: σ, its interval, and what two single runs could show."""
    if floor["sigma"] is None:
        return "σ unknown"
    return (
        f"σ {floor['sigma']:.4f} nats (95%: {floor['low']:.4f} to {floor['high']:.4f}, {floor['seeds']} replicate seeds); "
        f"smallest detectable difference of two single runs {floor['detectable']:.4f}"
    )


def flips(stage: str, decision: Mapping[str, Any]) -> list[str]:
    """What would have changed the decision, one sentence a track."""
    out = []
    for track, d in decision["tracks"].items():
        if stage == "finals":
            close = [x for x in d["verdict"] if x["verdict"] == "undecided"]
            out.append(
                f"{track}: more seeds (seeds=…, or finals.max_seeds=…) could settle {', '.join(x['name'] for x in close)}"
                if close
                else f"{track}: nothing is open"
            )
            continue
        if stage in ("tune", "ablation"):
            continue  # a table, not one winner
        others = [c for c in decision["candidates"] if c["run_id"] != d["run_id"] and c["val_loss"] is not None]
        ranked = [c for c in others if c["run_id"] in d["ranked"]]
        words = []
        if ranked:
            second = min(ranked, key=lambda c: c["val_loss"])
            gap = second["val_loss"] - d["val_loss"]
            sigma = f" ({gap / d['sigma']:.1f} σ)" if d["sigma"] else ""
            which = f"δ* {second['delta_star']:g}" if stage == "calibrate" else f"lr {second['lr']:g}"
            words.append(f"{second['arm']} at {which} would have had to be {gap:.4f} nats better{sigma}")
        if stage != "lr_sweep":
            passed = [
                c for c in others if c["role"] == "ebc" and c["run_id"] not in d["ranked"] and c["val_loss"] < d["val_loss"]
            ]
            if passed:
                low = min(passed, key=lambda c: c["val_loss"])
                words.append(
                    f"{low['arm']} has the lowest loss, {low['val_loss']:.4f}, but its median c, {low['c_median']:.2f}, did "
                    "not qualify: another band would have chosen it"
                )
        for pair in decision.get("pairs", []):
            if pair["track"] != track and pair["val_loss"] is not None:
                words.append(f"{pair['track']} would have had to be {pair['val_loss'] - d['val_loss']:.4f} nats better")
        out.append(f"{track}: " + ("; ".join(words) or "there was no other candidate"))
    return out


def clock(seconds: float | None) -> str:
    """A duration a person reads at a glance."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    whole = round(seconds)
    if whole < 90:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    return f"{minutes} min {s:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
