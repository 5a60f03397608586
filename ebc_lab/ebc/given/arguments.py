"""What a forward is called with, by name: which arguments EBC leaves out, and which positions count."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from .checks import tensors_in
from .rows import RowsOf

LABELS = ("labels", "num_items_in_batch")  # what a forward takes for its loss alone
MASKS = ("decoder_attention_mask", "attention_mask")

POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)

MaskOf = Callable[[dict[str, Any]], Tensor | None]


class Arguments:
    """How a model's forward is called.

    Args:
        model: its forward's signature names the positional arguments.
        drop: the names of those that only its loss needs. Default: `labels`, except for encoder-decoders,
            which make their input of them.
        mask_of: the arguments by name -> the mask of the positions that count. Default: an attention mask.
        rows_of: the arguments by name, an index of rows -> those of these rows, by name or as a tuple.
    """

    def __init__(
        self,
        model: nn.Module,
        drop: tuple[str, ...] | None,
        mask_of: MaskOf | None,
        rows_of: RowsOf | None = None,
    ):
        self.rows_of = rows_of
        self.signature = _signature(model)
        self.positional = [p.name for p in self.signature if p.kind in POSITIONAL]
        self.chosen = drop is not None  # whether somebody has said what to leave out
        if drop is None:
            config = getattr(model, "config", None)
            # an encoder-decoder shifts its labels into the decoder's input
            drop = () if getattr(config, "is_encoder_decoder", False) else LABELS
        self.drop = drop
        self.mask_of = mask_of

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All that the forward was given, by name; what a batch in one mapping holds, by its keys."""
        named: dict[str, Any] = {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Mapping):
                named |= value
        return named | dict(zip(self.positional, args, strict=False)) | dict(kwargs)

    def kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """`args` and `kwargs` of a measuring forward, and whether something was left out."""
        left = {name: value for name, value in kwargs.items() if name not in self.drop}
        names = self.positional[: len(args)] if self.chosen else []  # an input may be called labels, too
        out = [i for i, name in enumerate(names) if name in self.drop]
        first = out[0] if out else len(args)
        for name, value in zip(self.positional[first:], args[first:], strict=False):
            if name not in self.drop:  # one behind it is given by name instead
                left[name] = value
        batch = {
            "args": tuple(map(self._without, args[:first])),
            "kwargs": {k: self._without(v) for k, v in left.items()},
        }
        inside = (*args[:first], *left.values())
        dropped = any(self._without(value) is not value for value in inside)
        return batch, dropped or bool(out) or any(name in self.drop for name in kwargs)

    def _without(self, value: Any) -> Any:
        """A batch in one mapping without what is left out."""
        if isinstance(value, Mapping) and not value.keys().isdisjoint(self.drop):
            return {name: inner for name, inner in value.items() if name not in self.drop}
        return value

    def flags(self, batch: Mapping[str, Any]) -> tuple[str, ...]:
        """The names of a kept batch's arguments that hold no tensor and have a default."""
        optional = {p.name for p in self.signature if p.default is not inspect.Parameter.empty}
        return tuple(
            k for k, v in batch["kwargs"].items() if k in optional and next(tensors_in(v), None) is None
        )

    def rows(self, batch: Mapping[str, Any], index: Tensor) -> dict[str, Any]:
        """Some rows of a kept batch, as the user's `rows_of` cuts them."""
        assert self.rows_of is not None
        cut = self.rows_of(self.named(batch["args"], batch["kwargs"]), index)
        if isinstance(cut, Mapping):
            return {"args": (), "kwargs": dict(cut)}
        return {"args": cut if isinstance(cut, tuple) else (cut,), "kwargs": {}}

    def mask(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], shape: tuple[int, ...] | None
    ) -> Tensor | None:
        """Which positions count, of the logits' `shape` without the classes; None: all.

        Raises ValueError where `mask_of` returns another shape.
        """
        named = self.named(args, kwargs)
        if self.mask_of is not None:
            try:
                mask = self.mask_of(named)
            except KeyError as error:
                known = ", ".join(named) or "nothing by name"
                raise ValueError(f"mask_of asks for {error}, and the forward was given {known}.") from error
            if mask is not None and shape is not None and mask.shape != shape:
                raise ValueError(
                    f"mask_of returned a mask of shape {tuple(mask.shape)}, for positions of {tuple(shape)}."
                )
            return mask
        for name in MASKS:
            mask = named.get(name)
            if isinstance(mask, Tensor) and mask.ndim > 1 and (shape is None or mask.shape == shape):
                return mask
        return None


def _signature(model: nn.Module) -> list[inspect.Parameter]:
    """A forward's parameters, as far as they are known."""
    try:
        return list(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters.values())
    except (TypeError, ValueError):
        return []
