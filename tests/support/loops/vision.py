"""Images: batch-norm, predictions for each pixel, mixed images, a teacher, pairs of images and captions."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from .data import CLASSES, V, drawn, images, log_softmax, prototypes
from .loop import Loop
from .parts import adam, class_step, seeded

# -- ResNet --------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(h)) + self.down(x)).relu()


def resnet(outputs: int = CLASSES) -> nn.Module:
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Residual(16, 16, 1), Residual(16, 32, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, outputs))


RESNET = Loop(
    name="ResNet",
    like="batch-norm: what training sees is not what evaluation sees; SGD with momentum",
    build=partial(seeded, resnet),
    optimizers=lambda model: [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)],
    batch=images,
    step=class_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

# -- mixed images --------------------------------------------------------------------------------------------


def mixed(number: int) -> tuple[Tensor, Tensor]:
    """Each image is laid over another one, and so are their labels, (rows, CLASSES)."""
    x, labels = images(number)
    share = torch.rand(len(x), generator=drawn(number + 1))
    y = F.one_hot(labels, CLASSES).float()
    x = share[:, None, None, None] * x + (1 - share[:, None, None, None]) * x.roll(1, 0)
    return x, share[:, None] * y + (1 - share[:, None]) * y.roll(1, 0)


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.GroupNorm(4, 32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, 2, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.2),
        nn.Linear(512, CLASSES),
    )


MIXED = Loop(
    name="mixup",
    like="mixed images, and probabilities as targets",
    build=partial(seeded, convolutions),
    optimizers=partial(adam, lr=3e-3),
    batch=mixed,
    step=class_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

# -- a teacher -----------------------------------------------------------------------------------------------


@functools.cache
def teacher() -> nn.Module:
    """Knows what the images are made of."""
    known = prototypes(8).flatten(1)
    with torch.random.fork_rng(devices=[]):
        model = nn.Sequential(nn.Flatten(), nn.Linear(known.shape[1], CLASSES))
    with torch.no_grad():
        model[1].weight.copy_(known / 4)
        model[1].bias.copy_(-known.square().sum(1) / 8)
    return model.eval().requires_grad_(False)


def distilled_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    x, y = batch
    (optimizer,) = optimizers
    temperature = 4.0
    optimizer.zero_grad()
    with torch.no_grad():
        wanted = (teacher()(x) / temperature).softmax(-1)
    logits = model(x)
    soft = F.kl_div((logits / temperature).log_softmax(-1), wanted, reduction="batchmean")
    loss = 0.7 * temperature**2 * soft + 0.3 * F.cross_entropy(logits, y)
    loss.backward()
    optimizer.step()


DISTILLED = Loop(
    name="distillation",
    like="a frozen teacher's softened predictions beside the labels",
    build=partial(seeded, convolutions),
    optimizers=partial(adam, lr=3e-3),
    batch=images,
    step=distilled_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

# -- a class for each pixel ----------------------------------------------------------------------------------

BORDER = 255  # pixels that nobody has labelled


def labelled_pixels(number: int, rows: int = 8, size: int = 16) -> tuple[Tensor, Tensor]:
    """(rows, 3, size, size) and classes (rows, size, size), in squares of 4."""
    g = drawn(number)
    squares = torch.randint(CLASSES, (rows, size // 4, size // 4), generator=g)
    classes = squares.repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = prototypes(1)[classes, :, 0, 0].movedim(-1, 1) + torch.randn(rows, 3, size, size, generator=g)
    classes[:, 0] = BORDER
    return x, classes


def segmenter() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(32, CLASSES, 1),
    )


def segmenter_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    x, y = batch
    (optimizer,) = optimizers
    loss = F.cross_entropy(model(x), y, ignore_index=BORDER)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


SEGMENTED = Loop(
    name="segmentation",
    like="logits (B, V, H, W), and pixels that do not count",
    build=partial(seeded, segmenter),
    optimizers=partial(adam, lr=3e-3),
    batch=labelled_pixels,
    step=segmenter_step,
    log_p=lambda model, batch: log_softmax(model(batch[0]).movedim(1, -1)),
    options={"logits_of": lambda z: z.movedim(1, -1)},
    target_kl=0.0005,
    refused=r"axis 1 .*movedim\(1, -1\)",
)

# -- CLIP ----------------------------------------------------------------------------------------------------


class Pairs(nn.Module):
    """Images and captions -> logits (B, B): the classes of a row are the other rows."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.images = nn.Sequential(nn.Flatten(), nn.Linear(192, 128), nn.ReLU(), nn.Linear(128, width))
        self.words = nn.EmbeddingBag(V, width)
        self.captions = nn.Linear(width, width)
        self.log_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor, captions: Tensor) -> Tensor:
        a = F.normalize(self.images(x), dim=-1)
        b = F.normalize(self.captions(self.words(captions)), dim=-1)
        return self.log_scale.exp() * a @ b.t()


def captioned(number: int, rows: int = 256) -> tuple[Tensor, Tensor]:
    """Images, and eight words for each that depend on its class."""
    x, labels = images(number, rows)
    words = torch.randint(6, (rows, 8), generator=drawn(number + 1))
    return x, labels[:, None] * 6 + words


def both_ways(logits: Tensor) -> Tensor:
    """The captions of each image, and the images of each caption."""
    return torch.stack([logits, logits.T], 1)


def contrastive_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    (optimizer,) = optimizers
    logits = model(*batch)
    own = torch.arange(len(logits))
    loss = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


CONTRASTIVE = Loop(
    name="CLIP",
    like="logits (B, B), whose classes are the other rows, and the other columns",
    build=partial(seeded, Pairs),
    optimizers=partial(adam, lr=3e-3),
    batch=captioned,
    step=contrastive_step,
    log_p=lambda model, batch: log_softmax(both_ways(model(*batch))),
    options={"probe_sequences": 256, "logits_of": both_ways},
    target_kl=0.0002,
    refused=r"torch.stack\(\[z, z.T\], 1\).*probe_sequences=256",
)

LOOPS = [RESNET, MIXED, DISTILLED, SEGMENTED, CONTRASTIVE]
