"""The columns of every CSV file, with their units and meanings."""

from __future__ import annotations

STEP_COLUMNS = (
    "step",
    "loss",  # nats per token, on the batch, before the update
    "lr",
    "c",  # clip coefficient
    "eta_eff",  # c·lr
    "delta",  # KL budget, nats per token
    "target_kl",  # delta* at this step
    "radius",  # tau = 2·sqrt(delta), logits per token
    "guard",  # g, the factor on tau
    "trial",  # last shadow trial scale
    "trial_kl",  # KL measured there, on the tokens that choose c
    "measurements",
    "predicted_kl",  # q of the whole proposal, nats per token
    "calibration",  # k of `calibrated`: KL over S^2
    "slope",  # <gradient, dW> of the whole proposal, nats per token
    "agreement",  # r: what the loss fell by over what was predicted
    "applied_kl",  # on tokens that did not choose c
    "audit_tokens",
    "movement",  # T, logits per token
    "surrogate",  # S, logits per token
    "tightness",  # T/(c·S)
    "grad_norm",  # before anything limits it
    "grad_scale",  # the limited gradient's norm over it
    "skipped",
)
EVAL_COLUMNS = ("step", "val_loss", "val_se", "tokens", "train_s")


NATS, SHARE, SCALE = "nats/token", "0–1", "×"
COLUMN_MEANINGS = {  # of summary_*.csv, one row a run: column -> unit, meaning
    "arm": (
        "",
        "what was trained, `<optimizer>_<projection>_<stabilizer>[_d<δ*>_<budget>]_x<scale>[_lindelta][_lrdecay]`",
    ),
    "seed": ("", "of the initial weights and the data order; runs of one seed are pairs"),
    "lr": ("", "learning rate at its peak"),
    "lr_scale": (SCALE, "lr over the track's best plain learning rate"),
    "optimizer": ("", "the base optimizer"),
    "projection": ("", "of the weights"),
    "stabilizer": ("", "what acts between backward and the update; `none` is the plain optimizer"),
    "budget": ("", "how EBC finds c; empty without EBC"),
    "aggregate": ("", "how contributions add up to S; empty where S is not measured"),
    "controller": ("", "how EBC's δ moves; empty without EBC"),
    "delta_star": (NATS, "δ*, the target KL of a step, before its schedule"),
    "outcome": ("", "`completed`, `diverged`, `oom`, `failed`, `lost` or `cancelled`"),
    "steps": ("steps", "taken"),
    "val_loss": (NATS, "cross-entropy on the whole validation split; decisions look at this one"),
    "val_se": (NATS, "its standard error over the split's windows"),
    "test_loss": (NATS, "cross-entropy on the whole test split; the verdict looks at this one"),
    "test_se": (NATS, "its standard error over the split's windows"),
    "heldout_loss": (NATS, "validation and test split together"),
    "test_bits_per_char": ("bits/character", "test_loss over ln 2"),
    "test_accuracy": (SHARE, "next characters of the test split told right"),
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
}
COLUMNS = tuple(COLUMN_MEANINGS)
TIMING_COLUMNS = ("tokens_per_s", "overhead_pct", "probe_pct", "wall_s")
TUNED = "tuned_"
OF_A_DIFFERENCE = (
    *("low", "high", "detectable"),
    *(
        "method",
        "median",
        "joint_low",
        "joint_high",
        "joint_detectable",
        "comparisons",
        "p",
        "p_joint",
        "sigmas",
    ),
    *("alone", "judged"),
)
ABLATION_MEANINGS = {  # of ablation.csv, one row an arm; figures are means over its completed seeds
    "track": ("", "the optimizer and projection, `<optimizer>_<projection>`"),
    "arm": ("", "its name in the suite's file"),
    "about": ("", "what it is, in words"),
    "lr": COLUMN_MEANINGS["lr"],
    "lr_scale": COLUMN_MEANINGS["lr_scale"],
    "delta_star": COLUMN_MEANINGS["delta_star"],
    f"{TUNED}lr_scale": (SCALE, "the best of its grid, where the arm has one: LR scale"),
    f"{TUNED}delta": (SCALE, "the same: δ* over the calibrated (or natural) one"),
    f"{TUNED}strength": ("", "the same: the stabilizer's strength"),
    "strength": ("", "of the stabilizer: its own unit"),
    "seeds": ("runs", "that the arm has"),
    "completed": ("runs", "of them"),
    "diverged": ("runs", "of them"),
    **{k: COLUMN_MEANINGS[k] for k in ("val_loss", "test_loss", "heldout_loss", "c_median")},
    "c_median_logged": (SHARE, "median of c at every 20th step alone"),
    "c_early": (SHARE, "median c in a tenth of the run from step 20 on"),
    "c_late": (SHARE, "median c in the run's last tenth"),
    "clip_rate": COLUMN_MEANINGS["clip_rate"],
    "grad_clip_rate": (SHARE, "steps whose gradient was scaled below 0.999"),
    "kl_median": COLUMN_MEANINGS["kl_median"],
    "kl_ratio_median": ("", "median of applied KL over δ*, audited, clipped steps"),
    "kl_within_30pct": COLUMN_MEANINGS["kl_within_30pct"],
    "surrogate_early": ("logits/token", "median S, when as for c"),
    "surrogate_late": ("logits/token", "median S, when as for c"),
    "beta_early": ("logits/norm", "the groups' mean β, when as for c"),
    "beta_late": ("logits/norm", "the groups' mean β, when as for c"),
    **{k: COLUMN_MEANINGS[k] for k in ("tightness_median", "guard_count", "skipped_steps")},
    "shock_peak": (
        NATS,
        "how far the mean training loss of any 10 steps after a shock rose above that before it",
    ),
    "shock_recovery_steps": ("steps", "until such a mean was back; empty where a seed's never was"),
    "shock_recovered": (SHARE, "seeds that came back"),
    "versus": ("", "the arm that it is compared with"),
    "pairs": ("seeds", "that both have"),
    "difference": (NATS, "mean of test loss, arm minus versus, paired by seed; empty where a run diverged"),
    "low": (NATS, "lower end of its 95% interval by itself; empty: none, or infinite where method is `rank`"),
    "high": (NATS, "upper end of it"),
    "detectable": (NATS, "the smallest difference that so many seeds would have shown, with power 80%"),
    "method": ("", "`t`, or `rank` where a run diverged"),
    "median": (NATS, "of the paired differences"),
    "joint_low": (NATS, "lower end of the interval that holds, at 95%, for all comparisons together"),
    "joint_high": (NATS, "upper end of it"),
    "joint_detectable": (NATS, "the smallest difference that it could have told from none"),
    "comparisons": ("", "how many that is"),
    "p": (SHARE, "of no difference, by itself"),
    "p_joint": (SHARE, "corrected for the comparisons"),
    "sigmas": ("σ", "the difference over the noise of replicate seeds"),
    "alone": ("", "`beats`, `meets`, `misses` or `undecided`, by the interval by itself"),
    "judged": ("", "the same by the joint interval, on which claims rest"),
}
