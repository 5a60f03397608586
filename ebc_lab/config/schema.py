"""Every setting: its default, what it means, its unit, and which values it takes.

`compose` fills these dataclasses from the command line; docs/settings.md is printed from them.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ebc_lab.ebc import options

from .fields import Setting, number, setting
from .machine import INSTRUCTIONS

SPLITS = ("train", "val", "test")
# settings that may differ between calls on one study
NOT_THE_STUDY = ("launcher", "output_dir", "tracker", "own_files")
LR_SHAPES = ("constant", "warmup_linear", "cosine", "trapezoid", "inverse_sqrt")  # schedules without a record
CUSTOM = "custom"  # the choice of those groups that have a `target`

# Limits that several settings share: far beyond any real study, and near enough that a slip of the keyboard
# is refused at once instead of planned for minutes.
STEPS = 10**8  # a run of a day at a thousand steps a second
TOKENS = 10**15  # to train on
SEED = 10**9  # every generator of random numbers takes it
LR: dict[str, Any] = {
    "low": 1e-12,
    "high": 1e6,
}  # what doubles or halves from there on stays a number above 0
MULTIPLE: dict[str, Any] = {
    "low": 1e-4,
    "high": 1e4,
}  # of a measured best value; smaller ones have no name of an arm
EXTENSIONS = 20  # times a grid may double: a million-fold
SEEDS = 100  # of one stage
GRID: dict[str, Any] = {"low": 1e-9, "high": 1e9, "increasing": True}
TUNABLE: dict[str, Setting] = {  # what an arm's grid may hold, and its values
    "lr": Setting("learning rate, absolute", **LR, increasing=True),
    "lr_scale": Setting("learning rate", "× the best lr", **GRID),
    "delta": Setting("δ*", "× the calibrated one", **GRID),
    "strength": Setting("of a rival", **GRID),
    "warmup_share": Setting("warm-up", "× steps", low=0, below=1, unique=True),
    "schedule": Setting("shape of the learning rate", choices=LR_SHAPES, unique=True),
}
GROWING = ("lr", "lr_scale", "delta", "strength")  # of these: a grid grows where its best point is on an edge
CAPABILITIES = tuple(INSTRUCTIONS)
SECONDS = 10**7  # four months


@dataclass
class DataConfig:
    """The text that models are trained on."""

    name: str = setting("auto", "which text; auto: tiny Shakespeare, or Python's documentation", group="data")
    file: str | None = setting(None, "the text, UTF-8", only=("path",))
    sha256: str | None = setting(
        None, "checksum of the text; filled in when a study is resolved, then enforced"
    )


@dataclass
class ModelConfig:
    """The model."""

    name: str = setting("gpt", "which model", group="model")
    blocks: int = setting(3, "transformer blocks", low=1, high=256)
    width: int = setting(128, "size of a token's vector; a multiple of heads", "features", low=1, high=65536)
    heads: int = setting(4, "attention heads", low=1, high=1024)
    context: int = setting(64, "length of a sequence, T", "tokens", low=1, high=131072)
    dropout: float = setting(0.0, "dropout probability", low=0, below=1)
    target: str | None = setting(
        None, "of custom: module:function, which makes the model (docs/extending.md)", only=(CUSTOM,)
    )
    arguments: dict[str, Any] = setting({}, "of custom: what the function is also given", only=(CUSTOM,))
    sha256: str | None = setting(
        None, "of custom: checksum of the module's file; filled in, then enforced", only=(CUSTOM,)
    )


AXIOM = ("axiom",)


@dataclass
class OptimizerConfig:
    """The base optimizer; each has its own defaults in conf/optimizer and reads only the settings it has."""

    name: str = setting("adam", "which optimizer", group="optimizer")
    lr: float = setting(4e-3, "learning rate at its peak", **LR)
    beta1: float = setting(0.9, "decay of the first moment", low=0, below=1)
    beta2: float = setting(0.999, "decay of the second moment", low=0, below=1)
    eps: float = setting(1e-8, "added to the denominator", low=0, high=1)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0, high=100)
    momentum: float = setting(0.0, "of SGD and Muon", low=0, high=1)
    rank: int = setting(
        0,
        "of AXIOM's momentum, 0: none; of GaLore's gradients",
        low=0,
        high=65536,
        only=("axiom", "galore"),
    )
    relative: bool = setting(False, "lr in units of each tensor's own rms", only=AXIOM)
    momentum_weight: float = setting(
        0.5, "with rank > 0: of the momentum beside the gradient", low=0, high=1000, only=AXIOM
    )
    streak_boost: float = setting(
        1.0,
        "with rank > 0: how many times as far a tensor moves whose gradient agrees with its momentum; 1: off",
        low=1,
        high=1000,
        only=AXIOM,
    )
    snr_floor: float = setting(
        0.5,
        "with rank > 0: least factor on rows whose momentum is weak; 1: off",
        low=0,
        high=1,
        only=AXIOM,
    )
    target: str | None = setting(
        None, "of custom: module:function, which makes the optimizer (docs/extending.md)", only=(CUSTOM,)
    )
    arguments: dict[str, Any] = setting({}, "of custom: what the function is also given", only=(CUSTOM,))
    sha256: str | None = setting(
        None, "of custom: checksum of the module's file; filled in, then enforced", only=(CUSTOM,)
    )


@dataclass
class LRScheduleConfig:
    """How the learning rate changes during a run."""

    name: str = setting("constant", "which schedule", group="lr_schedule")
    warmup_steps: int = setting(
        20, "steps of linear warm-up; constant and replay have none", "steps", low=0, high=STEPS
    )
    warmup_share: float | None = setting(
        None, "warm-up as a share of the run, instead of warmup_steps", low=0, below=1
    )
    decay_share: float = setting(0.4, "of trapezoid: the share of the run that decays", above=0, high=1)
    source: str | None = setting(
        None, "of replay: folder, or in a study id, of the run whose recorded c·lr is replayed"
    )
    target: str | None = setting(
        None,
        "of custom: module:function, which gives the factor on the peak (docs/extending.md)",
        only=(CUSTOM,),
    )
    arguments: dict[str, Any] = setting({}, "of custom: what the function is also given", only=(CUSTOM,))
    sha256: str | None = setting(
        None,
        "of replay: checksum of that record, filled in for a single run; of custom: of the module's file; "
        "filled in, then enforced",
    )


@dataclass
class ProjectionConfig:
    """A constraint on weight matrices, restored after each step."""

    name: str = setting("none", "which constraint", group="projection")
    bound: float = setting(2.0, "of spectral", "× the largest initial singular value", above=0, high=1e6)


@dataclass
class StabilizerConfig:
    """What acts between backward and the update: EBC, one of its rivals, or nothing."""

    name: str = setting("none", "which stabilizer", group="stabilizer")
    strength: float | None = setting(
        None, "a rival's threshold; its file says in which unit", above=0, high=1e9
    )
    schedule: str = setting("constant", "of trust_region: of the squared radius", choices=options.SCHEDULES)
    per: str = setting(
        "all",
        "of trust_region: one radius for the whole update, or a share of it for each group of "
        "budget.grouping",
        choices=("all", "group"),
        only=("trust_region",),
    )
    norm: str = setting(
        "latent",
        "of trust_region: of the weights that the optimizer moves, or of the quantized ones that the "
        "forward uses",
        choices=("latent", "effective"),
        only=("trust_region",),
    )
    target: str | None = setting(
        None, "of custom: module:function, which wraps the optimizers (docs/extending.md)", only=(CUSTOM,)
    )
    arguments: dict[str, Any] = setting({}, "of custom: what the function is also given", only=(CUSTOM,))
    sha256: str | None = setting(
        None, "of custom: checksum of the module's file; filled in, then enforced", only=(CUSTOM,)
    )


@dataclass
class BudgetConfig:
    """EBC's budget of predicted change, and how the clip coefficient c is found."""

    name: str = setting("tracked", "how c is found", group="budget")
    target_kl: float = setting(0.01, "δ*, the target KL of a step", "nats/token", above=0, high=100)
    schedule: str = setting("constant", "of δ* over the run", choices=options.SCHEDULES)
    probe_sequences: int = setting(2, "sequences that choose c; the rest is for the audit", low=1, high=65536)
    probe_tokens: str = setting(
        "train", "where these come from: the batch, or training text held back", choices=("train", "held")
    )
    aggregate: str = setting(
        "l1", "how contributions add up to S; l2 gives no bound", choices=options.AGGREGATES
    )
    grouping: str = setting(
        "block",
        "parameters that share one β; matrices: all others move freely; kmeans: tensors alike in size, "
        "shape, weights and depth",
        choices=(*options.GROUPINGS, "kmeans"),
    )
    clusters: int = setting(6, "of grouping=kmeans: number of groups", "groups", low=1, high=1000)
    guard: str = setting(
        "none", "corrects the radius τ after audits", choices=options.GUARDS, only=("surrogate",)
    )
    probe: str = setting("jvp", "how β is measured", choices=options.PROBES)
    cadence: str = setting("warm", "when β is measured (docs/method.md)", choices=options.FORENSIC_CADENCES)
    beta_init: str = setting("first", "forensic: initial β", choices=options.BETA_INITS)
    units: str = setting(
        "logits", "forensic: unit of S; per_lr leaves the learning rate out", choices=options.UNITS
    )
    until: float = setting(
        1.0, "EBC acts until then; from there on every update is applied in full", "× steps", above=0, high=1
    )
    exponent: str = setting(
        "square",
        "of shadow: KL grows as c², or as a power of c measured at audits, as on a quantized model",
        choices=options.EXPONENTS,
        only=("shadow",),
    )
    measure_every: int = setting(
        1, "of shadow and tracked: steps between measurements", "steps", low=1, high=STEPS
    )
    sensitivity_every: int = setting(
        0,
        "of shadow, tracked and fisher: steps between recordings of S; 0: never",
        "steps",
        low=0,
        high=STEPS,
    )


@dataclass
class ControllerConfig:
    """How the current budget δ follows δ*. An empty gain is the controller's own default."""

    name: str = setting("auto", "auto: log_pi for surrogate, else fixed", group="controller")
    kp: float | None = setting(None, "proportional gain", low=0, only=("pi", "log_pi"), high=100)
    ki: float | None = setting(None, "integral gain", low=0, only=("pi", "log_pi"), high=100)
    a: float | None = setting(
        None,
        "KL per predicted decrease of the loss; a study takes the baseline's",
        "nats/nat",
        low=0,
        only=("energy",),
        high=1e6,
    )


@dataclass
class QuantizerConfig:
    """Low-bit training: hidden matrices, their gradients and the optimizer's state in few levels
    (docs/lowbit.md)."""

    name: str = setting("none", "levels of the hidden matrices in the forward", group="quantizer")
    group: str = setting("tensor", "weights that share a step: tensor, row, or so many neighbours in a row")
    scale: str = setting("absmean", "a group's step: absmean, absmax, or a number")
    gradients: str = setting(
        "none", "levels of the hidden matrices' gradients", choices=("none", "ternary", "five")
    )
    rounding: str = setting("nearest", "of the gradients", choices=("nearest", "stochastic"))
    error_feedback: bool = setting(
        False, "what rounding took from a gradient is added to the next step's gradient"
    )
    state: str = setting(
        "none",
        "levels of Adam's moments of the hidden matrices; int8_linear: forensic",
        choices=("none", "int8", "int8_linear", "ternary", "five"),
    )


@dataclass
class MemoryConfig:
    """What a step keeps beside the weights (docs/axiom.md)."""

    name: str = setting("none", "gradients, or activations, or both in little memory", group="memory")
    hooks: bool = setting(False, "the update is made inside backward, tensor by tensor; of optimizer=axiom")
    activations: str = setting(
        "none", "activations kept for backward: as they are, or in 4 bits", choices=("none", "int4")
    )
    seed: int = setting(0, "of their stochastic rounding, beside the run's", low=0, high=SEED)


VERITY = ("verity",)


@dataclass
class DeterminismConfig:
    """On what a run's bits may depend beside its settings (docs/verity.md)."""

    name: str = setting(
        "none",
        "on the machine; torch: its deterministic kernels, on one machine; verity: exact sums, on none",
        group="determinism",
    )
    engine: str = setting(
        "auto",
        "what computes; changes no bit; auto: c where it can be built",
        choices=("auto", "eager", "c"),
        only=VERITY,
    )
    micro_batches: int = setting(
        1,
        "parts of a batch that go forward and backward one after another; changes no bit",
        "parts",
        low=1,
        high=65536,
        only=VERITY,
    )

    @property
    def exact(self) -> bool:
        """Whether every sum of the run is exact, or made in a written order."""
        return self.name == "verity"


@dataclass
class PartitionConfig:
    """From which parts of the training text a batch is drawn (docs/lowbit.md)."""

    name: str = setting(
        "uniform", "anywhere; all rows from one cluster of windows; or spread over all", group="partition"
    )
    clusters: int = setting(
        8, "clusters of windows; 0: as the silhouette suggests", "clusters", low=0, high=1000
    )


@dataclass
class PolicyConfig:
    """What multiplies the learning rate and the trust radius from step to step (docs/lowbit.md)."""

    name: str = setting("constant", "nothing; random factors; or a small network that learns", group="policy")


@dataclass
class ShockConfig:
    """One disturbance at one step, to see how a run recovers."""

    name: str = setting("none", "which disturbance", group="shock")
    step: int | None = setting(None, "when, counted from 0; empty: half-way", "step", low=0, high=STEPS)
    size: float = setting(
        1.0, "share of wrong targets, factor on lr, or noise over the gradient's norm", above=0, high=1e6
    )


@dataclass
class WorkloadConfig:
    """What is trained: a GPT, or an energy-based language model on the sphere (docs/ebm.md)."""

    name: str = setting("gpt", "which workload", group="workload")


@dataclass
class TokensConfig:
    """What a text is cut into."""

    name: str = setting("characters", "its characters, byte pairs, or GPT-2's tokens", group="tokens")
    size: int = setting(512, "of bpe: tokens in the vocabulary", "tokens", low=257, high=65536, only=("bpe",))
    folder: str | None = setting(None, "of gpt2: a local folder with its tokenizer", only=("gpt2",))
    sha256: str | None = setting(
        None, "checksum of the tokenizer; filled in when a run is resolved, then enforced"
    )


@dataclass
class EncoderConfig:
    """Of workload=ebm: how the state of a token's context is made."""

    name: str = setting("window", "a mix of the last tokens, or transformer blocks", group="encoder")


@dataclass
class DecoderConfig:
    """Of workload=ebm: how a settled state becomes logits."""

    name: str = setting("moe", "a mixture of experts, or transformer blocks", group="decoder")
    experts: int = setting(4, "experts", low=1, high=64, only=("moe",))
    active: int = setting(2, "experts that see a token", low=1, high=64, only=("moe",))
    hidden_scale: float = setting(1.0, "size of an expert", "× ebm.hidden", above=0, high=16, only=("moe",))


@dataclass
class IndexConfig:
    """Of workload=ebm: how a state's nearest splats are found."""

    name: str = setting("auto", "auto: exact up to 16,384 splats or on a GPU, else hnsw", group="index")
    rebuild_every: int = setting(
        200, "of hnsw and ivf: steps until it is built anew", "steps", low=1, high=STEPS
    )


@dataclass
class SamplerConfig:
    """Of workload=ebm: the Langevin dynamics that draw a latent."""

    name: str = setting(
        "baoab", "as it is, Metropolis-adjusted, or with the original program's settings", group="sampler"
    )
    steps: int = setting(20, "of a chain", "steps", low=0, high=100_000)
    step: float = setting(0.25, "time step", "of the fastest oscillation's 1/ω", above=0, below=2)
    friction: float = setting(1.0, "friction", "ω", above=0, high=1000)
    temperature: float = setting(1.0, "temperature; 0: settle only", "nats", low=0, high=1000)


@dataclass
class EbmConfig:
    """Of workload=ebm: sizes, losses and what happens to the splats (docs/ebm.md)."""

    name: str = setting("laptop", "sizes; by default those of `scale`", group="ebm")
    n: int = setting(64, "dimension of the space around the sphere", "features", low=2, high=16384)
    splats: int = setting(
        1000,
        "splats at the most; one for 20 training tokens; 0: none",
        "splats",
        low=0,
        high=10**6,
    )
    neighbours: int = setting(16, "splats that act on a state, K", "splats", low=1, high=1024)
    hidden: int = setting(192, "hidden size of an expert", "features", low=1, high=65536)
    window: int = setting(8, "tokens that encoder=window mixes", "tokens", low=1, high=1024)
    embeddings: str = setting(
        "cooccurrence",
        "initial: from counts of neighbours, or GPT-2's",
        choices=("cooccurrence", "gpt2"),
    )
    gpt2: str | None = setting(None, "of embeddings=gpt2: a local folder with its weights")
    kappa_min: float = setting(1.0, "least concentration", "per degree of freedom", above=0, high=1e6)
    kappa_max: float = setting(50.0, "largest concentration", "per degree of freedom", above=0, high=1e6)
    adapt: str = setting("statistics", "what moves α and κ", choices=("statistics", "gradient"))
    mle: float = setting(1.0, "weight of the splats' likelihood of the states", low=0, high=1e6)
    score: float = setting(0.1, "weight of denoising score matching", low=0, high=1e6)
    noised: float = setting(0.25, "weight of the cross-entropy from noised states", low=0, high=1e6)
    balance: float = setting(0.01, "weight of the balance of the experts", low=0, high=1e6)
    z: float = setting(0.001, "weight of the squared log-partition of their router", low=0, high=1e6)
    noise: str = setting("vmf", "kernel of the noise", choices=("vmf", "geodesic"))
    levels: list[float] = setting(
        [0.01, 0.05, 0.1, 0.2, 0.5],
        "noise levels: rms angles",
        "radians",
        above=0,
        below=math.pi / 2,
        least=1,
        most=16,
        increasing=True,
    )
    states: int = setting(64, "states a step that are noised, at each level", "states", low=1, high=10**6)
    revive: bool = setting(True, "splats that win nothing move to states far from all")
    revive_every: int = setting(50, "steps between such looks, beside those at 10 and 20", low=1, high=STEPS)
    soc: bool = setting(True, "splats whose states lie too far out topple and split (docs/ebm.md)")
    soc_every: int = setting(50, "steps between such looks", "steps", low=1, high=STEPS)
    soc_threshold: float = setting(2.0, "stress from which a splat topples", above=0, high=1e9)
    soc_conserved: float = setting(0.8, "share of it that its neighbours get", low=0, below=1)
    temperature: list[float] = setting(
        [1.0, 1.0, 1.0], "divides κ, in each third of the run", above=0, high=1000, least=3, most=3
    )
    keep_every: int = setting(
        0, "steps between kept models (at evaluations); 0: the last", "steps", low=0, high=STEPS
    )


@dataclass
class RunConfig:
    """All of one training run. Everything here, and nothing else, enters `identity`."""

    seed: int = setting(0, "of the initial weights and the data order", low=0, high=SEED)
    steps: int = setting(600, "length of the run", "steps", low=1, high=STEPS)
    batch_size: int = setting(16, "sequences in a batch, B", "sequences", low=1, high=65536)
    accumulate: int = setting(
        1, "parts of a batch that go forward and backward one after another", "parts", low=1, high=65536
    )
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
    )
    compile: str = setting(
        "auto", "torch.compile of the training forward; changes bits", choices=("auto", "on", "off")
    )
    eval_every: int = setting(
        40, "steps between evaluations on the fixed windows", "steps", low=1, high=STEPS
    )
    eval_windows: int = setting(64, "number of these windows", "windows", low=1, high=10**6)
    evaluate: list[str] = setting(
        ["val", "test"], "splits evaluated completely at the end", choices=SPLITS[1:]
    )
    final_windows: int = setting(
        0, "forensic: overlapping windows at the end, not complete splits", "windows", low=0, high=10**6
    )
    audit_every: int = setting(20, "steps between measurements of the applied KL", "steps", low=1, high=STEPS)
    audit_tokens: int = setting(512, "on how many tokens it is measured", "tokens", low=1, high=10**8)
    curve_every: int = setting(
        0,
        "steps between measurements of the KL at six shares c of the proposed update; 0: never",
        "steps",
        low=0,
        high=STEPS,
    )
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    lr_schedule: LRScheduleConfig = field(default_factory=LRScheduleConfig)
    projection: ProjectionConfig = field(default_factory=ProjectionConfig)
    stabilizer: StabilizerConfig = field(default_factory=StabilizerConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    controller: ControllerConfig = field(default_factory=ControllerConfig)
    shock: ShockConfig = field(default_factory=ShockConfig)
    quantizer: QuantizerConfig = field(default_factory=QuantizerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    determinism: DeterminismConfig = field(default_factory=DeterminismConfig)
    partition: PartitionConfig = field(default_factory=PartitionConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    ebm: EbmConfig = field(default_factory=EbmConfig)


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


@dataclass
class StageConfig:
    """The settings of a stage. The stages are the fields of `Config` of this type, in their order."""

    needs: ClassVar[tuple[str, ...]] = ()  # stages without which this one cannot be asked for
    steps: int = setting(200, "length of each of its runs", "steps", low=1, high=STEPS)


@dataclass
class LRSweepConfig(StageConfig):
    """The best learning rate of each optimizer and projection without EBC."""

    optimizers: list[str] = setting(
        ["adam", "muon"], "which optimizers", group="optimizer", least=1, unique=True
    )
    projections: list[str] = setting(
        ["none"], "each combined with every optimizer", group="projection", least=1, unique=True
    )
    grids: dict[str, list[float]] = setting({}, "optimizer → learning rates to try", increasing=True, **LR)
    max_extensions: int = setting(
        2, "how often a grid grows, ×2, when the winner lies on its edge", low=0, high=EXTENSIONS
    )
    skip_threshold: float = setting(
        0.2, "a pair whose loss is this much above the best, relatively, is dropped", above=0, high=1e6
    )
    keep: str = setting("best", "which pairs of optimizer and projection go on", choices=("best", "all"))
    warmup: float = setting(
        1 / 6,
        "warm-up of these runs, where their schedule has one; < 1: share of the run",
        "steps",
        low=0,
        high=STEPS,
    )
    long_steps: int = setting(
        600, "length of the runs that tune the baseline and the fair control", "steps", low=1, high=STEPS
    )
    baseline_scales: list[float] = setting(
        [0.25, 0.5],
        "constant learning rates to try; the best is the baseline's, and the unit of all scales",
        "× the grid's best",
        least=1,
        increasing=True,
        **MULTIPLE,
    )
    replicates: int = setting(
        3, "seeds of the baseline, for the noise σ and the natural KL", "runs", low=2, high=SEEDS
    )
    control_shapes: list[str] = setting(
        ["trapezoid", "warmup_linear"],
        "schedules of the fair control; its search starts from the first",
        choices=LR_SHAPES,
        least=1,
        unique=True,
    )
    control_warmups: list[float] = setting(
        [1 / 6, 20.0, 1 / 3],
        "its warm-ups, likewise; < 1: share of the run",
        "steps",
        low=0,
        least=1,
        high=STEPS,
    )
    control_scales: list[float] = setting(
        [1.0, 2.0], "its peaks", "× the grid's best", least=1, increasing=True, **MULTIPLE
    )
    control_extensions: int = setting(
        2, "how often these grow, ×2, when the best lies on their edge", low=0, high=EXTENSIONS
    )


@dataclass
class CalibrateConfig(StageConfig):
    """The δ* with the lowest loss, or the one at which the median c lies in the band."""

    needs = ("lr_sweep",)
    steps: int = setting(
        600, "length of each of its runs; the best δ* depends on it", "steps", low=1, high=STEPS
    )
    lr_scale: float = setting(8.0, "learning rate of its runs", "× the best lr", **MULTIPLE)
    choose: str = setting("loss", "δ* by validation loss, or by the band", choices=("loss", "band"))
    seeds: int = setting(1, "runs of each δ*, whose mean loss counts", "runs", low=1, high=SEEDS)
    delta_grid: str = setting(
        "natural", "multiples of the natural KL, or 0.03, 0.05, 0.07", choices=("natural", "published")
    )
    multiples: list[float] = setting(
        [0.8, 1.0, 1.25, 1.6, 2.0], "δ* to try", "× the natural KL", least=1, increasing=True, **MULTIPLE
    )
    budgets: list[str] = setting(["tracked"], "budgets to calibrate", group="budget", least=1, unique=True)
    max_extra: int = setting(
        3, "further δ* tried where the best lies on an edge, or none reaches the band", low=0, high=EXTENSIONS
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
    steps: int = setting(600, "length of each of its runs", "steps", low=1, high=STEPS)
    scales: list[float] = setting(
        [1.0, 2.0, 4.0, 8.0, 16.0],
        "learning rates to try",
        "× the best lr",
        least=1,
        increasing=True,
        **MULTIPLE,
    )


@dataclass
class FinalsConfig(StageConfig):
    """The arms at full length over `seeds`, judged on the test split."""

    needs = ("lr_scale",)
    steps: int = setting(600, "length of each of its runs", "steps", low=1, high=STEPS)
    arms: list[str] = setting(
        ["baseline", "control", "ebc_x2", "ebc_x8", "control_x2", "control_x8"],
        "which arms (docs/stages.md)",
        least=1,
        unique=True,
    )
    margin: float = setting(
        0.01, "how much worse than the baseline still meets the target", "nats", low=0, high=100
    )
    window_margin: float = setting(
        0.02, "how much worse EBC may be at the highest rate than at the lowest", "nats", low=0, high=100
    )
    max_seeds: int = setting(
        0,
        "seeds are added up to this number while the verdict is undecided; 0: none",
        "seeds",
        low=0,
        high=SEEDS,
    )
    seeds_per_look: int = setting(
        2, "seeds added at a time; intervals are corrected for each look", "seeds", low=1, high=SEEDS
    )


@dataclass
class TuneConfig(StageConfig):
    """The suite's arms that have a grid, each at its own best point of it."""

    needs = ("lr_sweep", "ablation")
    steps: int = setting(600, "length of each of its runs", "steps", low=1, high=STEPS)
    seeds: int = setting(
        2, "seeds of each point, from study.stage_seed on; the worst loss decides", "runs", low=1, high=SEEDS
    )
    max_extensions: int = setting(
        2, "how often a grid grows, by its own ratio, when the best lies on its edge", low=0, high=EXTENSIONS
    )
    search: str = setting(
        "grid",
        "every combination; or one setting after the other: the rate at the first warm-up and shape, these, "
        "and the rates next to the best once more where they changed",
        choices=("grid", "coordinate"),
    )
    window: bool = setting(
        False,
        "a grid of lr then grows both ways, max_extensions times at most, until the losses at its ends are "
        "0.05 nats above the best",
    )


@dataclass
class ArmConfig:
    """One arm of a suite: the best baseline with some settings changed."""

    about: str = setting("", "what it is, in a few words")
    settings: dict[str, Any] = setting({}, "settings of a run that it changes: {stabilizer: {name: agc}}")
    lr_scale: float = setting(1.0, "learning rate", "× the best lr", **MULTIPLE)
    delta: float | None = setting(
        None, "δ*", "× the calibrated one, or the natural KL without calibration", **MULTIPLE
    )
    steps: float = setting(1.0, "length", "× the suite's", **MULTIPLE)
    batch_scale: float = setting(1.0, "batch_size", "× the study's", **MULTIPLE)
    width_scale: float = setting(1.0, "model.width", "× the study's", **MULTIPLE)
    control: bool = setting(
        False, "on the fair control's learning-rate schedule; lr_scale counts from the control's rate"
    )
    tune: dict[str, list[Any]] = setting(
        {},
        "grids whose best point is taken: lr in absolute numbers (lr_scale multiplies it), or lr_scale; "
        "delta, strength, warmup_share, and schedule, the names of shapes",
        keys=tuple(TUNABLE),
        least=1,
    )
    tuned_as: str | None = setting(None, "an arm whose best point this one takes")
    replay: str | None = setting(None, "an arm whose recorded c·lr this one replays without measuring")
    replay_seed: str = setting(
        "own", "replay the record of the same or the next seed", choices=("own", "next")
    )
    matched: str | None = setting(None, "an arm whose clip rate the strength of norm_clip is to reproduce")
    versus: str | None = setting(None, "the arm it is paired with; empty: the suite's reference")


@dataclass(frozen=True)
class Swept:
    """A point of a sweep: of which arm, over which setting, how its name ends, and the value there."""

    arm: str
    key: str  # lr_scale | delta
    tail: str
    value: float


@dataclass
class MineConfig:
    """Of a suite: what `mine=./my_opt.py:Cautious` makes an arm of, and the arms that its answer is about."""

    group: str = setting(
        "",
        "what mine= names; empty: this suite takes none",
        choices=("", "optimizer", "stabilizer", "lr_schedule"),
    )
    template: ArmConfig = field(default_factory=ArmConfig)
    arms: list[str] = setting([], "arms that are compared with every other; those of mine= join", unique=True)


@dataclass
class AblationConfig(StageConfig):
    """A suite: named arms over `seeds`, each compared with one of them, paired by seed (docs/suites.md)."""

    needs = ("lr_sweep",)
    question: str = setting("", "what the suite asks, in a sentence")
    steps: int = setting(600, "length of each of its runs", "steps", low=1, high=STEPS)
    reference: str = setting("", "the arm that every other is paired with")
    arms: dict[str, ArmConfig] = setting({}, "name → arm", most=500)
    mine: MineConfig = field(default_factory=MineConfig)
    step_cost: bool = setting(
        False, "the time of each arm's step is measured, in turns with that of torch's Adam"
    )
    shocks: list[str] = setting(
        [], "each arm also runs under each of these, paired with itself undisturbed", group="shock"
    )
    lr_scales: list[float] = setting(
        [], "each arm runs at each of these instead of its own lr_scale", increasing=True, **MULTIPLE
    )
    deltas: list[float] = setting(
        [], "each arm with EBC runs at each of these, too, as its delta", increasing=True, **MULTIPLE
    )

    def swept(self) -> dict[str, Swept]:
        """The points of the sweeps, `<arm>_x<lr_scale>` and `<arm>_d<delta>`."""
        out: dict[str, Swept] = {}
        for name, arm in self.arms.items():
            stabilizer = arm.settings.get("stabilizer")
            ebc = isinstance(stabilizer, dict) and stabilizer.get("name") == "ebc"
            points = [Swept(name, "lr_scale", f"_x{number(x)}", x) for x in self.lr_scales]
            points += [Swept(name, "delta", f"_d{number(x)}", x) for x in self.deltas if ebc]
            out |= {name + point.tail: point for point in points}
        return out

    def all_arms(self) -> dict[str, ArmConfig]:
        """The arms, one for each point of those that are swept, and after each its shocked versions,
        `<arm>_<shock>`."""
        swept = self.swept()
        out: dict[str, ArmConfig] = {}
        of_arm: dict[str, list[str]] = {}
        for label, point in swept.items():
            of_arm.setdefault(point.arm, []).append(label)
        for name in self.arms:
            for label in of_arm.get(name, [name]):
                arm = self._at(swept[label], swept) if label in swept else self.arms[name]
                out[label] = arm
                out |= {f"{label}_{shock}": _shocked(label, arm, shock) for shock in self.shocks}
        return out

    def _at(self, point: Swept, swept: Mapping[str, Swept]) -> ArmConfig:
        """The arm at a point of its sweep, compared with the same point of the arm that it is compared
        with, or with the reference where that has no such point."""
        arm = self.arms[point.arm]
        versus = arm.versus
        if versus in self.arms:
            versus = versus + point.tail if versus + point.tail in swept else None
        said = {"lr_scale": "at LR ×{:g}", "delta": "from δ* ×{:g}"}[point.key].format(point.value)
        about = f"{arm.about or point.arm}, {said}"
        at: dict[str, Any] = {point.key: point.value}
        return dataclasses.replace(arm, about=about, versus=versus, **at)


def _shocked(label: str, arm: ArmConfig, shock: str) -> ArmConfig:
    about = f"{arm.about or label}, {shock.replace('_', ' ')}"
    return dataclasses.replace(
        arm, about=about, settings={**arm.settings, "shock": {"name": shock}}, versus=label
    )


@dataclass
class CircumstancesConfig(StageConfig):
    """One run under each mode of determinism, in all combinations of circumstances that should change
    nothing."""

    steps: int = setting(50, "length of each of its runs", "steps", low=1, high=STEPS)
    seed: int = setting(0, "of the initial weights and the data order of all of them", low=0, high=SEED)
    modes: list[str] = setting(
        ["none", "torch", "verity"], "modes to compare", group="determinism", least=1, unique=True
    )
    threads: list[int] = setting([1, 2], "CPU threads", "threads", low=1, high=512, least=1, increasing=True)
    capabilities: list[str] = setting(
        [],
        "vector instructions that torch may use; empty: all that the CPU has",
        choices=CAPABILITIES,
        unique=True,
    )
    parts: list[int] = setting(
        [1, 2, 4],
        "parts of a batch that go forward and backward one after another",
        "parts",
        low=1,
        high=65536,
        least=1,
        increasing=True,
    )


SLURM = ("slurm",)


@dataclass
class LauncherConfig:
    """Where runs are trained. May differ between calls on one study."""

    name: str = setting("local", "worker processes here, array jobs, or this process", group="launcher")
    slots: int = setting(
        0, "workers at a time; 0: one per GPU, or per group of cores", "workers", low=0, high=10_000
    )
    workers_per_gpu: int = setting(
        1, "workers on each GPU, while slots is 0", "workers", low=1, only=("local", "inline"), high=64
    )
    runs_per_worker: int = setting(
        0,
        "runs that share a worker, as streams on a GPU; 0: measured on a GPU, 1 on a CPU",
        "runs",
        low=0,
        high=1000,
    )
    processes_per_run: int = setting(
        1,
        "that train one run together (DDP), each on its share of a batch's rows and on its own GPU or cores; "
        "changes a run by rounding",
        "processes",
        low=1,
        high=64,
    )
    checkpoint_every_s: float = setting(10.0, "time between checkpoints", "s", low=0, high=SECONDS)
    max_lost: int = setting(2, "times a run may lose its worker before it is given up", low=0, high=100)
    heartbeat_s: float = setting(
        300.0, "time without a step after which a worker is killed", "s", above=0, high=SECONDS
    )
    start_s: float = setting(
        600.0,
        "time for a worker to import and build its first run, if longer than heartbeat_s",
        "s",
        above=0,
        high=SECONDS,
    )
    run_timeout_s: float = setting(
        0.0, "time allowed for one attempt at a run; 0: any", "s", low=0, high=SECONDS
    )
    partition: str | None = setting(None, "Slurm partition", only=SLURM)
    account: str | None = setting(None, "Slurm account", only=SLURM)
    qos: str | None = setting(None, "Slurm quality of service", only=SLURM)
    constraint: str | None = setting(None, "Slurm node constraint", only=SLURM)
    timeout_min: int = setting(
        240, "time limit of a job; workers are requeued before", "min", low=1, only=SLURM, high=525_600
    )
    signal_delay_s: int = setting(
        90, "time before that limit to write a checkpoint", "s", low=1, only=SLURM, high=86_400
    )
    cpus_per_task: int = setting(
        0,
        "CPUs of a job; 0: threads_per_run, or 1, for each of processes_per_run",
        "CPUs",
        low=0,
        only=SLURM,
        high=1024,
    )
    gpus_per_node: int | None = setting(
        None,
        "GPUs of a job; empty: processes_per_run under device=cuda, else none",
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
    idle_s: float = setting(
        120.0, "time without work after which a job ends", "s", low=0, only=SLURM, high=SECONDS
    )


@dataclass
class TrackerConfig:
    """Where runs are also shown while they train. No part of a study's records."""

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
    wait_s: float = setting(
        30.0, "time a tracker may take to finish after the last run", "s", low=0, high=86_400
    )


@dataclass
class Config(RunConfig):
    """A complete study: the run's settings, the stages' settings, and where and how to run them."""

    train_tokens: float | None = setting(
        None,
        "of `train`, in place of `steps`: rounded up to whole steps of batch_size·model.context tokens; "
        "tokens=2e6 means the same",
        "tokens",
        low=1,
        high=TOKENS,
    )
    scale: str = setting("laptop", "model size, lengths and grids, as one choice", group="scale")
    seeds: list[int] = setting(
        [0, 1, 2], "of the finals and of suites", low=0, least=1, unique=True, high=SEED
    )
    mine: list[str] = setting(
        [],
        "of study=optimizers, stabilizers or schedules: yours, each an arm: mine=./my_opt.py:Cautious, or "
        "mine=[./a.py:A,./b.py:B]",
        unique=True,
        most=20,
    )
    output_dir: str = setting("outputs/ebc_ablation", "folder of the studies")
    own_files: dict[str, str] = setting(
        {}, "filled in: your suite, your own parts and what they import, which the study copies", most=500
    )
    study: StudyConfig = field(default_factory=StudyConfig)
    lr_sweep: LRSweepConfig = field(default_factory=LRSweepConfig)
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    controller_search: ControllerSearchConfig = field(default_factory=ControllerSearchConfig)
    lr_scale: LRScaleConfig = field(default_factory=LRScaleConfig)
    finals: FinalsConfig = field(default_factory=FinalsConfig)
    tune: TuneConfig = field(default_factory=TuneConfig)
    ablation: AblationConfig = field(default_factory=AblationConfig)
    circumstances: CircumstancesConfig = field(default_factory=CircumstancesConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracker: TrackerConfig = field(default_factory=TrackerConfig)


STAGE_NEEDS: dict[str, tuple[str, ...]] = {
    name: kind.needs
    for name, kind in typing.get_type_hints(Config).items()
    if isinstance(kind, type) and issubclass(kind, StageConfig)
}
STAGES = tuple(STAGE_NEEDS)  # in their order
