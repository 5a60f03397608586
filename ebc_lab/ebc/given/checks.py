"""The batch and the logits that a step is given; wrong ones would make c fall to 0 without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any

from torch import Tensor

FEW_TOKENS = 100  # to choose c by: with fewer, one step's KL says little about the next tokens
ENOUGH_TOKENS = 250  # what `probe_sequences=None` takes rows for: twice as many hold the KL little closer


class EBCWarning(UserWarning):
    """Something that makes a budget less exact than its reader may expect."""


class NoLogitsError(TypeError, ValueError):
    """What a forward returned holds no logits."""


class ForwardError(ValueError):
    """The model raised an error, its `__cause__`, when EBC called it to measure."""

    def __init__(self, error: Exception):
        super().__init__(
            "EBC calls the model in evaluation mode, on a batch that training has called it on, and that "
            f"failed ({failed(error)}): name the arguments that only its loss needs in drop=(…), or attach "
            "to the module inside it that returns logits."
        )


def logits_in(output: Any) -> Tensor:
    """The logits (B, ..., V) in what a forward returns: itself, or its `.logits`.

    Raises NoLogitsError where there are none.
    """
    logits = output["logits"] if isinstance(output, dict) and "logits" in output else output
    logits = getattr(logits, "logits", logits)
    if not isinstance(logits, Tensor):
        where = "output[0]" if isinstance(output, tuple | list) else "…"
        raise NoLogitsError(
            f"no logits in a {type(output).__name__}: say where they are, as logits_of=lambda output: "
            f"{where} to `attach`, or as forward=lambda model, batch: … to an optimizer."
        )
    if logits.ndim < 2:
        raise NoLogitsError(
            f"logits of shape {tuple(logits.shape)}: this looks like a loss; logits have a row for each row "
            "of the batch, and a last axis for the classes. Where the model returns its loss because it is "
            "given targets, say drop=('targets',), by their name in its forward, and EBC calls it without "
            "them; where it returns nothing else, attach to the module inside it that returns logits."
        )
    if not logits.is_floating_point():
        raise NoLogitsError(
            f"logits of {logits.dtype}: the arguments are step(tokens, logits), in this order."
        )
    if logits.shape[-1] == 1:
        raise NoLogitsError(
            "logits with one class: a softmax over it is always 1, its KL 0, and nothing would be limited. "
            "EBC is for classification; a regression has no distribution whose KL could be bounded. A binary "
            "classifier has two logits, 0 and the model's, as logits_of=lambda z: "
            "torch.cat([torch.zeros_like(z), z], -1); if it ends in a sigmoid, logits_of=lambda p: "
            "torch.cat([(1 - p).log(), p.log()], -1)."
        )
    return logits


def tensors_in(inputs: Any) -> Iterator[Tensor]:
    """Those in nested mappings, sequences and dataclasses."""
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, Mapping | tuple | list):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from tensors_in(value)
    elif is_dataclass(inputs) and not isinstance(inputs, type):
        yield from tensors_in(vars(inputs))


def holds_a_loss(output: Any) -> bool:
    """Whether a forward's output has a loss and no logits."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return isinstance(loss, Tensor) and loss.numel() == 1


def rows_of(tokens: Any, logits: Tensor | None, mask: Tensor | None, axis: int = 0) -> int:
    """The rows of a batch, which lie along `axis` of its tensors, and first in the logits and the mask.

    Raises ValueError where there is no batch, or neither logits nor mask nor tokens say how many rows it has.
    """
    if tokens is None:
        raise ValueError("step(tokens, logits) needs the batch: the budget is measured on its tokens.")
    if mask is not None and logits is not None and mask.shape != logits.shape[:-1]:
        raise ValueError(f"a mask of shape {tuple(mask.shape)} for logits of {tuple(logits.shape)}.")
    for known in (logits, mask):
        if known is not None:
            return known.shape[0]
    sizes = [t.shape[axis] for t in tensors_in(tokens) if t.ndim > axis]
    if not sizes:
        raise ValueError("the batch holds no tensor, and no logits are given: their rows are not known.")
    return sizes[0]


def uncut(tokens: Any, logits: Tensor | None, size: int, axis: int) -> str | None:
    """Why a batch of `size` rows cannot be cut by its tensors; None where one of them has as many rows.

    Raises ValueError where the logits are not laid out as EBC takes them.
    """
    tensors = [t for t in tensors_in(tokens) if t.ndim]
    sizes = [t.shape[axis] for t in tensors if t.ndim > axis]
    if size in sizes:
        return None
    if not tensors:
        return "the batch holds no tensor that EBC can see"
    shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
    if axis:
        raise ValueError(
            f"batch_dim={axis}: the logits have {size} rows along it, and no tensor of the batch has as many "
            f"({shapes}). Logits are (T, B, V) then; where a model flattens them to (T·B, V), say "
            "logits_of=lambda z: z.unflatten(0, (T, -1)), T the length of a row."
        )
    if logits is not None and logits.ndim == 2 and any(size == t.numel() for t in tensors if t.ndim > 1):
        raise ValueError(
            f"the logits have {size} rows, and no tensor of the batch has as many ({shapes}): they are "
            "flattened: say logits_of=lambda z: z.unflatten(0, (-1, T)), T the length of a row, or for a "
            "batch of shape (T, B) logits_of=lambda z: z.unflatten(0, (T, -1)) and batch_dim=1."
        )
    other = [] if logits is None else [i for i in range(1, logits.ndim - 1) if logits.shape[i] in sizes]
    remedy = f"; their axis {other[0]} has: logits_of=lambda z: z.movedim({other[0]}, 0)" if other else ""
    return f"the logits have {size} rows, and no tensor of the batch has as many ({shapes}){remedy}"


def other_shape(wanted: tuple[int, ...], got: tuple[int, ...]) -> ValueError:
    """The error for a measuring forward whose logits have not the shape of those at W."""
    return ValueError(
        f"the forward on the same rows returned logits of shape {tuple(got)}, and those given have "
        f"{tuple(wanted)}: in evaluation mode, or without targets, this model returns other positions; pass "
        "a `forward` that returns the logits of all."
    )


def listed(names: Sequence[str]) -> str:
    """The first three, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


TIME_FIRST = "; or, if the batch is time-first, (T, B), say batch_dim=1"


def failed(error: BaseException | None) -> str:
    """An error in a few words; the model's own, where that came while EBC measured."""
    error = error.__cause__ if isinstance(error, ForwardError) else error
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def read_whole(why: str, rows: int, size: int, axis: int) -> str:
    """What is said where a model is called on all rows of its batch from now on, to read some of them."""
    if rows >= size:
        return f"{why}. All rows choose c, and EBC calls the model on all of them."
    return (
        f"{why}. From now on EBC calls the model on all {size} rows and reads off the {rows} that choose c, "
        "at the cost of all: probe_sequences='all' lets all of them choose c, and rows_of=lambda given, "
        f"rows: … says how a batch is cut{'' if axis else TIME_FIRST}."
    )


def differing(kl: float) -> ValueError:
    """The error for logits that are not what the model says on the batch."""
    return ValueError(
        f"the logits given differ from the model's own on this batch by a KL of {kl:.2g} nats per token: "
        "they are another batch's, weights, logits or batch were changed since, a row's logits depend on "
        "other rows, or the training forward is not the one in evaluation mode (then pass fresh_logits=True)."
    )


def few_tokens(tokens: int, rows: int, size: int) -> str:
    """Return the warning for c chosen by so few tokens, of some of a batch's rows."""
    more = "take larger batches" if rows == size else f"raise probe_sequences (now {rows})"
    return (
        f"c is chosen by {tokens} tokens of each batch, and the others' KL will often be far from "
        f"the budget: {more}, or use budget='tracked'."
    )


def renewed(kl: float) -> str:
    """What is said when z(W) is computed anew from now on."""
    return (
        f"the training forward's logits differ from the model's own, without what it does in training alone, "
        f"by a KL of {kl:.2g} nats per token: from now on EBC computes them again at each step, one more "
        "forward on the rows that choose c. fresh_logits=True says so from the start."
    )


def check_counts(**counts: Any) -> None:
    """Raise TypeError or ValueError unless these are whole numbers >= 0, `probe_sequences` >= 1 or `all`."""
    for name, count in counts.items():
        least = 1 if name == "probe_sequences" else 0
        if least and count == "all":
            continue
        if not isinstance(count, int):
            raise TypeError(f"{name} must be a whole number, not {count!r}.")
        if count < least:
            raise ValueError(f"{name} must be at least {least}, not {count}.")
