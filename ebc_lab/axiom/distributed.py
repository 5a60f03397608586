"""Gradients between workers, which send each other the largest of each block, in 4 bits (docs/axiom.md).

A gradient is cut into blocks of 256 values, the last one filled up with zeros. Of each block the k largest
magnitudes are sent, k = 2·round(256·percent/200): s, the largest of all, in bfloat16; q = rint(7v/s) of each,
from -7 to 7, stored as q + 8 in 4 bits, two a byte, the first of the two in the low bits; and its position in
the block, one byte. At 6.25 percent, k = 16, that is 26 bytes in place of 1024, 39.4 times less.

Every worker chooses other positions, so the messages cannot be added up on their way as a ring all-reduce
does: each worker receives all of them, and the saving falls with their number (`AXIOM_DDP.bandwidth`).
`compress` puts the k of a block into an order that their values, positions and s decide, which costs no byte.
`decompress` refuses any other: a sum of payloads has it by chance only, one in k! for each block.

The largest elements alone: Lin et al., arXiv:1712.01887; with what was left out added to the next step:
Stich, Cordonnier & Jaggi, arXiv:1809.07599, and Karimireddy et al., arXiv:1901.09847.
"""

# Annotations are evaluated here, as DistributedDataParallel compares those of a hook with the classes.
import math
import operator
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from .packing import only_value_errors

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket, ProcessGroup
elif dist.is_available():
    from torch.distributed import GradBucket, ProcessGroup
else:  # a torch built without it: AXIOM_DDP works
    GradBucket = ProcessGroup = Any

BLOCK = 256
TOP = 7  # q of the largest value
SCALE_BYTES = 2
LARGEST_SCALE = torch.finfo(torch.bfloat16).max
NOT_A_NUMBER = 0xFF  # as both bytes of a bfloat16
WORD = 2**32 - 1
ODD = 0x2C1B3C6D  # of 30 bits: its product with 32 bits fits an int64


class AXIOM_DDP:
    """Compresses gradients of n values; it keeps nothing between calls.

    Args:
        n: values of the gradient.
        top_k_percent: how many of them are sent, above 0 and at most 100; k of each block, at least 2.

    Raises TypeError where n is no number, ValueError where either is out of range.
    """

    def __init__(self, n: int, top_k_percent: float = 6.25):
        if not isinstance(n, int):
            raise TypeError(
                f"AXIOM_DDP takes the number of values of a gradient, not a {type(n).__name__}: of a model, "
                "wrap it in DistributedDataParallel and register_comm_hook(AxiomDDPState(), axiom_hook)."
            )
        if n < 1:
            raise ValueError(f"a gradient of n={n} values cannot be cut into blocks: give n of at least 1.")
        self.n = n
        self.top_k_percent = top_k_percent
        self.k = _sent_of(top_k_percent)
        self.blocks = _blocks_of(n)

    @torch.no_grad()
    def compress(self, g: Tensor) -> tuple[Tensor, Tensor, int]:
        """Compress a gradient of n values, of any shape, strides and floating dtype, to (vals, idx, count).

        vals is uint8 (blocks, 2 + k/2): s, then the q. idx is uint8 (blocks, k): the positions, in the order
        that `decompress` knows. count is blocks·k. Both lie where g does. Payloads of several workers are to
        be gathered, decompressed one by one, and averaged then, as `axiom_hook` does: they have no sum.

        Raises TypeError for a sparse gradient or one that is not floating, ValueError for one of another
        length, FloatingPointError for one that is not finite in float32.
        """
        if g.layout != torch.strided or not g.is_floating_point():
            kind = g.dtype if g.layout == torch.strided else g.layout
            raise TypeError(f"a gradient of {kind} cannot be compressed: give a dense floating-point one.")
        if g.numel() != self.n:
            raise ValueError(
                f"a gradient of another length, {g.numel()} values in place of {self.n}: make an AXIOM_DDP "
                "for each length."
            )
        rows = _in_rows([g])
        if not rows.isfinite().all():
            raise FloatingPointError(
                "the gradient has values that are NaN or infinite in float32: skip this step or lower the "
                "learning rate."
            )
        vals, idx = _encode(rows, self.k)
        codes = _codes(vals)
        order = _keys(vals, codes, idx).argsort(1)
        vals = torch.cat((vals[:, :SCALE_BYTES], _packed(codes.gather(1, order))), 1)
        return vals, idx.gather(1, order), self.blocks * self.k

    @torch.no_grad()
    def decompress(self, vals: Tensor, idx: Tensor, count: int) -> Tensor:
        """Turn what `compress` returned into s·q/7 at its positions and 0 elsewhere, float32 (n,).

        Raises TypeError where vals or idx is not uint8, ValueError for a payload of another size, or one that
        is not as `compress` returned it, such as the sum of several that an all-reduce makes.
        """
        if vals.dtype != torch.uint8 or idx.dtype != torch.uint8:
            raise TypeError(
                f"a payload of {vals.dtype} and {idx.dtype} cannot be read: give the uint8 tensors that "
                "compress returned."
            )
        sizes = (tuple(vals.shape), tuple(idx.shape), count)
        wanted = ((self.blocks, SCALE_BYTES + self.k // 2), (self.blocks, self.k), self.blocks * self.k)
        if sizes != wanted:
            raise ValueError(
                f"a payload of another size, {sizes} in place of {wanted}: decompress with the n and "
                "top_k_percent it was compressed with."
            )
        if not (_keys(vals, _codes(vals), idx).diff(dim=1) > 0).all():
            raise ValueError(
                "the payload is not as compress returned it, or is the sum of several workers', which means "
                "nothing: send vals and idx by all_gather instead of all_reduce, decompress each and average "
                "them, or register axiom_hook, which does that."
            )
        values, positions = _decode(vals, idx)
        rows = torch.zeros(self.blocks, BLOCK, device=vals.device)
        return rows.scatter_(1, positions, values).view(-1)[: self.n]

    def payload_bytes(self) -> int:
        """Count the bytes of one message: 2 + k/2 + k for each block."""
        return self.blocks * (SCALE_BYTES + self.k // 2 + self.k)

    def bandwidth(self, world: int) -> dict[str, float]:
        """Return what a worker among `world` receives for one gradient, in bytes.

        `ring_all_reduce_bytes` of float32 gradients, 2(world - 1)/world·4n; `all_gather_bytes` of the
        others' messages, (world - 1)·payload_bytes(); and `ratio`, the first over the second.
        Raises ValueError for fewer than 2 workers, who send nothing.
        """
        if world < 2:
            raise ValueError(f"nothing is sent among {world} workers: ask for the bandwidth of 2 or more.")
        dense = 2 * (world - 1) / world * 4 * self.n
        gathered = (world - 1) * self.payload_bytes()
        return {"ring_all_reduce_bytes": dense, "all_gather_bytes": gathered, "ratio": dense / gathered}


class AxiomDDPState:
    """The settings and residuals of `axiom_hook`: register it with a model by `register_comm_hook`.

    Args:
        top_k_percent: as of AXIOM_DDP.
        error_feedback: whether what a step leaves out is added to the worker's next gradient. Costs a
            float32 copy of the parameters, and may want a lower learning rate: what is late comes on top.
        process_group: of the workers; None: all of them.

    `sent` counts the bytes of this worker's messages, each once however many workers receive it; `dense` what
    the same gradients are in float32, 4 B a value. A state serves one model. It may be pickled, without its
    process group. Raises ValueError for a top_k_percent out of range.
    """

    def __init__(
        self,
        top_k_percent: float = 6.25,
        error_feedback: bool = True,
        process_group: ProcessGroup | None = None,
    ):
        self.top_k_percent = top_k_percent
        self.k = _sent_of(top_k_percent)
        self.error_feedback = error_feedback
        self.process_group = process_group
        self.sent = 0
        self.dense = 0
        # By buckets of the first backward: parameters of equal models are met in the same order only there,
        # as DistributedDataParallel rebuilds its buckets after it.
        self._residuals: list[list[Tensor]] = []
        self._met = 0  # of these lists, how many belong to parameters already
        self._residual_of: dict[Tensor, Tensor] = {}

    def residuals_of(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Return what earlier steps left out of a bucket's gradients: float32, zeros at first.

        They are the state's own, to be changed in place, and lie in memory as the parameters do.
        Raises ValueError where loaded residuals are of other shapes than the parameters.
        """
        new = [p for p in parameters if p not in self._residual_of]
        if new:  # the first backward: its buckets are met in their order, loaded residuals too
            if self._met == len(self._residuals):
                self._residuals.append([_zeros_for(p) for p in new])
            residuals = self._residuals[self._met]
            _check_shapes(residuals, new)
            residuals[:] = [_zeros_for(p).copy_(r) for r, p in zip(residuals, new, strict=True)]
            self._residual_of.update(zip(new, residuals, strict=True))
            self._met += 1
        return [self._residual_of[p] for p in parameters]

    def state_dict(self) -> dict[str, Any]:
        """Return this worker's residuals, copied, and both counts; loads with `weights_only=True`.

        Each worker has residuals of its own: save them all. A run that goes on with the weights, optimizers
        and these of another, with the same settings of DistributedDataParallel, repeats it bit for bit.
        """
        return {"residuals": _copies(self._residuals), "sent": self.sent, "dense": self.dense}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue as the worker of this rank that `state` was taken from.

        Raises ValueError when it has residuals but this state has no error feedback, or when they are not of
        this model's parameters and buckets; before the first backward, that is noticed in it.
        """
        with only_value_errors("AxiomDDPState"):
            loaded = _copies(state["residuals"])
            counts = operator.index(state["sent"]), operator.index(state["dense"])
        if loaded and not self.error_feedback:
            raise ValueError(
                "the saved state has residuals of error feedback: set error_feedback=True to use it."
            )
        if self._met:
            own, saved = (list(chain.from_iterable(buckets)) for buckets in (self._residuals, loaded))
            _check_shapes(own, saved)
            for r, other in zip(own, saved, strict=True):
                r.copy_(other)
        else:
            self._residuals = loaded
        self.sent, self.dense = counts

    def __getstate__(self) -> dict[str, Any]:
        arguments = {"top_k_percent": self.top_k_percent, "error_feedback": self.error_feedback}
        return {"arguments": arguments, "state": self.state_dict()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        AxiomDDPState.__init__(self, **pickled["arguments"])
        self.load_state_dict(pickled["state"])


@torch.no_grad()
def axiom_hook(state: AxiomDDPState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Exchange a bucket's gradients: `model.register_comm_hook(AxiomDDPState(), axiom_hook)`.

    With e the gradient plus its residual, the residual becomes e - decompress(compress(e)) and the gradient
    the mean of what all workers' messages decompress to, added in the order of ranks: it has the same bits on
    every worker. Every parameter is cut into blocks by itself, in its order in memory, so that these bits
    depend neither on `bucket_cap_mb` nor on the rebuilding of buckets.

    Where one worker has a gradient that is not finite, none is left waiting: as of an all-reduce, the mean of
    the bucket is NaN on all workers. That one keeps its residuals, of the others what they sent is lost.

    Raises TypeError for sparse gradients, ValueError for loaded residuals of another model.
    """
    if bucket.buffer().layout != torch.strided:
        raise TypeError("sparse gradients cannot be cut into blocks: build the embedding with sparse=False.")
    gradients = bucket.gradients()
    rows = _in_rows(gradients)
    own_residuals = state.residuals_of(bucket.parameters()) if state.error_feedback else []
    # in the order of memory, as the gradients of a bucket lie, which need not be that of their indices
    residuals = [r.as_strided((r.numel(),), (1,)) for r in own_residuals]
    parts = _parts(rows, gradients) if residuals else []
    for part, residual in zip(parts, residuals, strict=True):
        part.add_(residual)
    finite = rows.isfinite().all()  # not looked at: on a GPU the host would wait for it
    vals, idx = _encode(rows, state.k)
    if residuals:
        values, positions = _decode(vals, idx)
        rows.scatter_add_(1, positions, -values)
    for part, residual in zip(parts, residuals, strict=True):
        residual.copy_(torch.where(finite, part, residual))
    vals[:, :SCALE_BYTES].masked_fill_(~finite, NOT_A_NUMBER)
    return _mean_of_all(state, bucket, torch.cat((vals, idx), 1))


def _mean_of_all(state: AxiomDDPState, bucket: GradBucket, message: Tensor) -> torch.futures.Future[Tensor]:
    """Send `message`, (blocks, bytes of a block); later, the bucket's buffer holds the mean of all."""
    group = state.process_group or dist.group.WORLD
    buffer = bucket.buffer()
    gradients = bucket.gradients()
    received = message.new_empty(dist.get_world_size(group), *message.shape)
    work = dist.all_gather(list(received), message, group=group, async_op=True)
    state.sent += message.nbytes
    state.dense += 4 * buffer.numel()

    @torch.no_grad()
    def into_buffer(future: torch.futures.Future[Any]) -> Tensor:
        future.value()  # raises what went wrong on the way
        if received.is_cuda:  # a stream of the callback's own reads it: not to be given away meanwhile
            received.record_stream(torch.cuda.current_stream(received.device))
        rows = _mean(received, state.k)
        for gradient, part in zip(gradients, _parts(rows, gradients), strict=True):
            gradient.view(-1).copy_(part)
        return buffer

    mean: torch.futures.Future[Tensor] = work.get_future().then(into_buffer)
    return mean


def _mean(messages: Tensor, k: int) -> Tensor:
    """Average messages (world, blocks, bytes), in order: float32 (blocks, 256), all NaN where one is."""
    world, blocks, _ = messages.shape
    total = torch.zeros(blocks, BLOCK, device=messages.device)
    finite = torch.ones((), dtype=torch.bool, device=messages.device)
    for message in messages:
        values, positions = _decode(message[:, :-k], message[:, -k:])
        total.scatter_add_(1, positions, values)
        finite &= values.isfinite().all()
    return total.div_(world).masked_fill_(~finite, torch.nan)


def _sent_of(percent: float) -> int:
    """Return how many values of each block are sent, an even number from 2 to 256."""
    k = 2 * round(BLOCK * percent / 200) if 0 < percent <= 100 else 0
    if k < 2:
        raise ValueError(
            f"top_k_percent={percent} does not keep 2 to 256 values of a block of 256: give one from 0.4 "
            "to 100."
        )
    return k


def _blocks_of(n: int) -> int:
    return math.ceil(n / BLOCK)


def _in_rows(gradients: Sequence[Tensor]) -> Tensor:
    """Cut gradients into blocks, float32 (blocks, 256), each gradient from a block of its own."""
    blocks = sum(_blocks_of(g.numel()) for g in gradients)
    rows = torch.zeros(blocks, BLOCK, device=gradients[0].device)
    for part, g in zip(_parts(rows, gradients), gradients, strict=True):
        part.copy_(g.reshape(-1))
    return rows


def _parts(rows: Tensor, gradients: Sequence[Tensor]) -> list[Tensor]:
    """Return where the gradients lie in the rows: views, (values of a gradient,)."""
    blocks = torch.split(rows, [_blocks_of(g.numel()) for g in gradients])
    return [part.view(-1)[: g.numel()] for part, g in zip(blocks, gradients, strict=True)]


def _encode(rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Encode blocks, float32 (blocks, 256), as vals and idx of `AXIOM_DDP.compress`."""
    magnitudes = rows.abs()
    positions = magnitudes.topk(k, dim=1, sorted=False).indices
    scale = magnitudes.amax(1, keepdim=True).clamp_(max=LARGEST_SCALE).to(torch.bfloat16)
    eighths = rows.gather(1, positions).mul_(TOP / 8)  # 7v/8 over s/8: 7v may overflow
    codes = eighths.div_(scale.float() / 8).nan_to_num_(0.0, 0.0, 0.0)  # where s is 0
    stored = codes.round_().clamp_(-TOP, TOP).add_(TOP + 1).to(torch.uint8)
    return torch.cat((scale.view(torch.uint8), _packed(stored)), 1), positions.to(torch.uint8)


def _decode(vals: Tensor, idx: Tensor) -> tuple[Tensor, Tensor]:
    """Decode vals and idx: values s·q/7, float32, and positions, int64, both (blocks, k)."""
    scale = vals[:, :SCALE_BYTES].clone(memory_format=torch.contiguous_format).view(torch.bfloat16)
    # divided by a tensor: by a number of the host CUDA multiplies with its reciprocal
    sevenths = (_codes(vals).float() - (TOP + 1)) / torch.full((), float(TOP), device=vals.device)
    return sevenths * scale.float(), idx.long()


def _packed(stored: Tensor) -> Tensor:
    """Pack q + 8, uint8 (blocks, k), two a byte."""
    return stored[:, ::2] | (stored[:, 1::2] << 4)


def _codes(vals: Tensor) -> Tensor:
    """Return q + 8 of the values, uint8 (blocks, k)."""
    packed = vals[:, SCALE_BYTES:]
    return torch.stack((packed & 15, packed >> 4), 2).flatten(1)


def _keys(vals: Tensor, codes: Tensor, idx: Tensor) -> Tensor:
    """Return what rises along each block of `compress`, int64 (blocks, k), no two of a block being equal.

    A value's key is a hash of itself, its position, and of a number that all of its block and the block's
    place decide: equal blocks have orders of their own.
    """
    pairs = idx.long() << 4 | codes
    low, high = vals[:, :SCALE_BYTES].long().unbind(1)
    place = torch.arange(len(vals), device=vals.device)
    whole = _mixed(pairs).sum(1) + _mixed((place << 16 | high << 8 | low) & WORD)
    return _mixed(pairs ^ (whole & WORD)[:, None])


def _mixed(x: Tensor) -> Tensor:
    """Map integers of 32 bits one to one onto others, so that one bit changes about half of all."""
    for _ in range(2):
        x = ((x >> 16 ^ x) * ODD) & WORD
    return x >> 16 ^ x


def _zeros_for(p: Tensor) -> Tensor:
    """Make zeros in float32, of p's shape and order in memory."""
    return torch.zeros_like(p, dtype=torch.float32)


def _copies(buckets: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    return [[r.detach().clone() for r in bucket] for bucket in buckets]


def _check_shapes(residuals: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Raise ValueError where residuals are not of these shapes."""
    shapes = [tuple(t.shape) for t in residuals]
    needed = [tuple(t.shape) for t in wanted]
    if shapes != needed:
        raise ValueError(
            f"residuals of the shapes {shapes} do not fit the bucket's {needed}: load the state of the same "
            "model, wrapped with the same bucket_cap_mb."
        )
