"""The parts of workload=ebm: encoder, decoder, index of splats, sampler, and the energy-based model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import LENGTH, LENGTH_OR_0, STEPS, setting
from ..part import EXPERT, LEVEL, Part, Run

SEARCHED = ("hnsw", "ivf")  # approximate indices, built by faiss
EBM = ("workload", ("ebm",))
NATS = "nats/token"
SHARE = "0–1"
STEP_COLUMNS = {  # of steps.csv; `loss` is the cross-entropy alone
    "loss_total": (NATS, "what is minimised: `loss` and the other parts by their weights"),
    "loss_mle": ("nats/degree of freedom", "mean energy of the states under the splats, over n − 1"),
    "energy": ("nats", "the same, over all degrees, less that of the uniform law on the sphere"),
    "loss_dsm": ("", "of denoising score matching: 1 less the mean of R² over the levels"),
    f"r2_{LEVEL}": ("", "R², the share of the score explained, of this step's states noised by σ radians"),
    "loss_noised": (NATS, "cross-entropy from states that settled from a noised start"),
    "dropped_mass": (SHARE, "mass of the splats beyond the K that act on a state; empty with hnsw and ivf"),
    "splats": ("splats", "in use"),
    "revived": ("splats", "that won nothing and were moved; at such looks"),
    "kappa_median": ("per degree of freedom", "median concentration κ of the splats in use"),
    "soc_rate": ("per 1,000 states", "consolidations since the last look; at such looks"),
    "topplings": ("", "how often a splat toppled; at such looks"),
    "consolidations": ("splats", "that toppling made or widened; at such looks"),
    "balance": ("", "balance loss of the experts: 1 where all are used alike"),
    "router_z": ("", "mean squared log-partition of their router"),
    "route_flips": (SHARE, "audited tokens whose experts the update changed; at audits"),
    f"load_{EXPERT}": (SHARE, "share of the (token, place) pairs that expert i has, from 0"),
    "splat_flips": (SHARE, "audited tokens whose nearest splat the update changed; at audits"),
    "score_shift": ("", "rms change of the scores by the update over their rms; at audits"),
    "event_kl": (
        NATS,
        "between the logits before and after what is no part of the update: statistics, revival, toppling, "
        "new splats; at audits",
    ),
}
EVAL_COLUMNS = {  # of evals.csv, and of `workload` in result.json, over validation states
    "state_spread": (SHARE, "1 less the length of the mean state: 0 where states have collapsed"),
    "energy": ("nats", "mean energy of the states under the splats, less that of the uniform law"),
    "splat_coverage": (SHARE, "splats in use that won one of the last training states, 20 for each splat"),
    "winners": (SHARE, "splats in use that win one of these states"),
    "state_coverage": (SHARE, "states no further from their splat than its own concentration expects"),
    "kappa_at_limit": (SHARE, "splats in use whose κ is at `ebm.kappa_min` or `ebm.kappa_max`"),
    "kappa_median": ("per degree of freedom", "median κ of the splats in use"),
    f"r2_{LEVEL}": ("", "R², the share of the score explained at noise of σ radians"),
    f"r2_se_{LEVEL}": ("", "its standard error over the states"),
    f"matched_{LEVEL}": ("", "R² if the states were spread as their own splats are"),
    "dropped_mass": (SHARE, "of the last steps.csv row before it"),
    "soc_rate": ("per 1,000 states", "of the latest look before it; empty before the first one"),
    "load_max": (SHARE, "the largest load of an expert, likewise"),
}


@dataclass
class EncoderConfig(Part):
    """Of workload=ebm: how the state of a token's context is made."""

    name: str = setting("window", "a mix of the last tokens, or transformer blocks", group="encoder")

    place = 160
    read_by = EBM


@dataclass
class DecoderConfig(Part):
    """Of workload=ebm: how a settled state becomes logits."""

    name: str = setting("moe", "a mixture of experts, or transformer blocks", group="decoder")
    experts: int = setting(4, "experts", low=1, high=64, only=("moe",))
    active: int = setting(2, "experts that see a token", low=1, high=64, only=("moe",))
    hidden_scale: float = setting(1.0, "size of an expert", "× ebm.hidden", above=0, high=16, only=("moe",))

    place = 170
    read_by = EBM

    def refuses(self, run: Run) -> Iterator[str]:
        if self.active > self.experts:
            yield f"decoder.active={self.active} must be at most decoder.experts={self.experts}."


@dataclass
class IndexConfig(Part):
    """Of workload=ebm: how a state's nearest splats are found."""

    name: str = setting("auto", "auto: exact up to 16,384 splats or on a GPU, else hnsw", group="index")
    rebuild_every: int = setting(200, "steps until it is built anew", only=("auto", *SEARCHED), **LENGTH)

    place = 180
    read_by = EBM
    required = dict.fromkeys(SEARCHED, ("faiss", "ebm", "index=exact"))


@dataclass
class SamplerConfig(Part):
    """Of workload=ebm: the Langevin dynamics that draw a latent."""

    name: str = setting(
        "baoab", "as it is, Metropolis-adjusted, or with the original program's settings", group="sampler"
    )
    steps: int = setting(20, "of a chain", "steps", low=0, high=100_000)
    step: float = setting(0.25, "time step", "of the fastest oscillation's 1/ω", above=0, below=2)
    friction: float = setting(1.0, "friction", "ω", above=0, high=1000)
    temperature: float = setting(1.0, "temperature; 0: settle only", "nats", low=0, high=1000)

    place = 190
    read_by = EBM


@dataclass
class EbmConfig(Part):
    """Of workload=ebm: sizes, losses and what happens to the splats (docs/ebm.md)."""

    name: str = setting("laptop", "sizes; by default those of `scale`", group="ebm", in_run_id=False)
    n: int = setting(64, "dimension of the space around the sphere", "features", low=2, high=16384)
    splats: int = setting(
        1000, "splats at the most; one for 20 training tokens; 0: none", "splats", low=0, high=10**6
    )
    neighbours: int = setting(16, "splats that act on a state, K", "splats", low=1, high=1024)
    hidden: int = setting(192, "hidden size of an expert", "features", low=1, high=65536)
    window: int = setting(8, "tokens that encoder=window mixes", "tokens", low=1, high=1024)
    embeddings: str = setting(
        "cooccurrence", "initial: from counts of neighbours, or GPT-2's", choices=("cooccurrence", "gpt2")
    )
    gpt2: str | None = setting(None, "a local folder with GPT-2's weights", by="embeddings", only=("gpt2",))
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
    soc_every: int = setting(50, "steps between such looks", **LENGTH)
    soc_threshold: float = setting(2.0, "stress from which a splat topples", above=0, high=1e9)
    soc_conserved: float = setting(0.8, "share of it that its neighbours get", low=0, below=1)
    temperature: list[float] = setting(
        [1.0, 1.0, 1.0], "divides κ, in each third of the run", above=0, high=1000, least=3, most=3
    )
    keep_every: int = setting(0, "steps between kept models (at evaluations); 0: the last", **LENGTH_OR_0)

    place = 200
    columns = STEP_COLUMNS
    evals = EVAL_COLUMNS
    read_by = EBM

    def refuses(self, run: Run) -> Iterator[str]:
        if self.kappa_min >= self.kappa_max:
            yield f"ebm.kappa_min={self.kappa_min:g} must be below ebm.kappa_max={self.kappa_max:g}."
        if 0 < self.splats < self.neighbours:
            yield (
                f"ebm.neighbours={self.neighbours} splats act on a state, of at most "
                f"ebm.splats={self.splats}: choose fewer, or ebm.splats=0 for none."
            )
        if self.splats == 0 and self.adapt != "statistics":
            yield "ebm.adapt=gradient trains the splats, and ebm.splats=0 has none."
        if self.embeddings == "gpt2" and not self.gpt2:
            yield "ebm.embeddings=gpt2 needs ebm.gpt2=FOLDER, which holds GPT-2's weights."
        if self.embeddings == "gpt2" and run.tokens.name != "gpt2":
            yield "ebm.embeddings=gpt2 are those of GPT-2's own tokens: add tokens=gpt2."
