"""finals: every arm at full length over fresh seeds, the arms' paired differences, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from ebc_lab.config.identity import round3
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.decisions import Decision, FinalsTrack, Sequential
from ebc_lab.records.figures import RunResult
from ebc_lab.records.spec import RunSpec, arm_name

from .compare_arms import claims, compare, efficiency, judged_arms, looks, next_seeds, shares_of_error
from .lr_sweep.fair_control import control_run
from .rules import Decisions, Results, Specs, divided_in_words, make_decision
from .runs import ebc_run, length, plain_run, searched, spec_of, tracks_of, waiting, with_ebc
from .stage import Figure, NotSettled, Stage, or_undecided
from .statistics import CONFIDENCE, level_of, show_difference, show_mean
from .verdict import remedy, verdict_lines

OVERHEAD_STEPS = 160  # per side of the overhead measurement
ASKED_ABOUT = {  # rival -> a clause on the comparison so far
    "baseline": "EBC at ×2 {} against the baseline",
    "control": "the best EBC arm by validation {} against the fair control",
}


def final_arms(
    config: Config, decisions: Decisions, name: str, seed: int
) -> Iterator[tuple[str, RunConfig, float]]:
    """Yield (role, run, LR scale) for each arm in `finals.arms` that the decisions so far determine. Two
    roles may have the same run."""
    for role in config.finals.arms:
        arm = None
        with suppress(NotSettled):
            arm = _final_arm(config, decisions, name, seed, role)
        if arm is not None:
            run, scale = arm
            yield role, replace(run, evaluate=["val", "test"]), scale


def _final_arm(
    config: Config, decisions: Decisions, name: str, seed: int, role: str
) -> tuple[RunConfig, float] | None:
    """Return the run and the LR scale of a role, or None while a decision that the role needs is missing."""
    track = decisions["lr_sweep"]["tracks"][name]
    steps = config.finals.steps
    kind, _, rate = role.rpartition("_x")  # ebc_x8 gives `ebc` and `8`; without a rate the kind is empty
    if role == "baseline":
        return plain_run(config, track, steps, seed, 1.0), 1.0
    if "control" in (role, kind):
        scale = float(rate) if kind else track["control"]["lr_scale"]
        return control_run(config, track, steps, seed, scale), scale
    if "calibrate" not in decisions or (kind != "ebc" and "lr_scale" not in decisions):
        return None
    calibrated = decisions["calibrate"]["tracks"][name]
    ebc = {"budget": calibrated["budget"], **searched(decisions, name)}
    target_kl = calibrated["delta_star"]
    scale = float(rate) if kind == "ebc" else decisions["lr_scale"]["tracks"][name]["lr_scale"]
    if kind == "ebc" or role == "ebc_chosen":
        return ebc_run(config, track, steps, seed, scale, target_kl=target_kl, **ebc), scale
    if role == "none_chosen":
        return plain_run(config, track, steps, seed, scale), scale
    make = control_run if role == "ebc_lindelta_lrdecay" else plain_run
    run = make(config, track, steps, seed, 2 * scale)
    return with_ebc(run, track, target_kl=round3(2 * target_kl), schedule="linear", **ebc), 2 * scale


def _rule(config: Config, sequential: Sequential | None) -> str:
    rule = (
        f"test loss, paired by seed, with {level_of(shares_of_error(config))} intervals, joint ones where an "
        "arm is picked from several, that allow for the luck in choosing constant rate, control and δ*; no "
        f"worse: upper limit ≤ +{config.finals.margin:g} nats; beats: upper limit below 0; "
        "KL, c, plateau and overhead are judged on EBC ×2; LR window: EBC at its highest rate minus EBC at "
        f"its lowest, upper limit ≤ +{config.finals.window_margin:g} nats"
    )
    if sequential:
        seeds = ", ".join(map(str, sequential["looks"]))
        rule += f"; looked at after {seeds} seeds, the error shared out over the looks"
    return rule + divided_in_words(config)


class Finals(Stage):
    """The stage that trains every arm at full length over fresh seeds and gives the verdict."""

    name = "finals"
    title = "Finals"
    about = "Every arm at full length, from the same initial weights and data order for each seed."
    figures = (
        Figure("best_ebc_by_val", "best EBC arm"),
        Figure("overhead_pct", "overhead", "{:.1f}%", "of the step time"),
    )
    concludes = True
    shows = "verdict"
    pictures = ("curves", "arms", "tightness")
    summary_csv = "summary_final.csv"

    def runs(self, config: Config, earlier: Decisions, results: Results) -> list[RunSpec]:
        """Return every arm's runs at full length over `seeds`, and over more seeds while the verdict is
        undecided and more are allowed. For each track, add a paired measurement of EBC's overhead at ×2."""
        seeds = list(config.seeds)
        made: dict[tuple[str, int], list[RunSpec]] = {}  # by track and seed, kept between looks
        while True:
            specs: list[RunSpec] = []
            for name in tracks_of(earlier, "finals"):
                for seed in seeds:
                    if (name, seed) not in made:
                        arms = final_arms(config, earlier, name, seed)
                        made[name, seed] = [spec_of("finals", role, run, scale) for role, run, scale in arms]
                    specs += made[name, seed]
                if "lr_scale" in earlier:
                    twice = next(s for s in made[name, seeds[0]] if s.role == "ebc_x2")
                    shape = replace(twice.run, steps=OVERHEAD_STEPS)
                    timed = arm_name(shape, 2.0, length(shape, config.finals.steps))
                    specs.append(RunSpec("finals", "overhead", timed, 2.0, shape, "overhead"))
            if "lr_scale" not in earlier or waiting([s for s in specs if s.kind == "train"], results):
                return specs
            more = next_seeds(config, specs, results, earlier)
            if not more:
                return specs
            seeds += more

    def decide(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> Decision:
        """Return a decision with each track's arms, paired differences, efficiency and verdict. If seeds may
        be added, it also holds the planned looks, and when and why the looks stopped. Raises Undecidable."""
        tracks = compare(config, specs, results, earlier)
        notes: list[str] = []
        for name, track in tracks.items():
            measured = (s.run_id for s in specs if s.kind == "overhead" and s.track == name)
            overhead = results.get(next(measured, ""), RunResult())
            track |= {
                "sigma": earlier["lr_sweep"]["tracks"][name]["sigma"],
                "margin_sigma": track["differences"]["control"][track["best_ebc_by_val"]]["sigmas"],
                "overhead_pct": overhead.get("overhead_pct"),
                "efficiency": efficiency(
                    track["arms"], track["roles"]["baseline"], results, config.tokens_per_step
                ),
                "verdict": verdict_lines(config, track, results, overhead),
            }
            if not overhead.get("overhead_pct") and overhead.get("outcome") != "completed":
                why = overhead.get("cause") or "no result"
                notes.append(f"{name}: the overhead was not measured ({why})")
        sequential: Sequential | None = None
        if len(looks(config)) > 1:
            seeds = len({s.run.seed for s in specs if s.kind == "train"})
            stopped = "every comparison is decided"
            if any("undecided" in claims(track) for track in tracks.values()):
                stopped = f"still undecided at {seeds} seeds, the most allowed"
            confidence = 1 - (1 - CONFIDENCE) / shares_of_error(config)
            sequential = {"looks": looks(config), "at": seeds, "confidence": confidence, "stopped": stopped}
        rule = _rule(config, sequential)
        return make_decision(
            "finals", rule, config, specs, results, earlier, tracks=tracks, sequential=sequential, notes=notes
        )

    def headline(self, track: FinalsTrack) -> str:
        """Return the counts of verdict lines, and how the best EBC arm differs from the fair control."""
        counts = Counter(line["verdict"] for line in track["verdict"])
        text = ", ".join(f"{counts[v]} {v}" for v in ("pass", "fail", "undecided"))
        best = track["differences"]["control"][track["best_ebc_by_val"]]
        return f"{text}; best EBC arm (by validation) minus fair control: {show_difference(best, joint=True)}"

    def turning_points(self, name: str, decision: Decision) -> list[str]:
        """Return clauses that say what could change each line of the verdict that did not pass."""
        lines: dict[str, list[str]] = {}
        for line in decision["tracks"][name]["verdict"]:
            if line["verdict"] != "pass":
                lines.setdefault(remedy(line), []).append(line["name"])
        remedies = [f"{what} could change {', '.join(names)}" for what, names in lines.items()]
        return remedies or ["every line passed"]

    def so_far(self, config: Config, specs: Specs, results: Results, earlier: Decisions) -> list[str]:
        """Return how the verdict's comparisons of test loss stand so far, over the seeds under which both
        arms have finished. Raises Undecidable."""
        clauses = []
        for name, track in compare(config, specs, results, earlier).items():
            asked = len({s.run.seed for s in specs if s.track == name and s.kind == "train"})
            for rival, arm in judged_arms(track).items():
                d = track["differences"][rival][arm]
                if d["seeds"]:
                    words = f"{ASKED_ABOUT[rival]}, from {d['seeds']} of {asked} seeds"
                    clauses.append(or_undecided(words.format(show_mean(d)), d, joint=rival == "control"))
        return clauses


STAGE = Finals()
