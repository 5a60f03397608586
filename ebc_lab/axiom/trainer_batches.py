"""Batches and losses as `AXIOM_Trainer` takes them from a loader and a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

IGNORED = -100  # a label that torch's and transformers' losses leave out
Batch = tuple[Tensor, Tensor, dict[str, Any]]  # input_ids, labels, what else the model is given


class Batches:
    """The batches of a loader without end, drawn from random numbers of its own: none of the model's."""

    def __init__(self, loader: Iterable[Any]):
        self.loader = loader
        self.rng: Tensor | None = None  # the state of torch's random numbers; None before the first batch
        self._pass: Iterator[Any] | None = None

    def begin_anew(self, rng: Tensor | None) -> None:
        """Forget the position, and go on with these random numbers."""
        self.rng = rng
        self._pass = None

    def next(self) -> Any:
        """Return the next batch; an exhausted loader is begun again. Raises ValueError if it cannot."""
        with self._own_random_numbers():
            for _ in range(2):
                if self._pass is None:
                    self._pass = iter(self.loader)
                for batch in self._pass:
                    return batch
                self._pass = None
        raise ValueError(
            "train_loader has no batch (more): give one that is not empty and can be iterated again, such as "
            "a DataLoader or a list."
        )

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        if self.rng is None:
            seed = int(torch.randint(2**62, ()))
            self.rng = torch.Generator().manual_seed(seed).get_state()
        models = torch.get_rng_state()
        torch.set_rng_state(self.rng)
        try:
            yield
        finally:
            self.rng = torch.get_rng_state()
            torch.set_rng_state(models)


def on_device(batch: Any, device: torch.device) -> Batch:
    """Move a batch to the device. Raises ValueError unless it is input_ids, or has them.

    Without labels they are the input_ids, which a model moves by one as those of transformers do, and
    `IGNORED` where attention_mask is 0.
    """
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, Tensor):
        named = {"input_ids": batch}
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        named = dict(zip(("input_ids", "labels"), batch, strict=False))
    else:
        raise ValueError(
            f"a batch is a {type(batch).__name__}: give input_ids, pairs (input_ids, labels), or dicts with "
            "these keys."
        )
    if named.get("labels") is None and isinstance(named.get("input_ids"), Tensor):
        named["labels"] = named["input_ids"]
        if isinstance(mask := named.get("attention_mask"), Tensor):
            named["labels"] = named["labels"].masked_fill(mask == 0, IGNORED)
    for name in ("input_ids", "labels"):
        if not isinstance(named.get(name), Tensor):
            keys = ", ".join(map(str, named))
            raise ValueError(f"{name} is missing in a batch, or is no tensor; it has {keys}: add it.")
    here = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
    return here.pop("input_ids"), here.pop("labels"), here


def loss_of(output: Any) -> Tensor:
    """Return the loss in what a model returned, of one element. Raises ValueError where there is none."""
    loss = getattr(output, "loss", output)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    what = f"of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else repr(type(loss).__name__)
    raise ValueError(
        f"model(input_ids, labels=labels) returned no scalar loss ({what}): return one, or an object with "
        ".loss."
    )


def counted(labels: Tensor) -> int:
    """Count the labels that a mean loss is over."""
    return int((labels != IGNORED).sum())


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and the like off; each module is then again in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
