"""The model of workload=gpt or images, and the sizes of the transformer blocks of workload=ebm."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..fields import OWN, OWN_ARGUMENTS, OWN_CHECKSUM, OWN_TARGET, number, setting
from ..part import Mode, Part, Run, Tail

GPT = ("gpt",)
TEXT_MODELS = (*GPT, "modern", "gru")
IMAGE_MODELS = ("cnn", "vit")
BUILT = (*TEXT_MODELS, *IMAGE_MODELS)
WITHOUT_NAMED_MATRICES = ("gru", "cnn")  # matrices without the names that grouping=matrices needs
DROPOUT = {
    Mode.EXACT: "it is not built",
    Mode.SEVERAL_PROCESSES: "each process would draw its own",
    Mode.IN_BACKWARD: "a second forward would draw other numbers",
}


@dataclass
class ModelConfig(Part):
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
    heads: int = setting(4, "attention heads", low=1, high=1024, only=("gpt", "modern", "vit"))
    context: int = setting(64, "length of a sequence, T", "tokens", low=1, high=131072)
    dropout: float = setting(0.0, "dropout probability", low=0, below=1, only=GPT)
    init_scale: float = setting(
        1.0, "factor on the initial matrices", above=0, high=1000, only=GPT, unnamed_at=1.0
    )
    target: str | None = setting(None, OWN_TARGET.format("makes the model"), only=OWN)
    arguments: dict[str, Any] = setting({}, OWN_ARGUMENTS, only=OWN)
    sha256: str | None = setting(None, OWN_CHECKSUM, only=OWN)

    place = 80
    words = {"gpt": "GPT", "modern": "GPT with RoPE and QK-norm", "gru": "GRU", "cnn": "CNN", "vit": "ViT"}

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "modern" and self.width % (2 * self.heads):
            yield (
                f"model=modern turns pairs of features: model.width={self.width} must be a multiple of twice "
                f"model.heads={self.heads}."
            )
        if self.name == "gru" and run.quantizer.name != "none":
            yield "a quantizer goes with a model whose hidden matrices are its own: model=gru has torch's."
        if self.name == "gru" and run.compile == "on":
            yield "compile=on does not go with model=gru: torch.compile leaves recurrent layers as they are."
        grouped = run.stabilizer.name == "ebc" or run.stabilizer.per == "group"
        if self.name in WITHOUT_NAMED_MATRICES and grouped and run.budget.grouping == "matrices":
            yield (
                f"budget.grouping=matrices knows a transformer's matrices by their names, not those of "
                f"model={self.name}: choose budget.grouping=block or tensor."
            )

    def unfit(self, mode: Mode) -> Iterator[str]:
        if self.name != "gpt" and mode is Mode.EXACT:
            yield f"model={self.name}: its layers are torch's; choose model=gpt"
        if self.name not in BUILT and mode is Mode.SEVERAL_PROCESSES:
            yield f"model={self.name}: it may draw numbers of its own; train it in one process"
        if self.name != "gpt" and mode is Mode.EBM:
            yield f"model={self.name}: it has a model of its own; leave model=gpt"
        if self.init_scale != 1 and mode in (Mode.EXACT, Mode.EBM):
            yield "model.init_scale: its initial weights have a size of their own; leave it at 1"
        if self.dropout > 0 and mode is not Mode.EBM:
            yield f"model.dropout: {DROPOUT[mode]}; leave it at 0"

    def tail(self) -> Iterator[Tail]:
        if self.name != "gpt":
            yield Tail(f"_{self.name}", self.words.get(self.name, f"model {self.name}"))
        if self.init_scale != 1:
            yield Tail(f"_init{number(self.init_scale)}", f"initial matrices ×{self.init_scale:g}")
