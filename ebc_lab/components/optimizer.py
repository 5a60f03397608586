"""Base optimizers: a name -> the torch optimizers that share out a model's parameters.

They come from torch and from `pytorch_optimizer`, which is imported where it is used: it imports
transformers, where that is installed, and every worker would start later. A subclass replaces one that breaks
the contract which the rest of the lab relies on: every step uses the learning rate of its parameter group
unchanged, moves the weights from the first step on, leaves `p.grad` unchanged, and has all of its state in
`state_dict()`.

An optimizer whose state holds copies of the weights names their state keys in `weight_copies`, so that they
are scaled with the update; copies of the weights at the start, which stay, in `weight_starts`. One that
evaluates other weights than it trains has `eval()` and `train()`, which swap them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.config.errors import require
from ebc_lab.config.own.parts import describe_own_part, own_part
from ebc_lab.config.parts.optimizer import OptimizerConfig

from .forensics import UncorrectedAdam
from .rival_optimizers import DoG, Hyperball, LDoG, LionAR, PartialAdam, PartialAdamW
from .torch_optimizers import StackedMuon, UncappedAdafactor

Matrices = Sequence[nn.Parameter]  # the hidden ones, as the workload names them
Maker = Callable[[nn.Module, OptimizerConfig, Matrices], list[Optimizer]]


def _fused(params: Iterable[nn.Parameter], c: OptimizerConfig) -> dict[str, Any]:
    """What the Adams share: one kernel for all tensors, and on a GPU a step that a CUDA graph can capture."""
    return moments(c) | {"fused": True, "capturable": any(p.is_cuda for p in params)}


def moments(c: OptimizerConfig) -> dict[str, Any]:
    """Return the arguments of an optimizer with Adam's moments."""
    return {"lr": c.lr, "betas": (c.beta1, c.beta2), "eps": c.eps, "weight_decay": c.weight_decay}


def _adam(params: Sequence[nn.Parameter], c: OptimizerConfig) -> Optimizer:
    return torch.optim.Adam(params, **_fused(params, c))


def adam(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Adam with bias correction; `weight_decay` is added to the gradient. Kingma & Ba, arXiv:1412.6980."""
    return [_adam(list(model.parameters()), c)]


def adamw(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Adam with decoupled weight decay. Loshchilov & Hutter, arXiv:1711.05101."""
    return [torch.optim.AdamW(model.parameters(), **_fused(model.parameters(), c))]


def nadamw(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Adam with Nesterov momentum and decoupled weight decay. Dozat 2016, with his momentum that grows over
    the first steps; AlgoPerf's baseline (arXiv:2505.24005) keeps it at beta1."""
    return [torch.optim.NAdam(model.parameters(), **moments(c), decoupled_weight_decay=True)]


def sgd(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """SGD (Robbins & Monro 1951) with heavy-ball momentum (Polyak 1964)."""
    params = list(model.parameters())
    # torch's fused kernel, up to 2.13, computes steps of bfloat16 weights on a CPU and does not store them
    fused = all(p.is_cuda or p.dtype == torch.float32 for p in params)
    return [torch.optim.SGD(params, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay, fused=fused)]


def _rest(model: nn.Module, matrices: Matrices) -> list[nn.Parameter]:
    """Return the parameters that are not hidden matrices."""
    hidden = {id(p) for p in matrices}
    return [p for p in model.parameters() if id(p) not in hidden]


def muon(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Muon on the hidden matrices, its updates at Adam's rms so that one rate fits both; Adam on the rest.

    Jordan et al. 2024; the scale of the updates: Liu et al., arXiv:2502.16982. Where embeddings, head, and
    gains and biases have rates of their own, or a decay that is decoupled, each has an Adam or AdamW to
    itself, as in modded-nanogpt; all have the moments of `c`.
    """
    made = StackedMuon(
        matrices,
        lr=c.lr,
        momentum=c.momentum,
        weight_decay=c.weight_decay,
        adjust_lr_fn="original" if c.update_size == "shape" else "match_rms_adamw",
    )
    scales = {"embedding": c.embedding_scale, "head": c.head_scale, "vector": c.vector_scale}
    rest = _rest(model, matrices)
    if c.rest_decay is None and set(scales.values()) == {1.0}:
        return [made, _adam(rest, c)]
    bases: list[Optimizer] = [made]
    for kind, params in _kinds(model, rest).items():
        if params:
            bases.append(_at_a_share(params, c, scales[kind]))
    return bases


def _kinds(model: nn.Module, rest: Sequence[nn.Parameter]) -> dict[str, list[nn.Parameter]]:
    """Tell what is no hidden matrix apart: embeddings, other matrices (of a GPT the head), and vectors."""
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    tables = {id(module.weight) for module in embeddings}
    kinds: dict[str, list[nn.Parameter]] = {"embedding": [], "head": [], "vector": []}
    for p in rest:
        matrix = "embedding" if id(p) in tables else "head"
        kinds[matrix if p.ndim > 1 else "vector"].append(p)
    return kinds


def _at_a_share(params: Sequence[nn.Parameter], c: OptimizerConfig, scale: float) -> Optimizer:
    """Return the Adam of some parameters, AdamW where the rest has its own decay, at `scale` times lr."""
    made: PartialAdam | PartialAdamW
    if c.rest_decay is None:
        made = PartialAdam(params, **_fused(params, c))
    else:
        made = PartialAdamW(params, **(_fused(params, c) | {"weight_decay": c.rest_decay}))
    made.share = scale
    return made


def adam_uncorrected(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Adam without bias correction: a mistake of the earlier study, kept as an arm."""
    return [UncorrectedAdam(model.parameters(), **_fused(model.parameters(), c))]


def lion(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Lion: each weight moves by lr·sign(b1·m + (1-b1)·g), m follows g with b2; decoupled decay.

    Chen et al., arXiv:2302.06675.
    """
    from .library_optimizers import TensorRateLion

    return [
        TensorRateLion(model.parameters(), lr=c.lr, betas=(c.beta1, c.beta2), weight_decay=c.weight_decay)
    ]


def adafactor(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Adafactor: second moments by rows and columns, no momentum, lr relative to the rms of each tensor.

    Shazeer & Stern, arXiv:1804.04235.

    eps1 is not torch's default, 1.2e-7: that is compared with mean *squared* gradients, so a matrix whose
    gradients have an rms below 3e-4, as most have here, would lose its second moments. torch adds its square
    to g²: 1e-30, as in the paper.
    """
    return [UncappedAdafactor(model.parameters(), lr=c.lr, weight_decay=c.weight_decay, eps=(1e-15, 1e-3))]


def soap(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """SOAP: Adam in the eigenbases of Shampoo's preconditioners, renewed every 10 steps; decoupled decay.

    Vyas et al., arXiv:2409.11321; Shampoo: Gupta, Koren & Singer, arXiv:1802.09568.

    The rows of a model's `tables` are places, not directions of a space: they have no preconditioner.
    """
    from .library_optimizers import PromptSOAP

    tables = list(getattr(model, "tables", ()))
    apart = {id(p) for p in tables}
    groups: list[dict[str, Any]] = [{"params": [p for p in model.parameters() if id(p) not in apart]}]
    groups += [{"params": [p], "max_precondition_dim": p.shape[1]} for p in tables]
    return [PromptSOAP(groups, **moments(c))]


def axiom(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """AXIOM: second moments by rows and columns, a momentum of low rank; decoupled decay (docs/axiom.md).

    The lab checks gradients itself, before any of them is used.
    """
    return [
        AXIOM(
            model.named_parameters(),
            lr=c.lr,
            weight_decay=c.weight_decay,
            detect_anomaly=False,
            streak_boost=c.streak_boost,
            snr_floor=c.snr_floor,
            rank=c.rank,
            momentum_weight=c.momentum_weight,
            relative=c.relative,
            beta1=c.beta1,
        )
    ]


def galore(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """GaLore: Adam on the hidden matrices' gradients, projected to `rank` dimensions; Adam on the rest.

    Zhao et al., arXiv:2403.03507.
    """
    from .library_optimizers import PlainGaLore

    projected = {"rank": c.rank, "update_proj_gap": 50, "scale": 0.25, "projection_type": "std"}
    rest = _rest(model, matrices)
    groups: list[dict[str, Any]] = [{"params": list(matrices), **projected}, {"params": rest}]
    return [PlainGaLore([group for group in groups if group["params"]], **moments(c))]


def prodigy(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Prodigy: Adam at lr·d, d a growing estimate of the distance to the solution; decoupled decay.

    Mishchenko & Defazio, arXiv:2306.06101. `safeguard`, for a warm-up, keeps lr out of d's denominator.
    """
    from .library_optimizers import PlainProdigy

    return [PlainProdigy(model.parameters(), **moments(c), safeguard_warmup=c.safeguard)]


def hyperball(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Hyperball around Adam: hidden matrices keep their norm, and step lr times it; AdamW on the rest.

    Wen et al., arXiv:2606.16899. The rest has the rate lr·rest_scale, and alone decays.
    """
    rest = PartialAdamW(_rest(model, matrices), **moments(c))
    rest.share = c.rest_scale
    return [Hyperball(matrices, c.lr, (c.beta1, c.beta2), c.eps), rest]


def lionar(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """LionAR: the sign of a Nesterov momentum, hidden matrices at a fixed norm; the rest by the same sign.

    Kosson, Messmer & Jaggi, arXiv:2410.23922. lr is the length of a matrix's step over its norm, there the
    sqrt(2·lr·decay) of a balance; the rest has the rate lr·rest_scale, and alone decays.
    """
    from .library_optimizers import PartialLion

    betas = (c.beta1**2, c.beta1)  # of the momentum before this step, as Lion takes it: the same sign
    rest = PartialLion(_rest(model, matrices), lr=c.lr, betas=betas, weight_decay=c.weight_decay)
    rest.share = c.rest_scale
    return [LionAR(matrices, c.lr, c.beta1), rest]


def scion(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """Scion: steps of fixed size, hidden matrices in the spectral norm, vectors in rms, the rest by signs.

    Pethick et al., arXiv:2502.07529: unconstrained; with weight_decay = 1/r it is the constrained one of
    radius r. A sign's step is 60·lr over the columns, as in the authors' GPT with shared embeddings.
    """
    from pytorch_optimizer import SCION

    from .library_optimizers import SCION_NORMS

    rest = _rest(model, matrices)
    parts = {
        "spectral": list(matrices),
        "sign": [p for p in rest if p.ndim == 2],
        "rms": [p for p in rest if p.ndim < 2],
    }
    options: dict[str, Any] = {"lr": c.lr, "momentum": 1 - c.momentum, "weight_decay": c.weight_decay}
    return [SCION(params, **options, **SCION_NORMS[norm]) for norm, params in parts.items() if params]


def normuon(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """NorMuon: Muon's updates over the rms of each row so far, at Adam's rms; Adam on the rest.

    Li et al., arXiv:2510.05491. beta2 is of the rows and of Adam.
    """
    from .library_optimizers import PlainNorMuon

    group = {"params": list(matrices), "use_muon": True, "weight_decay": c.weight_decay}
    options: dict[str, Any] = {"lr": c.lr, "momentum": c.momentum, "beta2": c.beta2}
    made = PlainNorMuon([group], **options, update_scale="match_rms")
    return [made, _adam(_rest(model, matrices), c)]


def muonclip(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """MuonClip: Muon, and after its step queries and keys whose logits of attention exceeded a bound shrink.

    Kimi Team, arXiv:2507.20534: each head's by the root of logit_bound over the largest logit of the batch.
    """
    from .library_optimizers import LargestLogits, WatchedMuonClip

    blocks = {name: block for name, block in model.named_modules() if hasattr(block, "largest_logits")}
    require(
        bool(blocks),
        "optimizer=muonclip needs a model whose blocks have `largest_logits` (docs/extending.md).",
    )
    hidden = {id(p) for p in matrices}
    groups: list[dict[str, Any]] = []
    for name, block in blocks.items():
        for role, layer in (("query", block.q), ("key", block.k)):
            label = {"attention_name": name, "qk_clip": role}
            groups += [label | {"params": [p]} for p in layer.parameters() if id(p) in hidden]
    labelled = {id(p) for group in groups for p in group["params"]}
    groups.append({"params": [p for p in matrices if id(p) not in labelled]})
    options: dict[str, Any] = {"use_muon": True, "weight_decay": c.weight_decay}
    made = WatchedMuonClip(
        [options | group for group in groups],
        lr=c.lr,
        momentum=c.momentum,
        qk_clip_threshold=c.logit_bound,
    )
    made.watched = LargestLogits(blocks)
    return [made, _adam(_rest(model, matrices), c)]


def dog(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """DoG: gradient steps as long as the way from the start over the gradients' size so far.

    Ivgi, Hinder & Carmon, arXiv:2302.12022, without their averaging of the weights; decay of the gradient.
    """
    return [DoG(model.parameters(), c.lr, c.weight_decay)]


def ldog(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
    """DoG for each tensor by itself. Ivgi, Hinder & Carmon, arXiv:2302.12022."""
    return [LDoG(model.parameters(), c.lr, c.weight_decay)]


def custom(model: nn.Module, c: OptimizerConfig) -> list[Optimizer]:
    """What the function of `target` makes of (params, lr=…, **arguments): one optimizer or a list of them.

    Raises UserError where that is something else, where it leaves trained parameters out, or where a group's
    learning rate is not the one given: a run sets all of them.
    """
    made = own_part(c)(list(model.parameters()), lr=c.lr)
    bases = list(made) if isinstance(made, list | tuple) else [made]
    key = describe_own_part(c)
    others = [type(base).__name__ for base in bases if not isinstance(base, Optimizer)]
    require(
        bool(bases) and not others,
        f"{key} returned {', '.join(others) or 'nothing'}, not a torch optimizer or a list of them.",
    )
    groups = [group for base in bases for group in base.param_groups]
    optimized = {id(p) for group in groups for p in group["params"]}
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in optimized]
    require(not left, f"{key} leaves out {len(left)} of the model's parameters, {', '.join(left[:3])}….")
    rates = [group.get("lr") for group in groups if group.get("lr") != c.lr]
    require(
        not rates,
        f"{key} has a group with learning rate {rates[:1]}, and a run gives every group its own, "
        f"optimizer.lr={c.lr:g}, on its schedule: leave lr as it is given.",
    )
    return bases


def of_class(name: str, **options: Any) -> Maker:
    """Make one optimizer with Adam's moments for all parameters; its class is imported when it is made."""
    module, _, kind = name.rpartition(".")

    def make(model: nn.Module, c: OptimizerConfig, matrices: Matrices) -> list[Optimizer]:
        made = getattr(import_module(f".{module}", __package__), kind)
        return [made(model.parameters(), **moments(c), **options)]

    return make


OPTIMIZERS: dict[str, Maker] = {
    "adam": adam,
    "adamw": adamw,
    "nadamw": nadamw,
    "sgd": sgd,
    "muon": muon,
    "lion": lion,
    "adafactor": adafactor,
    "soap": soap,
    "schedule_free": of_class("library_optimizers.ScheduleFree"),  # Defazio et al., arXiv:2405.15682
    "adam_uncorrected": adam_uncorrected,
    "axiom": axiom,
    "galore": galore,
    "adam8bit": of_class("torchao_optimizers.EagerAdam8bit"),  # Dettmers et al., arXiv:2110.02861
    "adam4bit": of_class("torchao_optimizers.EagerAdam4bit"),  # Li, Chen & Zhu, arXiv:2309.01507
    "prodigy": prodigy,
    "adopt": of_class("library_optimizers.PromptADOPT", weight_decouple=True),  # arXiv:2411.02853
    "hyperball": hyperball,
    "lionar": lionar,
    "scion": scion,
    "normuon": normuon,
    "muonclip": muonclip,
    "d_adaptation": of_class("library_optimizers.PlainDAdaptAdam", weight_decouple=True),  # arXiv:2301.07733
    "dog": dog,
    "ldog": ldog,
    "mechanic": of_class("rival_optimizers.Mechanic"),  # Cutkosky, Defazio & Mehta, arXiv:2306.00144
}


# on a GPU, these take `lr` as a tensor and heed `found_inf`
CAPTURABLE = ("adam", "adamw", "adam_uncorrected", "muon", "sgd", "lion", "schedule_free")


def capturable(config: OptimizerConfig) -> bool:
    """Say whether the optimizers that `build` returns can be part of a CUDA graph; a user's own are not."""
    return config.target is None and config.name in CAPTURABLE


def build(
    model: nn.Module, config: OptimizerConfig, matrices: Matrices, dtype: str = "float32"
) -> list[Optimizer]:
    """Return the base optimizers of a model; `matrices`: its hidden ones (a workload's `matrices(model)`).

    `dtype`: that of the run's products, in which Muon takes its own too.
    """
    if config.target is not None:
        return custom(model, config)
    bases = OPTIMIZERS[config.name](model, config, matrices)
    for base in bases:
        if isinstance(base, StackedMuon):
            base.precision = getattr(torch, dtype)
    return bases
