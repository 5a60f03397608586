"""The columns of every CSV file and table, their units and meanings, as `ebc-lab columns` prints them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ebc_lab.config.fields import number
from ebc_lab.config.part import EXPERT, LEVEL, Figure
from ebc_lab.config.parts import PARTS
from ebc_lab.ebc.options import CURVE_SCALES

if TYPE_CHECKING:
    import pandas as pd

Meanings = Mapping[str, tuple[str, str]]  # column -> unit, meaning
NATS = "nats/token"
LOGITS = "logits/token"
SHARE = "0–1"
SCALE = "×"

_WORKLOAD_PARTS = [part for part in PARTS if part.read_by]
_ANY_PARTS = [part for part in PARTS if not part.read_by]

STEP_MEANINGS = {  # of steps.csv, one row per step: column -> unit, meaning
    "step": ("", "from 0"),
    "loss": (NATS, "on the batch, before the update"),
    "lr": ("", "learning rate"),
    "c": (SHARE, "clip coefficient"),
    "eta_eff": ("", "c·lr"),
    "delta": (NATS, "the KL budget"),
    "target_kl": (NATS, "δ* at this step"),
    "radius": (LOGITS, "τ = 2·sqrt(δ)"),
    "guard": ("", "the factor on τ"),
    "trial": (SHARE, "the last scale at which a KL was measured"),
    "trial_kl": (NATS, "the KL measured there, on the tokens that choose c"),
    "measurements": ("", "how many it made"),
    "tracked_log_ratio": ("", "x of `tracked`, ln of the whole proposal's KL over P, after this step"),
    "tracked_variance": ("", "the variance of x; empty while x is not known"),
    "tracked_flicker": ("", "the variance of ln(KL/P) about x, from step to step"),
    "tracked_scale": ("", "P of `tracked`, from ⟨gradient, ΔW⟩ and ‖ΔW‖"),
    "innovation": ("", "the measured x minus the predicted one"),
    "predicted_kl": (NATS, "q of the whole proposal"),
    "calibration": ("", "k of `calibrated`: KL over S²"),
    "slope": (NATS, "⟨gradient, ΔW⟩ of the whole proposal"),
    "agreement": ("", "what the loss fell by over what was predicted"),
    "applied_kl": (NATS, "between W and W + c·ΔW, on tokens that did not choose c; at audits"),
    "applied_norm": (
        "weight norm",
        "‖c·ΔW‖ over all weights; at audits. `applied_kl` over its square is the curvature along the step",
    ),
    "audit_tokens": ("tokens", "how many those were"),
    "movement": (LOGITS, "T"),
    "surrogate": (LOGITS, "S"),
    "tightness": ("", "T/(c·S)"),
    "grad_norm": ("", "global L2 norm, before anything limits it"),
    "grad_scale": ("", "the limited gradient's norm over it"),
    "skipped": ("0 or 1", "no usable gradient or update"),
}
STEP_COLUMNS = tuple(STEP_MEANINGS)
CURVE_COLUMNS = tuple(f"kl_c{number(c)}" for c in CURVE_SCALES)  # KL of these shares of the proposed step
FURTHER_STEP_MEANINGS = {  # of steps.csv, in runs whose settings ask for these columns
    "exponent": ("", "p of exponent=auto: KL is taken to grow as c to this power"),
    "sharpness": (
        "nats/weight norm²",
        "largest eigenvalue of the training loss's Hessian before the update; every `sharpness_every` steps",
    ),
    "preconditioned_sharpness": (
        "1/lr",
        "the same of P^(-1/2) H P^(-1/2), P Adam's sqrt(v) + eps of the step before; with torch's Adam",
    ),
    **dict(column for part in _ANY_PARTS for column in part.columns.items()),
    **{
        name: (NATS, f"between W and W + {c:g}·ΔW, on the audit's tokens; every `curve_every` steps")
        for name, c in zip(CURVE_COLUMNS, CURVE_SCALES, strict=True)
    },
}
EVAL_MEANINGS = {  # of evals.csv, one row per evaluation
    "step": ("", "steps taken"),
    "val_loss": (NATS, "on the same 64 windows of the validation split each time (`eval_windows`)"),
    "val_se": (NATS, "its standard error"),
    "tokens": ("tokens", "trained on so far"),
    "train_s": ("s", "of training so far, evaluations aside"),
}
EVAL_COLUMNS = tuple(EVAL_MEANINGS)
BITS = "test_bits_per_char"
FURTHER_EVAL_MEANINGS = dict(column for part in _ANY_PARTS for column in part.evals.items())
# further columns of these files, under workloads that have some
WORKLOAD_STEP_MEANINGS = dict(column for part in _WORKLOAD_PARTS for column in part.columns.items())
WORKLOAD_EVAL_MEANINGS = dict(column for part in _WORKLOAD_PARTS for column in part.evals.items())
PATTERNS = {LEVEL: r"\d+(?:p\d+)?", EXPERT: r"\d+"}


def meaning_of(column: str, meanings: Mapping[str, tuple[str, str]]) -> tuple[str, str] | None:
    """Return (unit, meaning) of a column; None if the column is unknown. A placeholder in a name in
    `meanings`, such as `r2_<σ>`, matches any noise level or expert number."""
    if column in meanings:
        return meanings[column]
    for name, meaning in meanings.items():
        lead, mark, _ = name.partition("<")
        if mark and re.fullmatch(re.escape(lead) + PATTERNS[name.removeprefix(lead)], column):
            return meaning
    return None


COLUMN_MEANINGS = {  # of summary_*.csv, one row per run: column -> unit, meaning
    "arm": (
        "",
        "what was trained, `<optimizer>_<projection>_<stabilizer>[_d<δ*>_<budget>]_x<scale>"
        "<schedules><low-bit>`, which end as in `_holddelta_trapezoid_w0`, and with low bits as in "
        "`_ternary_gfive_mint8_clustered_auxnn`; in summary_lr_sweep.csv `_lr<rate>` stands for `_x<scale>`, "
        "and `_n<steps>` at the end for another length than the finals'. A name means one setting",
    ),
    "seed": ("", "of the initial weights and the data order; runs of one seed are pairs"),
    "lr": ("", "learning rate at its peak"),
    "lr_scale": (
        SCALE,
        "lr over the track's best constant rate; in summary_lr_sweep.csv over the grid's best, and empty in "
        "the grid",
    ),
    "optimizer": ("", "the base optimizer"),
    "projection": ("", "of the weights"),
    "stabilizer": ("", "what acts between backward and the update; `none` is the plain optimizer"),
    "budget": ("", "how EBC finds c; empty without EBC"),
    "aggregate": ("", "how contributions add up to S; empty where S is not measured"),
    "controller": ("", "how EBC's δ moves; empty without EBC"),
    "delta_star": (NATS, "δ*, the target KL of a step, before its schedule"),
    "outcome": ("", "`completed`, `diverged`, `raced`, `oom`, `failed`, `lost` or `cancelled`"),
    "steps": ("steps", "taken"),
    "val_loss": (NATS, "cross-entropy on the whole validation split; decisions look at this one"),
    "val_se": (NATS, "its standard error over the split's windows"),
    "test_loss": (NATS, "cross-entropy on the whole test split; the verdict looks at this one"),
    "test_se": (NATS, "its standard error over the split's windows"),
    "heldout_loss": (NATS, "validation and test split together"),
    BITS: ("bits/character", "test_loss over ln 2 and over the characters of a token"),
    "test_accuracy": (SHARE, "tokens of the test split predicted correctly"),
    "clip_rate": (SHARE, "steps with c < 0.999"),
    "c_mean": (SHARE, "mean clip coefficient c, over steps that were not skipped, like its quantiles"),
    "c_p10": (SHARE, "10% quantile of c"),
    "c_median": (SHARE, "median of c"),
    "c_p90": (SHARE, "90% quantile of c"),
    "eta_eff_median": ("", "median of c·lr"),
    "kl_median": (
        NATS,
        "median applied KL of the audited steps from step 20 on; of a plain run: its natural KL",
    ),
    "kl_within_30pct": (SHARE, "audited, clipped steps whose applied KL lies within ±30% of δ*"),
    "tightness_median": ("", "median of T/(c·S); above 1 the bound was too small"),
    "guard_count": ("audits", "at which the guard stepped in"),
    "skipped_steps": ("steps", "without a usable gradient or update"),
    "tokens_per_s": ("tokens/s", "of training, evaluations aside"),
    "overhead_pct": (
        "%",
        "of a step's time that EBC adds, from one paired measurement; EBC arms of the finals only",
    ),
    "probe_pct": ("%", "of the training time that measuring took on the host"),
    "wall_s": (
        "s",
        "of the run on the clock, evaluations and earlier attempts up to their checkpoint included",
    ),
    "run_id": ("", "its folder under runs/"),
    "track": (
        "",
        "`<optimizer>_<projection>` of the baseline that it is built on; a suite's arm may have others",
    ),
    "stage": ("", "that asked for it"),
    "role": ("", "what it is there for: `grid`, `replicate`, `control` …, in a suite the arm"),
    "lr_schedule": ("", "how the learning rate moves"),
    "warmup_steps": ("steps", "over which it rises; empty on a schedule that has none"),
    "delta_schedule": ("", "how δ*, or a trust region, moves; empty where there is neither"),
}
COLUMNS = tuple(COLUMN_MEANINGS)
TIMING_COLUMNS = ("tokens_per_s", "overhead_pct", "probe_pct", "wall_s")
TUNED = "tuned_"
DIFFERENCE_FIGURES = (
    *("low", "high", "detectable", "method", "median"),
    *("joint_low", "joint_high", "joint_detectable", "comparisons"),
    *("p", "p_joint", "sigmas", "alone", "judged"),
)
PART_FIGURES: dict[str, Figure] = {figure.key: figure for part in PARTS for figure in part.figures}
PROFILE_MEANINGS = {  # of profiles.csv, one row per method and workload
    "track": ("", "the study's optimizer and projection, `<optimizer>_<projection>`"),
    "method": ("", "of `profiles.methods`"),
    "workload": ("", "of `profiles.workloads`"),
    "point": ("", "the method's configuration, the same on every workload"),
    "target": (NATS, "loss on the fixed windows that is to be reached"),
    "chose": ("", "whether the configuration was chosen on this workload, among others"),
    "seeds": ("runs", "that ended by themselves"),
    "reached": ("runs", "of them, that reached the target"),
    "diverged": ("runs", "of them"),
    "steps": ("steps", "to the target, median over the seeds; empty for a miss"),
    "train_s": ("s", "of training to the target, likewise"),
    "tokens": ("tokens", "read to the target, likewise; images under `workload=images`"),
    "ratio": ("×", "steps, over those of the best method on the workload"),
    "ratio_seconds": ("×", "seconds, likewise"),
    "score": ("0–1", "of the method: mean share of the workloads within a ratio of 1 to 4"),
    "low": ("0–1", "lower end of its 95% interval, by bootstrap over the seeds"),
    "high": ("0–1", "upper end"),
    "score_seconds": ("0–1", "the score by seconds"),
    "score_others": ("0–1", "the score over the workloads on which nothing was chosen"),
    "place": ("", "of the method by its score, from 1"),
    "lr_sensitivity": (NATS, "mean of min(loss, first loss) over the rates tried, less the best loss"),
    "lr_window": ("octaves", "of learning rates within 0.05 nats of the best"),
}
MODE_MEANINGS = {  # of determinism.csv, one row per mode of determinism
    "track": ("", "the optimizer and projection, `<optimizer>_<projection>`"),
    "mode": ("", "of `determinism`"),
    "runs": ("runs", "one in each combination of threads, vector instructions and parts of a batch"),
    "completed": ("runs", "of them"),
    "diverged": ("runs", "of them"),
    "checksums": ("", "different `weights_checksum` among the completed ones"),
    "loss_range": (NATS, "largest difference of the validation loss between two of them"),
    "steps_per_s": ("steps/s", "median over the runs, several of which were trained at a time"),
}
UNIT_MEANINGS = {  # of carry.csv, one row per arm and setting
    "track": ("", "the study's own optimizer and projection, `<optimizer>_<projection>`"),
    "arm": ("", "its name in the suite"),
    "unit": ("", "of its constants"),
    "over": ("", "the setting of a run that the constant is of"),
    "setting": ("", "its name in the suite"),
    "kept": ("", "whether it is kept for the judgement: no constant is chosen on it"),
    "best": ("", "the constant with the lowest mean validation loss in this setting"),
    "edge": ("", "`low` or `high` where that lies on an edge of what was tried"),
    "best_val_loss": (NATS, "validation loss there, mean of the seeds"),
    "constant": ("", "the one that was chosen on the other settings"),
    "regret": (NATS, "its mean validation loss there, less the best of all arms"),
    "test_loss": (NATS, "test loss at it in this setting, mean of the seeds"),
    "excess": (NATS, "that less the test loss of the setting's best arm at its best constant"),
    "tuned_excess": (NATS, "the same of this arm at its own best constant in this setting"),
    "diverged": ("runs", "at the carried constant; each counts with the loss of its first step"),
    "difference": (NATS, "test loss less the reference's, both at what they carry, paired by seed"),
    "low": (NATS, "lower end of its 95% interval, by itself"),
    "high": (NATS, "upper end"),
}
LADDER_MEANINGS = {  # of ladder.csv, one row per comparison of two arms and rung
    "track": ("", "the study's optimizer and projection, `<optimizer>_<projection>`"),
    "arm": ("", "the arm"),
    "reference": ("", "the arm that it is compared with"),
    "asked": ("", "whether the study's answer is about this comparison"),
    "rung": ("", "of `ladder.rungs`; `base`: the suite's own size"),
    "width": ("", "of the model"),
    "blocks": ("", "of the model"),
    "batch_size": ("", "sequences in a batch"),
    "steps": ("steps", "of a run"),
    "tokens": ("tokens", "of a run"),
    "compute": ("FLOP", "of a run"),
    "arm_loss": (NATS, "test loss of the arm, mean over its completed seeds"),
    "reference_loss": (NATS, "likewise of the reference"),
    "seeds": ("seeds", "that both have"),
    "difference": (
        NATS,
        "of the test loss, arm minus reference, paired by seed; of diverged runs the median",
    ),
    "joint_low": (NATS, "lower end of its interval, joint over rungs and comparisons"),
    "joint_high": (NATS, "upper end"),
    "verdict": ("", "`better`, `worse`, `level` or `undecided`, by that interval"),
    "carried": (NATS, "the difference with both arms at the settings that were carried to the rung"),
    "carried_low": (NATS, "lower end of its joint interval"),
    "carried_high": (NATS, "upper end"),
    "arm_point": ("", "the arm's settings on this rung"),
    "arm_trials": ("points", "among which they were chosen; 0: they were carried"),
    "arm_regret": (NATS, "test loss at the carried settings, less that at these"),
    "reference_point": ("", "likewise of the reference"),
    "reference_trials": ("points", "likewise of the reference"),
    "reference_regret": (NATS, "likewise of the reference"),
    "steps_ratio": ("×", "how many times as soon, in steps, the arm reaches the loss that both reach"),
    "steps_low": ("×", "lower end of its joint interval"),
    "steps_high": ("×", "upper end"),
    "seconds_ratio": ("×", "likewise in seconds of training"),
    "seconds_low": ("×", "lower end of its joint interval"),
    "seconds_high": ("×", "upper end"),
}


def _columns_from(meanings: Mapping[str, tuple[str, str]], *columns: str) -> dict[str, tuple[str, str]]:
    """Return column -> (unit, meaning) for some columns, taken from `meanings`, those of another table."""
    return {name: meanings[name] for name in columns}


ABLATION_MEANINGS = {  # of ablation.csv, one row per arm; figures are means over its completed seeds
    "track": ("", "`<optimizer>_<projection>` of the baseline that it is built on; an arm may have others"),
    "arm": ("", "its name in the suite's file"),
    "about": ("", "what it is, in words"),
    **_columns_from(COLUMN_MEANINGS, "lr", "lr_scale", "delta_star"),
    f"{TUNED}lr_scale": (SCALE, "the best of its grid, where the arm has one: LR scale"),
    f"{TUNED}lr": ("", "the same: the learning rate, absolute"),
    f"{TUNED}warmup_share": (SHARE, "the same: warm-up as a share of the run"),
    f"{TUNED}schedule": ("", "the same: shape of the learning rate"),
    f"{TUNED}delta": (SCALE, "the same: δ* over the calibrated (or natural) one"),
    f"{TUNED}strength": ("", "the same: the stabilizer's strength"),
    f"{TUNED}radius": ("", "the same: the radius of EBC, beside δ*"),
    "strength": ("", "of the stabilizer: its own unit"),
    "seeds": ("runs", "that the arm has"),
    "completed": ("runs", "of them"),
    "diverged": ("runs", "of them"),
    **_columns_from(COLUMN_MEANINGS, "val_loss", "test_loss", BITS, "heldout_loss", "c_median"),
    "c_median_logged": (SHARE, "median of c at every 20th step alone"),
    "c_early": (SHARE, "median c in a tenth of the run from step 20 on"),
    "c_late": (SHARE, "median c in the run's last tenth"),
    "clip_rate": COLUMN_MEANINGS["clip_rate"],
    "grad_clip_rate": (SHARE, "steps whose gradient was scaled below 0.999"),
    "kl_median": COLUMN_MEANINGS["kl_median"],
    "kl_ratio_median": ("", "median of applied KL over δ*, audited, clipped steps"),
    "kl_within_30pct": COLUMN_MEANINGS["kl_within_30pct"],
    "surrogate_early": (LOGITS, "median S, when as for c"),
    "surrogate_late": (LOGITS, "median S, when as for c"),
    "beta_early": ("logits/norm", "the groups' mean β, when as for c"),
    "beta_late": ("logits/norm", "the groups' mean β, when as for c"),
    **_columns_from(COLUMN_MEANINGS, "tightness_median", "guard_count", "skipped_steps"),
    **{key: (figure.unit, figure.meaning) for key, figure in PART_FIGURES.items()},
    "versus": ("", "the arm that it is compared with"),
    "pairs": ("seeds", "that both have"),
    "difference": (NATS, "mean of test loss, arm minus versus, paired by seed; empty where a run diverged"),
    "low": (NATS, "lower end of its 95% interval by itself; empty: none, or infinite where method is `rank`"),
    "high": (NATS, "upper end of it"),
    "detectable": (NATS, "the smallest difference that this many seeds would have shown, with power 80%"),
    "method": ("", "`t`, or `rank` where a run diverged"),
    "median": (NATS, "of the paired differences"),
    "joint_low": (NATS, "lower end of the interval that holds, at 95%, for all comparisons together"),
    "joint_high": (NATS, "upper end of it"),
    "joint_detectable": (NATS, "the smallest difference that it could have told from none"),
    "comparisons": ("", "how many that is"),
    "p": (SHARE, "of no difference, by itself"),
    "p_joint": (SHARE, "corrected for the comparisons"),
    "sigmas": ("σ", "the difference over the noise of replicate seeds, which is of the validation loss"),
    "alone": ("", "`beats`, `meets`, `misses` or `undecided` against the margin, by the interval by itself"),
    "judged": ("", "`beats`, `meets`, `misses` or `undecided` against the margin, by the joint interval"),
    **_columns_from(COLUMN_MEANINGS, "lr_schedule", "warmup_steps", "delta_schedule"),
}


def described(table: pd.DataFrame, meanings: Meanings) -> pd.DataFrame:
    """Return the table with `attrs["units"]` and `attrs["meanings"]`: column -> unit, and what it says in
    words."""
    known = {name: meanings[name] for name in table.columns if name in meanings}
    table.attrs["units"] = {name: unit for name, (unit, _) in known.items()}
    table.attrs["meanings"] = {name: meaning for name, (_, meaning) in known.items()}
    return table


# -- tables of `ebc_lab.load` --------------------------------------------------------------------------------

_RUN_COLUMNS = ("run_id", "stage", "role", "track", "arm", "seed", "optimizer", "projection", "stabilizer")
_SETTING_COLUMNS = ("lr", "lr_scale", "lr_schedule", "warmup_steps", "delta_star", "delta_schedule")
_LENGTH = {"planned_steps": ("steps", "that it is to take")}
RUN_MEANINGS = {  # of runs(), one row per run
    **_columns_from(COLUMN_MEANINGS, *_RUN_COLUMNS, *_SETTING_COLUMNS),
    **_LENGTH,
    "kind": ("", "`train`, or a measurement of time, which has no losses"),
    **_columns_from(
        COLUMN_MEANINGS, *(name for name in COLUMNS if name not in (*_RUN_COLUMNS, *_SETTING_COLUMNS))
    ),
    "cause": ("", "why it did not complete; empty where it did"),
    "problem": ("", "what is wrong with its files; empty where nothing is"),
}
ARM_MEANINGS = {  # of arms(), one row per arm of a stage, over its seeds
    **_columns_from(COLUMN_MEANINGS, "stage", "role", "track", "arm"),
    **_columns_from(COLUMN_MEANINGS, "optimizer", "projection", "stabilizer", *_SETTING_COLUMNS),
    **_LENGTH,
    "mine": ("", "whether the study asks about this arm"),
    **_columns_from(ABLATION_MEANINGS, "seeds", "completed", "diverged"),
    "val_loss": COLUMN_MEANINGS["val_loss"],
    "val_sd": (NATS, "its standard deviation over the completed seeds"),
    "test_loss": COLUMN_MEANINGS["test_loss"],
    "test_sd": (NATS, "its standard deviation over the completed seeds"),
    **_columns_from(COLUMN_MEANINGS, "c_median", "kl_median", "clip_rate", "tokens_per_s", "wall_s"),
    "step_cost": (SCALE, "time of a step over the reference's, where that was measured"),
}
DIFFERENCE_MEANINGS = {  # of differences(), one row per comparison of two arms
    "stage": COLUMN_MEANINGS["stage"],
    "track": ABLATION_MEANINGS["track"],
    "family": (
        "",
        "what it belongs to: `baseline`, `control`, `rate` or `lr_window` of the finals, `mine` of a "
        "question about an arm of one's own, `versus` of a suite's other arms; of a ladder `rungs` (their "
        "mean), `trend` (per doubling of compute), `rung_<name>`, and `kept_<name>` at carried settings",
    ),
    "arm": ("", "the arm"),
    "reference": ("", "the arm that it is compared with"),
    "seeds": ("seeds", "that both have"),
    "mean": (NATS, "of the test loss, arm minus reference, paired by seed; empty where a run diverged"),
    **_columns_from(ABLATION_MEANINGS, "low", "high", "joint_low", "joint_high"),
    "judged": ABLATION_MEANINGS["judged"],
    "rival": ("", "whether this comparison answers the question: the best of the others by validation loss"),
    "verdict": ("", "of a suite: `better`, `worse`, `level` or `undecided`"),
    "seeds_needed": (
        "seeds",
        "fresh ones, that would decide it by themselves, if the differences go on as they are; "
        "empty: not known",
    ),
    **_columns_from(ABLATION_MEANINGS, "alone", "method", "median", "p", "p_joint", "comparisons"),
    "margin": (NATS, "how much worse still counts as level"),
    **_columns_from(ABLATION_MEANINGS, "detectable", "joint_detectable"),
    "luck": (NATS, "what other tuning seeds would make of it (standard deviation), in its intervals"),
}
VERDICT_MEANINGS = {  # of verdict, one row per question of the study
    "track": ABLATION_MEANINGS["track"],
    "name": ("", "of the line of the verdict, or of the suite's arm"),
    "question": ("", "in words"),
    "verdict": ("", "`pass`, `fail`, `undecided`; of a suite `better`, `worse`, `level`, `undecided`"),
    "figure": ("", "what was measured, in words"),
}
BOARD_MEANINGS = {  # of a leaderboard, one row per arm of a study
    "group": ("", "arms of one group were trained alike: only these are ranked"),
    "rank": ("", "in its group, by mean test loss; arms of which a run diverged come last"),
    "arm": ("", "its name in its study"),
    "study": ("", "its study"),
    "track": ABLATION_MEANINGS["track"],
    "test_loss": (NATS, "mean over its completed seeds"),
    "low": (NATS, "lower end of the 95% interval of that mean, over seeds"),
    "high": (NATS, "upper end of it"),
    "seeds": ("seeds", "that it finished"),
    "diverged": ("seeds", "of them"),
    "lr": COLUMN_MEANINGS["lr"],
    "shared_seeds": ("seeds", "that the group's best has, too"),
    "difference": (NATS, "from the group's best, paired on the shared seeds"),
    "difference_low": (NATS, "lower end of its 95% interval"),
    "difference_high": (NATS, "upper end of it"),
}

# -- tables of `ebc-lab judge`, whose losses are in the unit of the judged column ----------------------------

_OWN = "loss"
JUDGED_ARM_MEANINGS = {
    "arm": ("", "the arm"),
    "runs": ("runs", "in the configuration that was chosen for it"),
    "completed": ("runs", "of them with a finite outcome"),
    "diverged": ("runs", "of them"),
    "mean": (_OWN, "of the outcomes; empty where a run diverged"),
    "sd": (_OWN, "their standard deviation"),
    "low": (_OWN, "lower end of the 95% t-interval of the mean"),
    "high": (_OWN, "upper end of it"),
    "median": (_OWN, "of the outcomes, diverged runs behind all others"),
    "median_low": (_OWN, "lower end of its interval of order statistics"),
    "median_high": (_OWN, "upper end of it; empty: infinite"),
    "median_confidence": (SHARE, "the confidence that this interval has"),
    "lowest": (_OWN, "the lowest outcome"),
    "highest": (_OWN, "the highest outcome; empty where a run diverged"),
    "length": ("steps", "the last step of its runs, where it is one for all"),
    "at": ("steps", "the step that was asked for in place of the last"),
    "configuration": ("", "its settings, of those that vary among all runs, as JSON"),
}
JUDGED_DIFFERENCE_MEANINGS = {
    **_columns_from(DIFFERENCE_MEANINGS, "arm", "reference"),
    "method": (
        "",
        "`t` or `rank`: paired; `welch` or `rank-sum`: unpaired; `sigma`: by a given σ; empty: none",
    ),
    "note": ("", "why there is no method"),
    "n_arm": ("runs", "of the arm"),
    "n_reference": ("runs", "of the reference"),
    "mean": (_OWN, "of the outcome, arm minus reference; empty where a run diverged"),
    "median": (_OWN, "of the paired differences; unpaired, of those of all pairs of runs"),
    "sd": (_OWN, "standard deviation of the difference of one run of each arm"),
    "low": (_OWN, "lower end of the 95% interval by itself; empty: none, or infinite"),
    "high": (_OWN, "upper end of it"),
    "p": ABLATION_MEANINGS["p"],
    "detectable": (_OWN, "the smallest difference that these runs would have shown, with power 80%"),
    "joint_low": (_OWN, "lower end of the interval that holds, at 95%, for all comparisons together"),
    "joint_high": (_OWN, "upper end of it"),
    "p_joint": ABLATION_MEANINGS["p_joint"],
    "joint_detectable": (_OWN, "the smallest difference that it would have shown"),
    "verdict": ("", "`better`, `worse`, `level` or `undecided`, by the joint interval"),
    "seeds_needed": ("runs", "fresh ones an arm, that would decide it by themselves; empty: not known"),
    "margin": (_OWN, "how much may lie between two arms that count as level"),
    "comparisons": ABLATION_MEANINGS["comparisons"],
}
JUDGED_RUN_MEANINGS = {
    "run": ("", "its name"),
    "arm": ("", "its arm"),
    "seed": ("", "its seed, where there is one"),
    "source": ("", "the file or folder that it was read from, of several"),
    "planned": ("steps", "that it was to have"),
    "length": ("steps", "its last one"),
    "outcome": (_OWN, "what it is judged by; infinite or empty: it diverged, or has none"),
}

TABLES: dict[str, dict[str, tuple[str, str]]] = {  # file or method of a loaded study -> its columns
    "summary": COLUMN_MEANINGS,
    "ablation": ABLATION_MEANINGS,
    "determinism": MODE_MEANINGS,
    "carry": UNIT_MEANINGS,
    "profiles": PROFILE_MEANINGS,
    "ladder": LADDER_MEANINGS,
    "steps": STEP_MEANINGS | FURTHER_STEP_MEANINGS | WORKLOAD_STEP_MEANINGS,
    "evals": EVAL_MEANINGS | FURTHER_EVAL_MEANINGS | WORKLOAD_EVAL_MEANINGS,
    "runs()": RUN_MEANINGS,
    "arms()": ARM_MEANINGS,
    "differences()": DIFFERENCE_MEANINGS,
    "verdict": VERDICT_MEANINGS,
    "board": BOARD_MEANINGS,
    "judged_arms": JUDGED_ARM_MEANINGS,
    "judged_differences": JUDGED_DIFFERENCE_MEANINGS,
    "judged_runs": JUDGED_RUN_MEANINGS,
}
