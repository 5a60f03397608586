"""What is trained of the model: all of its weights, or low-rank matrices beside them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import number, setting
from ..part import Mode, Need, Part, Tail, Unfit

LORA = ("lora",)
TARGETS = {"hidden": ("q", "k", "v", "o", "mlp_in", "mlp_out"), "qv": ("q", "v")}


@dataclass
class AdapterConfig:
    """What is trained of the model: all of it, or low-rank matrices beside its own (docs/finetune.md)."""

    name: str = setting("none", "all weights, or low-rank matrices alone", group="adapter")
    rank: int = setting(8, "of the trained matrices", low=1, high=4096, only=LORA)
    alpha: float = setting(16.0, "what they add is multiplied by alpha/rank", above=0, high=1e6, only=LORA)
    targets: str = setting(
        "hidden",
        "the matrices that get them: all hidden ones, or those of queries and values",
        choices=tuple(TARGETS),
        only=LORA,
    )


def _neutral(adapter: AdapterConfig) -> bool:
    return adapter.name == "none"


def _needs(adapter: AdapterConfig) -> Iterator[Need]:
    if not _neutral(adapter):
        yield Need("adapter=lora", "peft", "lora")


def _clashes(adapter: AdapterConfig, run: Any) -> Iterator[str]:
    if _neutral(adapter):
        return
    others = {
        "quantizer": ("none", "levels are those of the whole matrix"),
        "projection": ("none", "a constraint is one on the whole matrix"),
        "model": ("gpt", "the matrices are found by their names in the GPT"),
    }
    for group, (usual, why) in others.items():
        choice = getattr(run, group).name
        if choice != usual:
            yield f"adapter=lora does not go with {group}={choice}: {why}; choose {group}={usual}."
    if run.compile == "on":
        yield "adapter=lora does not go with compile=on: leave compile at off."


def _unfit(adapter: AdapterConfig, mode: Mode) -> Unfit | None:
    return (
        None if _neutral(adapter) else Unfit("adapter=lora", "it trains the plain GPT; choose adapter=none")
    )


def _tail(adapter: AdapterConfig) -> Iterator[Tail]:
    if not _neutral(adapter):
        rank = number(adapter.rank)
        of = "" if adapter.targets == "hidden" else f" of {adapter.targets}"
        yield Tail(
            f"_lora{rank}{adapter.targets if of else ''}", f"LoRA of rank {rank}{of}", f"LoRA {rank}{of}"
        )


ADAPTER = Part(
    "adapter",
    AdapterConfig,
    place=25,
    neutral=_neutral,
    needs=_needs,
    clashes=_clashes,
    unfit=_unfit,
    tail=_tail,
    words={"lora": "low-rank adapters"},
    libraries={"lora": "peft"},
)
