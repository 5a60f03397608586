"""Windows of images: patches for a convolution as a matrix product, and means of tiles, with gradients.

Images are (B, C, H, W) float32. Where windows overlap, a pixel's gradient is the sum of those of its places
in the windows, added in float64 one place after another, in row order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .bits import divided, tree_sum

Pair = tuple[int, int]


def pair(value: int | Pair, name: str, least: int) -> Pair:
    """Return a number, or two of them, as two. ValueError unless these are whole and `least` at least."""
    both = value if isinstance(value, tuple | list) else (value, value)
    if len(both) != 2 or not all(isinstance(v, int) and v >= least for v in both):
        raise ValueError(f"{name} takes a whole number, {least} or more, or two of them, not {value!r}.")
    return both[0], both[1]


def counts(H: int, W: int, kernel: Pair, stride: Pair, padding: Pair) -> Pair:
    """Return how many windows there are, down and across. ValueError where not even one fits."""
    sizes = zip((H, W), kernel, stride, padding, strict=True)
    down, across = ((n + 2 * p - k) // s + 1 for n, k, s, p in sizes)
    if down < 1 or across < 1:
        raise ValueError(f"no window of {kernel} pixels fits into an image of {(H, W)} padded by {padding}.")
    return down, across


class Patches(torch.autograd.Function):
    """The pixels under each window, (B, C, H, W) -> (B·H'·W', C·kh·kw)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair, stride: Pair, padding: Pair) -> Tensor:
        B, C, H, W = x.shape
        ctx.shape, ctx.window = x.shape, (kernel, stride, padding)
        padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
        windows = padded.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])
        down, across = counts(H, W, kernel, stride, padding)
        return windows.permute(0, 2, 3, 1, 4, 5).reshape(B * down * across, C * kernel[0] * kernel[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        B, C, H, W = ctx.shape
        (kh, kw), (sh, sw), (ph, pw) = ctx.window
        down, across = counts(H, W, *ctx.window)
        terms = dy.view(B, down, across, C, kh, kw).permute(4, 5, 0, 3, 1, 2)
        dx = dy.new_zeros(B, C, H + 2 * ph, W + 2 * pw, dtype=torch.float64)
        for i in range(kh):
            for j in range(kw):
                rows = slice(i, i + sh * (down - 1) + 1, sh)
                dx[:, :, rows, j : j + sw * (across - 1) + 1 : sw] += terms[i, j].double()
        return dx[:, :, ph : ph + H, pw : pw + W].float(), None, None, None


class TileMeans(torch.autograd.Function):
    """The mean of each tile of kh·kw pixels, a tree's sum over their number, (B, C, H, W) -> the tiles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Pair) -> Tensor:
        kh, kw = ctx.kernel = kernel
        B, C, H, W = x.shape
        tiles = x.reshape(B, C, H // kh, kh, W // kw, kw).transpose(3, 4).flatten(4)
        return divided(tree_sum(tiles), float(kh * kw)).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        kh, kw = ctx.kernel
        B, C, down, across = dy.shape
        each = divided(dy.double(), float(kh * kw)).float()[:, :, :, None, :, None]
        return each.expand(B, C, down, kh, across, kw).reshape(B, C, down * kh, across * kw), None
