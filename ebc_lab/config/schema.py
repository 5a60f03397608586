"""The settings of a run, of a study and of a study's stages: defaults, meanings, units and allowed values.

The settings of a run's parts are in `parts`. `compose` fills these dataclasses from the command line;
docs/settings.md is generated from them.
"""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from ebc_lab.ebc import options

from .fields import (
    GRID,
    LENGTH,
    LENGTH_OR_0,
    LR,
    MULTIPLE,
    SEED,
    STEPS,
    Setting,
    number,
    setting,
    setting_of,
)
from .machine import INSTRUCTIONS
from .parts import PART, PARTS
from .parts.budget import BudgetConfig
from .parts.controller import ControllerConfig
from .parts.data import DataConfig
from .parts.determinism import DeterminismConfig
from .parts.ebm import DecoderConfig, EbmConfig, EncoderConfig, IndexConfig, SamplerConfig
from .parts.lr_schedule import LR_SHAPES, LRScheduleConfig
from .parts.memory import MemoryConfig
from .parts.model import ModelConfig
from .parts.optimizer import OptimizerConfig
from .parts.projection import ProjectionConfig
from .parts.stabilizer import StabilizerConfig
from .parts.tokens import TokensConfig
from .parts.workload import WorkloadConfig

T = TypeVar("T")
# units and limits that several settings share, as generous as those in `fields`
TOKENS: dict[str, Any] = {"unit": "tokens", "low": 1, "high": 10**15}  # to train on
SEEDS = 100  # most seeds of one stage
RUNS: dict[str, Any] = {"unit": "runs", "low": 1, "high": SEEDS}
DURATION: dict[str, Any] = {"unit": "s", "low": 0, "high": 10**7}  # up to four months
PERIOD: dict[str, Any] = {"unit": "s", "above": 0, "high": 10**7}
EXTENSIONS: dict[str, Any] = {"low": 0, "high": 20}  # times that a grid may double: a million-fold
MULTIPLES: dict[str, Any] = {**MULTIPLE, "least": 1, "increasing": True}
CHOICES: dict[str, Any] = {"least": 1, "unique": True}
BATCH_PARTS: dict[str, Any] = {
    "about": "parts of a batch that go forward and backward one after another",
    "unit": "parts",
    "low": 1,
    "high": 65536,
}
SPLITS = ("train", "val", "test")
# settings that may differ between calls on one study and are left out of what it was asked for
NOT_THE_STUDY = ("launcher", "output_dir", "tracker", "notify", "own_files", "answered_before")
TUNABLE: dict[str, Setting] = {  # key in the grid of an arm -> the values that it takes
    "lr": Setting("learning rate, absolute", **LR, increasing=True),
    "lr_scale": Setting("learning rate", "× the best lr", **GRID),
    "delta": Setting("δ*", "× the calibrated one", **GRID),
    "strength": Setting("of a rival", **GRID),
    "radius": Setting("of EBC, beside δ*", **GRID),
    "warmup_share": Setting("warm-up", "× steps", low=0, below=1, unique=True),
    "schedule": Setting("shape of the learning rate", choices=LR_SHAPES, unique=True),
}
# those of them whose grid grows where its best point lies on an edge
GROWING = ("lr", "lr_scale", "delta", "strength", "radius")
# settings of a part that a grid may not have under their own names -> the keys that stand for them
TUNED_AS = {
    "optimizer.lr": "lr",
    "budget.target_kl": "delta",
    "budget.radius": "radius",
    "stabilizer.strength": "strength",
    "lr_schedule.name": "schedule",
    "lr_schedule.warmup_share": "warmup_share",
    "lr_schedule.warmup_steps": "warmup_share",
}
# parts that say what is trained, and not how: arms that differ in them are no longer compared
COMPARED_ON = ("data", "tokens", "model", "workload", "init", "encoder", "decoder", "index", "ebm", "race")
CAPABILITIES = tuple(INSTRUCTIONS)
ARGUMENTS = "arguments"  # of a user's own part: what its function is also given, of which nothing is known
SLURM = ("slurm",)
HORIZON = "horizon"  # in a method's grid: the shares of the longest run at which its runs end


def with_further(fields_of_parts: Mapping[str, tuple[Any, Any]]) -> Callable[[type[T]], type[T]]:
    """Return a decorator that adds fields to a class before it becomes a dataclass, except fields that the
    class declares itself. `Part.from_run` reads the added fields.

    `fields_of_parts` maps the name of each field to its type and its default, a dataclass field.
    """

    def add(cls: type[T]) -> type[T]:
        for name, (kind, default) in fields_of_parts.items():
            if name not in cls.__annotations__:
                cls.__annotations__[name] = kind
                setattr(cls, name, default)
        return cls

    return add


@dataclass
@with_further({part.group_name: (part, field(default_factory=part)) for part in PARTS})
class RunConfig:
    """All settings of one training run. These, and nothing else, enter `identity`.

    Parts that many modules read are declared here; the decorator adds the others."""

    seed: int = setting(0, "of the initial weights and the data order", low=0, high=SEED)
    steps: int = setting(600, "length of the run", **LENGTH)
    batch_size: int = setting(16, "sequences in a batch, B", "sequences", 1, 65536)
    accumulate: int = setting(1, **BATCH_PARTS, unnamed_at=1)
    dtype: str = setting("auto", "of autocast; auto: measured", choices=("auto", "float32", "bfloat16"))
    param_dtype: str = setting("float32", "forensic: of the parameters", choices=("float32", "bfloat16"))
    device: str = setting("auto", "auto: a GPU where one is visible", choices=("auto", "cpu", "cuda"))
    threads_per_run: int = setting(
        0,
        "CPU threads; changes bits, but under determinism=verity; 0: chosen by measurement",
        low=0,
        high=512,
    )
    capability: str = setting(
        "auto",
        "vector instructions that torch may use; changes bits; auto: all; else the run has a process of its "
        "own, and what changes no bit names it as well",
        choices=("auto", *CAPABILITIES),
        unnamed_at="auto",
    )
    compile: str = setting(
        "auto",
        "torch.compile of the training forward; changes bits",
        choices=("auto", "on", "off"),
        unnamed_at="off",
    )
    eval_every: int = setting(40, "steps between evaluations on the fixed windows", **LENGTH)
    eval_windows: int = setting(64, "number of these windows", "windows", 1, 10**6)
    evaluate: list[str] = setting(
        ["val", "test"], "splits evaluated completely at the end", choices=SPLITS[1:]
    )
    final_windows: int = setting(
        0, "forensic: overlapping windows at the end, not complete splits", "windows", 0, 10**6
    )
    audit_every: int = setting(20, "steps between measurements of the applied KL", **LENGTH)
    audit_tokens: int = setting(512, "on how many tokens it is measured", "tokens", 1, 10**8)
    curve_every: int = setting(
        0,
        "steps between measurements of the KL at six shares c of the proposed update; 0: never",
        **LENGTH_OR_0,
        unnamed_at=0,
    )
    sharpness_every: int = setting(
        0,
        "steps between measurements of the largest eigenvalue of the loss's Hessian; 0: never",
        **LENGTH_OR_0,
        unnamed_at=0,
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    stabilizer: StabilizerConfig = field(default_factory=StabilizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    determinism: DeterminismConfig = field(default_factory=DeterminismConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)

    @property
    def tokens_per_step(self) -> int:
        """Return how many tokens (images, under `workload=images`) a step reads."""
        return self.batch_size * self.model.context


@dataclass
class StudyConfig:
    """What a study is called, and which stages it has."""

    name: str = setting("${scale}", "the study's folder, in output_dir")
    stages: list[str] = setting(
        ["lr_sweep", "calibrate", "lr_scale", "finals"], "its stages, in order (docs/stages.md)", least=1
    )
    stage_seed: int = setting(
        100, "seed of the stages' runs; their replicates use those after it", low=0, high=SEED
    )
    band: list[float] = setting([0.5, 0.7], "where the median c should lie: low, high", above=0, high=1)
    lr_schedule: str = setting(
        "trapezoid", "learning rate in the stages' runs; EBC's have no warm-up", choices=LR_SHAPES
    )
    kl_schedule: str = setting("hold_decay", "δ* in the stages' runs", choices=options.SCHEDULES)
    mirror: str | None = setting(
        None, "fsspec address below which its files are also kept, s3://BUCKET/PATH (docs/beyond.md)"
    )
    mirror_every_s: float = setting(10.0, "time between two looks for what is to be mirrored", **PERIOD)


@dataclass
class StageConfig:
    """The settings of a stage. The stages are the fields of `Config` that have this type, in their order."""

    needs: ClassVar[tuple[str, ...]] = ()  # stages that a study with this one must also have
    judges: ClassVar[bool] = False  # whether it gives intervals over the study's `seeds`
    steps: int = setting(200, "length of each of its runs", **LENGTH)
    train_tokens: float | None = setting(None, "in place of its steps, rounded up to whole ones", **TOKENS)


@dataclass
class LRSweepConfig(StageConfig):
    """The best learning rate of each optimizer and projection without EBC."""

    optimizers: list[str] = setting(["adam", "muon"], "which optimizers", group="optimizer", **CHOICES)
    projections: list[str] = setting(
        ["none"], "each combined with every optimizer", group="projection", **CHOICES
    )
    grids: dict[str, list[float]] = setting({}, "optimizer → learning rates to try", increasing=True, **LR)
    max_extensions: int = setting(
        2, "how often a grid grows, ×2, when the winner lies on its edge", **EXTENSIONS
    )
    skip_threshold: float = setting(
        0.2, "a pair whose loss is this much above the best, relatively, is dropped", above=0, high=1e6
    )
    keep: str = setting("best", "which pairs of optimizer and projection go on", choices=("best", "all"))
    warmup: float = setting(
        1 / 6, "warm-up of these runs, where their schedule has one; < 1: share of the run", **LENGTH_OR_0
    )
    long_steps: int = setting(600, "length of the runs that tune the baseline and the fair control", **LENGTH)
    baseline_scales: list[float] = setting(
        [0.25, 0.5],
        "constant learning rates to try; the best is the baseline's, and the unit of all scales",
        "× the grid's best",
        **MULTIPLES,
    )
    replicates: int = setting(
        3, "seeds of the baseline, for the noise σ and the natural KL", **{**RUNS, "low": 2}
    )
    control_shapes: list[str] = setting(
        ["trapezoid", "warmup_linear"],
        "schedules of the fair control; its search starts from the first",
        choices=LR_SHAPES,
        **CHOICES,
    )
    control_warmups: list[float] = setting(
        [1 / 6, 20.0, 1 / 3], "its warm-ups, likewise; < 1: share of the run", "steps", 0, STEPS, least=1
    )
    control_scales: list[float] = setting([1.0, 2.0], "its peaks", "× the grid's best", **MULTIPLES)
    control_extensions: int = setting(
        2, "how often these grow, ×2, when the best lies on their edge", **EXTENSIONS
    )


@dataclass
class CalibrateConfig(StageConfig):
    """The δ* with the lowest loss, or the one at which the median c lies in the band."""

    needs = ("lr_sweep",)
    steps: int = setting(600, "length of each of its runs; the best δ* depends on it", **LENGTH)
    lr_scale: float = setting(8.0, "learning rate of its runs", "× the best lr", **MULTIPLE)
    choose: str = setting("loss", "δ* by validation loss, or by the band", choices=("loss", "band"))
    seeds: int = setting(1, "runs of each δ*, whose mean loss counts", **RUNS)
    delta_grid: str = setting(
        "natural", "multiples of the natural KL, or 0.03, 0.05, 0.07", choices=("natural", "published")
    )
    multiples: list[float] = setting([0.8, 1.0, 1.25, 1.6, 2.0], "δ* to try", "× the natural KL", **MULTIPLES)
    budgets: list[str] = setting(["tracked"], "budgets to calibrate", group="budget", **CHOICES)
    max_extra: int = setting(
        3, "further δ* tried where the best lies on an edge, or none reaches the band", **EXTENSIONS
    )


@dataclass
class ControllerSearchConfig(StageConfig):
    """The controller that holds the applied KL closest to δ*."""

    needs = ("calibrate",)
    candidates: dict[str, Any] = setting({}, "name → settings of a run that it changes")


@dataclass
class LRScaleConfig(StageConfig):
    """How far the learning rate can rise with EBC, and without it."""

    needs = ("lr_sweep", "calibrate")
    steps: int = setting(600, "length of each of its runs", **LENGTH)
    scales: list[float] = setting(
        [1.0, 2.0, 4.0, 8.0, 16.0], "learning rates to try", "× the best lr", **MULTIPLES
    )


@dataclass
class FinalsConfig(StageConfig):
    """The arms at full length over `seeds`, judged on the test split."""

    needs = ("lr_scale",)
    judges = True
    steps: int = setting(600, "length of each of its runs", **LENGTH)
    arms: list[str] = setting(
        ["baseline", "control", "ebc_x2", "ebc_x8", "control_x2", "control_x8"],
        "which arms (docs/stages.md)",
        **CHOICES,
    )
    margin: float = setting(0.01, "how much worse than the baseline still meets the target", "nats", 0, 100)
    window_margin: float = setting(
        0.02, "how much worse EBC may be at the highest rate than at the lowest", "nats", 0, 100
    )
    max_seeds: int = setting(
        0, "seeds are added up to this number while the verdict is undecided; 0: none", "seeds", 0, SEEDS
    )
    seeds_per_look: int = setting(
        2, "seeds added at a time; intervals are corrected for each look", "seeds", 1, SEEDS
    )


@dataclass
class TuneConfig(StageConfig):
    """The suite's arms that have a grid, each at its own best point of it."""

    needs = ("lr_sweep", "ablation")
    steps: int = setting(600, "length of each of its runs", **LENGTH)
    seeds: int = setting(2, "seeds of each point, from study.stage_seed on; the worst loss decides", **RUNS)
    max_extensions: int = setting(
        2, "how often a grid grows, by its own ratio, when the best lies on its edge", **EXTENSIONS
    )
    search: str = setting(
        "grid",
        "every combination; or one setting after the other: the rate at the first value of the others, these "
        "in their order, and the rates next to the best once more where they changed",
        choices=("grid", "coordinate"),
    )
    combined: list[str] = setting(
        [],
        "tuned settings of which search=coordinate combines every value with every rate at first",
        unique=True,
        unnamed_at=[],
    )
    trials: int = setting(
        0,
        "points of every arm among which its best is chosen: whatever its search leaves of them goes between "
        "the best value of each number and its neighbours; 0: as many as the search asks for",
        "points",
        low=0,
        high=1000,
        unnamed_at=0,
    )
    finalists: int = setting(
        0,
        "the best points of every arm, which are trained on final_seeds more: the lowest mean wins; 0: the "
        "lowest worst loss wins at once",
        "points",
        low=0,
        high=1000,
        unnamed_at=0,
    )
    final_seeds: int = setting(3, "further seeds of each finalist", unnamed_at=3, **RUNS)
    window: bool = setting(
        False,
        "a grid of lr then grows both ways, max_extensions times at most, until the losses at its ends are "
        "0.05 nats above the best",
    )
    race_sigmas: float = setting(
        0.0,
        "from three quarters of its steps on a run is stopped that is so far behind the arm's best finished "
        "point of the same shape at the same step; 0: none is; not with window",
        "σ",
        0,
        1000,
    )

    @property
    def at_first(self) -> tuple[str, ...]:
        """Return the settings of which search=coordinate combines all values at first."""
        return (*GROWING, *self.combined)

    @property
    def further_seeds(self) -> int:
        """Return how many further seeds a finalist has; 0 where there are no finalists."""
        return self.final_seeds if self.finalists else 0


@dataclass
class EntryConfig:
    """One entry of a study: runs with some settings changed."""

    about: str = setting("", "what it is, in a few words")
    settings: dict[str, Any] = setting({}, "settings of a run that it changes: {stabilizer: {name: agc}}")


@dataclass
class SizedConfig(EntryConfig):
    """One entry of a study whose runs may have another size."""

    steps: float = setting(1.0, "length", "× the stage's", **MULTIPLE)
    batch_scale: float = setting(1.0, "batch_size", "× the study's", **MULTIPLE)
    width_scale: float = setting(1.0, "model.width", "× the study's", **MULTIPLE)


@dataclass
class ArmConfig(SizedConfig):
    """One arm of a suite: the best baseline with some settings changed."""

    lr_scale: float = setting(1.0, "learning rate", "× the best lr", **MULTIPLE)
    delta: float | None = setting(
        None, "δ*", "× the calibrated one, or the natural KL without calibration", **MULTIPLE
    )
    control: bool = setting(
        False, "on the fair control's learning-rate schedule; lr_scale counts from the control's rate"
    )
    tune: dict[str, list[Any]] = setting(
        {},
        "grids whose best point is taken: lr in absolute numbers (lr_scale multiplies it), or lr_scale; "
        "delta, strength, radius, warmup_share, schedule, the names of shapes; and any setting of a part, "
        "optimizer.beta2 or optimizer.arguments.beta",
        least=1,
    )
    grows: dict[str, str] = setting(
        {},
        "such a setting → how its grid grows where its best value lies on an edge: log, by the ratio of the "
        "last two values, or linear, by their difference; the grid of any other stays as it is",
        choices=("log", "linear"),
        unnamed_at={},
    )
    tuned_as: str | None = setting(None, "an arm whose best point this one takes")
    replay: str | None = setting(None, "an arm whose recorded c·lr this one replays without measuring")
    replay_seed: str = setting(
        "own", "replay the record of the same or the next seed", choices=("own", "next")
    )
    init: str | None = setting(
        None, "an arm from whose weights this one starts, each seed from that arm's run of the same seed"
    )
    matched: str | None = setting(None, "an arm whose clip rate the strength of norm_clip is to reproduce")
    versus: str | None = setting(None, "the arm it is paired with; empty: the suite's reference")


@dataclass(frozen=True)
class Swept:
    """One point of a sweep over a setting of an arm."""

    arm: str
    key: str  # the setting: lr_scale or delta
    tail: str  # the suffix of the arm's name at this point
    value: float


@dataclass
class PlaceForMineConfig:
    """What the parts named by `mine=` are of. Subclasses have the template of their entries."""

    group: str = setting(
        "",
        "what mine= names; empty: this suite takes none",
        choices=("", "optimizer", "stabilizer", "lr_schedule"),
    )


@dataclass
class MineConfig(PlaceForMineConfig):
    """What a suite makes an arm of for `mine=./my_opt.py:Cautious`, and the arms that its answer is about."""

    template: ArmConfig = field(default_factory=ArmConfig)
    arms: list[str] = setting([], "arms that are compared with every other; those of mine= join", unique=True)


EACH = "each arm also runs under each of these, paired with itself undisturbed"
VERSIONS = {part.versions.key: part for part in PARTS if part.versions}


@dataclass
@with_further({key: (list[str], setting([], EACH, group=part.group_name)) for key, part in VERSIONS.items()})
class AblationConfig(StageConfig):
    """A suite: named arms over `seeds`, each compared with one of them, paired by seed (docs/suites.md)."""

    needs = ("lr_sweep",)
    judges = True
    question: str = setting("", "what the suite asks, in a sentence")
    steps: int = setting(600, "length of each of its runs", **LENGTH)
    reference: str = setting("", "the arm that every other is paired with")
    arms: dict[str, ArmConfig] = setting({}, "name → arm", most=500)
    further: dict[str, ArmConfig] = setting(
        {}, "name → arm that takes part where rivals= names it", unnamed_at={}
    )
    mine: MineConfig = field(default_factory=MineConfig)
    step_cost: bool = setting(
        False, "the time of each arm's step is measured, in turns with that of torch's Adam"
    )
    lr_scales: list[float] = setting(
        [], "each arm runs at each of these instead of its own lr_scale", increasing=True, **MULTIPLE
    )
    deltas: list[float] = setting(
        [], "each arm with EBC runs at each of these, too, as its delta", increasing=True, **MULTIPLE
    )

    def swept(self) -> dict[str, Swept]:
        """Return the points of the suite's sweeps by label, `<arm>_x<lr_scale>` or `<arm>_d<delta>`."""
        out: dict[str, Swept] = {}
        for name, arm in self.arms.items():
            stabilizer = arm.settings.get("stabilizer")
            ebc = isinstance(stabilizer, dict) and stabilizer.get("name") == "ebc"
            points = [Swept(name, "lr_scale", f"_x{number(x)}", x) for x in self.lr_scales]
            points += [Swept(name, "delta", f"_d{number(x)}", x) for x in self.deltas if ebc]
            out |= {name + point.tail: point for point in points}
        return out

    def all_arms(self) -> dict[str, ArmConfig]:
        """Return all arms by label, with one for each point of a swept arm. Each is followed by its versions,
        `<arm>_<choice>`, which run under other choices of a part and are compared with the arm itself."""
        swept = self.swept()
        labels: dict[str, list[str]] = {name: [] for name in self.arms}
        for label, point in swept.items():
            labels[point.arm].append(label)
        out: dict[str, ArmConfig] = {}
        for name, its_points in labels.items():
            for label in its_points or [name]:
                arm = out[label] = self._arm_at(swept[label], swept) if its_points else self.arms[name]
                for part, choices in self.versions().items():
                    for choice in choices:
                        about = f"{arm.about or label}, {choice.replace('_', ' ')}"
                        settings = {**arm.settings, part: {"name": choice}}
                        version = dataclasses.replace(arm, about=about, settings=settings, versus=label)
                        out[f"{label}_{choice}"] = version
        return out

    def versions(self) -> dict[str, list[str]]:
        """Return, by group, the choices under which every arm is run again."""
        return {part.group_name: choices for key, part in VERSIONS.items() if (choices := getattr(self, key))}

    def _arm_at(self, point: Swept, swept: Mapping[str, Swept]) -> ArmConfig:
        """Return the arm for one point of a sweep. It is compared with the same point of its `versus` arm if
        that point is swept too, and otherwise with the reference."""
        arm = self.arms[point.arm]
        versus = arm.versus
        if versus in self.arms:
            versus = versus + point.tail if versus + point.tail in swept else None
        text = {"lr_scale": "at LR ×{:g}", "delta": "from δ* ×{:g}"}[point.key].format(point.value)
        changed: dict[str, Any] = {point.key: point.value, "about": f"{arm.about or point.arm}, {text}"}
        return dataclasses.replace(arm, versus=versus, **changed)


SIZES = ("width", "batch", "steps")  # in which a rung may differ from the suite
BASE = "base"  # the rung of the suite's own size
HALF_LIVES = ("beta", "momentum")  # settings of which what is lacking to 1 is carried; so they begin


@dataclass
class RungConfig(SizedConfig):
    """One rung of the ladder: a width, batch and length at which the suite's arms are compared once more."""


@dataclass
class LadderConfig(StageConfig):
    """The arms of a suite at several sizes, batches and lengths: does an advantage hold where more is
    trained?"""

    needs = ("tune", "ablation")
    judges = True
    question: str = setting("", "what the ladder asks, in a sentence")
    steps: int = setting(600, "length of its runs at the suite's own size, that of ablation", **LENGTH)
    rungs: dict[str, RungConfig] = setting({}, f"name → rung beside {BASE}, the suite's own size", most=50)
    arms: str = setting(
        "all",
        "all of the suite's; or those that the answer is about, and their rivals",
        choices=("all", "asked"),
    )
    trials: int = setting(
        6,
        "points of each arm on each rung, around what was carried there; 0: what was carried is judged",
        "points",
        0,
        1000,
    )
    again: list[str] = setting(
        ["lr", "lr_scale", "weight_decay"], "tuned settings that are tuned again on each rung", unique=True
    )
    carry: str = setting(
        "rules",
        "what was tuned is carried to a rung by the rules, or kept as it is",
        choices=("rules", "kept"),
    )
    rules: dict[str, dict[str, Any]] = setting(
        {
            "lr": {"width": -1.0, "batch": 0.5, "steps": -0.32},
            "weight_decay": {"lr": -1.0, "steps": -1.0},
            "beta2": {"batch": 1.0},
        },
        "how tuned settings are carried to a rung: setting → the powers of width, batch and steps, each over "
        "the suite's own, and of the lr that was carried; of betas and momentum, 1 less the value is "
        "multiplied; what is not named is kept",
        low=-4,
        high=4,
    )
    rules_of: dict[str, dict[str, Any]] = setting(
        {}, "arm → such rules in the place of those", low=-4, high=4
    )


@dataclass
class CircumstancesConfig(StageConfig):
    """One run under each mode of determinism, in all combinations of circumstances that should change
    nothing."""

    steps: int = setting(50, "length of each of its runs", **LENGTH)
    seed: int = setting(0, "of the initial weights and the data order of all of them", low=0, high=SEED)
    modes: list[str] = setting(
        ["none", "torch", "verity"], "modes to compare", group="determinism", **CHOICES
    )
    threads: list[int] = setting([1, 2], "CPU threads", "threads", 1, 512, least=1, increasing=True)
    capabilities: list[str] = setting(
        [],
        "vector instructions that torch may use; empty: all that the CPU has",
        choices=CAPABILITIES,
        unique=True,
    )
    parts: list[int] = setting([1, 2, 4], **BATCH_PARTS, least=1, increasing=True)


@dataclass
class UnitConfig(EntryConfig):
    """One arm of `carry`: a unit, and the constants in that unit which are tried in every setting."""

    unit: str = setting("", "the unit of the constant, in a word or two")
    over: str = setting("", "the setting of a run that the constant is of: budget.target_kl, optimizer.lr")
    grid: list[float] = setting([], "the constants", least=2, **GRID)
    lr_scale: float = setting(
        1.0, "learning rate, unless the constant is one", "× the setting's lr", **MULTIPLE
    )
    starts: bool = setting(
        False,
        "the constants are starts of a rule that nobody tunes: in each setting the worst of them counts",
    )
    width_power: float = setting(
        0.0, "the constant is multiplied by this power of the setting's width_scale", low=-4, high=4
    )


@dataclass
class CarrySettingConfig(SizedConfig):
    """One setting of `carry`: what a constant is carried to, or chosen on."""

    lr: float = setting(4e-3, "the usual learning rate of its optimizer, which arms multiply", **LR)
    kept: bool = setting(False, "kept for the judgement: no constant is chosen on it")


@dataclass
class CarryConfig(StageConfig):
    """Arms that measure a step in different units, in different settings: which one constant, chosen in other
    settings, serves a setting that it was not chosen on? Over `seeds`."""

    judges = True
    question: str = setting("", "what the study asks, in a sentence")
    steps: int = setting(600, "length of each of its runs", **LENGTH)
    arms: dict[str, UnitConfig] = setting({}, "name → unit")
    settings: dict[str, CarrySettingConfig] = setting({}, "name → setting; the first is the usual one")
    reference: str = setting("", "the arm that every other is paired with: the strongest rival")
    challengers: list[str] = setting([], "the arms that the verdict is about", unique=True)
    margin: float = setting(
        0.01, "a challenger earns its cost from so much below the reference on", "nats", 0, 10
    )
    broken: float = setting(
        0.3, "a run is broken from so much above its setting's median test loss on", "nats", above=0, high=10
    )
    max_extensions: int = setting(
        4, "how often a grid grows by its own ratio, when a setting's best lies on its edge", low=0, high=10
    )


@dataclass
class ProfiledWorkloadConfig(SizedConfig):
    """One workload of `profiles`: what every method trains."""


@dataclass
class MethodConfig(EntryConfig):
    """One method of `profiles`: it has one configuration for all workloads, a point of its grid."""

    grid: dict[str, list[Any]] = setting(
        {},
        "setting of a run → values that are tried: {optimizer.lr: [1e-3, 2e-3]}; horizon: at which shares of "
        "the longest run its schedule, and the run, ends",
        least=1,
    )
    cannot: list[str] = setting([], "workloads that it cannot train: each counts as missed", unique=True)

    def settings_at(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Return the method's settings at a point of its grid, without the horizon, which no run has."""
        made = {group: dict(part) for group, part in self.settings.items()}
        for key, value in point.items():
            if key != HORIZON:
                group, _, name = key.partition(".")
                made.setdefault(group, {})[name] = value
        return made


@dataclass
class MineMethodConfig(PlaceForMineConfig):
    """What `profiles` makes a method of for `mine=./my_opt.py:Cautious`."""

    template: MethodConfig = field(default_factory=MethodConfig)


@dataclass
class ProfilesConfig(StageConfig):
    """Methods with one configuration each for all workloads: how soon does each reach a target that a tuned
    yardstick set? Over `seeds`."""

    judges = True
    question: str = setting("", "what the study asks, in a sentence")
    steps: int = setting(300, "length of the runs that set the targets", **LENGTH)
    longest: float = setting(2.0, "length of the longest run of a method, its budget", "× those runs", 1, 4)
    evaluations: int = setting(
        40, "on the fixed windows, in as many steps as those runs have", "evaluations", 1, 1000
    )
    workloads: dict[str, ProfiledWorkloadConfig] = setting({}, "name → workload")
    methods: dict[str, MethodConfig] = setting({}, "name → method")
    yardstick: str = setting("", "the method that sets the targets, tuned on each workload")
    calibrate_on: list[str] = setting(
        [], "the workloads on which each method's configuration is chosen", unique=True
    )
    calibration_seeds: int = setting(1, "seeds of each point of a grid, from study.stage_seed on", **RUNS)
    target_seeds: int = setting(
        3, "seeds, after those, with which the yardstick's best point sets the target", low=1, high=SEEDS
    )
    target_slack: float = setting(0.0, "added to the loss that the yardstick reached", "nats", 0, 10)
    asked_about: list[str] = setting(
        [], "methods whose place the headline tells; those of mine= come first", unique=True
    )
    mine: MineMethodConfig = field(
        default_factory=MineMethodConfig, metadata={"setting": Setting(unnamed_at=MineMethodConfig())}
    )


@dataclass
class LauncherConfig:
    """Where runs are trained. May differ between calls on one study."""

    name: str = setting("local", "worker processes here, array jobs, or this process", group="launcher")
    slots: int = setting(0, "workers at a time; 0: one per GPU, or per group of cores", "workers", 0, 10_000)
    workers_per_gpu: int = setting(
        1, "workers on each GPU, while slots is 0", "workers", 1, 64, only=("local", "inline")
    )
    processes_per_run: int = setting(
        1,
        "that train one run together (DDP), each on its share of a batch's rows and on its own GPU or cores; "
        "changes a run by rounding",
        "processes",
        1,
        64,
    )
    nodes_per_run: int = setting(
        1, "of a job, each with as many of a run's processes; changes no number", "nodes", 1, 64, only=SLURM
    )
    checkpoint_every_s: float = setting(10.0, "time between checkpoints", **DURATION)
    max_lost: int = setting(2, "times a run may lose its worker before it is given up", low=0, high=100)
    heartbeat_s: float = setting(300.0, "time without a step after which a worker is killed", **PERIOD)
    start_s: float = setting(
        600.0, "time for a worker to import and build its first run, if longer than heartbeat_s", **PERIOD
    )
    run_timeout_s: float = setting(0.0, "time allowed for one attempt at a run; 0: any", **DURATION)
    join: bool = setting(
        False, "workers may join from other machines, with ebc-lab worker (docs/beyond.md)", only=("local",)
    )
    partition: str | None = setting(None, "Slurm partition", only=SLURM)
    account: str | None = setting(None, "Slurm account", only=SLURM)
    qos: str | None = setting(None, "Slurm quality of service", only=SLURM)
    constraint: str | None = setting(None, "Slurm node constraint", only=SLURM)
    timeout_min: int = setting(
        240, "time limit of a job; workers are requeued before", "min", 1, 525_600, only=SLURM
    )
    signal_delay_s: int = setting(
        90, "time before that limit to write a checkpoint", "s", 1, 86_400, only=SLURM
    )
    cpus_per_task: int = setting(
        0,
        "CPUs of a job, on each node; 0: threads_per_run, or 1, for each of processes_per_run there",
        "CPUs",
        low=0,
        only=SLURM,
        high=1024,
    )
    gpus_per_node: int | None = setting(
        None,
        "GPUs of a job, on each node; empty: one for each process under device=cuda, else none",
        "GPUs",
        only=SLURM,
        low=0,
        high=64,
    )
    mem_gb: float | None = setting(None, "memory of a job", "GB", only=SLURM, above=0, high=100_000)
    setup: list[str] = setting([], "shell lines before the worker starts: module load …", only=SLURM)
    sbatch: dict[str, Any] = setting({}, "further options of sbatch: {reservation: mine}", only=SLURM)
    srun_args: list[str] = setting([], "further arguments of srun", only=SLURM)
    queue_every_s: float = setting(
        10.0, "time between looks at the queue", "s", above=0, only=SLURM, high=86_400
    )
    idle_s: float = setting(120.0, "time without work after which a job ends", **DURATION, only=SLURM)


# settings of earlier versions -> what replaced them; a study that recorded one is read without it
GONE: dict[type, dict[str, str]] = {
    LauncherConfig: {
        "runs_per_worker": "a worker trains one run at a time; launcher.workers_per_gpu=2 has two on each GPU"
    }
}


@dataclass
class TrackerConfig:
    """Where runs are also shown while they train. A study does not record it."""

    names: list[str] = setting([], "trackers to use", choices=("tensorboard", "mlflow", "wandb", "trackio"))
    folder: str | None = setting(None, "what they write on this machine; empty: .trackers in the study")
    mlflow_uri: str | None = setting(
        None, "sqlite:///FILE, file:FOLDER or http://HOST:PORT; empty: a database in the folder"
    )
    wandb_mode: str = setting(
        "auto",
        "auto: WANDB_MODE, or without it online where you are logged in, else offline",
        choices=("auto", "online", "offline"),
    )
    wandb_project: str | None = setting(None, "W&B project; empty: WANDB_PROJECT, or ebc-lab")
    wait_s: float = setting(30.0, "time a tracker may take to finish after the last run", "s", 0, 86_400)


@dataclass
class Config(RunConfig):
    """A complete study: the run's settings, the stages' settings, and where and how to run them."""

    train_tokens: float | None = setting(
        None,
        "of `train`, in place of `steps`: rounded up to whole steps of batch_size·model.context tokens; "
        "tokens=2e6 means the same",
        **TOKENS,
    )
    scale: str = setting("laptop", "model size, lengths and grids, as one choice", group="scale")
    seeds: list[int] = setting([0, 1, 2], "of the finals and of suites", low=0, high=SEED, **CHOICES)
    mine: list[str] = setting(
        [],
        "of study=optimizers, stabilizers, schedules or calibrated: yours, each an arm (of calibrated a "
        "method): mine=./my_opt.py:Cautious, or mine=[./a.py:A,./b.py:B]",
        unique=True,
        most=20,
    )
    check: str = setting(
        "none",
        "of study=optimizers: whether its answer is asked once more where more is trained",
        group="check",
    )
    rivals: list[str] = setting(
        [], "of study=optimizers: further arms that it has by option: soap", unique=True
    )
    output_dir: str = setting("outputs/ebc_ablation", "folder of the studies")
    notify: str = setting(
        "", "a program and its arguments, run when the study has ended, failed or stalled (docs/running.md)"
    )
    own_files: dict[str, str] = setting(
        {}, "filled in: your suite, your own parts and what they import, which the study copies", most=500
    )
    answered_before: int = setting(
        0, "filled in: how many earlier answers rest on some of this study's seeds", low=0, high=1000
    )
    study: StudyConfig = field(default_factory=StudyConfig)
    lr_sweep: LRSweepConfig = field(default_factory=LRSweepConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    controller_search: ControllerSearchConfig = field(default_factory=ControllerSearchConfig)
    lr_scale: LRScaleConfig = field(default_factory=LRScaleConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    ladder: LadderConfig = field(default_factory=LadderConfig)
    circumstances: CircumstancesConfig = field(default_factory=CircumstancesConfig)
    carry: CarryConfig = field(default_factory=CarryConfig)
    profiles: ProfilesConfig = field(default_factory=ProfilesConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


@functools.cache
def tunable(key: str) -> Setting:
    """Return what values a key in an arm's grid takes: those in TUNABLE, or those of a part's setting."""
    if key in TUNABLE:
        return TUNABLE[key]
    group, _, name = key.partition(".")
    part: Any = PART.get(group)
    known = {field.name: field for field in dataclasses.fields(part)} if part else {}
    return setting_of(known[name]) if name in known else Setting()


STAGE_NEEDS: dict[str, tuple[str, ...]] = {
    name: kind.needs
    for name, kind in typing.get_type_hints(Config).items()
    if isinstance(kind, type) and issubclass(kind, StageConfig)
}
STAGES = tuple(STAGE_NEEDS)  # in the order in which a study runs them
