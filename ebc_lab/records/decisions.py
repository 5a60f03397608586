"""What the stages of a study decide, as auto_decisions.json records it: one class for each JSON object.

`Decision` is what every stage writes. Its `tracks` hold a class for each stage: `SweepTrack` of lr_sweep,
`CalibratedTrack`, `ControllerTrack`, `ScaleTrack`, `TunedTrack`, `FinalsTrack`, `SuiteTrack` of ablation,
`ModesTrack` of circumstances, `UnitsTrack` of carry and `ProfilesTrack` of profiles. Losses are in nats per
token, KL divergences in nats. A run's result is `records.figures.RunResult`.
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Candidate(TypedDict):
    """A run as a decision shows it."""

    run_id: str
    role: str
    arm: str
    lr: float
    lr_scale: float
    delta_star: float | None  # the target KL, nats per token
    seed: int
    outcome: str | None
    cause: str | None
    raced: NotRequired[int]  # after how many steps it was stopped, because it could not win any more
    val_loss: float | None
    val_se: float | None
    c_median: float | None
    clip_rate: float | None
    kl_median: float | None
    kl_within_30pct: float | None


class Decision(TypedDict, total=False):
    """What a stage decided."""

    stage: str
    form: int
    rule: str  # in words
    # <optimizer>_<projection> -> what was chosen for it: of each stage its own class, see above. It stays
    # open here, because a file is refused only for what every stage has in common.
    tracks: dict[str, Any]
    notes: list[str]
    candidates: list[Candidate]
    measurements: list[dict[str, str]]  # run_id and role of runs that were not trained
    inputs_sha256: str
    decision_sha256: str
    pairs: list[dict[str, Any]]  # of lr_sweep: each a `Pair`
    sequential: dict[str, Any] | None  # of the finals: a `Sequential`


# -- what several stages share -------------------------------------------------------------------------------


class Window(TypedDict):
    """The range around the best value of a setting in which the loss is hardly higher."""

    best: float
    loss: float  # at the best value
    low: float
    high: float
    octaves: float
    open_low: bool  # the window still holds at the end of what was tried
    open_high: bool


class Diverged(TypedDict):
    """How many pairs of runs there are in which the arm's diverged, and in which the reference's did."""

    arm: int
    reference: int


class LuckOfTuning(TypedDict):
    """How much a tuned loss would vary with the tuning's seeds: `statistics.Luck` as JSON."""

    sd: float
    freedom: float


class Difference(TypedDict):
    """An arm's loss minus its reference's, paired by seed; `statistics.paired` says what each figure is."""

    seeds: int
    comparisons: int
    looks: int
    margin: float
    method: str | None  # t | rank
    median: float | None
    mean: float | None
    sd: float | None
    sigmas: float | None
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None
    alone: str  # beats | meets | misses | undecided
    joint_low: float | None
    joint_high: float | None
    p_joint: float | None
    joint_detectable: float | None
    judged: str
    diverged: NotRequired[Diverged]
    luck: NotRequired[LuckOfTuning]
    verdict: NotRequired[str]  # of a suite: better | worse | level | undecided
    seeds_needed: NotRequired[int | None]


class Schedules(TypedDict, total=False):
    """The schedules of an arm, as tables name them."""

    lr_schedule: str
    warmup_steps: int | None  # None where the schedule does not read them
    delta_schedule: str | None


class Arm(Schedules, total=False):
    """An arm of the finals or of a suite: its settings, its runs, and its figures over completed seeds."""

    roles: list[str]
    track: str
    lr: float
    lr_scale: float
    ebc: bool
    delta_star: float | None
    runs: dict[str, str]  # seed -> run id
    outcomes: dict[str, int]
    val_loss: float | None
    test_loss: float | None
    test_sd: float | None
    heldout_loss: float | None
    c_mean: float | None
    c_median: float | None
    kl_median: float | None
    clip_rate: float | None
    test_bits_per_char: float | None  # where these are not nats by another factor
    val_median: float | None  # over all finished seeds; None where one that diverged is in the middle
    test_median: float | None
    # of a suite's arms alone
    about: str
    shape: str  # how its runs differ in size from the suite's, in words
    point: dict[str, Any] | None  # what it was tuned to
    figures: dict[str, float | None]
    strength: float | None
    comparable: bool  # judged on the whole split
    versus: str | None  # the arm that it is compared with
    cause: str | None  # why no run of it finished
    difference: Difference | None


# -- lr_sweep ------------------------------------------------------------------------------------------------


class SweepGrid(TypedDict):
    """The best run of the grid by which the first best rate is found."""

    lr: float
    val_loss: float
    edge: str | None
    extensions: int


class Schedule(TypedDict):
    """The schedule of a learning rate."""

    name: str
    warmup_steps: int
    decay_share: float


class ControlPoint(TypedDict):
    """A run that the fair control was chosen from."""

    run_id: str
    lr: float
    schedule: str
    warmup_steps: int
    val_loss: float | None


class Control(TypedDict):
    """The fair control: the same optimizer on a schedule that was tuned for it."""

    lr: float
    lr_scale: float
    run_id: str
    val_loss: float
    lr_schedule: Schedule
    edge: str | None
    longest_warmup: bool
    grid: list[ControlPoint]
    used: bool  # something in the study is compared with it


class Pair(TypedDict):
    """An (optimizer, projection) of the sweep, and how far it lies behind the best."""

    track: str
    lr: float | None
    val_loss: float | None
    triaged: bool
    kept: bool
    behind: NotRequired[float | None]
    behind_sigma: NotRequired[float | None]
    told_apart: NotRequired[bool]
    detectable: NotRequired[float | None]  # of a pair that was dropped


class BestRate(TypedDict):
    """The part of a `SweepTrack` that a track's plain runs need."""

    optimizer: str
    projection: str
    lr: float


class NaturalSteps(TypedDict):
    """The part of a `SweepTrack` that says what a step of the baseline does, for runs with EBC."""

    natural_kl: float
    descent_median: float | None


class Winner(TypedDict):
    """The run that won a search, and by how much."""

    run_id: str
    val_loss: float
    ranked: list[str]  # what was compared, the best first
    margin_sigma: float | None  # how far the second lies behind, in units of sigma
    sigma: float


class SweepTrack(BestRate, NaturalSteps, Winner):
    """The best constant rate of a track, its noise, its natural KL, and its fair control."""

    edge: str | None
    grid: SweepGrid
    replicate_losses: list[float]
    control: Control
    dropped: NotRequired[list[Pair]]


class NoiseFloor(TypedDict):
    """The noise between replicate seeds, with its 95% interval, and what two single runs could show."""

    sigma: float | None
    low: float | None
    high: float | None
    detectable: float | None
    seeds: int


# -- calibrate, controller_search, lr_scale ------------------------------------------------------------------


class CalibratedTrack(Winner):
    """The target KL of a track, and the budget that it is measured by."""

    budget: str
    bound: str
    delta_star: float
    times_natural: float
    lr_scale: float
    seeds: int
    losses: dict[str, float]  # target KL -> mean loss
    edge: str | None
    delta_window: Window | None
    c_median: float | None
    in_band: bool
    by_budget: dict[str, float]  # budget -> its best target KL
    ranked_losses: dict[str, float]


class ControllerTrack(Winner):
    """The controller that holds the KL of a track on its target."""

    candidate: str
    settings: dict[str, Any]
    delta_star: float
    kl_ratio: float | None
    kl_ratios: dict[str, float | None]


class ScaledRun(Candidate):
    """A run at a multiple of the best rate."""

    inert: bool  # nearly every step is clipped, which cancels the learning rate


class ScaleTrack(TypedDict):
    """The learning rate's multiple that was chosen, and how far it can rise, by arm."""

    lr_scale: float
    run_id: str
    val_loss: float | None
    c_median: float | None
    in_band: bool
    inert: bool
    baseline_val_loss: float
    headroom: dict[str, float | None]
    lr_window: dict[str, Window | None]
    headroom_is_tautology: bool
    ranked: list[str]
    margin_sigma: float | None
    sigma: float
    arms: dict[str, list[ScaledRun]]


# -- finals --------------------------------------------------------------------------------------------------


class Efficiency(TypedDict):
    """What an arm took to reach the baseline's final loss: medians over the seeds that got there."""

    steps: float
    tokens: float
    train_s: float
    seeds: int


class RateWindow(TypedDict):
    """An arm at its highest rate in the finals against itself at its lowest."""

    scales: list[float]
    arm: str
    reference: str
    difference: Difference


class Line(TypedDict, total=False):
    """A line of the verdict: the first four always, then what its figure was made from."""

    name: str
    question: str
    verdict: str  # pass | fail | undecided
    figure: str
    share: float | None
    median_ratio: float | None
    c_median: float | None
    longest: int | None
    overhead_pct: float | None
    arm: str
    reference: str
    difference: Difference
    joint: bool
    beats: bool
    plain: RateWindow | None
    track: str  # in acceptance.json and in tables of several tracks


class ComparedTrack(TypedDict, total=False):
    """The arms of the finals or of a suite, for tables that serve both."""

    reference: str  # of a suite: the arm that others are compared with unless they name another
    arms: dict[str, Arm]
    sigma: float
    efficiency: dict[str, Efficiency | None]  # of the finals


class FinalsTrack(ComparedTrack, total=False):
    """The final arms of a track, their paired differences, and the verdict."""

    roles: dict[str, str]  # role -> arm
    best_ebc_by_val: str
    differences: dict[str, dict[str, Difference]]  # family -> arm -> from the family's reference
    lr_windows: dict[str, RateWindow]
    margin_sigma: float | None
    overhead_pct: float | None
    verdict: list[Line]


class Sequential(TypedDict):
    """After how many seeds the finals were looked at, and why no more were added."""

    looks: list[int]
    at: int
    confidence: float
    stopped: str


class Acceptance(TypedDict, total=False):
    """acceptance.json: every line of the verdict, and how many passed, failed or stayed undecided."""

    study: str
    corpus: str
    warning: str | None
    counts: dict[str, int]
    lines: list[Line]
    confidence: float
    power_of_detectable: float
    seeds: list[int]
    sequential: dict[str, Any] | None  # a `Sequential`


# -- tune, ablation ------------------------------------------------------------------------------------------


class CurvePoint(TypedDict):
    """The losses at one learning rate around an arm's best point; None where a run diverged or was raced."""

    lr: float
    val_loss: float | None
    seeds: dict[str, float | None]
    raced: NotRequired[int]  # seeds that were stopped, because they could not win any more


class TunedArm(TypedDict):
    """The best point of an arm, and what was tried to find it."""

    point: dict[str, Any]
    run_id: str | None
    val_loss: float | None
    worst_loss: float | None
    runs: int
    extended: list[dict[str, Any]]
    edges: dict[str, str]
    margin_sigma: float | None
    luck: LuckOfTuning
    untuned: NotRequired[str]  # why there is no best point
    curve: NotRequired[list[CurvePoint]]
    window: NotRequired[Window | None]


class TunedTrack(TypedDict):
    """The tuned arms of a suite."""

    arms: dict[str, TunedArm]
    sigma: float


class SweptPoint(TypedDict):
    """One value of a setting that a suite sweeps. A seed that diverged has no loss, and then the mean has
    none."""

    value: float
    arm: str
    lr: float
    delta_star: float | None
    loss: float | None
    seeds: dict[str, float | None]
    rate: float | None  # median c times the learning rate


class Sweep(TypedDict, total=False):
    """A setting swept over an arm, its window, and what follows for a rule that needs no tuning."""

    points: list[SweptPoint]
    left_out: list[str]
    about: str
    shape: str
    window: Window | None
    regret_x4: float | None
    rate_octaves: float | None
    yardstick: str  # the arm whose best point a rule is measured by
    worst: float | None
    every_start: bool


class Transfer(TypedDict):
    """What arms lose at another size than the one that they were tuned at, against an arm tuned there."""

    shape: str
    tuned: str
    kept: list[str]
    against_kept: dict[str, Difference]


class StepCost(TypedDict):
    """The time of an arm's step over that of the reference's: median over turns, and quartiles."""

    ratio: float
    low: float
    high: float


class Answer(TypedDict):
    """What a suite says of a user's own arm against every other."""

    rival: str | None
    difference: Difference | None
    against: dict[str, Difference]
    verdict: str
    seeds_needed: int | None
    seeds: list[int] | None
    sentence: str


class SuiteTrack(ComparedTrack, total=False):
    """The arms of a suite, and what was asked about them."""

    steps_cost: dict[str, StepCost]
    windows: dict[str, dict[str, Sweep]]  # swept arm -> setting -> its sweep
    transfer: list[Transfer]
    best_by_seed: dict[str, str | None]
    mine: list[str]
    answers: dict[str, Answer]


# -- circumstances -------------------------------------------------------------------------------------------


class ModeFound(TypedDict):
    """What the runs of one mode of determinism have in common."""

    runs: int
    completed: int
    diverged: int
    checksums: int
    loss_range: float | None


class ModesTrack(TypedDict):
    """The modes of determinism that a study compares."""

    modes: dict[str, ModeFound]
    capabilities: list[str]


# -- carry ---------------------------------------------------------------------------------------------------


class UnitPoint(TypedDict):
    """The losses at one constant of an arm in a setting, by seed; a diverged run has that of its first step,
    and a run without a result none."""

    value: float
    val: dict[str, float | None]
    test: dict[str, float | None]
    mean: float | None  # validation loss; None where a run has no result
    diverged: list[str]  # seeds


class UnitCurve(TypedDict):
    """What was tried of an arm in a setting, by rising constant, and the constant that is best there."""

    points: list[UnitPoint]
    best: float | None
    loss: float | None  # mean validation loss at the best
    edge: str | None  # of what was tried, on which the best lies


class Carried(TypedDict):
    """An arm in a setting, at the constant that was chosen on others."""

    constant: float
    regret: float  # mean validation regret in the settings that it was chosen on, nats
    test: dict[str, float]
    diverged: list[str]  # seeds
    excess: float  # mean test loss above that of the setting's best arm at its best constant, nats
    tuned: float  # the same of this arm at its own best constant in the setting


class BrokenRuns(TypedDict):
    """How many runs ended so far above their setting's median that they are of no use."""

    runs: int
    broken: int


class UnitFound(TypedDict):
    """What was found of one unit; None where nothing could be judged."""

    about: str
    unit: str
    over: str
    curves: dict[str, UnitCurve]  # by setting
    carried: dict[str, Carried]  # by setting
    octaves: float | None  # between the lowest and the highest of the settings' best constants
    open: bool  # whether one of them lies on the edge of what was tried, so that there are more at least
    excess: float | None  # mean over the settings
    worst: str | None  # the setting with the largest excess
    broken: BrokenRuns  # at the carried constants
    broken_anywhere: BrokenRuns  # at all constants of the common grid
    starts: NotRequired[bool]  # its constants are starts, of which the worst counts in each setting


class UnitSetting(TypedDict):
    """A setting, and the best that any arm reached in it."""

    about: str
    kept: bool
    arm: str | None
    value: float | None
    val_loss: float | None
    test_loss: float | None
    median: float | None  # test loss of all runs at carried constants


class UnitsTrack(TypedDict):
    """Which unit's constant serves settings that it was not chosen on."""

    reference: str
    challengers: list[str]
    settings: dict[str, UnitSetting]
    arms: dict[str, UnitFound]
    against: dict[str, Difference]  # arm -> from the reference, mean over the settings, paired by seed
    by_setting: dict[str, dict[str, Difference]]  # arm -> setting -> the same in that setting
    over_settings: dict[str, Difference]  # arm -> the mean over seeds, paired by setting
    verdicts: dict[str, str]  # challenger -> earns | loses | no gain | undecided
    margin: float
    broken: float


# -- profiles ------------------------------------------------------------------------------------------------


class Target(TypedDict):
    """A workload, and the loss that a method has to reach on it."""

    about: str
    calibrates: bool  # whether methods' configurations are chosen on it
    steps: int  # of the runs that set the target
    longest: int  # steps of the longest run
    point: dict[str, Any] | None  # of the yardstick's grid, the best here
    edges: dict[str, str]  # setting -> end of its grid that this point lies on
    lowest: dict[str, float]  # seed -> lowest loss on the fixed windows, of the runs that set the target
    loss: float | None  # their median and the slack; None where no such run completed
    best_steps: float | None  # fewest steps to it that any method takes
    best_seconds: float | None


class Reached(TypedDict):
    """When a method reached the target on a workload; None for never, or not within the longest run."""

    steps: dict[str, int | None]  # by seed: until the first evaluation at or below the target
    seconds: dict[str, float | None]  # of training, likewise
    median_steps: float | None  # over the seeds
    median_seconds: float | None
    ratio: float | None  # of the median to that of the best method
    ratio_seconds: float | None
    lowest: dict[str, float | None]  # by seed: lowest loss on the fixed windows
    diverged: list[str]  # seeds


class RateSensitivity(TypedDict):
    """How much the learning rate matters around a method's configuration, on a workload."""

    rates: list[float]
    losses: list[float | None]  # mean validation loss; None where a run diverged
    sensitivity: float | None  # mean of min(loss, loss of the first step) over the rates, less the best loss
    window: Window | None


class Profiled(TypedDict):
    """What was found of one method."""

    about: str
    point: dict[str, Any] | None  # its one configuration, of its grid; None where no run of it ended
    edges: dict[str, str]  # setting -> end of its grid that this point lies on
    tried: int  # points of its grid
    calibration: float | None  # of this point: geometric mean of steps to the target over `Target.steps`
    missed: list[str]  # workloads on which this point missed the target in the calibration
    workloads: dict[str, Reached]
    score: float  # mean share of workloads within a ratio τ, over τ from 1 to `most`
    low: float | None  # of the score, by bootstrap over the seeds
    high: float | None
    score_seconds: float  # the same with times in seconds of training
    score_others: float | None  # the same over the workloads on which nothing was chosen
    place: int  # by score, from 1
    sensitivity: dict[str, RateSensitivity]  # by workload of the calibration


class ProfilesTrack(TypedDict):
    """How soon each method reached the targets."""

    yardstick: str
    most: float  # ratio beyond which a workload counts as missed
    asked_about: list[str]
    workloads: dict[str, Target]
    methods: dict[str, Profiled]
