from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ..errors import any_of
from ..fields import LR, OWN, OWN_ARGUMENTS, OWN_CHECKSUM, OWN_TARGET, setting
from ..part import Mode, Part, Run

AXIOM = ("axiom",)
ADAMS = (  # optimizers with Adam's two moments, or with Adam inside
    *("adam", "adamw", "adam_uncorrected", "adam8bit", "adam4bit"),
    *("muon", "soap", "schedule_free", "galore", "nadamw"),
    *("prodigy", "adopt", "hyperball", "normuon", "muonclip", "d_adaptation", "mechanic"),
)
MUON = ("muon",)
SCALE: dict[str, Any] = {"low": 0, "high": 1000}  # range of a rate in units of lr
MUON_RATE: dict[str, Any] = {**SCALE, "only": MUON, "unnamed_at": 1.0}
WITH_MOMENTUM = ("sgd", "muon", "normuon", "muonclip", "scion")
EXACT = ("adam", "adamw")
WITHOUT_LOGITS = ("modern", "gru", "cnn")  # models without attention logits, or (modern) with bounded ones
TORCHAO = ("adam8bit", "adam4bit")


@dataclass
class OptimizerConfig(Part):
    """The base optimizer; each has its own defaults in conf/optimizer and reads only the settings it has."""

    name: str = setting("adam", "which optimizer", group="optimizer")
    lr: float = setting(4e-3, "learning rate at its peak", **LR)
    beta1: float = setting(
        0.9, "decay of the first moment", low=0, below=1, only=(*ADAMS, "lion", "lionar", "axiom")
    )
    beta2: float = setting(0.999, "decay of the second moment", low=0, below=1, only=(*ADAMS, "lion"))
    eps: float = setting(1e-8, "added to the denominator", low=0, high=1, only=ADAMS)
    weight_decay: float = setting(0.0, "decoupled weight decay", low=0, high=100)
    momentum: float = setting(
        0.0, "of SGD, Muon, NorMuon, MuonClip and Scion", low=0, high=1, only=WITH_MOMENTUM
    )
    rank: int = setting(
        0, "of AXIOM's momentum, 0: none; of GaLore's gradients", low=0, high=65536, only=("axiom", "galore")
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
        0.5, "with rank > 0: least factor on rows whose momentum is weak; 1: off", low=0, high=1, only=AXIOM
    )
    rest_scale: float = setting(
        0.1, "rate of what is not a hidden matrix, in units of lr", only=("hyperball", "lionar"), **SCALE
    )
    update_size: str = setting(
        "rms",
        "of Muon: rms, that of Adam's updates; or shape, max(1, rows/columns)^½ times an orthogonal matrix",
        choices=("rms", "shape"),
        only=MUON,
        unnamed_at="rms",
    )
    embedding_scale: float = setting(1.0, "beside Muon: rate of the embeddings, in units of lr", **MUON_RATE)
    head_scale: float = setting(1.0, "beside Muon: rate of the head, in units of lr", **MUON_RATE)
    vector_scale: float = setting(1.0, "beside Muon: rate of gains and biases, in units of lr", **MUON_RATE)
    rest_decay: float | None = setting(
        None,
        "beside Muon: decoupled weight decay of the rest, whose Adam is then AdamW; empty: weight_decay, "
        "added to its gradient",
        low=0,
        high=100,
        only=MUON,
        unnamed_at=None,
    )
    logit_bound: float = setting(
        100.0, "largest logit of attention that a step leaves", above=0, high=1e6, only=("muonclip",)
    )
    safeguard: bool = setting(
        False, "keep a warm-up of the rate out of the distance's denominator", only=("prodigy",)
    )
    target: str | None = setting(None, OWN_TARGET.format("makes the optimizer"), only=OWN)
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(None, OWN_CHECKSUM, only=OWN)

    place = 20
    words = {
        "adam": "Adam",
        "adamw": "AdamW",
        "muon": "Muon",
        "sgd": "SGD",
        "lion": "Lion",
        "adafactor": "Adafactor",
        "soap": "SOAP",
        "schedule_free": "schedule-free AdamW",
        "adam_uncorrected": "Adam without bias correction",
        "axiom": "AXIOM",
        "galore": "GaLore",
        "adam8bit": "8-bit Adam",
        "adam4bit": "4-bit Adam",
        "prodigy": "Prodigy",
        "adopt": "ADOPT",
        "hyperball": "Adam-Hyperball",
        "lionar": "LionAR",
        "scion": "Scion",
        "normuon": "NorMuon",
        "muonclip": "MuonClip",
        "d_adaptation": "D-Adaptation",
        "dog": "DoG",
        "ldog": "LDoG",
        "mechanic": "Mechanic around Adam",
        "nadamw": "NadamW",
    }
    # torch is not listed: its version is part of every run's identity
    libraries = {
        **dict.fromkeys(("lion", "soap", "schedule_free", "galore", "prodigy", "adopt"), "pytorch-optimizer"),
        **dict.fromkeys(("lionar", "scion", "normuon", "muonclip", "d_adaptation"), "pytorch-optimizer"),
        **dict.fromkeys(TORCHAO, "torchao"),
    }

    required = dict.fromkeys(TORCHAO, ("torchao", "axiom"))

    def unread(self) -> Iterable[str]:
        without_momentum = self.name == "axiom" and not self.rank
        return ("beta1", "momentum_weight", "streak_boost", "snr_floor") if without_momentum else ()

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "galore" and self.rank < 1:
            yield "optimizer=galore needs optimizer.rank >= 1."
        if self.name in ("dog", "ldog") and run.param_dtype == "bfloat16":
            yield (
                f"optimizer={self.name} begins with steps of a millionth of the weights' length, too short "
                "for weights in bfloat16: choose param_dtype=float32."
            )
        if self.name != "muonclip":
            return
        if run.workload.name not in ("gpt", "images") or run.model.name in WITHOUT_LOGITS:
            yield (
                "optimizer=muonclip shrinks queries and keys by the logits of attention that they make: "
                "choose model=gpt, vit or custom."
            )
        if run.adapter.name != "none":
            yield "optimizer=muonclip shrinks whole matrices of queries and keys: choose adapter=none."

    def unfit(self, mode: Mode) -> Iterator[str]:
        name = self.name
        if mode is Mode.EXACT and name == "axiom":
            why = "its 4-bit and low-rank parts could be exact, but they are not built so"
            yield f"optimizer=axiom: {why}; choose optimizer=adam"
        if mode is Mode.EXACT and name not in EXACT:
            yield f"optimizer={name}: choose {any_of(EXACT)}"
        if mode is Mode.EXACT and name == "adam" and self.weight_decay > 0:
            why = "its decay is decoupled; choose optimizer=adamw"
            yield f"optimizer.weight_decay under optimizer=adam: {why}"
        if mode is Mode.IN_BACKWARD and name != "axiom":
            why = "the update is made inside backward, which it does not; choose optimizer=axiom"
            yield f"optimizer={name}: {why}"
