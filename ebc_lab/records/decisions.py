"""The decisions of a study's stages, as auto_decisions.json records them: one class for each JSON object.

Every stage writes a `Decision`, whose tracks are of the class that `TRACKS` names. Losses and KL divergences
are in nats per token. A run's result is a `records.figures.RunResult`.

`scripts/json_schemas.py` makes the schema of results_final.json from these classes and the comments at their
fields. In a file a key may be missing only if it is marked `NotRequired`; `total=False` says that an object
is built key by key.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired, TypedDict

from msgspec import Meta

KL_ON_TARGET = "kl_on_target"
C_IN_BAND = "c_in_band"
NO_PLATEAU = "no_plateau"
NO_WORSE_THAN_BASELINE = "x2_no_worse_than_baseline"
NO_WORSE_THAN_CONTROL = "best_ebc_no_worse_than_control"
OVERHEAD = "overhead"
# the lines that a verdict always has; `lr_window` is there if the finals have two rates
LINES = (KL_ON_TARGET, C_IN_BAND, NO_PLATEAU, NO_WORSE_THAN_BASELINE, NO_WORSE_THAN_CONTROL, OVERHEAD)


def _one_of(*words: str) -> Meta:
    return Meta(extra_json_schema={"enum": [*words]})


Judged = Annotated[str, _one_of("beats", "meets", "misses", "undecided")]
Verdict = Annotated[str, _one_of("better", "level", "worse", "undecided", "untuned")]
LineVerdict = Annotated[str, _one_of("pass", "fail", "undecided")]
EACH_LINE = {"allOf": [{"contains": {"properties": {"name": {"const": line}}}} for line in LINES]}
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0)]


class Candidate(TypedDict):
    """An entry in a decision's list of the runs that it compares. Figures not measured are None."""

    run_id: str
    role: str
    arm: str
    lr: float
    lr_scale: float
    delta_star: float | None  # the target KL, nats per token
    seed: int
    outcome: str | None
    cause: str | None
    raced: NotRequired[int]  # step at which the run was stopped, because it could no longer win
    val_loss: float | None
    val_se: float | None
    c_median: float | None
    clip_rate: float | None
    kl_median: float | None
    kl_within_30pct: float | None


class Decision(TypedDict, total=False):
    """A stage's decision."""

    stage: str
    form: int  # version of the format
    rule: str  # by which it was decided, in words
    # <optimizer>_<projection> -> what was chosen for this track, in the stage's own class (see above). The
    # type is left open here because a file is refused only for faults in what all stages share.
    tracks: dict[str, Any]
    notes: list[str]
    candidates: list[Candidate]
    measurements: list[dict[str, str]]  # run_id and role of each time measurement, which trains nothing
    inputs_sha256: Sha256
    decision_sha256: Sha256
    pairs: NotRequired[list[dict[str, Any]]]  # only of lr_sweep: each a `Pair`
    sequential: NotRequired[dict[str, Any] | None]  # only of the finals: a `Sequential`


# -- shared by several stages --------------------------------------------------------------------------------


class Window(TypedDict):
    """The range of a setting around its best value in which the loss is hardly higher than at that value."""

    best: float
    loss: float  # at the best value
    low: float
    high: float
    octaves: float  # from low to high
    open_low: bool  # the window reaches the lowest value tried, and may go on below
    open_high: bool  # likewise at the highest value tried


class Diverged(TypedDict):
    """On how many paired seeds the arm's run diverged, and on how many the reference's run did."""

    arm: Count
    reference: Count


class LuckOfTuning(TypedDict):
    """How much a tuned loss varies with the tuning seeds: `statistics.Luck` as JSON."""

    sd: float  # standard deviation
    freedom: float  # degrees of freedom of its estimate


class TuningNeeded(TypedDict):
    """How many seeds would decide a difference that the luck of the tuning keeps open."""

    tune_seeds: int  # of each point that is tried
    final_seeds: int  # further ones of each finalist
    seeds: Count  # fresh ones, that judge


class Difference(TypedDict):
    """An arm's loss minus that of its reference, paired by seed. `statistics.paired` explains each figure."""

    seeds: Count  # that both arms have
    comparisons: int  # for which the joint interval holds at once
    looks: int  # planned at the results; every interval is corrected for them
    margin: float  # up to so much worse is no worse
    method: str | None  # t, or rank if a run diverged
    median: float | None
    mean: float | None
    sd: float | None
    sigmas: float | None
    low: float | None
    high: float | None
    p: float | None
    detectable: float | None
    alone: Judged  # by the interval of this comparison alone
    joint_low: float | None
    joint_high: float | None
    p_joint: float | None
    joint_detectable: float | None
    judged: Judged  # by the interval that holds for all comparisons jointly
    diverged: NotRequired[Diverged]
    luck: NotRequired[LuckOfTuning]
    verdict: NotRequired[Verdict]  # only in a suite
    seeds_needed: NotRequired[int | None]
    tuning_needed: NotRequired[TuningNeeded]  # only where no number of seeds alone would decide


class Schedules(TypedDict, total=False):
    """The schedules of an arm. The keys are the names of table columns."""

    lr_schedule: str
    warmup_steps: int | None  # None if the schedule has no warm-up
    delta_schedule: str | None


class Arm(Schedules, total=False):
    """An arm of the finals or of a suite: settings, runs, and figures over the completed seeds."""

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
    test_sd: NotRequired[float | None]
    heldout_loss: float | None
    c_mean: float | None
    c_median: float | None
    kl_median: float | None
    clip_rate: float | None
    test_bits_per_char: NotRequired[float | None]  # only if tokens are not single characters
    val_median: float | None  # over all finished seeds; None if the median is that of a diverged run
    test_median: float | None  # likewise
    # only of a suite's arms
    about: NotRequired[str]  # description in words
    shape: NotRequired[str]  # how its runs differ in size from the suite's, in words
    point: NotRequired[dict[str, Any] | None]  # its settings as tuned
    figures: NotRequired[dict[str, float | None]]
    strength: NotRequired[float | None]
    comparable: NotRequired[bool]  # whether it was judged on the suite's text, and on the whole split
    versus: NotRequired[str | None]  # the arm that it is compared with
    cause: NotRequired[str | None]  # why no run of it finished
    difference: NotRequired[Difference | None]


# -- lr_sweep ------------------------------------------------------------------------------------------------


class SweepGrid(TypedDict):
    """The best run of the grid of learning rates that begins the search."""

    lr: float
    val_loss: float
    edge: str | None  # low | high | both: edge of the grid that it lies on
    extensions: int  # number of times that the grid was extended


class Schedule(TypedDict):
    """The schedule of a learning rate."""

    name: str
    warmup_steps: int
    decay_share: float


class ControlPoint(TypedDict):
    """A run in the grid from which the fair control was chosen."""

    run_id: str
    lr: float
    schedule: str
    warmup_steps: int
    val_loss: float | None


class Control(TypedDict):
    """The fair control: the plain optimizer on a schedule that was tuned for it."""

    lr: float
    lr_scale: float
    run_id: str
    val_loss: float
    lr_schedule: Schedule
    edge: str | None
    longest_warmup: bool
    grid: list[ControlPoint]
    used: bool  # whether something in the study is compared with it


class Pair(TypedDict):
    """A pair (optimizer, projection) of the sweep, and how far its best loss lies behind the best pair's."""

    track: str
    lr: float | None
    val_loss: float | None
    triaged: bool
    kept: bool
    behind: NotRequired[float | None]
    behind_sigma: NotRequired[float | None]
    told_apart: NotRequired[bool]
    detectable: NotRequired[float | None]  # only of a dropped pair


class BestRate(TypedDict):
    """The part of a `SweepTrack` that is needed to plan the track's plain runs."""

    optimizer: str
    projection: str
    lr: float


class NaturalSteps(TypedDict):
    """The part of a `SweepTrack` that describes the baseline's steps. It is needed to plan runs with EBC."""

    natural_kl: float
    descent_median: float | None


class Winner(TypedDict):
    """The winning run of a search, and the margin by which it won."""

    run_id: str
    val_loss: float
    ranked: list[str]  # ids of the runs that were compared
    margin_sigma: float | None  # by how much the runner-up's loss is higher, in units of sigma
    sigma: float  # noise between replicate seeds


class SweepTrack(BestRate, NaturalSteps, Winner):
    """The sweep of a track: best constant learning rate, noise between seeds, natural KL, fair control."""

    edge: str | None
    grid: SweepGrid
    replicate_losses: list[float]
    control: Control
    dropped: NotRequired[list[Pair]]


class NoiseFloor(TypedDict):
    """The noise between replicate seeds, its 95% interval, and the least difference two runs can show."""

    sigma: float | None
    low: float | None
    high: float | None
    detectable: float | None
    seeds: int


# -- calibrate, controller_search, lr_scale ------------------------------------------------------------------


class CalibratedTrack(Winner):
    """The target KL that was chosen for a track, and the budget under which this target KL was best."""

    budget: str
    bound: str
    delta_star: float
    times_natural: float
    lr_scale: float
    seeds: int
    losses: dict[str, float]  # target KL -> mean loss over seeds
    edge: str | None
    delta_window: Window | None
    c_median: float | None
    in_band: bool
    by_budget: dict[str, float]  # budget -> its best target KL
    ranked_losses: dict[str, float]


class ControllerTrack(Winner):
    """The controller chosen for a track: the best of those that keep the median KL near the target KL."""

    candidate: str
    settings: dict[str, Any]
    delta_star: float
    kl_ratio: float | None
    kl_ratios: dict[str, float | None]


class ScaledRun(Candidate):
    """A run at a multiple of the track's best learning rate."""

    inert: bool  # nearly every step is clipped, so that the learning rate has no effect


class ScaleTrack(TypedDict):
    """The multiple chosen for a track's best learning rate, and how far each arm's rate can be raised."""

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
    """How long an arm trains to reach the baseline's final loss: medians over the seeds that reach it."""

    steps: float
    tokens: float
    train_s: float  # seconds of training
    seeds: int  # that reached it


class RateWindow(TypedDict):
    """A comparison of EBC, or of the control, at its highest rate in the finals with itself at its lowest."""

    scales: list[float]
    arm: str
    reference: str
    difference: Difference


class Line(TypedDict):
    """A line of the verdict. The keys after the first four are the inputs of `figure`."""

    name: str
    question: str
    verdict: LineVerdict
    figure: str
    share: NotRequired[float | None]
    median_ratio: NotRequired[float | None]
    c_median: NotRequired[float | None]
    longest: NotRequired[int | None]
    overhead_pct: NotRequired[float | None]
    arm: NotRequired[str]
    reference: NotRequired[str]
    difference: NotRequired[Difference]
    joint: NotRequired[bool]
    beats: NotRequired[bool]
    plain: NotRequired[RateWindow | None]
    track: NotRequired[str]  # only in acceptance.json and in tables of several tracks


class ComparedTrack(TypedDict, total=False):
    """The fields of the finals and of a suite that the tables of arms read, so that the same tables show
    both."""

    reference: NotRequired[str]  # only of a suite: the arm that the others are compared with by default
    arms: dict[str, Arm]
    sigma: float
    efficiency: NotRequired[dict[str, Efficiency | None]]  # only of the finals


class FinalsTrack(ComparedTrack, total=False):
    """The arms of a track in the finals, their paired differences, and the verdict."""

    roles: dict[str, str]  # role -> arm
    best_ebc_by_val: str
    differences: dict[str, dict[str, Difference]]  # family -> arm -> its difference from the reference
    lr_windows: dict[str, RateWindow]
    margin_sigma: float | None
    overhead_pct: float | None
    verdict: Annotated[list[Line], Meta(max_length=7, extra_json_schema=EACH_LINE)]


class Sequential(TypedDict):
    """The looks at the results of the finals, and why no more seeds were added."""

    looks: list[int]  # number of seeds at each planned look
    at: int  # number of seeds at the last look taken
    confidence: float
    stopped: str  # the reason, in words


class Acceptance(TypedDict, total=False):
    """The contents of acceptance.json: the lines of the verdict, and how many lines have each verdict."""

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
    """The losses at one learning rate around an arm's best point; None if a run diverged or was raced."""

    lr: float
    val_loss: float | None
    seeds: dict[str, float | None]
    raced: NotRequired[int]  # number of seeds stopped because they could no longer win


class TunedArm(TypedDict):
    """The best point of an arm's tuning grid, and figures of the search for this point."""

    point: dict[str, Any]
    run_id: str | None
    val_loss: float | None
    worst_loss: float | None
    runs: int
    trials: NotRequired[int]  # points among which the best was chosen
    finalists: NotRequired[int]  # points among them that were trained on further seeds
    cut: NotRequired[
        list[str]
    ]  # settings of whose grids values were not tried, since the trials were used up
    extended: list[dict[str, Any]]
    edges: dict[str, str]
    margin_sigma: float | None
    luck: LuckOfTuning
    untuned: NotRequired[str]  # why no best point was found
    curve: NotRequired[list[CurvePoint]]
    window: NotRequired[Window | None]


class TunedTrack(TypedDict):
    """The tuned arms of a suite."""

    arms: dict[str, TunedArm]
    sigma: float


class SweptPoint(TypedDict):
    """One value of a setting that a suite sweeps. If a seed diverged, its loss is None, as is the mean."""

    value: float
    arm: str
    lr: float
    delta_star: float | None
    loss: float | None
    seeds: dict[str, float | None]
    rate: float | None  # median c times the learning rate


class Sweep(TypedDict, total=False):
    """The sweep of one setting of an arm, its window, and how well a rule that needs no tuning performs."""

    points: list[SweptPoint]  # by rising value
    left_out: list[str]  # arms whose points are left out, because a run failed or was lost
    about: str
    shape: str
    window: Window | None
    regret_x4: float | None  # loss at 4 times the best value, less the loss there
    rate_octaves: float | None  # between the effective rates c·lr at the ends of the window
    yardstick: NotRequired[str]  # the arm whose best loss the rule is compared with
    worst: NotRequired[float | None]  # highest loss in the sweep less that best loss
    every_start: NotRequired[bool]  # whether `worst` is negligible, so that any start of the rule does


class Transfer(TypedDict):
    """How much worse arms do at a size at which they were not tuned than an arm that was tuned there."""

    shape: str  # the other size, in words
    tuned: str  # the arm that was tuned at this size
    kept: list[str]  # arms that kept the settings tuned elsewhere
    against_kept: dict[str, Difference]  # EBC arm of these -> its difference from the plain one


class StepCost(TypedDict):
    """The time of an arm's step divided by the reference's: median and quartiles over repeated turns."""

    ratio: float
    low: float
    high: float


class Answer(TypedDict):
    """A suite's answer about one of the user's own arms, which is compared with every other arm."""

    rival: str | None
    difference: Difference | None
    against: dict[str, Difference]
    verdict: Verdict
    seeds_needed: int | None
    seeds: list[int] | None
    sentence: str


class SuiteTrack(ComparedTrack, total=False):
    """The arms of a suite, and the answers about the user's own arms among them."""

    steps_cost: NotRequired[dict[str, StepCost]]
    windows: dict[str, dict[str, Sweep]]  # swept arm -> setting -> its sweep
    transfer: list[Transfer]
    best_by_seed: dict[str, str | None]
    mine: list[str]
    answers: dict[str, Answer]


# -- ladder --------------------------------------------------------------------------------------------------


class RungArm(TypedDict):
    """An arm on one rung: its settings there, and the runs that are judged."""

    point: dict[str, Any]  # its best settings there
    carried: dict[str, Any]  # those of the suite's own size, as the rules carry them
    trials: int  # points among which `point` was chosen; 0: it is what was carried
    edges: dict[str, str]  # setting -> end of the tried values on which `point` lies
    luck: LuckOfTuning
    untuned: NotRequired[str]  # why it was not judged
    runs: dict[str, str]  # seed -> run id, at `point`
    outcomes: dict[str, int]
    val_loss: float | None  # means over the completed seeds
    test_loss: float | None
    test_sd: float | None
    train_s: float | None  # seconds of training of a run, median
    carried_runs: dict[str, str]  # likewise at `carried`; those of `runs` where it is the same
    regret: Difference | None  # loss at `carried` less that at `point`
    target: NotRequired[dict[str, float | None]]  # figures for `target=`


class Rung(TypedDict):
    """A model size, batch and length at which the arms are compared."""

    about: str
    shape: str  # how it differs from the suite's own size, in words; empty for that size
    width: int
    blocks: int
    batch_size: int
    steps: int
    tokens: int  # of one run
    compute: float  # floating-point operations of one run
    arms: dict[str, RungArm]


class SpeedUp(TypedDict):
    """How many times as soon an arm reaches a loss as the other does: above 1 where the arm is faster. The
    loss is, seed by seed, the higher of the two arms' last losses on the fixed windows, which both reach."""

    seeds: Count
    steps: float | None  # geometric mean over the seeds
    steps_low: float | None  # joint interval, no narrower than the evaluations allow
    steps_high: float | None
    seconds: float | None  # likewise in seconds of training
    seconds_low: float | None
    seconds_high: float | None


class Lengths(TypedDict):
    """How many times as long an arm's rival would have to train to end at the arm's loss: a length at which
    the rival was not trained, on the straight line through its losses at two lengths over log(length)."""

    rungs: list[str]  # the shorter and the longer one
    times: float | None  # at the shorter one
    low: float | None
    high: float | None


class Climb(TypedDict):
    """A comparison of two arms over all rungs."""

    arm: str
    reference: str
    asked: bool  # whether the answer is about it
    rungs: dict[
        str, Difference
    ]  # test loss of the arm less the reference's; joint over rungs and comparisons
    carried: dict[str, Difference]  # likewise with carried settings
    speed: dict[str, SpeedUp]
    lengths: Lengths | None
    overall: Difference | None  # mean over the rungs: the contrast that is named beforehand
    overall_carried: Difference | None
    trend: Difference | None  # slope of the difference, nats per doubling of compute
    lacking: str  # why `overall` and `trend` are None; empty
    verdict: Verdict  # by `overall`
    course: Annotated[
        str, _one_of("gains", "loses", "holds", "undecided")
    ]  # of the arm with more compute, by `trend`
    sentence: str


class LadderTrack(TypedDict):
    """The arms of a suite at several sizes, batches and lengths."""

    reference: str
    rungs: dict[str, Rung]
    climbs: list[Climb]
    rules: dict[str, dict[str, float]]  # tuned setting -> width | batch | steps | lr -> power
    tuned: bool  # whether the arms were tuned again on each rung


# -- circumstances -------------------------------------------------------------------------------------------


class ModeFound(TypedDict):
    """How far the runs of one mode of determinism agree."""

    runs: int
    completed: int
    diverged: int
    checksums: int  # number of different checksums of the weights
    loss_range: float | None  # largest difference of validation losses


class ModesTrack(TypedDict):
    """The comparison of modes of determinism."""

    modes: dict[str, ModeFound]
    capabilities: list[str]


# -- carry ---------------------------------------------------------------------------------------------------


class UnitPoint(TypedDict):
    """The losses, by seed, of an arm with one constant in one setting. A diverged run is given the loss of
    its first step, and a run without a result is given None."""

    value: float  # the constant
    val: dict[str, float | None]
    test: dict[str, float | None]
    mean: float | None  # of the validation loss; None if a run has no result
    diverged: list[str]  # seeds


class UnitCurve(TypedDict):
    """The losses of an arm in a setting at each constant that was tried, and the best constant."""

    points: list[UnitPoint]  # by rising constant
    best: float | None
    loss: float | None  # mean validation loss at the best constant
    edge: str | None  # edge of the tried constants that the best one lies on


class Carried(TypedDict):
    """The results of an arm in one setting with the constant that was chosen on the other settings."""

    constant: float
    regret: float  # mean validation regret in the settings that the constant was chosen on, nats
    test: dict[str, float]  # test loss by seed
    diverged: list[str]  # seeds
    excess: float  # mean test loss above that of the setting's best arm at its best constant, nats
    tuned: float  # `excess` of this arm at its own best constant in the setting, nats


class BrokenRuns(TypedDict):
    """The number of runs, and the number that are broken: diverged or far above their setting's median."""

    runs: int  # all of them
    broken: int


class UnitFound(TypedDict):
    """What was found out about one unit. A figure that could not be judged is None."""

    about: str
    unit: str
    over: str
    curves: dict[str, UnitCurve]  # by setting
    carried: dict[str, Carried]  # by setting
    octaves: float | None  # between the lowest and the highest of the settings' best constants
    open: bool  # whether one of them lies on an edge of the tried range, so that `octaves` is a lower bound
    excess: float | None  # mean over the settings
    worst: str | None  # the setting with the largest excess
    broken: BrokenRuns  # at the carried constants
    broken_anywhere: BrokenRuns  # at all constants of the common grid
    starts: NotRequired[bool]  # its constants are starting values; in each setting the worst one counts


class UnitSetting(TypedDict):
    """A setting, and the best result that any arm reached in it."""

    about: str
    kept: bool
    arm: str | None
    value: float | None
    val_loss: float | None
    test_loss: float | None
    median: float | None  # test loss of all runs at carried constants


class UnitsTrack(TypedDict):
    """The results of comparing units: how well a constant chosen on some settings works on the others."""

    reference: str
    challengers: list[str]
    settings: dict[str, UnitSetting]
    arms: dict[str, UnitFound]
    against: dict[str, Difference]  # arm -> difference from the reference, mean over settings, by seed
    by_setting: dict[str, dict[str, Difference]]  # arm -> setting -> difference in that setting alone
    over_settings: dict[str, Difference]  # arm -> difference of means over seeds, paired by setting
    verdicts: dict[str, str]  # challenger -> earns | loses | no gain | undecided
    margin: float
    broken: float


# -- profiles ------------------------------------------------------------------------------------------------


class Target(TypedDict):
    """A workload, and the loss that methods have to reach on it."""

    about: str
    calibrates: bool  # whether methods' configurations are chosen on it
    steps: int  # of the runs that set the target
    longest: int  # steps of the longest run
    point: dict[str, Any] | None  # best point of the yardstick's grid on this workload
    edges: dict[str, str]  # setting -> end of its grid that this point lies on
    lowest: dict[str, float]  # seed -> lowest loss on the fixed windows, of the runs that set the target
    loss: float | None  # the target, median of `lowest` plus the slack; None if no such run completed
    best_steps: float | None  # fewest steps to the target of any method
    best_seconds: float | None  # least seconds of training, likewise


class Reached(TypedDict):
    """How long a method trains to reach a workload's target; None if even the longest run does not."""

    steps: dict[str, int | None]  # by seed: to the first evaluation at or below the target
    seconds: dict[str, float | None]  # of training, likewise
    median_steps: float | None  # over the seeds
    median_seconds: float | None
    ratio: float | None  # `median_steps` over that of the best method
    ratio_seconds: float | None  # likewise for `median_seconds`
    lowest: dict[str, float | None]  # by seed: lowest loss on the fixed windows
    diverged: list[str]  # seeds


class RateSensitivity(TypedDict):
    """How sensitive a method is to the learning rate on one workload, around the method's configuration."""

    rates: list[float]
    losses: list[float | None]  # mean validation loss at each rate; None if a run diverged
    sensitivity: float | None  # mean of min(loss, loss of the first step) over the rates, less the best loss
    window: Window | None


class Profiled(TypedDict):
    """What was found out about one method."""

    about: str
    point: dict[str, Any] | None  # its configuration, one point of its grid; None if no run ended
    edges: dict[str, str]  # setting -> end of its grid that this point lies on
    tried: int  # points of its grid
    calibration: float | None  # at this point, geometric mean of steps to the target over `Target.steps`
    missed: list[str]  # workloads on which this point missed the target in the calibration
    workloads: dict[str, Reached]
    score: float  # share of workloads with a ratio of at most τ, averaged over τ from 1 to `most`
    low: float | None  # 95% interval of the score, by bootstrap over the seeds
    high: float | None
    score_seconds: float  # the score by seconds of training instead of steps
    score_others: float | None  # the score over the workloads on which nothing was chosen
    place: int  # rank by score, from 1
    sensitivity: dict[str, RateSensitivity]  # by workload of the calibration


class ProfilesTrack(TypedDict):
    """The comparison of methods by how soon each reaches the targets."""

    yardstick: str
    most: float  # ratio beyond which a workload counts as missed
    asked_about: list[str]
    workloads: dict[str, Target]
    methods: dict[str, Profiled]


TRACKS: dict[str, type] = {
    "lr_sweep": SweepTrack,
    "calibrate": CalibratedTrack,
    "controller_search": ControllerTrack,
    "lr_scale": ScaleTrack,
    "finals": FinalsTrack,
    "tune": TunedTrack,
    "ablation": SuiteTrack,
    "ladder": LadderTrack,
    "circumstances": ModesTrack,
    "carry": UnitsTrack,
    "profiles": ProfilesTrack,
}
