"""The schema of everything a user may set, and the identity that names a run.

`overrides.compose` fills it from the command line. `identity(run)` keeps exactly what can change a run's numbers.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from typing import Any, ClassVar

SPLITS = ("train", "val", "test")
NOT_THE_STUDY = ("launcher", "output_dir", "tracker")  # settings that may differ between calls on one study


@dataclass
class DataConfig:
    name: str = "auto"  # auto | shakespeare | pydoc | path
    file: str | None = None  # the text, for data=path
    sha256: str | None = None  # checksum of the text; filled when the study is resolved, then enforced


@dataclass
class ModelConfig:
    name: str = "gpt"
    blocks: int = 3
    width: int = 128  # d, features
    heads: int = 4
    context: int = 64  # T, tokens
    dropout: float = 0.0


@dataclass
class OptimizerConfig:
    name: str = "adam"
    lr: float = 4e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0  # SGD and Muon


@dataclass
class LRScheduleConfig:
    name: str = "constant"  # constant | warmup_linear | replay
    warmup_steps: int = 20
    source: str | None = (
        None  # replay: the run (its id, or its folder) whose recorded c·lr is this run's learning rate
    )
    sha256: str | None = (
        None  # of that record; filled for a single run, whose source is a folder that may change
    )


@dataclass
class ProjectionConfig:
    name: str = "none"  # none | spectral | stiefel
    bound: float = 2.0  # of spectral, times the largest initial singular value


@dataclass
class StabilizerConfig:
    name: str = "none"  # none | ebc | the rivals in conf/stabilizer
    strength: float | None = None  # a rival's own threshold; its meaning and unit stand in its file
    schedule: str = "constant"  # m(t), the square root of which scales the radius of trust_region


@dataclass
class BudgetConfig:
    name: str = "shadow"  # shadow | surrogate | fisher | calibrated
    target_kl: float = 0.01  # delta*, nats per token
    schedule: str = "constant"  # of delta*: constant | linear | cosine | lr_squared
    probe_sequences: int = 2  # rows that choose c
    probe_tokens: str = (
        "train"  # where those rows are from: train (the batch) | held (training text held back for it)
    )
    aggregate: str = "l1"  # l1 | sqrtl_l2 | l2 (l2 is not a bound)
    grouping: str = "block"  # block | tensor | type | matrices (the rest moves freely) | global
    guard: str = "none"  # of the surrogate: none | shrink | shrink_inflate
    probe: str = "jvp"  # how beta is measured: jvp | fd
    cadence: str = "warm"  # warm | published | dense | sweep
    beta_init: str = "first"  # first | zero (forensic)
    units: str = "logits"  # of S: logits | per_lr (forensic: the learning rate left out)
    measure_every: int = 1  # of shadow: one step in so many measures, the others go by what it found
    sensitivity_every: int = 0  # steps between recordings of S under shadow and fisher; 0 never


@dataclass
class ControllerConfig:
    name: str = "auto"  # auto | fixed | pi | log_pi | rsl | agreement | energy
    kp: float | None = None  # None: the kind's own gain
    ki: float | None = None
    a: float | None = None  # energy: nats of KL per nat of predicted decrease; a study takes the baseline's


@dataclass
class ShockConfig:
    """One disturbance at one step, to see how a run recovers."""

    name: str = "none"  # none | label_noise | lr_spike | corrupt_gradient
    step: int | None = None  # None: half-way
    size: float = 1.0  # share of wrong targets | factor on the learning rate | noise over the gradient's norm


@dataclass
class RunConfig:
    """All of one training run. Everything here, and nothing else, enters `identity`."""

    seed: int = 0
    steps: int = 600
    batch_size: int = 16  # B, sequences
    dtype: str = "auto"  # of the autocast: auto | float32 | bfloat16
    param_dtype: str = "float32"  # of the parameters: float32 | bfloat16 (forensic)
    device: str = "auto"  # auto | cpu | cuda
    threads_per_run: int = 0  # CPU threads; changes bits; 0: chosen by measurement
    compile: str = "auto"  # the training forward by torch.compile: auto | on | off; changes bits
    eval_every: int = 40  # steps between evaluations on the fixed windows
    eval_windows: int = 64
    evaluate: list[str] = field(default_factory=lambda: ["val", "test"])  # splits evaluated whole at the end
    final_windows: int = 0  # forensic: so many overlapping windows at the end instead of the whole splits
    audit_every: int = 10  # steps between measurements of the applied KL
    audit_tokens: int = 512
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    stabilizer: StabilizerConfig = field(default_factory=StabilizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    shock: ShockConfig = field(default_factory=ShockConfig)


@dataclass
class StudyConfig:
    name: str = "${scale}"
    stages: list[str] = field(default_factory=lambda: ["lr_sweep", "calibrate", "lr_scale", "finals"])
    stage_seed: int = 100  # of the stage runs; replicates follow it; the finals have seeds of their own
    band: list[float] = field(default_factory=lambda: [0.5, 0.7])  # where the median c should lie


@dataclass
class StageConfig:
    """The settings of a stage. The stages are the fields of `Config` of this type, in their order."""

    needs: ClassVar[tuple[str, ...]] = ()  # stages without which this one cannot be asked for
    steps: int = 200  # of each of its runs


@dataclass
class LRSweepConfig(StageConfig):
    optimizers: list[str] = field(default_factory=lambda: ["adam", "muon"])
    projections: list[str] = field(default_factory=lambda: ["none"])
    grids: dict[str, list[float]] = field(default_factory=dict)  # learning rates by optimizer
    max_extensions: int = 2  # of a grid whose winner lies on its edge, by a factor 2
    skip_threshold: float = 0.2  # a pair this much (relative) behind the best is triaged
    keep: str = "best"  # best | all: which (optimizer, projection) go on
    replicates: int = 3  # seeds of the winner: the noise sigma and the natural KL
    control_scales: list[float] = field(default_factory=lambda: [1.0, 2.0, 4.0])
    control_warmup: int = 20  # steps


@dataclass
class CalibrateConfig(StageConfig):
    needs = ("lr_sweep",)
    lr_scale: float = 2.0
    delta_grid: str = "natural"  # natural: multiples of the natural KL | published: 0.03, 0.05, 0.07
    multiples: list[float] = field(default_factory=lambda: [0.75, 1.0, 1.25, 1.5, 2.0])
    budgets: list[str] = field(default_factory=lambda: ["shadow"])
    max_extra: int = 3


@dataclass
class ControllerSearchConfig(StageConfig):
    needs = ("calibrate",)
    # name -> settings of a run (controller, budget …) that it changes
    candidates: dict[str, Any] = field(default_factory=dict)


@dataclass
class LRScaleConfig(StageConfig):
    needs = ("lr_sweep", "calibrate")
    scales: list[float] = field(default_factory=lambda: [1.0, 1.5, 2.0, 3.0, 4.0])


@dataclass
class FinalsConfig(StageConfig):
    needs = ("lr_scale",)
    steps: int = 600
    margin: float = 0.01  # nats: how much worse than the baseline still counts as no worse
    max_seeds: int = (
        0  # more seeds while the verdict's comparisons are undecided, up to so many; 0: `seeds` and no more
    )
    seeds_per_look: int = 2  # added at a time; the intervals are corrected for every look


@dataclass
class TuneConfig(StageConfig):
    """The ablation's arms that have a grid, each at its own best point of it."""

    needs = ("lr_sweep", "ablation")
    steps: int = 600


@dataclass
class ArmConfig:
    """One arm of an ablation: the best baseline with some settings changed."""

    about: str = ""  # what it is, in a few words
    settings: dict[str, Any] = field(default_factory=dict)  # of a run, e.g. {stabilizer: {name: agc}}
    lr_scale: float = 1.0  # times the best baseline learning rate
    delta: float | None = (
        None  # delta*: times the calibrated one, or the natural KL where nothing was calibrated
    )
    tune: dict[str, list[Any]] = field(
        default_factory=dict
    )  # grid over lr_scale, delta or strength, its own best taken
    replay: str | None = None  # an arm whose recorded c·lr this one replays without measuring anything
    replay_seed: str = "own"  # own: the record of the same seed | next: of the next one
    matched: str | None = (
        None  # an arm whose clip rate the strength matches: the gradient norm that as many of its steps exceed
    )
    versus: str | None = None  # the arm it is paired with, instead of the suite's reference


@dataclass
class AblationConfig(StageConfig):
    """Named arms over `seeds`, each compared with one of them, paired by seed."""

    needs = ("lr_sweep",)
    question: str = ""  # what the suite asks, in a sentence
    steps: int = 600
    reference: str = ""  # the arm that every other is paired with
    arms: dict[str, ArmConfig] = field(default_factory=dict)
    shocks: list[str] = field(
        default_factory=list
    )  # each arm also under each of these, paired with its undisturbed runs

    def all_arms(self) -> dict[str, ArmConfig]:
        """The arms, and after each its shocked versions, `<arm>_<shock>`."""
        out: dict[str, ArmConfig] = {}
        for name, arm in self.arms.items():
            out[name] = arm
            for shock in self.shocks:
                shocked = {**arm.settings, "shock": {"name": shock}}
                about = f"{arm.about or name}, {shock.replace('_', ' ')}"
                out[f"{name}_{shock}"] = dataclasses.replace(arm, about=about, settings=shocked, versus=name)
        return out


@dataclass
class LauncherConfig:
    name: str = "local"  # local: worker processes here | slurm: array jobs | inline: this process
    slots: int = 0  # workers at a time; 0: one per GPU, or per core group
    workers_per_gpu: int = 1  # of launcher=local, while slots is 0
    runs_per_worker: int = (
        0  # runs that one worker carries in turn, on a GPU as streams; 0: measured on a GPU, 1 on a CPU
    )
    checkpoint_every_s: float = 10.0  # seconds
    max_lost: int = 2  # times a run may lose its worker before it is given up
    heartbeat_s: float = 300.0  # seconds without a step after which a worker counts as hung, and is killed
    run_timeout_s: float = 0.0  # seconds that one attempt at a run may take; 0: any
    # launcher=slurm: what each job asks for
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    timeout_min: int = 240  # minutes; a worker is requeued before they are over
    signal_delay_s: int = 90  # seconds before the end at which it writes its checkpoint
    cpus_per_task: int = 0  # 0: threads_per_run, or 1
    gpus_per_node: int | None = None  # None: one under device=cuda, else none
    mem_gb: float | None = None
    setup: list[str] = field(default_factory=list)  # shell lines before the worker starts: module load …
    sbatch: dict[str, Any] = field(
        default_factory=dict
    )  # any other option of sbatch, e.g. {reservation: mine}
    srun_args: list[str] = field(default_factory=list)
    queue_every_s: float = 10.0  # seconds between two looks at the queue
    idle_s: float = 120.0  # seconds without work after which a job gives its GPU back


@dataclass
class TrackerConfig:
    """Where runs are also shown while they go on; no part of a study, and of what it records."""

    names: list[str] = field(default_factory=list)  # tensorboard | mlflow
    folder: str | None = None  # for event files and MLflow's database; None: .trackers in the study's folder
    mlflow_uri: str | None = (
        None  # sqlite:///FILE | file:FOLDER | http://HOST:PORT; None: a database in the folder
    )
    wait_s: float = 30.0  # seconds that a tracker may take, after the last run, to show what is left


@dataclass
class Config(RunConfig):
    """A whole study: the run's settings, the stages' settings, and where and how to run them."""

    scale: str = "laptop"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    output_dir: str = "outputs/ebc_ablation"
    study: StudyConfig = field(default_factory=StudyConfig)
    lr_sweep: LRSweepConfig = field(default_factory=LRSweepConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    controller_search: ControllerSearchConfig = field(default_factory=ControllerSearchConfig)
    lr_scale: LRScaleConfig = field(default_factory=LRScaleConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


STAGE_NEEDS: dict[str, tuple[str, ...]] = {
    name: kind.needs
    for name, kind in typing.get_type_hints(Config).items()
    if isinstance(kind, type) and issubclass(kind, StageConfig)
}
STAGES = tuple(STAGE_NEEDS)  # in their order
