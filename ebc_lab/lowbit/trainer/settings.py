"""The settings of a trainer, each with its range."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from ..backends.formulas import TOP
from ..names import Settings, Spellings

EPOCHS = 10


@dataclasses.dataclass
class TrainingConfig(Settings):
    """What a trainer does. An unknown one is a TypeError with the nearest name, a wrong value a ValueError.

    The other spellings of the "1.58-bit hybrid" trainer (`SPELLINGS`) are taken, too.

    Args:
        batch_size: rows, or windows of text, of a step.
        learning_rate: of Adam.
        max_epochs, max_steps: the training ends with the one that comes first; EPOCHS if neither is given.
        n_clusters: of the training rows, from which batches are drawn; 1 draws from all alike.
        quantize_weights: whether the hidden matrices are used in `levels`, else in float32.
        quantize_gradients: whether their gradients are rounded to `levels` at random.
        use_adaptive_lr: the policy `auxnn` and a trust region, else a constant learning rate.
        checkpoint_dir: where the last epoch's state is kept; None for nowhere.
        levels: `ternary` or `five`.
        validation_share: of the rows (or of the text), at the end, that is not trained on.
        hidden: width of the perceptron; text has the trainer's `model_dim`.
        seed: of everything that is drawn.
    """

    batch_size: int = 32
    learning_rate: float = 1e-3
    max_epochs: int | None = None
    n_clusters: int = 10
    quantize_weights: bool = True
    quantize_gradients: bool = True
    use_adaptive_lr: bool = True
    checkpoint_dir: str | Path | None = None
    levels: str = "five"
    max_steps: int | None = None
    validation_share: float = 0.1
    hidden: int = 256
    seed: int = 0

    SPELLINGS: ClassVar[Spellings] = {
        "base_learning_rate": lambda value: {"learning_rate": value},
        "data_clusters": lambda value: {"n_clusters": value},
        "use_clustering": lambda value: {} if value else {"n_clusters": 1},
        "use_quantization": lambda value: {"quantize_weights": value, "quantize_gradients": value},
    }

    def __post_init__(self) -> None:
        self.check()

    def check(self) -> None:
        """Raise ValueError for the first setting out of its range."""
        least = {"batch_size": 1, "n_clusters": 1, "hidden": 1, "seed": 0}
        least |= {name: 1 for name in ("max_epochs", "max_steps") if getattr(self, name) is not None}
        for name, low in least.items():
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
                raise ValueError(f"{name} is {value!r}: give an integer of at least {low}.")
            setattr(self, name, int(value))  # numpy's own are not what a checkpoint keeps
        for name, high in (("learning_rate", 1e3), ("validation_share", 1.0)):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.floating) or not 0 < value < high:
                raise ValueError(f"{name} is {value!r}: give a number above 0 and below {high:g}.")
            setattr(self, name, float(value))
        for name in ("quantize_weights", "quantize_gradients", "use_adaptive_lr"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} is {getattr(self, name)!r}: give True or False.")
            setattr(self, name, bool(getattr(self, name)))
        if self.levels not in TOP:
            raise ValueError(f"levels is {self.levels!r}: give one of {', '.join(TOP)}.")
        if self.checkpoint_dir is not None and not isinstance(self.checkpoint_dir, str | Path):
            raise ValueError(f"checkpoint_dir is {self.checkpoint_dir!r}: give a folder, or None.")

    def last_step(self, steps_per_epoch: int) -> int:
        """Return how many steps a training takes."""
        epochs = self.max_epochs
        if self.max_steps is None:
            return (epochs or EPOCHS) * steps_per_epoch
        return self.max_steps if epochs is None else min(self.max_steps, epochs * steps_per_epoch)

    def identity(self) -> dict[str, Any]:
        """Return what the bits of a training depend on, its length aside."""
        settings = dataclasses.asdict(self)
        for name in ("checkpoint_dir", "max_epochs", "max_steps"):
            del settings[name]
        return settings
