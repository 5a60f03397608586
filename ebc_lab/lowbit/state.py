"""Adam whose moments lie in few bits between steps.

The arithmetic of a step is torch's own, on float32 moments, one quantized matrix after the other, so that
one matrix's float32 moments exist at a time. Between steps the moments lie in blocks of the flattened matrix,
each with a float32 maximum. With n weights of a matrix and `exp_avg` m, `exp_avg_sq` v:

| state | block | m | v | bits of both |
|---|---|---|---|---|
| `int8` | 256 | nearest multiple of max/127 | its root r, nearest multiple of max r/255, above 0 | 16.25 |
| `int8_linear` | 256 | the same | nearest multiple of max/255: small v become 0 | 16.25 |
| `ternary` | 64 | stochastic, 3 levels | stochastic, max·{1/256, 1/16, 1} | 4.2 |
| `five` | 64 | stochastic, 5 levels | stochastic, max·{1/256, 1/64, 1/16, 1/4, 1} | 5.67 |

A v that is rounded to 0 where m is not would divide m by eps alone: `int8` keeps every v above 0 there,
`int8_linear` shows what it is good for. The maths is in docs/lowbit.md, "Optimizer state".

Moments in blocks of 8 bits: Dettmers et al., arXiv:2110.02861; in 4, and why 0 must not be a level of v: Li,
Chen & Zhu, arXiv:2309.01507.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.adam import adam

from .backends.formulas import TOP
from .backends.tensors import torch_pack, torch_unpack
from .dispatch import default_dispatcher
from .levels import rounding_key

STREAM = 4096  # of matrix j, m draws from STREAM + 2j and v from STREAM + 2j + 1
M_TOP = 127
V_TOP = 255
LOWEST = -8  # log2 of the lowest level of v, as a share of the block's maximum
EXPONENT = 127  # of 1.0, as float32 stores it
CODES = ("exp_avg_codes", "exp_avg_sq_codes")
MAXIMA = ("exp_avg_max", "exp_avg_sq_max")

Packed = dict[str, Tensor]
Keys = tuple[int, int]


def in_blocks(flat: Tensor, size: int) -> Tensor:
    """Cut (n,) into blocks, (ceil(n/size), size), the last one filled up with zeros."""
    missing = -flat.numel() % size
    return (F.pad(flat, (0, missing)) if missing else flat).view(-1, size)


def quotient(values: Tensor, steps: Tensor) -> Tensor:
    """Return values/steps by rows, 0 where that is not finite: a step of 0, or a block that is not."""
    return (values / steps[:, None]).nan_to_num_(0.0, 0.0, 0.0)


def share(maxima: Tensor, parts: int) -> Tensor:
    """Return maxima/parts, divided: by a number of the host torch on CUDA multiplies with its reciprocal."""
    return maxima / torch.full((), float(parts), device=maxima.device)


class Bytes:
    """Moments in one byte each, to the nearest. `linear`: v itself in place of its root."""

    block = 256
    stochastic = False

    def __init__(self, linear: bool = False):
        self.linear = linear

    def pack(self, m: Tensor, v: Tensor, keys: Keys) -> Packed:
        """Turn float32 m, v, (n,), into int8, uint8 codes, (n,), and the blocks' maxima (of r or v)."""
        n = m.numel()
        blocks = in_blocks(m, self.block)
        m_max = blocks.abs().amax(1)
        m_codes = quotient(blocks, share(m_max, M_TOP)).round_().clamp_(-M_TOP, M_TOP)
        blocks = in_blocks(v, self.block)
        if not self.linear:
            blocks = blocks.sqrt()
        v_max = blocks.amax(1)
        v_codes = quotient(blocks, share(v_max, V_TOP))
        if not self.linear:
            v_codes = torch.maximum(v_codes, v_codes.sign())  # above 0 at least 1
        v_codes = v_codes.round_().clamp_(max=V_TOP)
        return {
            "exp_avg_codes": m_codes.view(-1)[:n].to(torch.int8),
            "exp_avg_max": m_max,
            "exp_avg_sq_codes": v_codes.view(-1)[:n].to(torch.uint8),
            "exp_avg_sq_max": v_max,
        }

    def unpack(self, packed: Packed, n: int) -> tuple[Tensor, Tensor]:
        """Turn what `pack` returned into flat float32 m and v, (n,)."""
        m = in_blocks(packed["exp_avg_codes"].float(), self.block)
        m = m * share(packed["exp_avg_max"], M_TOP)[:, None]
        v = in_blocks(packed["exp_avg_sq_codes"].float(), self.block)
        v = v * share(packed["exp_avg_sq_max"], V_TOP)[:, None]
        if not self.linear:
            v = v * v
        return m.view(-1)[:n], v.view(-1)[:n]


class Levels:
    """Moments in three or five levels, rounded at random without bias, packed."""

    block = 64
    stochastic = True

    def __init__(self, levels: str):
        self.levels = levels
        self.top = TOP[levels]
        self.octaves = 4 // self.top  # between neighbouring levels of v

    def pack(self, m: Tensor, v: Tensor, keys: Keys) -> Packed:
        """Turn flat float32 m and v, (n,), into uint8 packed codes of each, and the blocks' maxima."""
        backend = default_dispatcher()
        n = m.numel()
        blocks = in_blocks(m, self.block)
        m_max = blocks.abs().amax(1)
        y = quotient(blocks, share(m_max, self.top)).view(-1)[:n]
        m_codes = backend.stochastic(y, self.levels, 1.0, keys[0])
        blocks = in_blocks(v, self.block)
        v_max = blocks.amax(1)
        # v lies between two levels, powers of two of the maximum: a draw decides which
        below, y = self._position(quotient(blocks, v_max).view(-1)[:n])
        # for y within [0, 1] the ternary code is [u < y]; below the lowest level it is 0
        v_codes = below + backend.stochastic(y, "ternary", 1.0, keys[1])
        return {
            "exp_avg_codes": self._in_bytes(m_codes),
            "exp_avg_max": m_max,
            "exp_avg_sq_codes": self._in_bytes(v_codes),
            "exp_avg_sq_max": v_max,
        }

    def _position(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """Turn v/max, (n,), into the code of the level below, int8, and the share of the way to the next."""
        octave = (y.view(torch.int32) >> 23).sub_(EXPONENT + LOWEST)  # floor(log2 y) above the lowest level
        below = octave.bitwise_right_shift_(self.octaves.bit_length() - 1).clamp_(0, 2 * self.top - 1)
        low = self._power(below * self.octaves)
        gap = low * (2**self.octaves - 1)
        return below.sub_(self.top).to(torch.int8), y.sub_(low).div_(gap).clamp_(min=0)

    def _power(self, octaves: Tensor) -> Tensor:
        """Return 2^(int32 octaves above the lowest level), float32, put together from its bits."""
        return (octaves + (EXPONENT + LOWEST)).bitwise_left_shift_(23).view(torch.float32)

    def unpack(self, packed: Packed, n: int) -> tuple[Tensor, Tensor]:
        """Turn what `pack` returned into flat float32 m and v, (n,)."""
        m = in_blocks(self._codes(packed["exp_avg_codes"], n).float(), self.block)
        m = m * share(packed["exp_avg_max"], self.top)[:, None]
        octaves = (self._codes(packed["exp_avg_sq_codes"], n).int() + self.top) * self.octaves
        v = in_blocks(self._power(octaves), self.block) * packed["exp_avg_sq_max"][:, None]
        return m.view(-1)[:n], v.view(-1)[:n]

    # On a GPU nobody looks whether these are codes: the host would wait, and they are ours.

    def _in_bytes(self, codes: Tensor) -> Tensor:
        if codes.is_cuda:
            return torch_pack(codes, self.levels)
        return cast(Tensor, default_dispatcher().pack(codes, self.levels))

    def _codes(self, data: Tensor, n: int) -> Tensor:
        if data.is_cuda:
            return torch_unpack(data, n, self.levels)
        return cast(Tensor, default_dispatcher().unpack(data, n, self.levels))


FORMS: dict[str, Callable[[], Bytes | Levels]] = {
    "int8": Bytes,
    "int8_linear": lambda: Bytes(linear=True),
    "ternary": lambda: Levels("ternary"),
    "five": lambda: Levels("five"),
}


class QuantizedAdam(torch.optim.Adam):
    """torch's Adam with the moments of some matrices in few bits between steps; of the others it is torch's.

    Args:
        state: `int8`, `int8_linear`, `ternary` or `five`: see the module.
        quantized: the parameters whose moments are packed, in the run's order (their numbers j name the
            streams of random numbers); all of them among `params`, float32.
        seed: of the stochastic rounding, with the step and j.
        decoupled: weight decay as in AdamW, not added to the gradient.
        fused, capturable: torch's.

    A packed moment's state has `exp_avg_codes`, `exp_avg_max`, `exp_avg_sq_codes` and `exp_avg_sq_max`;
    `state_dict` and `load_state_dict` return them bit for bit. With `ternary` and `five` a step on CUDA reads
    the counts of steps on the host, once.

    Raises ValueError for an unknown state, and for a quantized parameter that is not float32 or not given.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        state: str,
        quantized: Sequence[Tensor],
        seed: int = 0,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        fused: bool | None = None,
        capturable: bool = False,
    ):
        if state not in FORMS:
            raise ValueError(f"state={state!r} is unknown: choose one of {', '.join(FORMS)}.")
        flags = {"fused": fused, "capturable": capturable, "decoupled_weight_decay": decoupled}
        super().__init__(params, lr, betas, eps, weight_decay, **flags)  # type: ignore[arg-type]
        self.form = state
        self.seed = seed
        self.streams = {p: STREAM + 2 * j for j, p in enumerate(quantized)}
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for j, p in enumerate(quantized):
            if id(p) not in known:
                raise ValueError(
                    f"quantized[{j}] is none of the optimizer's parameters: pass it in params too."
                )
            if p.dtype != torch.float32:
                raise ValueError(f"quantized[{j}] is {p.dtype}: its moments are packed from float32 only.")

    def __getstate__(self) -> dict[str, Any]:
        extra = {"form": self.form, "seed": self.seed, "streams": self.streams}
        return super().__getstate__() | extra

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Do one step of Adam from the gradients at hand -> the closure's loss, if there is a closure."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            packed = [p for p in group["params"] if p in self.streams]
            plain = [p for p in group["params"] if p not in self.streams]
            self._update(group, plain)
            moved = [p for p in packed if p.grad is not None]
            for p, count in zip(moved, self._counts(moved), strict=True):
                self._update_packed(group, p, count + 1)
        return loss

    def _update(self, group: dict[str, Any], params: Sequence[Tensor]) -> None:
        """Do torch's Adam on some parameters of a group; their float32 moments are in `self.state`."""
        lists: tuple[list[Tensor], ...] = ([], [], [], [], [], [])
        weights, gradients, m, v, unused, steps = lists
        has_complex = self._init_group({**group, "params": params}, *lists)  # type: ignore[no-untyped-call]
        names = ("lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "fused")
        adam(
            *(weights, gradients, m, v, unused, steps),
            **{name: group[name] for name in (*names, "decoupled_weight_decay")},
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            amsgrad=False,
            differentiable=False,
            has_complex=has_complex,
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
        )

    def _counts(self, params: Sequence[Tensor]) -> list[int]:
        """Count the updates of these parameters so far: all in one look where a GPU counts them."""
        if not FORMS[self.form]().stochastic:
            return [0] * len(params)  # nobody asks
        steps = [self.state[p]["step"] if self.state[p] else torch.zeros(()) for p in params]
        device = next((step.device for step in steps if not step.is_cpu), None)
        return [int(n) for n in torch.stack([step.to(device) for step in steps]).tolist()] if steps else []

    def _update_packed(self, group: dict[str, Any], p: Tensor, step: int) -> None:
        """Do the same on one parameter whose moments are packed: unpack, move and pack them again.

        `step` counts this update. Where torch moves nothing (`found_inf`), what it rounds is dropped.
        """
        form = FORMS[self.form]()
        state = self.state[p]
        if CODES[0] in state:
            m, v = form.unpack(state, p.numel())
            state["exp_avg"] = m.view(p.shape)
            state["exp_avg_sq"] = v.view(p.shape)
        self._update(group, [p])
        # the float32 moments of this matrix exist up to here
        m = state.pop("exp_avg").reshape(-1)
        v = state.pop("exp_avg_sq").reshape(-1)
        packed = form.pack(m, v, self._keys(p, step))
        bad = getattr(self, "found_inf", None)
        for name, new in packed.items():
            old = state.setdefault(name, new)
            # torch moved nothing where `bad`, so no second rounding may; in place, as torch's own moments
            old.copy_(new if bad is None else torch.where(bad > 0, old, new))

    def _keys(self, p: Tensor, step: int) -> Keys:
        """Return the keys of m and v of one parameter, at the count of its updates."""
        stream = self.streams[p]
        return rounding_key(self.seed, step, stream), rounding_key(self.seed, step, stream + 1)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load as torch, but keep codes and maxima as they are: torch casts state to the weights' dtype."""
        super().load_state_dict(dict(state_dict))
        numbers = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(numbers, params, strict=True):
            saved = state_dict["state"].get(i, {})
            for name in CODES + MAXIMA:
                if name in saved:
                    self.state[p][name] = saved[name].detach().clone().to(p.device)

    def state_bytes(self) -> int:
        """Count the bytes of all moments between steps, the plain ones included; 0 before the first."""
        tensors = [t for state in self.state.values() for name, t in state.items() if name != "step"]
        return sum(t.nbytes for t in tensors)

    @property
    def bits_per_weight(self) -> float:
        """Return the bits of both moments of a quantized weight, with maxima; 0 before the first step."""
        states = [(p.numel(), self.state[p]) for p in self.streams if p in self.state]
        size: int = sum(state[name].nbytes for _, state in states for name in CODES + MAXIMA)
        return 8 * size / max(1, sum(numel for numel, _ in states))
