"""Reinforcement learning: policies, values, and logits that are changed after the forward."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.optim import Optimizer

from .data import drawn, features, log_softmax
from .loop import Loop
from .parts import adam, perceptron, seeded

ACTIONS = 12
INPUTS = 32


def worth_of(actions: Tensor, worth: Tensor) -> Tensor:
    """What the actions that were taken bring, around 0."""
    return worth.gather(-1, actions[:, None])[:, 0]


# -- illegal moves are masked in the logits themselves -------------------------------------------------------


def positions(number: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boards (512, 32), legal moves, and what each move is worth. At first all boards are nearly empty."""
    x, worth = features(number, 512, INPUTS, ACTIONS)
    filled = 0.3 * min(1.0, number / 20)
    legal = torch.rand(512, ACTIONS, generator=drawn(number + 1)) >= filled
    legal[:, 0] = True
    return x, legal, worth


def masked_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, legal, worth = batch
    (optimizer,) = optimizers
    logits = model(x)
    logits[~legal] = -1e9
    move = worth.masked_fill(~legal, -torch.inf).argmax(-1)
    loss = F.cross_entropy(logits, move)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


MASKED = Loop(
    name="board policy",
    like="logits masked in place between forward and loss",
    build=partial(seeded, perceptron, INPUTS, ACTIONS),
    optimizers=adam,
    batch=positions,
    step=masked_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

# -- PPO -----------------------------------------------------------------------------------------------------

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
    returns = worth_of(action, worth)
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

# -- REINFORCE -----------------------------------------------------------------------------------------------


def episodes(number: int) -> tuple[Tensor, Tensor]:
    return features(number, 512, INPUTS, ACTIONS)


def reinforce_step(
    model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]
) -> None:
    """Acts place by place, with gradients on as many do, and then trains on all that was seen."""
    x, worth = batch
    (optimizer,) = optimizers
    actions = torch.cat([Categorical(logits=model(part)).sample() for part in x.chunk(8)])
    optimizer.zero_grad()
    log_p = Categorical(logits=model(x)).log_prob(actions)
    returns = worth_of(actions, worth)
    loss = -(log_p * (returns - returns.mean())).mean()
    loss.backward()
    optimizer.step()


REINFORCE = Loop(
    name="REINFORCE",
    like="many forwards to act, with gradients on, before the one that trains",
    build=partial(seeded, perceptron, INPUTS, ACTIONS),
    optimizers=adam,
    batch=episodes,
    step=reinforce_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
)

# -- DQN -----------------------------------------------------------------------------------------------------


def dqn_step(model: nn.Module, optimizers: list[Optimizer], batch: Any, carried: dict[str, Any]) -> None:
    x, worth = batch
    (optimizer,) = optimizers
    if "target" not in carried:
        carried["target"] = copy.deepcopy(model)
    actions = torch.randint(ACTIONS, (len(x),))
    with torch.no_grad():
        wanted = worth_of(actions, worth) + 0.5 * carried["target"](x.roll(1, 0)).max(-1).values
    loss = F.smooth_l1_loss(worth_of(actions, model(x)), wanted)
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 100)
    optimizer.step()
    with torch.no_grad():
        for slow, fast in zip(carried["target"].parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.05)


DQN = Loop(
    name="DQN",
    like="values of actions, which no softmax is taken of: EBC bounds a KL that means nothing, and says so",
    build=partial(seeded, perceptron, INPUTS, ACTIONS),
    optimizers=partial(adam, lr=3e-3),
    batch=episodes,
    step=dqn_step,
    log_p=lambda model, batch: log_softmax(model(batch[0])),
    target_kl=0.0005,
    warned="not one of a softmax",
)

LOOPS = [MASKED, PPO, REINFORCE, DQN]
