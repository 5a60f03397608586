"""A policy, images, rows that are mostly padding, (T, B) batches, and classes on the second axis."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import Optimizer

from .data import CLASSES, V, features, images, log_softmax, padding, shifted
from .loop import Loop
from .parts import Block, adam, class_step, seeded, token_step

# -- PPO -----------------------------------------------------------------------------------------------------

ACTIONS = 12
INPUTS = 32
MINIBATCHES, EPOCHS, ROLLOUT = 4, 3, 1024


class ActorCritic(nn.Module):
    """-> (logits, value)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(INPUTS, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.actor = nn.Linear(width, ACTIONS)
        self.critic = nn.Linear(width, 1)
        nn.init.orthogonal_(self.actor.weight, 0.01)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.trunk(x)
        return self.actor(h), self.critic(h)[:, 0]


def situations(number: int) -> tuple[int, Tensor, Tensor]:
    """The number of the minibatch, and the situations of its rollout with what each action is worth there."""
    x, worth = features(number // (MINIBATCHES * EPOCHS), ROLLOUT, INPUTS, ACTIONS)
    return number, x, worth


def acted(model: nn.Module, x: Tensor, worth: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        logits, value = model(x)
        policy = Categorical(logits=logits)
        action = policy.sample()
    returns = worth.gather(-1, action[:, None])[:, 0]
    return {"x": x, "action": action, "log_p": policy.log_prob(action), "returns": returns, "value": value}


def ppo_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    number, x, worth = batch
    (optimizer,) = optimizers
    if number % (MINIBATCHES * EPOCHS) == 0:
        carried["rollout"] = acted(model, x, worth)
    if number % MINIBATCHES == 0:
        carried["order"] = torch.randperm(ROLLOUT)
    rows = carried["order"].chunk(MINIBATCHES)[number % MINIBATCHES]
    part = {name: values[rows] for name, values in carried["rollout"].items()}

    logits, value = model(part["x"])
    policy = Categorical(logits=logits)
    advantage = part["returns"] - part["value"]
    advantage = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    ratio = (policy.log_prob(part["action"]) - part["log_p"]).exp()
    surrogate = torch.min(advantage * ratio, advantage * ratio.clamp(0.8, 1.2)).mean()
    loss = -surrogate + 0.5 * (value - part["returns"]).square().mean() - 0.01 * policy.entropy().mean()
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()


PPO = Loop(
    name="PPO",
    like="(logits, value), several epochs over the minibatches of a rollout",
    build=partial(seeded, ActorCritic),
    optimizers=adam,
    batch=situations,
    step=ppo_step,
    log_p=lambda model, batch: log_softmax(model(batch[1])[0]),
    options={"logits_of": lambda output: output[0]},
    target_kl=0.0001,
    refused=r"output\[0\]",
)

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

# -- a mask by its place -------------------------------------------------------------------------------------


class Encoder(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.tokens = nn.Embedding(V + 1, width)
        self.positions = nn.Embedding(64, width)
        self.blocks = nn.ModuleList(Block(width, 4, dropout=0.1, causal=False) for _ in range(2))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, CLASSES))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.head(x)


def tagged(number: int, rows: int = 40, length: int = 32) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and tags, (rows, length) each; most of it is padding."""
    ids, _ = shifted(number, rows, length)
    mask = padding(number, rows, length, longest=14)
    return ids.masked_fill(~mask, V), mask.long(), (ids % CLASSES).masked_fill(~mask, -100)


def tagged_log_p(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    ids, mask, _ = batch
    return log_softmax(model(ids, mask))[mask.flatten().bool()]


ENCODER = Loop(
    name="encoder of padded rows",
    like="the attention mask is given by its place, and most positions are padding",
    build=partial(seeded, Encoder),
    optimizers=adam,
    batch=tagged,
    step=token_step,
    log_p=tagged_log_p,
    target_kl=0.0002,
    quick=True,
)

# -- a recurrent network over characters ---------------------------------------------------------------------


def columns(number: int) -> tuple[Tensor, Tensor]:
    """(48, 24) each."""
    x, y = shifted(number, rows=24, length=48)
    return x.t().contiguous(), y.t().contiguous()


class Characters(nn.Module):
    """(T, B) -> (T, B, V)."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.embedding = nn.Embedding(V, width)
        self.rnn = nn.LSTM(width, width, num_layers=2)
        self.out = nn.Linear(width, V)

    def forward(self, x: Tensor) -> Tensor:
        h, _ = self.rnn(self.embedding(x))
        return self.out(h)


CHARACTERS = Loop(
    name="char-rnn",
    like="(T, B) -> (T, B, V)",
    build=partial(seeded, Characters),
    optimizers=adam,
    batch=columns,
    step=token_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    options={"batch_dim": 1},
    target_kl=0.0005,
    quick=True,
)

# -- classes on the second axis ------------------------------------------------------------------------------


class WaveNet(nn.Module):
    """Dilated causal convolutions, (B, T) -> (B, V, T), as `nn.CrossEntropyLoss` takes it."""

    def __init__(self, channels: int = 48, depth: int = 4):
        super().__init__()
        self.embedding = nn.Embedding(V, channels)
        self.layers = nn.ModuleList(nn.Conv1d(channels, 2 * channels, 2, dilation=2**i) for i in range(depth))
        self.skips = nn.ModuleList(nn.Conv1d(channels, channels, 1) for _ in range(depth))
        self.out = nn.Conv1d(channels, V, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).transpose(1, 2)
        total = torch.zeros_like(h)
        for layer, skip in zip(self.layers, self.skips, strict=True):
            signal, gate = layer(F.pad(h, (layer.dilation[0], 0))).chunk(2, 1)
            h = h + signal.tanh() * gate.sigmoid()
            total = total + skip(h)
        return self.out(total.relu())


WAVENET = Loop(
    name="WaveNet",
    like="logits (B, V, T), the classes on the second axis",
    build=partial(seeded, WaveNet),
    optimizers=adam,
    batch=partial(shifted, rows=8, length=96),
    step=class_step,
    log_p=lambda model, batch: log_softmax(model(batch[0]).movedim(1, -1)),
    options={"logits_of": lambda z: z.movedim(1, -1)},
    target_kl=0.001,
    refused=r"axis 1 .*movedim\(1, -1\)",
    quick=True,
)

LOOPS = [PPO, RESNET, ENCODER, CHARACTERS, WAVENET]
