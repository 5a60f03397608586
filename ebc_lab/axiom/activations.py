"""Activations in 4 bits: what autograd saves in the forward pass is packed until the backward pass needs it.

The packed form is of `packing`: with its noise a value is unbiased. Unbiased values make an unbiased gradient
only where the backward pass is linear in them. Where it exponentiates them, as attention does when it
recomputes its weights from queries, keys and their log-sum-exp, an error of a few units becomes a factor of
thousands: those functions keep theirs (`EXACT`, docs/axiom.md, "Activations").

Activations in few bits with stochastic rounding: Chen et al., arXiv:2104.14129; for any model: Liu et al.,
arXiv:2206.11357.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .packing import DTYPES, Packed, Rounding, statistics, unpack

# functions whose backward pass exponentiates what they saved
EXACT: tuple[Callable[..., Any], ...] = (
    *(F.scaled_dot_product_attention, F.multi_head_attention_forward),
    *(F.softmax, F.softmin, F.log_softmax, F.cross_entropy, F.ctc_loss),
    *(torch.softmax, torch.log_softmax, torch.logsumexp, torch.logcumsumexp),
    *(torch.special.softmax, torch.special.log_softmax, torch.special.logsumexp),
    *(Tensor.softmax, Tensor.log_softmax, Tensor.logsumexp, Tensor.logcumsumexp),
)
weak_reference: Callable[[torch.UntypedStorage], object] = StorageWeakRef


class _Exact:
    """A saved tensor that stays as it is, without its part of the graph, which would be a cycle."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def value(self) -> Tensor:
        """Return the tensor; RuntimeError if it was changed since: autograd does not look behind hooks."""
        if self.tensor._version != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} that the backward pass needs was changed in "
                "place after it was saved: change it after backward, or change a copy."
            )
        return self.tensor


class _Saved:
    """A saved tensor in 4 bits: the values of its memory, and how they are to be looked at."""

    def __init__(self, packed: Packed, tensor: Tensor, dense: bool):
        self.packed = packed
        self.shape = tensor.shape
        self.stride = tensor.stride() if dense else None

    def value(self) -> Tensor:
        """Return the tensor, unpacked anew each time."""
        values = unpack(self.packed)
        return values if self.stride is None else values.as_strided(self.shape, self.stride)


class _Watch(TorchFunctionMode):
    """Makes calls of `functions` with `around()` entered."""

    def __init__(self, functions: Collection[Callable[..., Any]], around: Callable[[], Any]):
        super().__init__()
        self.functions = frozenset(functions)
        self.around = around

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self.around() if func in self.functions else nullcontext():
            return func(*args, **(kwargs or {}))


class compressed_activations(Rounding):
    """A context around forward passes: what autograd saves in it is packed in 4 bits, until it is needed.

        activations = compressed_activations(parameters=model.parameters())
        with activations:
            loss = loss_of(model, batch)
        loss.backward()

    Packed are dense floating tensors of at least `min_numel` finite values, once however many nodes save
    them (by memory and version), except

    * weights and views of them: `nn.Parameter`, leaves that require a gradient, and whatever shares memory
      with `parameters`, which only detached tensors and `.data` need. Copies of weights (the casts of
      autocast, concatenations) are packed like activations;
    * what the functions `exact` save (by default those that exponentiate it, above all attention), what is
      saved inside `with activations.exact():`, and what shares memory with it, which would be kept anyway;
    * expanded tensors, tensor subclasses, and values so near the dtype's end that a block leaves its range.

    Decompositions (svd, inverse, ...) and attention kernels of other packages need `activations.exact()`.
    Inside `torch.compile` functions cannot be told apart, and a CUDA graph cannot be captured, since whether
    values are finite is looked at: use it with neither. A tensor that somebody else keeps alive, such as an
    input, is packed all the same, which saves nothing.

    Args:
        min_numel: smallest number of values that is packed.
        seed: of the noise.
        stochastic: unbiased rounding; False rounds to the nearest level, which is biased.
        parameters: tensors that stay in memory anyway: weights, and buffers. Where they lie is looked up at
            each forward pass.
        exact: functions whose saved tensors are kept; `()` for none.

    The object is used again for each forward pass. Raises ValueError for min_numel below 1, and RuntimeError
    when it is entered while in use.
    """

    def __init__(
        self,
        min_numel: int = 4096,
        seed: int = 0,
        *,
        stochastic: bool = True,
        parameters: Iterable[Tensor] = (),
        exact: Collection[Callable[..., Any]] = EXACT,
    ):
        if min_numel < 1:
            raise ValueError(f"min_numel={min_numel} must be at least 1: raise it.")
        super().__init__(seed, stochastic)
        self.min_numel = min_numel
        self._parameters = list(parameters)
        self._functions = exact
        self._entered: ExitStack | None = None
        self._exact_depth = 0
        self._weights: set[int] = set()  # their storages
        self._storages: dict[int, object] = {}  # weak references
        self._packed: WeakValueDictionary[tuple[Any, ...], Packed] = WeakValueDictionary()
        self._kept: dict[int, dict[tuple[Any, ...], int]] = {}  # by storage and view, bytes
        self._counts = (0, 0, 0)  # slots, original and compressed bytes
        self._kept_bytes = 0

    def __enter__(self) -> compressed_activations:
        if self._entered is not None:
            raise RuntimeError(
                "these compressed_activations are in use: leave their `with` block first, or make others."
            )
        self._weights = {p.untyped_storage()._cdata for p in self._parameters}
        self._counts = (0, 0, 0)
        self._kept_bytes = 0
        with ExitStack() as stack:
            stack.enter_context(saved_tensors_hooks(self._pack, lambda saved: saved.value()))
            if self._functions:
                stack.enter_context(_Watch(self._functions, self.exact))
            self._entered = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._entered is not None
        entered = self._entered
        self._entered = None
        self._packed.clear()
        self._kept.clear()
        self._storages.clear()
        entered.__exit__(*error)

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Keep what is saved inside as it is; has no effect outside the forward pass."""
        self._exact_depth += 1
        try:
            yield
        finally:
            self._exact_depth -= 1

    def memory_stats(self) -> dict[str, float]:
        """Return the bytes of the current or last forward pass.

        slots_used, original_bytes, compressed_bytes, compression_ratio and saved_pct count what was packed,
        once each; kept_bytes counts what was saved as it is, weights aside.
        """
        return {**statistics(*self._counts), "kept_bytes": self._kept_bytes}

    def _pack(self, tensor: Tensor) -> _Exact | _Saved:
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or self._is_weight(tensor):
            return _Exact(tensor)
        place = self._place(tensor)
        if self._exact_depth or place in self._kept or not self._packable(tensor):
            return self._keep(tensor, place)
        # the same memory, looked at in whatever way, is packed once
        dense = _is_dense(tensor)
        view: tuple[Any, ...] = (tensor.numel(),) if dense else (tensor.shape, tensor.stride())
        key = (place, tensor.storage_offset(), tensor.dtype, tensor._version, *view)
        packed = self._packed.get(key)
        if packed is None:
            memory = tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor
            try:
                packed = self._packed_form(memory)
            except FloatingPointError:
                return self._keep(tensor, place)
            self._packed[key] = packed
            slots, original, compressed = self._counts
            self._counts = (slots + 1, original + packed.original_bytes, compressed + packed.nbytes)
        return _Saved(packed, tensor, dense)

    def _is_weight(self, tensor: Tensor) -> bool:
        whole = tensor if tensor._base is None else tensor._base
        if isinstance(whole, nn.Parameter) or (whole.is_leaf and whole.requires_grad):
            return True
        return bool(self._weights) and tensor.untyped_storage()._cdata in self._weights

    def _place(self, tensor: Tensor) -> int:
        """Return the identity of a tensor's storage; a weak reference keeps it, and not the memory."""
        storage = tensor.untyped_storage()
        place: int = storage._cdata
        if place not in self._storages:
            self._storages[place] = weak_reference(storage)
        return place

    def _packable(self, tensor: Tensor) -> bool:
        return (
            tensor.numel() >= self.min_numel
            and tensor.dtype in DTYPES
            and not (tensor.is_neg() or tensor.is_meta)
            and tensor.nbytes <= tensor.untyped_storage().nbytes()  # not expanded
        )

    def _keep(self, tensor: Tensor, place: int) -> _Exact:
        """Count what keeping the tensor holds in memory: its bytes, and of a storage at most all."""
        views = self._kept.setdefault(place, {})
        room = tensor.untyped_storage().nbytes()
        before = min(sum(views.values()), room)
        views[(tensor.storage_offset(), tensor.shape, tensor.stride())] = tensor.nbytes
        self._kept_bytes += min(sum(views.values()), room) - before
        return _Exact(tensor)


def _is_dense(tensor: Tensor) -> bool:
    """Tell whether the values fill a stretch of memory, each place once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
