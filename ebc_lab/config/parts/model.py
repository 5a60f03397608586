"""The model of workload=gpt or images, and the sizes of the transformer blocks of workload=ebm."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import OWN, OWN_ARGUMENTS, OWN_CHECKSUM, number, setting
from ..part import Mode, Part, Tail, Unfit

GPT = ("gpt",)
OF_TEXT = (*GPT, "modern", "gru")
OF_IMAGES = ("cnn", "vit")
BUILT = (*OF_TEXT, *OF_IMAGES)
WITH_HEADS = ("gpt", "modern", "vit")
WITHOUT_NAMED_MATRICES = ("gru", "cnn")  # budget.grouping=matrices knows a transformer's by their names
WORDS = {"gpt": "GPT", "modern": "GPT with RoPE and QK-norm", "gru": "GRU", "cnn": "CNN", "vit": "ViT"}


@dataclass
class ModelConfig:
    """The model."""

    name: str = setting("gpt", "which model", group="model")
    blocks: int = setting(3, "blocks, or layers of a GRU", low=1, high=256, only=BUILT)
    width: int = setting(
        128,
        "size of a token's vector, or channels of a CNN; a multiple of heads",
        "features",
        low=1,
        high=65536,
        only=BUILT,
    )
    heads: int = setting(4, "attention heads", low=1, high=1024, only=WITH_HEADS)
    context: int = setting(64, "length of a sequence, T", "tokens", low=1, high=131072)
    dropout: float = setting(0.0, "dropout probability", low=0, below=1, only=GPT)
    init_scale: float = setting(
        1.0, "factor on the initial matrices", above=0, high=1000, only=GPT, unnamed_at=1.0
    )
    target: str | None = setting(
        None, "of custom: module:function, which makes the model (docs/extending.md)", only=OWN
    )
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(None, OWN_CHECKSUM, only=OWN)


def _unfit(model: ModelConfig, mode: Mode) -> Unfit | None:
    if model.name != "gpt" and mode is Mode.EXACT:
        return Unfit(f"model={model.name}", "its layers are torch's; choose model=gpt")
    if model.name not in BUILT and mode is Mode.SEVERAL_PROCESSES:
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
        yield Tail(f"_{model.name}", WORDS.get(model.name, f"model {model.name}"))
    if model.init_scale != 1:
        yield Tail(f"_init{number(model.init_scale)}", f"initial matrices ×{model.init_scale:g}")


def _refuses(model: ModelConfig) -> Iterator[str]:
    if model.name == "modern" and model.width % (2 * model.heads):
        yield (
            f"model=modern turns pairs of features: model.width={model.width} must be a multiple of twice "
            f"model.heads={model.heads}."
        )


def _clashes(model: ModelConfig, run: Any) -> Iterator[str]:
    if model.name == "gru" and run.quantizer.name != "none":
        yield "a quantizer goes with a model whose hidden matrices are its own: model=gru has torch's."
    if model.name == "gru" and run.compile == "on":
        yield "compile=on does not go with model=gru: torch.compile leaves recurrent layers as they are."
    grouped = run.stabilizer.name == "ebc" or run.stabilizer.per == "group"
    if model.name in WITHOUT_NAMED_MATRICES and grouped and run.budget.grouping == "matrices":
        yield (
            f"budget.grouping=matrices knows a transformer's matrices by their names, not those of "
            f"model={model.name}: choose budget.grouping=block or tensor."
        )


DROPOUT = {
    Mode.EXACT: "it is not built",
    Mode.SEVERAL_PROCESSES: "each process would draw its own",
    Mode.IN_BACKWARD: "a second forward would draw other numbers",
}
MODEL = Part(
    "model",
    ModelConfig,
    place=80,
    refuses=_refuses,
    clashes=_clashes,
    unfit=_unfit,
    tail=_tail,
    words=WORDS,
)
