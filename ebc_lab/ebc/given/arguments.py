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
        try:
            forward = inspect.signature(getattr(model, "_orig_mod", model).forward)
            self.signature = list(forward.parameters.values())
        except (TypeError, ValueError):  # of compiled code it is not known
            self.signature = []
        self.positional = [p.name for p in self.signature if p.kind in POSITIONAL]
        self.chosen = drop is not None  # whether somebody has said what to leave out
        # an encoder-decoder shifts its labels into the decoder's input
        shifts = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
        default = () if shifts else LABELS
        self.drop = default if drop is None else drop
        self.mask_of = mask_of

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All that the forward was given, by name; what a batch in one mapping holds, by its keys."""
        named: dict[str, Any] = {}
        for value in (*args, *kwargs.values()):
            if isinstance(value, Mapping):
                named |= value
        # not zip(strict=False), which torch.compile up to 2.9 cannot take
        return named | {name: args[i] for i, name in enumerate(self.positional[: len(args)])} | dict(kwargs)

    def kept(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        """`args` and `kwargs` of a measuring forward, and whether something was left out."""
        if not (kwargs or self.chosen or any(isinstance(value, Mapping) for value in args)):
            return {"args": args, "kwargs": {}}, False
        names = self.positional[: len(args)] if self.chosen else []  # an input may be called labels, too
        first = next((i for i, name in enumerate(names) if name in self.drop), len(args))
        # what is behind the first that is left out is given by name instead
        named = {**kwargs, **dict(zip(self.positional[first:], args[first:], strict=False))}
        left = {name: value for name, value in named.items() if name not in self.drop}
        batch = {
            "args": tuple(map(self._without, args[:first])),
            "kwargs": {name: self._without(value) for name, value in left.items()},
        }
        inside = any(self._without(value) is not value for value in (*args[:first], *left.values()))
        return batch, inside or len(left) < len(named)

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
