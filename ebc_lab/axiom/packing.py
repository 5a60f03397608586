"""Tensors in 4 bits a value, and numbered slots that keep them so.

A block of 64 values is kept as `lo` and `step` in bfloat16, rounded down and up so that lo … lo + 15·step
covers it, and q = floor((x - lo)/step + ξ) in 0…15 for each value, two q in a byte, the even one in its low
four bits: 36 bytes for 64 values. With ξ uniform in (0, 1) the rounding is unbiased and |error| < step; the
nearest level (ξ = ½) errs less in each value but always in the same direction (docs/axiom.md, "Activations").
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # values
TOP = 15  # highest q
STRETCH = 1 << 16  # values that take their noise from one place of the table; also the table's length
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SMALLEST = 0x00800000  # bits of the smallest normal float32, the least step: 1/step is finite


@contextmanager
def only_value_errors(owner: str) -> Iterator[None]:
    """Raise ValueError for whatever a state that is damaged, or another's, makes a load raise."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise ValueError(
            f"this is no state of {owner} ({why}): load what its state_dict() returned."
        ) from error


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
        """Draw where in the table each of the next stretches begins."""
        begins: list[int] = torch.randint(STRETCH, (stretches,), generator=self._generator).tolist()
        return begins

    def at(self, places: list[int], device: torch.device) -> Tensor:
        """Return the noise of stretches from `places` on, (len(places)·65536,) float32, not to be changed."""
        if device not in self._tables:
            self._tables[device] = self._tables[torch.device("cpu")].to(device)
        table = self._tables[device]
        if len(places) == 1:
            return table[places[0] : places[0] + STRETCH]
        chosen = torch.tensor(places, device=device)
        return table.unfold(0, STRETCH, 1)[chosen].view(-1)

    def state_dict(self) -> dict[str, Any]:
        """Return the seed and where the generator stands. Loads with `weights_only=True`."""
        return {"seed": self.seed, "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the bits that would have followed when `state` was taken.

        Raises ValueError, and nothing has changed, where it is no such state."""
        with only_value_errors("the noise"):
            seed = int(state["seed"])
            torch.Generator().set_state(state["generator"].cpu())
            self._generator.manual_seed(seed)
        self.seed = seed
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
        """Count 36 bytes for each block."""
        return self.codes.nbytes + self.lo.nbytes + self.step.nbytes

    @property
    def original_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@torch.no_grad()
def pack(x: Tensor, noise: Noise | None = None) -> Packed:
    """Pack a dense tensor of one of `DTYPES`, each value to the nearest level without `noise`.

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
    """Return lo + q·step in the tensor's shape and dtype, contiguous."""
    out = torch.empty(len(packed.codes), BLOCK, dtype=packed.dtype, device=packed.codes.device)
    _decode(packed, out)
    return out.view(-1)[: packed.shape.numel()].view(packed.shape)


def _ranges(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return lo and step of blocks (b, 64), (b,) float32 of bfloat16's bits: lo <= x <= lo + 15·step."""
    wide = torch.float64 if blocks.dtype is torch.float64 else torch.float32
    low = blocks.amin(1).to(wide)
    high = blocks.amax(1).to(wide)
    bits = _float32(low, -torch.inf).view(torch.int32)
    # downwards: a negative number's magnitude grows
    lo = torch.sub(bits, bits >> 31, alpha=0xFFFF).bitwise_and_(-0x10000).view(torch.float32)
    bits = _float32((high - lo) / TOP, torch.inf).view(torch.int32)
    bits = torch.add(bits, 0xFFFF).bitwise_and_(-0x10000).clamp_(min=SMALLEST)
    step = bits.view(torch.float32)
    # where a rounding error leaves the top uncovered, the next larger step
    short = torch.add(lo.to(wide), step, alpha=TOP) < high
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
    """Return x in float32, rounded towards an infinity."""
    if x.dtype is torch.float32:
        return x
    near = x.float()
    beyond = near > x if direction < 0 else near < x
    return torch.where(beyond, torch.nextafter(near, torch.full_like(near, direction)), near)


def _rows(device: torch.device) -> int:
    """Return the blocks worked on at a time: a stretch stays in a CPU's cache, a GPU takes many at once."""
    stretches = 1 if device.type == "cpu" else 64
    return stretches * STRETCH // BLOCK


def _parts(rows: int, *columns: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield `rows` rows of each column at a time."""
    return zip(*(torch.split(c, max(1, rows)) for c in columns), strict=True)


def _encode(blocks: Tensor, lo: Tensor, step: Tensor, noise: Noise | None, codes: Tensor) -> None:
    """Fill `codes`, (b, 32): (x - lo)/step is 15·(1 + 2^-22) at most, below 16 with the largest ξ too."""
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
            xi = noise.at(places[i * at_once : (i + 1) * at_once], x.device)[: x.numel()]
            torch.addcmul(xi.view(-1, BLOCK), scaled, inverse, out=scaled)
        q.copy_(scaled)  # towards zero: the floor
        pairs = q.view(torch.int32)  # the odd q in bits 16 to 19
        torch.bitwise_right_shift(pairs, 12, out=both)
        code.copy_(both.bitwise_or_(pairs))  # the low byte


def _decode(packed: Packed, out: Tensor) -> None:
    """Fill `out`, (blocks, 64) of the tensor's dtype, with the values of `packed`."""
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


def statistics(slots: int, original: int, compressed: int) -> dict[str, float]:
    """Return what slots and activations report; a ratio of 1 where nothing is packed."""
    return {
        "slots_used": slots,
        "original_bytes": original,
        "compressed_bytes": compressed,
        "compression_ratio": original / compressed if compressed else 1.0,
        "saved_pct": 100 * (1 - compressed / original) if original else 0.0,
    }


class Rounding:
    """Packs tensors with noise of its own: `seed` of it, `stochastic` for unbiased rounding."""

    def __init__(self, seed: int, stochastic: bool):
        self.stochastic = stochastic
        self._noise = Noise(seed)

    def _packed_form(self, x: Tensor) -> Packed:
        return pack(x, self._noise if self.stochastic else None)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the noise, and nothing that is packed. Loads with `weights_only=True`."""
        return self._noise.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the bits that would have followed when `state` was taken."""
        self._noise.load_state_dict(state)


class AXIOM_CHECKPOINT(Rounding):
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
        super().__init__(seed, stochastic)
        self.max_slots = max_slots
        self.max_n = max_n
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
        self._slots[slot] = self._packed_form(x)

    def restore(self, slot: int) -> Tensor:
        """Return the slot's tensor, of its shape and dtype, contiguous, on its device. It stays stored.

        Raises IndexError for a slot that does not exist, KeyError for an empty one.
        """
        self._check(slot)
        if slot not in self._slots:
            raise KeyError(f"slot {slot} is empty: store a tensor in it first.")
        return unpack(self._slots[slot])

    def memory_stats(self) -> dict[str, float]:
        """Return slots_used, original_bytes, compressed_bytes, compression_ratio, saved_pct of all slots."""
        stored = self._slots.values()
        return statistics(len(stored), sum(p.original_bytes for p in stored), sum(p.nbytes for p in stored))

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.max_slots:
            raise IndexError(f"slot {slot} does not exist: choose one of 0 to {self.max_slots - 1}.")
