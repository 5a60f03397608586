"""`ebc-lab new NAME`: a suite, an optimizer and its test to begin with, in the working folder."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template

from ebc_lab.config.choices import groups
from ebc_lab.config.errors import require, shown
from ebc_lab.config.own.editor import FILE, suite_schema

NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
SUITE = Template(
    """\
# yaml-language-server: $$schema=./$schema
# Is it better than Adam and Muon? All are tuned alike, and judged on seeds that the tuning did not use.
#   ebc-lab plan study=./$name.yaml scale=smoke         what that would take
#   ebc-lab autopilot study=./$name.yaml scale=smoke    a minute or two, to see that all works
#   ebc-lab autopilot study=./$name.yaml                the real one; the same command continues it
defaults: [optimizers]    # everything that this file does not set is as in `study=optimizers`

mine: ['./$file.py:$made']    # yours, file and class; several: ['./a.py:A', './b.py:B']
seeds: [0, 1, 2, 3, 4]    # that judge; more of them make a smaller difference visible
ablation:
  question: is $name better than Adam and Muon, each at its own best?
#  arms:    # more to compare with; each gets as many points as the others
#    lion:
#      about: Lion
#      settings: {optimizer: {name: lion}, lr_schedule: {name: trapezoid}}
#      tune:
#        lr: [5e-4, 1e-3, 2e-3]
#        warmup_share: [0.1667, 0.0333, 0.3333]
#        schedule: [trapezoid, warmup_linear, cosine]
"""
)
OPTIMIZER = Template(
    '''\
"""An optimizer of my own: AdamW that leaves out what points against the gradient."""

import torch


class $made(torch.optim.Optimizer):
    """Cautious AdamW: only the parts of Adam's step that agree with the gradient are taken, larger by as much
    as the others are missing (Liang et al., arXiv:2411.16085).

    A study calls it with (parameters, lr=…) and sets the learning rate of every group at every step.
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._move(p, group)
        return loss

    def _move(self, p, group):
        state, (beta1, beta2) = self.state[p], group["betas"]
        if not state:  # all that it keeps belongs in `state`, so that a run can be continued
            state |= {"step": 0, "mean": torch.zeros_like(p), "square": torch.zeros_like(p)}
        state["step"] += 1
        mean, square = state["mean"], state["square"]
        mean.lerp_(p.grad, 1 - beta1)
        square.mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
        size = (square / (1 - beta2 ** state["step"])).sqrt() + group["eps"]
        update = mean / (1 - beta1 ** state["step"]) / size
        agrees = (update * p.grad > 0).to(p.dtype)
        update *= agrees / agrees.mean().clamp(min=1e-3)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])
'''
)
TEST = Template(
    '''\
"""What every optimizer should do, in a second: `python -m pytest test_$name.py`."""

import torch
from $file import $made

LR = 0.05  # choose yours: a rate at which 100 steps lower the loss of the problem below


def problem(seed=0):
    """Parameters, and a quadratic loss of them whose least value is 0."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, generator=generator, requires_grad=True)
    scale = torch.logspace(-1, 1, 8)
    return x, lambda: (scale * x**2).sum()


def taken(optimizer, loss, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


def test_it_goes_down():
    x, loss = problem()
    before = loss().item()
    taken($made([x], lr=LR), loss, 100)
    assert loss().item() < 0.1 * before


def test_it_goes_on_from_its_state():
    (x, loss), (y, other) = problem(), problem()
    first, second = $made([x], lr=LR), $made([y], lr=LR)
    taken(first, loss, 20)
    taken(second, other, 10)
    third = $made([y], lr=LR)
    third.load_state_dict(second.state_dict())
    taken(third, other, 10)
    assert torch.equal(x, y)


def test_nothing_moves_where_the_gradient_is_zero():
    x = torch.ones(3, requires_grad=True)
    optimizer = $made([x], lr=LR)
    x.grad = torch.zeros(3)
    optimizer.step()
    assert torch.equal(x, torch.ones(3))
    assert not x.grad.any()  # and the gradient is left as it was


def test_the_learning_rate_is_that_of_its_group():
    moved = []
    for lr in (LR, 2 * LR):
        x, loss = problem()
        before = x.detach().clone()
        taken($made([x], lr=lr), loss, 1)
        moved.append((x.detach() - before).norm())
    assert moved[1] > 1.5 * moved[0]
'''
)


def new(name: str, folder: Path) -> list[str]:
    """Write NAME.yaml, NAME_optimizer.py, test_NAME.py and the schema. -> the commands that come next.

    Raises UserError for a name that means something else, and where one of the files is there already.
    """
    require(
        bool(NAME.fullmatch(name)),
        f"{shown(name)} cannot be a name in Python: take small letters, digits and _, such as cautious.",
    )
    require(
        name not in (*groups()["optimizer"], *groups()["study"]),
        f"{name} is ebc-lab's own already: take another name, such as my_{name}.",
    )
    words = {"name": name, "file": f"{name}_optimizer", "made": "".join(map(str.capitalize, name.split("_")))}
    words["schema"] = FILE
    made = {f"{name}.yaml": SUITE, f"{words['file']}.py": OPTIMIZER, f"test_{name}.py": TEST}
    for file in made:
        require(
            not (folder / file).exists(), f"{file} is there already: choose another name, or move it away."
        )
    for file, text in made.items():
        (folder / file).write_text(text.substitute(words), encoding="utf-8")
    write_schema(folder)
    return [
        f"python -m pytest test_{name}.py",
        f"ebc-lab plan study=./{name}.yaml scale=smoke",
        f"ebc-lab autopilot study=./{name}.yaml scale=smoke",
    ]


def write_schema(folder: Path) -> None:
    """Write what an editor checks suites against, of this version, in place of that of another.

    It lies beside the suites, which name it in their first line: the path of an installed package would be
    another on every machine, and would enter the copies of the suite that studies keep.
    """
    (folder / FILE).write_text(suite_schema(), encoding="utf-8")
