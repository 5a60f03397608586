"""Activations in 4 bits: what autograd saves in the forward pass is packed until the backward pass needs it.

A block of 64 values is kept as `lo` and `step` in bfloat16, rounded down and up so that lo … lo + 15·step
covers it, and q = floor((x - lo)/step + ξ) in 0…15 for each value, two q in a byte, the even one in its low
four bits: 36 bytes for 64 values. With ξ uniform in (0, 1) the rounding is unbiased and |error| < step; the
nearest level (ξ = ½) errs less in each value but always in the same direction (docs/axiom.md, "Activations").

Unbiased values make an unbiased gradient only where the backward pass is linear in them. Where it
exponentiates them, as attention does when it recomputes its weights from queries, keys and their
log-sum-exp, an error of a few units becomes a factor of thousands: those functions keep theirs (`EXACT`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

BLOCK = 64  # values
TOP = 15  # highest q
STRETCH = 1 << 16  # values that take their noise from one place of the table; also the table's length
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALLEST = 0x00800000  # bits of the smallest normal float32

# functions whose backward pass exponentiates what they saved
EXACT: tuple[Callable[..., Any], ...] = (
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    F.softmax,
    F.softmin,
    F.log_softmax,
    F.cross_entropy,
    torch.softmax,
    torch.log_softmax,
    torch.logsumexp,
    torch.special.softmax,
    torch.special.log_softmax,
    torch.special.logsumexp,
    Tensor.softmax,
    Tensor.log_softmax,
    Tensor.logsumexp,
    torch.logcumsumexp,
    Tensor.logcumsumexp,
    F.ctc_loss,
)
weak_reference: Callable[[torch.UntypedStorage], object] = StorageWeakRef


class Noise:
    """Uniform numbers in (0, 1), from its own seed: a shuffled table, read from a random place on.

    The table holds each (k + ½)/65536 once, so every value's noise is uniform whatever the table, and no two
    values of a stretch share theirs. A place is drawn for each stretch of 65536 values, which leaves two
    stretches unrelated unless they draw the same one of 65536 places.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._generator = torch.Generator().manual_seed(seed)
        self._tables = {torch.device("cpu"): self._shuffled()}

    def _shuffled(self) -> Tensor:
        order = torch.randperm(STRETCH, generator=self._generator)
        table = (order.double() + 0.5) / STRETCH
        return table.float().repeat(2)  # a stretch may begin anywhere in the first half

    def places(self, stretches: int) -> list[int]:
        """Where in the table each of the next stretches begins."""
        drawn: list[int] = torch.randint(STRETCH, (stretches,), generator=self._generator).tolist()
        return drawn

    def at(self, places: list[int], device: torch.device) -> Tensor:
        """The noise of stretches that begin at `places`, (len(places)·65536,) float32; not to be changed."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        table = self._tables[device]
        if len(places) == 1:
            return table[places[0] : places[0] + STRETCH]
        chosen = torch.tensor(places, device=device)
        return table.unfold(0, STRETCH, 1)[chosen].view(-1)

    def state_dict(self) -> dict[str, Any]:
        """The seed and where the generator stands. Loads with `weights_only=True`."""
        return {"seed": self.seed, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the bits that would have followed when `state` was taken."""
        self.seed = int(state["seed"])
        self._generator.manual_seed(self.seed)
        self._tables = {torch.device("cpu"): self._shuffled()}
        self._generator.set_state(state["generator"].cpu())


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in 4 bits a value.

    `codes` is uint8 (blocks, 32), `lo` and `step` are bfloat16 (blocks,); shape and dtype are the tensor's.
    """

    codes: Tensor
    lo: Tensor
    step: Tensor
    shape: torch.Size
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """36 bytes for each block."""
        return self.codes.nbytes + self.lo.nbytes + self.step.nbytes

    @property
    def original_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@torch.no_grad()
def pack(x: Tensor, noise: Noise | None = None) -> Packed:
    """A dense tensor of one of `DTYPES` -> its 4-bit form, to the nearest level without `noise`.

    Blocks follow the row-major order of x. The last one is filled up with repetitions of the last value,
    which leaves its range as it is. Raises TypeError for other tensors, and FloatingPointError where a value
    is not finite or a block's range, as rounded, leaves that of x's dtype or of float32.
    """
    if x.dtype not in DTYPES or x.layout is not torch.strided:
        raise TypeError(f"a tensor of {x.dtype} ({x.layout}) cannot be packed: give dense floating values.")
    flat = x.detach().reshape(-1)
    missing = -flat.numel() % BLOCK
    if missing:
        flat = torch.cat([flat, flat[-1:].expand(missing)])
    blocks = flat.view(-1, BLOCK)
    lo, step = _ranges(blocks)
    codes = torch.empty(len(blocks), BLOCK // 2, dtype=torch.uint8, device=x.device)
    if len(blocks):
        _encode(blocks, lo, step, noise, codes)
    return Packed(codes, lo.to(torch.bfloat16), step.to(torch.bfloat16), x.shape, x.dtype)


@torch.no_grad()
def unpack(packed: Packed) -> Tensor:
    """lo + q·step in the tensor's shape and dtype, contiguous."""
    out = torch.empty(len(packed.codes), BLOCK, dtype=packed.dtype, device=packed.codes.device)
    _decode(packed, out)
    return out.view(-1)[: packed.shape.numel()].view(packed.shape)


def _ranges(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(b, 64) -> lo and step, (b,) float32 with the bits of a bfloat16: lo <= values <= lo + 15·step.

    A step is at least the smallest normal number, so that a constant block can be divided by it.
    """
    wide = torch.float64 if blocks.dtype is torch.float64 else torch.float32
    low = blocks.amin(1).to(wide)
    high = blocks.amax(1).to(wide)
    bits = _float32(low, -torch.inf).view(torch.int32)
    # downwards: a negative number's magnitude grows
    lo = torch.sub(bits, bits >> 31, alpha=0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    bits = _float32((high - lo) / TOP, torch.inf).view(torch.int32)
    bits = torch.add(bits, 0xFFFF).bitwise_and_(-0x10000).clamp_(min=SMALLEST)
    step = bits.view(torch.float32)
    short = torch.add(lo.to(wide), step, alpha=TOP) < high  # by a rounding error
    bits.add_(short, alpha=0x10000)
    top = torch.add(lo.to(wide), step, alpha=TOP)
    limit = min(torch.finfo(blocks.dtype).max, torch.finfo(torch.float32).max)
    if not bool(((high <= top) & (torch.maximum(top, -lo) <= limit)).all()):
        raise FloatingPointError(
            "the tensor has values that are not finite, or too large to pack: pack finite values well within "
            f"the range of {blocks.dtype}."
        )
    return lo, step


def _float32(x: Tensor, direction: float) -> Tensor:
    """x in float32, rounded towards an infinity."""
    if x.dtype is torch.float32:
        return x
    near = x.float()
    beyond = near > x if direction < 0 else near < x
    return torch.where(beyond, torch.nextafter(near, torch.full_like(near, direction)), near)


def _rows(device: torch.device) -> int:
    """Blocks that are worked on at a time: a stretch stays in a CPU's cache, a GPU takes many at once."""
    stretches = 1 if device.type == "cpu" else 64
    return stretches * STRETCH // BLOCK


def _parts(rows: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """`rows` rows of each column at a time."""
    return zip(*(torch.split(c, max(1, rows)) for c in columns), strict=True)


def _encode(blocks: Tensor, lo: Tensor, step: Tensor, noise: Noise | None, codes: Tensor) -> None:
    """Fill `codes`, (b, 32).

    (x - lo)/step is at most 15·(1 + 2^-22), so with the largest ξ, 1 - 2^-17, it stays below 16.
    """
    most = min(_rows(blocks.device), len(blocks))
    scaled = torch.empty(most, BLOCK, device=blocks.device)
    q = torch.empty(most, BLOCK, dtype=torch.int16, device=blocks.device)
    both = torch.empty(most, BLOCK // 2, dtype=torch.int32, device=blocks.device)
    at_once = -(-most * BLOCK // STRETCH)  # stretches
    places = [] if noise is None else noise.places(-(-blocks.numel() // STRETCH))
    parts = _parts(most, blocks, lo[:, None], step.reciprocal()[:, None], codes)
    for i, (x, low, inverse, code) in enumerate(parts):
        if len(x) < most:
            scaled, q, both = scaled[: len(x)], q[: len(x)], both[: len(x)]
        torch.sub(x, low, out=scaled)
        if noise is None:
            scaled.mul_(inverse).add_(0.5)
        else:
            drawn = noise.at(places[i * at_once : (i + 1) * at_once], x.device)[: x.numel()]
            torch.addcmul(drawn.view(-1, BLOCK), scaled, inverse, out=scaled)
        q.copy_(scaled)  # towards zero: the floor
        pairs = q.view(torch.int32)  # the odd q in bits 16 to 19
        torch.bitwise_right_shift(pairs, 12, out=both)
        code.copy_(both.bitwise_or_(pairs))  # the low byte


def _decode(packed: Packed, out: Tensor) -> None:
    """Fill `out`, (b, 64) of the tensor's dtype."""
    most = min(_rows(out.device), len(out))
    spread = torch.empty(most, BLOCK // 2, dtype=torch.int16, device=out.device)
    shifted = torch.empty_like(spread)
    product = torch.empty(most, BLOCK, device=out.device)
    wide = torch.float64 if out.dtype is torch.float64 else torch.float32
    parts = _parts(most, packed.codes, packed.lo.to(wide)[:, None], packed.step.float()[:, None], out)
    for code, low, step, values in parts:
        if len(code) < most:
            spread, shifted, product = spread[: len(code)], shifted[: len(code)], product[: len(code)]
        spread.copy_(code)
        torch.bitwise_left_shift(spread, 4, out=shifted)
        spread.bitwise_or_(shifted).bitwise_and_(0x0F0F)  # the even q in the low byte, the odd in the high
        product.copy_(spread.view(torch.uint8))
        torch.add(product.mul_(step), low, out=values)


def _statistics(slots: int, original: int, compressed: int) -> dict[str, float]:
    """What both classes below report; a ratio of 1 where nothing is packed."""
    return {
        "slots_used": slots,
        "original_bytes": original,
        "compressed_bytes": compressed,
        "compression_ratio": original / compressed if compressed else 1.0,
        "saved_pct": 100 * (1 - compressed / original) if original else 0.0,
    }


class AXIOM_CHECKPOINT:
    """Tensors kept in 4 bits in numbered slots.

    Args:
        max_slots: slots, numbered from 0.
        max_n: most values of one tensor.
        seed: of the noise.
        stochastic: unbiased rounding; False rounds to the nearest level.

    Raises ValueError for max_slots or max_n below 1.
    """

    def __init__(
        self, max_slots: int = 32, max_n: int = 4 * 512 * 4096, *, seed: int = 0, stochastic: bool = True
    ):
        if max_slots < 1 or max_n < 1:
            raise ValueError(f"max_slots={max_slots} and max_n={max_n} must both be at least 1: raise them.")
        self.max_slots = max_slots
        self.max_n = max_n
        self.stochastic = stochastic
        self._noise = Noise(seed)
        self._slots: dict[int, Packed] = {}

    def store(self, x: Tensor, slot: int) -> None:
        """Pack x into a slot, in place of what it held; after an error it still holds that.

        Raises IndexError for a slot that does not exist, TypeError for a tensor that is not dense and
        floating, ValueError for one of more than max_n values, and FloatingPointError for NaN, infinities
        and values next to the end of the dtype's range.
        """
        self._check(slot)
        if not isinstance(x, Tensor):
            raise TypeError(f"a {type(x).__name__} cannot be stored: give a tensor of floating values.")
        if x.numel() > self.max_n:
            raise ValueError(f"{x.numel()} values are more than max_n={self.max_n}: raise max_n.")
        self._slots[slot] = pack(x, self._noise if self.stochastic else None)

    def restore(self, slot: int) -> Tensor:
        """The slot's tensor, of its shape and dtype, contiguous, on its device. It stays stored.

        Raises IndexError for a slot that does not exist, KeyError for an empty one.
        """
        self._check(slot)
        if slot not in self._slots:
            raise KeyError(f"slot {slot} is empty: store a tensor in it first.")
        return unpack(self._slots[slot])

    def memory_stats(self) -> dict[str, float]:
        """slots_used, original_bytes, compressed_bytes, compression_ratio and saved_pct of what is stored."""
        held = self._slots.values()
        return _statistics(len(held), sum(p.original_bytes for p in held), sum(p.nbytes for p in held))

    def state_dict(self) -> dict[str, Any]:
        """The state of the noise; what the slots hold is not part of it. Loads with `weights_only=True`."""
        return self._noise.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the noise that would have followed when `state` was taken."""
        self._noise.load_state_dict(state)

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise IndexError(f"slot {slot} does not exist: choose one of 0 to {self.max_slots - 1}.")


class _Kept:
    """A saved tensor that stays as it is, without its part of the graph, which would be a cycle."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def value(self) -> Tensor:
        """The tensor; RuntimeError if it was changed since: autograd does not look behind hooks."""
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
        """The tensor, unpacked anew each time."""
        values = unpack(self.packed)
        return values if self.stride is None else values.as_strided(self.shape, self.stride)


class _Watch(TorchFunctionMode):
    """Calls of `functions` are made with `around()` entered."""

    def __init__(self, functions: Collection[Callable[..., Any]], around: Callable[[], Any]):
        super().__init__()
        self.functions = frozenset(functions)
        self.around = around

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self.functions:
            return func(*args, **(kwargs or {}))
        with self.around():
            return func(*args, **(kwargs or {}))


class compressed_activations:
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
        self.min_numel = min_numel
        self.stochastic = stochastic
        self._noise = Noise(seed)
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
            stack.enter_context(saved_tensors_hooks(self._pack, _unpack))
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
        """What is saved inside is kept as it is; has no effect outside the forward pass."""
        self._exact_depth += 1
        try:
            yield
        finally:
            self._exact_depth -= 1

    def memory_stats(self) -> dict[str, float]:
        """Bytes of the current or last forward pass.

        slots_used, original_bytes, compressed_bytes, compression_ratio and saved_pct count what was packed,
        once each; kept_bytes counts what was saved as it is, weights aside.
        """
        return {**_statistics(*self._counts), "kept_bytes": self._kept_bytes}

    def state_dict(self) -> dict[str, Any]:
        """The state of the noise. Loads with `weights_only=True`."""
        return self._noise.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Pack the next forward passes with the bits that followed when `state` was taken."""
        self._noise.load_state_dict(state)

    def _pack(self, tensor: Tensor) -> _Kept | _Saved:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout is not torch.strided:
            return _Kept(tensor)
        if self._is_weight(tensor):
            return _Kept(tensor)
        place = self._place(tensor)
        if self._exact_depth or place in self._kept or not self._packable(tensor):
            return self._keep(tensor, place)
        dense = _is_dense(tensor)
        view: tuple[Any, ...] = (tensor.numel(),) if dense else (tensor.shape, tensor.stride())
        key = (place, tensor.storage_offset(), tensor.dtype, tensor._version, *view)
        packed = self._packed.get(key)
        if packed is None:
            memory = tensor.as_strided((tensor.numel(),), (1,)) if dense else tensor
            try:
                packed = pack(memory, self._noise if self.stochastic else None)
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
        """The identity of a tensor's storage, which no other takes in this forward pass.

        The weak reference frees the storage's memory with its last tensor, but not its identity.
        """
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

    def _keep(self, tensor: Tensor, place: int) -> _Kept:
        """Count what keeping the tensor holds in memory: its bytes, and of a storage at most all."""
        views = self._kept.setdefault(place, {})
        room = tensor.untyped_storage().nbytes()
        before = min(sum(views.values()), room)
        views[(tensor.storage_offset(), tensor.shape, tensor.stride())] = tensor.nbytes
        self._kept_bytes += min(sum(views.values()), room) - before
        return _Kept(tensor)


def _unpack(saved: _Kept | _Saved) -> Tensor:
    return saved.value()


def _is_dense(tensor: Tensor) -> bool:
    """Whether the values fill a stretch of memory, each place once, in whatever order."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True
