"""The model of workload=gpt, and the sizes of the transformer blocks of workload=ebm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import OWN, OWN_ARGUMENTS, OWN_CHECKSUM, number, setting
from ..part import Mode, Part, Tail, Unfit

GPT = ("gpt",)


@dataclass
class ModelConfig:
    """The model."""

    name: str = setting("gpt", "which model", group="model")
    blocks: int = setting(3, "transformer blocks", low=1, high=256, only=GPT)
    width: int = setting(
        128, "size of a token's vector; a multiple of heads", "features", low=1, high=65536, only=GPT
    )
    heads: int = setting(4, "attention heads", low=1, high=1024, only=GPT)
    context: int = setting(64, "length of a sequence, T", "tokens", low=1, high=131072)
    dropout: float = setting(0.0, "dropout probability", low=0, below=1, only=GPT)
    init_scale: float = setting(
        1.0, "factor on the initial matrices", above=0, high=1000, only=GPT, neutral=1.0
    )
    target: str | None = setting(
        None, "of custom: module:function, which makes the model (docs/extending.md)", only=OWN
    )
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(None, OWN_CHECKSUM, only=OWN)


def _unfit(model: ModelConfig, mode: Mode) -> Unfit | None:
    if model.name != "gpt" and mode is Mode.EXACT:
        return Unfit(f"model={model.name}", "its layers are torch's; choose model=gpt")
    if model.name != "gpt" and mode is Mode.SEVERAL_PROCESSES:
        return Unfit(f"model={model.name}", "it may draw numbers of its own; train it in one process")
    if model.name != "gpt" and mode is Mode.EBM:
        return Unfit(f"model={model.name}", "it has a model of its own; leave model=gpt")
    if model.init_scale != 1 and mode in (Mode.EXACT, Mode.EBM):
        return Unfit("model.init_scale", "its initial weights have a size of their own; leave it at 1")
    if model.dropout > 0 and mode is not Mode.EBM:
        return Unfit("model.dropout", f"{DROPOUT[mode]}; leave it at 0")
    return None


def _tail(model: ModelConfig) -> Iterator[Tail]:
    if model.name != "gpt":
        yield Tail(f"_{model.name}", f"model {model.name}")
    if model.init_scale != 1:
        yield Tail(f"_init{number(model.init_scale)}", f"initial matrices ×{model.init_scale:g}")


DROPOUT = {
    Mode.EXACT: "it is not built",
    Mode.SEVERAL_PROCESSES: "each process would draw its own",
    Mode.IN_BACKWARD: "a second forward would draw other numbers",
}
MODEL = Part("model", ModelConfig, place=80, unfit=_unfit, tail=_tail)
