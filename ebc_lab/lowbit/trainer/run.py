"""The state of a training, and its file: written whole, with a checksum, and nothing in it is executed."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..container import DamagedFileError, written_whole
from ..gradients import GradientQuantizer
from ..linear import hidden_linears
from ..policy import Policy

_MAGIC = b"EBCTRN01"
_PARTS = ("model", "optimizer", "gradients", "policy")  # of a run, that have a state of their own
_LISTS = {"losses": float, "history": dict}  # of a run, and what is in them


@dataclasses.dataclass
class Run:
    """What the next step depends on, and what the summary says of those before: what a checkpoint holds."""

    kind: str  # of data: rows or text
    sizes: dict[str, Any]  # of the model
    digest: str  # of the data
    model: nn.Module
    optimizer: torch.optim.Adam
    gradients: GradientQuantizer | None
    policy: Policy
    step: int = 0
    update: Tensor | None = None  # the last one as it was applied, (weights,); None after a skipped step
    update_norm: float = 0.0
    clipped: bool = False
    factors: tuple[float, float] = (1.0, 1.0)  # on the learning rate and the radius, of the last step
    clipped_steps: int = 0
    skipped_steps: int = 0
    initial_loss: float = math.nan
    zero_loss: float = math.nan
    seconds: float = 0.0
    losses: list[float] = dataclasses.field(default_factory=list)  # of this epoch's steps
    history: list[dict[str, float]] = dataclasses.field(default_factory=list)  # of whole epochs

    def parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def predict(self, inputs: Tensor) -> Tensor:
        """Return the model's answer, or the logits in it, as Hugging Face's models have them."""
        answer = self.model(inputs)
        return cast(Tensor, getattr(answer, "logits", answer))

    def hidden(self) -> dict[str, nn.Parameter]:
        """Return the matrices that are quantized: all of a perceptron's, those inside the blocks of a GPT,
        the `hidden_linears` of a model that was given."""
        if "model" in self.sizes:
            layers = hidden_linears(self.model)
            return {f"{name}.weight": cast(nn.Parameter, m.weight) for name, m in layers.items()}
        named = self.model.named_parameters()
        return {name: p for name, p in named if p.ndim == 2 and (self.kind == "rows" or "blocks." in name)}

    def state_dict(self) -> dict[str, Any]:
        plain = {name: value for name, value in vars(self).items() if name not in _PARTS}
        parts = {name: getattr(self, name) for name in _PARTS}
        return plain | {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in vars(self).items():
            if name not in _PARTS:
                if value is not None and type(state[name]) is not type(value):
                    raise TypeError(f"{name} is {state[name]!r}")
                if name in _LISTS and not all(isinstance(one, _LISTS[name]) for one in state[name]):
                    raise TypeError(f"{name} is {state[name]!r}")
                setattr(self, name, state[name])
            elif value is not None:
                value.load_state_dict(state[name])


def write_checkpoint(path: Path, saved: dict[str, Any]) -> None:
    """Write plain numbers, names and tensors; a reader, or a crash, meets a whole file or none."""
    body = io.BytesIO()
    torch.save(saved, body)
    content = body.getvalue()
    with written_whole(path.resolve()) as file:
        file.write(_MAGIC + hashlib.sha256(content).digest() + content)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `write_checkpoint` wrote. Raises DamagedFileError for anything else, OSError as files do."""
    content = path.read_bytes()
    start = len(_MAGIC)
    body = content[start + 32 :]
    if content[:start] != _MAGIC:
        raise DamagedFileError(
            f"{path} is no checkpoint of this trainer: give one that save_checkpoint wrote."
        )
    if hashlib.sha256(body).digest() != content[start : start + 32]:
        raise DamagedFileError(
            f"{path} is damaged, its checksum is another one: restore it, or train from the start."
        )
    try:
        return cast(dict[str, Any], torch.load(io.BytesIO(body), weights_only=True))
    except Exception as error:
        raise DamagedFileError(
            f"{path} is damaged ({type(error).__name__}): its content is none of this trainer's."
        ) from None
