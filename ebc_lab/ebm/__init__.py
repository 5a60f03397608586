"""An energy-based language model on the sphere, measured.

A library of its own: it imports torch, numpy and scipy, and nothing else of `ebc_lab`. The maths, the figures
and a first loop are in docs/ebm.md. Importing this package loads none of them; a name is imported when it is
used, and one of the original program's is answered with what does its work here.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "model": "Draws EnergyModel LossWeights ModelSettings objective",
    "store": "SplatStore",
    "soc": "HistoryBuffer Pile",
    "generate": "Sampling draw written",
    "evaluate": "held_out ngram_baselines sampled_loss score_quality",
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names.split()}

# what does their work here -> names of the original program, and of its documents
_NAMED_THERE = {
    "EnergyModel(ModelSettings(vocabulary=V))": "EBMModel EBMModelCUDA",
    "ModelSettings, or `ebc-lab ebm train` with the settings of docs/settings.md": "EBMConfig TrainConfig",
    "SplatStore": "SplatStorage Splat",
    "ebm.energy.Energy, which `model.under(contexts)` returns": "EnergyFunction EnergyFunctionCUDA",
    "ebm.energy.compositional_energy": "CompositionalEngine",
    "the contexts that `model.encode(tokens)` returns": "HierarchicalContext",
    "ebm.decoder.Decoder": "EBMDecoder",
    "ebm.decoder.MixtureOfExperts": "MoELayer",
    "the energy's own score, `model.score_at`: no network beside it": "ScoreNetwork SigmaEncoder",
    "Sampling and draw": "sample_langevin AdaptiveLangevinSampler FractionalLangevinSampler",
    "ebm.langevin.baoab_step": "langevin_step LangevinState",
    "Pile, whose `check` topples and splits splats": "maybe_consolidate compute_order_parameter",
    "objective": "denoising_score_matching_loss dsm_loss",
    "ebm.sphere.exp": "exp_map",
    "ebm.sphere.log": "log_map",
    "ebm.sphere.project": "project_to_tangent",
    "ebm.sphere.distance": "geodesic_distance",
    "ebm.sphere.normalise": "normalize_sphere",
    "`ebc-lab ebm evaluate MODEL`": "compute_perplexity compute_energy_metrics compute_diversity_metrics "
    "EBMEvaluator",
    "ebm.evaluate.energy_trend": "compute_convergence_metrics",
    "`ebc-lab ebm diagnose MODEL`": "diagnose_checkpoint",
    "`ebc-lab ebm diagnose --batch FOLDER`": "batch_diagnose",
    "`ebc-lab ebm train`, which keeps a model.pt": "save_checkpoint load_checkpoint get_dataloader "
    "TrainingLogger train_epoch",
    "device=cuda with torch's ROCm build: torch's Vulkan backend does not train": "VulkanEBMRunner",
}
_MEANT = {name: here for here, names in _NAMED_THERE.items() for name in names.split()}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    if name in _MEANT:  # an AttributeError would lose its words in `from … import`
        raise ImportError(f"{name} of the original program is here {_MEANT[name]} (docs/ebm.md).")
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
