"""Small images and their classes, and two models of them: is what holds for text about text?

* an image has one prediction: inputs (B, 1, 8, 8), logits (B, 1, V), targets (B, 1). So the KL of a budget
  and every loss are a mean over images, and what the lab counts as tokens are images
* CNN: residual blocks before whose convolutions are a norm and a ReLU (He et al., arXiv:1603.05027), with
  GroupNorm of one group (Wu & He, arXiv:1803.08494), since a batch's statistics would make the prediction of
  one image depend on the others'; 4×4 pixels after the first block
* ViT: patches of 2×2 pixels with learned positions through the GPT's blocks without their causal mask, the
  mean of the patches before the head (Dosovitskiy et al., arXiv:2010.11929)
* a convolution's weight is kept as the matrix (out, in·9) that it is to an image's windows, so that Muon,
  projections and quantizers treat it as any hidden matrix
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebc_lab.config.parts.model import ModelConfig
from ebc_lab.config.schema import RunConfig

from . import BatchSource
from .batches import brought
from .digits import CLASSES, MEAN, SIDE, SPREAD, Images, digits
from .gpt import Block, GPTWorkload, HiddenLinear, draw_weights

PATCH = 2  # pixels a side
KERNEL = 3  # pixels a side


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """3×3 convolution of images (B, in, H, W) with a matrix (out, in·9) -> (B, out, H, W)."""
    return F.conv2d(x, weight.view(len(weight), -1, KERNEL, KERNEL), padding=KERNEL // 2)


class Stem(nn.Linear):
    """The first convolution, from the pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.weight)


class HiddenConv(HiddenLinear):
    """A convolution with a hidden matrix, or with what a quantizer makes of it."""

    def __init__(self, width: int):
        super().__init__(width * KERNEL**2, width)

    def forward(self, x: Tensor) -> Tensor:
        return convolved(x, self.effective())


class ConvBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm_in = nn.GroupNorm(1, width)
        self.conv_in = HiddenConv(width)
        self.norm_out = nn.GroupNorm(1, width)
        self.conv_out = HiddenConv(width)

    def forward(self, x: Tensor) -> Tensor:  # x: (B, C, H, W)
        inner = self.conv_in(F.relu(self.norm_in(x)))
        x = x + self.conv_out(F.relu(self.norm_out(inner)))
        return x


class CNN(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 1, V)."""

    def __init__(self, config: ModelConfig, classes: int):
        super().__init__()
        self.stem = Stem(KERNEL**2, config.width, bias=False)
        self.blocks = nn.ModuleList(ConvBlock(config.width) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, classes, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:  # He et al., arXiv:1502.01852; less where blocks add up
                parts = config.blocks if name.endswith("conv_out.weight") else 1
                nn.init.normal_(p, 0.0, math.sqrt(2 / (parts * p.shape[1])))
        nn.init.normal_(self.head.weight, 0.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)  # (B, C, 8, 8)
        for i, block in enumerate(self.blocks):
            x = block(x)
            x = F.avg_pool2d(x, 2) if i == 0 else x
        logits: Tensor = self.head(self.norm(x.float().mean((2, 3))))
        return logits[:, None]


class ViT(nn.Module):
    """Images (B, 1, 8, 8) -> logits (B, 1, V)."""

    def __init__(self, config: ModelConfig, classes: int):
        super().__init__()
        self.patch_embedding = nn.Linear(PATCH**2, config.width, bias=False)
        self.position_embedding = nn.Embedding((SIDE // PATCH) ** 2, config.width)
        self.blocks = nn.ModuleList(Block(config, causal=False) for _ in range(config.blocks))
        self.norm = nn.LayerNorm(config.width, bias=False)
        self.head = nn.Linear(config.width, classes, bias=False)
        draw_weights(self, config.blocks)
        nn.init.normal_(self.patch_embedding.weight, 0.0, 1 / PATCH)  # keeps the size of its four pixels
        # large enough beside them that attention can tell places apart from the first step on
        nn.init.normal_(self.position_embedding.weight, 0.0, config.width**-0.5)

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(images, PATCH, stride=PATCH).mT  # (B, 16, 4)
        x = self.patch_embedding(patches) + self.position_embedding.weight
        B, T, width = x.shape
        x = x.reshape(B * T, width)
        for block in self.blocks:
            x = block(x, B)
        logits: Tensor = self.head(self.norm(x).view(B, T, width).mean(1))
        return logits[:, None]


MODELS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {"cnn": CNN, "vit": ViT}


class ImageBatches(BatchSource):
    """Training batches by step, each epoch in an order of its own: a function of (seed, step)."""

    def __init__(self, images: Tensor, classes: Tensor, batch_size: int, seed: int):
        self.images = images  # (n, 1, 8, 8)
        self.classes = classes  # (n, 1)
        self.batch_size = batch_size
        self.seed = seed
        self.orders: dict[int, np.ndarray] = {}  # of the epochs of the latest batch

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self.orders:
            draw = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
            self.orders[epoch] = draw.permutation(len(self.images))
        return self.orders[epoch]

    def source_at(self, step: int) -> Tensor:
        """The images of `step`, by number, (B,) int64, on their device; a batch may end one epoch and begin
        the next."""
        nth = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(nth, len(self.images))
        self.orders = {e: order for e, order in self.orders.items() if e >= epochs[0]}
        rows = [self._order(int(e))[place] for e, place in zip(epochs, places, strict=True)]
        return brought(np.array(rows), self.images.device)

    def rows(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        """The images of these numbers, (B, 1, 8, 8), and their classes, (B, 1)."""
        return self.images[starts], self.classes[starts]


def _tensors(images: Images, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pixels around 0, of size 1, (n, 1, 8, 8) float32, and classes (n, 1) int64."""
    pixels = (torch.from_numpy(images.pixels).float() - MEAN) / SPREAD
    return pixels[:, None].to(device), torch.from_numpy(images.classes).long()[:, None].to(device)


class ImageWorkload(GPTWorkload):
    """A model that tells the class of an image. Raises UserError where the images are not there."""

    def __init__(self, run: RunConfig, device: torch.device):
        self.run = run
        self.images = {split: _tensors(images, device) for split, images in digits().items()}
        self.tokens = {}
        self.vocabulary = CLASSES
        self.characters_per_token = {}
        self.capturable = False  # cuDNN may measure its algorithms during a step

    def make(self) -> nn.Module:
        return MODELS[self.run.model.name](self.run.model, self.vocabulary)

    def batches(self) -> tuple[ImageBatches, None]:
        """Return the training batches."""
        return ImageBatches(*self.images["train"], self.run.batch_size, self.run.seed), None

    def held_out(
        self, split: str, count: int | None = None, *, exact: bool = False
    ) -> list[tuple[Tensor, Tensor]]:
        """Return a whole split, however much is asked for: it is small."""
        return [self.images[split]]
