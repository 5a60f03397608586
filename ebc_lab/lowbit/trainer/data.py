"""What is trained on: rows of numbers, or text. Both are split, clustered, and drawn from by (seed, step).

A batch takes its share of each k-means cluster of the training rows, or of the windows of the training text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..backends.formulas import as_float32
from ..clustering import DataClustering, window_features
from .settings import TrainingConfig

CONTEXT = 64  # tokens of a window
WIDTH = 128  # of the GPT
BLOCKS = 3
CLASSES = 256  # of tokens, that windows are clustered by: the most frequent ones
MOST_TOKENS = 1 << 20  # of a vocabulary
CHUNK = 1024  # rows of an evaluation's forward


class Rows:
    """Rows (n, d) and targets (n, e), split, clustered and scaled; without targets the rows are their own."""

    kind = "rows"

    def __init__(self, rows: object, targets: object, config: TrainingConfig):
        inputs = _finite_rows(rows, "training_data")
        wanted = inputs if targets is None else _finite_rows(targets, "training_targets")
        if len(wanted) != len(inputs):
            raise ValueError(
                f"training_targets has {len(wanted)} rows, but training_data {len(inputs)}: give one each."
            )
        if len(inputs) < 2:
            raise ValueError(
                f"training_data has {len(inputs)} row(s): give 2 at least, one to train on, one to validate."
            )
        self.digest = _digest(inputs, wanted)
        train = min(max(1, round(len(inputs) * (1 - config.validation_share))), len(inputs) - 1)
        self.clusters = _clustered(inputs[:train], config)
        self.batch_size = min(config.batch_size, train)
        self.steps_per_epoch = -(-train // self.batch_size)
        self.scales = _rms(inputs[:train]), _rms(wanted[:train])
        self.unit = self.scales[1] ** 2  # of the mean squared error
        self.inputs = torch.from_numpy(inputs)
        self.targets = torch.from_numpy(wanted)
        self.train = train

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(self.clusters.rows(step, self.batch_size, "stratified"))
        return self.inputs[rows], self.targets[rows]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs = torch.split(self.inputs[self.train :], CHUNK)
        targets = torch.split(self.targets[self.train :], CHUNK)
        yield from zip(inputs, targets, strict=True)

    def zeros(self, target: Tensor) -> Tensor:
        """Return what the zero predictor says where this is wanted."""
        return torch.zeros_like(target)

    def sizes(self, model_dim: int | None, num_layers: int | None, config: TrainingConfig) -> dict[str, Any]:
        middle = 1 if num_layers is None else num_layers
        hidden = [model_dim or config.hidden] * (middle + 1)
        return {"widths": [self.inputs.shape[1], *hidden, self.targets.shape[1]], "scales": self.scales}

    @staticmethod
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(prediction, target)


class Text:
    """A text in windows of CONTEXT tokens, split and clustered by the tokens' frequencies."""

    kind = "text"
    unit = 1.0

    def __init__(self, tokens: NDArray[np.int64], config: TrainingConfig):
        self.digest = _digest(tokens)
        self.vocabulary = int(tokens.max()) + 1 if len(tokens) else 0
        train = round(len(tokens) * (1 - config.validation_share))
        if train <= CONTEXT or len(tokens) - train <= CONTEXT:
            raise ValueError(
                f"the text has {len(tokens)} tokens, {train} of them to train on: give so many that both "
                f"parts have more than {CONTEXT}; a file is given as a pathlib.Path."
            )
        self.last_start = train - CONTEXT - 1
        folded = _most_frequent(tokens[:train])
        self.clusters = _clustered(window_features(folded, CONTEXT, int(folded.max()) + 1), config)
        windows = len(self.clusters.labels)
        self.batch_size = min(config.batch_size, windows)
        self.steps_per_epoch = -(-windows // self.batch_size)
        self.seed = config.seed
        self.tokens = torch.from_numpy(tokens)
        self.train = train

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Draw (B, T) tokens and those that follow them; a row begins anywhere in its window."""
        windows = self.clusters.rows(step, self.batch_size, "stratified")
        within = np.random.default_rng([self.seed, step, CONTEXT]).integers(CONTEXT, size=len(windows))
        starts = np.minimum(windows * CONTEXT + within, self.last_start)
        places = torch.from_numpy(starts)[:, None] + torch.arange(CONTEXT + 1)
        tokens = self.tokens[places]
        return tokens[:, :-1], tokens[:, 1:]

    def validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        rest = self.tokens[self.train :]
        windows = (len(rest) - 1) // CONTEXT
        inputs = torch.split(rest[: windows * CONTEXT].view(windows, CONTEXT), 32)
        targets = torch.split(rest[1 : windows * CONTEXT + 1].view(windows, CONTEXT), 32)
        yield from zip(inputs, targets, strict=True)

    def zeros(self, target: Tensor) -> Tensor:
        """Return the logits of a model that knows nothing: all tokens are as likely."""
        return torch.zeros(*target.shape, self.vocabulary)

    def sizes(self, model_dim: int | None, num_layers: int | None, config: TrainingConfig) -> dict[str, Any]:
        width = model_dim or WIDTH
        heads = max(1, width // 32)
        while width % heads:
            heads -= 1
        sizes = {"vocabulary": self.vocabulary, "context": CONTEXT, "width": width, "heads": heads}
        return sizes | {"blocks": BLOCKS if num_layers is None else num_layers}

    @staticmethod
    def loss(prediction: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten())


def _finite_rows(values: object, name: str) -> NDArray[np.float32]:
    try:
        array = as_float32(values)
    except ValueError as error:
        raise ValueError(f"{name} is no array of real numbers ({error}): give rows, (n, d).") from None
    if array.ndim != 2 or array.size == 0:
        raise ValueError(f"{name} has the shape {array.shape}: give rows of numbers, (n, d).")
    wrong = np.argwhere(~np.isfinite(array))
    if len(wrong):
        raise ValueError(
            f"{name} has {len(wrong)} values that are NaN or infinite as float32, the first at "
            f"{tuple(wrong[0].tolist())}: remove or replace them."
        )
    return array if array.flags.writeable else array.copy()  # torch has no read-only tensors


def tokens_of(data: object) -> NDArray[np.int64] | None:
    """Return token numbers, of a text its characters' places in the sorted alphabet; None for other data."""
    if isinstance(data, str) and 0 < len(data) < 4096 and "\n" not in data:
        with suppress(OSError):  # a text may be longer than a file's name
            data = Path(data) if Path(data).is_file() else data
    if isinstance(data, Path):
        try:
            data = data.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{data} cannot be read as text: {error}") from None
    if isinstance(data, str):
        characters = sorted(set(data))
        places = {character: index for index, character in enumerate(characters)}
        return np.array([places[character] for character in data], dtype=np.int64)
    if isinstance(data, Tensor):
        if data.ndim != 1 or data.is_floating_point():
            return None
        data = data.cpu()
    try:
        array = np.asarray(data)
    except ValueError:  # rows of different lengths
        return None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        return None
    if len(array) and (array.min() < 0 or array.max() >= MOST_TOKENS):
        raise ValueError(
            f"tokens run from {array.min()} to {array.max()}: number them from 0, below {MOST_TOKENS}."
        )
    return array.astype(np.int64)


def _most_frequent(tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return each token's rank by frequency, 0 the most frequent; ranks from CLASSES - 1 on are one class."""
    ranks = np.argsort(np.argsort(-np.bincount(tokens), kind="stable"), kind="stable")
    folded: NDArray[np.int64] = np.minimum(ranks, CLASSES - 1)[tokens]
    return folded


def _clustered(features: NDArray[Any], config: TrainingConfig) -> DataClustering:
    return DataClustering(min(config.n_clusters, len(features)), config.seed).fit(features)


def _rms(values: NDArray[np.float32]) -> float:
    root = float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))
    return root if np.float32(root) > 0 else 1.0


def _digest(*arrays: NDArray[Any]) -> str:
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(repr((array.shape, array.dtype.str)).encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
