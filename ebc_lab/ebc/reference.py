"""EBC once more, as a slow plain transcription of docs/method.md, for the tests to hold the fast path against.

Python floats and one tensor at a time; whole deep copies of the model; beta by a central difference. It knows nothing of the
other files here except the logits' geometry, and shares no state, no search and no controller code with them.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


def mean_kl(z: Tensor, z_new: Tensor) -> float:
    total, tokens = 0.0, 0
    for row, row_new in zip(z.flatten(0, -2).tolist(), z_new.flatten(0, -2).tolist(), strict=True):
        if not all(map(math.isfinite, row_new)):
            return math.nan
        top, top_new = max(row), max(row_new)
        norm = top + math.log(sum(math.exp(a - top) for a in row))
        norm_new = top_new + math.log(sum(math.exp(a - top_new) for a in row_new))
        total += sum(math.exp(a - norm) * ((a - norm) - (b - norm_new)) for a, b in zip(row, row_new, strict=True))
        tokens += 1
    return total / tokens


def movement(z: Tensor, z_new: Tensor) -> float:
    total, tokens = 0.0, 0
    for row in (z_new - z).flatten(0, -2).tolist():
        mean = sum(row) / len(row)
        total += sum((a - mean) ** 2 for a in row)
        tokens += 1
    return math.sqrt(total / tokens)


@dataclass
class ReferenceStep:
    c: float
    delta: float
    skipped: bool = False
    trace: list[tuple[float, float]] = field(default_factory=list)
    S: float | None = None
    s: list[float] | None = None
    applied_kl: float | None = None
    T: float | None = None


@dataclass
class ReferenceClip:
    """One model, its base optimizers, one budget. `step(tokens)` needs the gradients in place, as torch's `step` does."""

    model: nn.Module
    bases: Sequence[torch.optim.Optimizer]
    groups: Sequence[Sequence[str]]
    target_kl: float
    budget: str = "shadow"
    aggregate: str = "l1"
    controller: str = "fixed"
    schedule: str = "constant"
    total_steps: int = 1
    probe_sequences: int = 2
    audit_every: int = 10
    audit_tokens: int = 512
    floor: float = 1e-7
    cadence: str = "warm"

    def __post_init__(self) -> None:
        self.t = 0
        self.trial = 0.1
        self.delta = self.target_kl
        self.previous_target = self.target_kl
        self.previous_error: float | None = None
        self.ema: float | None = None
        self.beta: list[float | None] = [None] * len(self.groups)
        self.seen = [0] * len(self.groups)

    def step(self, tokens: Tensor) -> ReferenceStep:
        t, self.t = self.t, self.t + 1
        m = max(0.05, 1 - t / self.total_steps) if self.schedule == "linear" else 1.0
        target = m * self.target_kl
        self.delta *= target / self.previous_target
        self.previous_target = target
        names = dict(self.model.named_parameters())
        if any(p.grad is not None and not bool(torch.isfinite(p.grad).all()) for p in names.values()):
            return ReferenceStep(0.0, self.delta, skipped=True)

        before = copy.deepcopy(self.model)
        old = {n: p.detach().clone() for n, p in names.items()}
        for base in self.bases:
            base.step()
        new = {n: p.detach().clone() for n, p in names.items()}
        k = self.probe_sequences
        rows = min(len(tokens), k + math.ceil(self.audit_tokens / tokens.shape[1]))
        done = ReferenceStep(1.0, self.delta)
        if self.budget == "shadow":
            self._shadow(done, before, old, new, tokens[:k], t)
        else:
            self._surrogate(done, before, old, new, tokens[:k], t)
        self._set(self.model, old, new, done.c)
        if t % self.audit_every == 0 and not done.skipped:
            z, z_new = self._z(before, tokens[k:rows]), self._z(self.model, tokens[k:rows])
            done.applied_kl, done.T = max(0.0, mean_kl(z, z_new)), movement(z, z_new)
            self._control(target, done.applied_kl, done.c < 0.999)
        return done

    def _shadow(self, done: ReferenceStep, before: nn.Module, old: Any, new: Any, tokens: Tensor, t: int) -> None:
        z, trial_model = self._z(before, tokens), copy.deepcopy(before)
        left, trial = 3 if t < 20 else 1, self.trial
        while True:
            self._set(trial_model, old, new, trial)
            kl = mean_kl(z, self._z(trial_model, tokens))
            kl = max(0.0, kl) if math.isfinite(kl) else kl
            done.trace.append((trial, kl))
            left -= 1
            if not math.isfinite(kl):
                again, c, following, skipped = True, 0.0, trial / 10, True
            elif kl < self.floor:
                again, c, following, skipped = trial < 1, trial, min(1.0, 10 * trial), False
            else:
                c = min(1.0, trial * math.sqrt(self.delta / kl))
                again, following, skipped = not 1 / 1.5 <= c / trial <= 1.5, c, False
            trial = following
            if not again or left == 0:
                break
        self.trial, done.c, done.skipped = trial, c, skipped

    def _surrogate(self, done: ReferenceStep, before: nn.Module, old: Any, new: Any, tokens: Tensor, t: int) -> None:
        due = self._due(t)
        done.s = []
        for g, members in enumerate(self.groups):
            norm = math.sqrt(sum(float((new[n] - old[n]).double().square().sum()) for n in members))
            if norm > 0 and (g in due or self.beta[g] is None):
                eps = 1e-4
                sides = []
                for sign in (+1, -1):
                    moved = copy.deepcopy(before)
                    here = {n: old[n] + sign * eps * (new[n] - old[n]) / norm for n in members}
                    moved.load_state_dict({**before.state_dict(), **here})
                    sides.append(self._z(moved, tokens))
                self._observe(g, movement(sides[1], sides[0]) / (2 * eps))
            beta = self.beta[g]
            done.s.append((0.0 if beta is None else beta) * norm)
        moving = sum(1 for s in done.s if s != 0)
        l2 = math.sqrt(sum(s * s for s in done.s))
        done.S = {"l1": sum(done.s), "sqrtl_l2": math.sqrt(moving) * l2, "l2": l2}[self.aggregate]
        done.c = 1.0 if done.S == 0 else min(1.0, 2 * math.sqrt(self.delta) / done.S)

    def _due(self, t: int) -> set[int]:
        everything = set(range(len(self.groups)))
        sweeps = {0, 10, 20, 50} | {100 * 2**i for i in range(20)}
        if (self.cadence == "warm" and t in sweeps) or (self.cadence == "published" and t % 200 == 0):
            return everything
        if t % 20 == 0:
            first = 2 * (t // 20 - 1)
            return {first % len(self.groups), (first + 1) % len(self.groups)}
        return set()

    def _observe(self, g: int, observed: float) -> None:
        self.seen[g] += 1
        n, beta = self.seen[g], self.beta[g]
        if beta is None:
            self.beta[g] = observed
            return
        weight = 0.05 if self.cadence == "published" else max(0.05, 1 / n)
        residual = observed - beta
        if n >= (2 if self.cadence == "published" else 4):
            residual = max(-0.5 * beta, min(0.5 * beta, residual))
        self.beta[g] = beta + weight * residual

    def _control(self, target: float, kl: float, clipped: bool) -> None:
        if self.controller == "log_pi":
            error = math.log(target) - math.log(max(kl, 1e-12))
            previous = error if self.previous_error is None else self.previous_error
            self.previous_error = error
            if clipped or error <= 0:
                offset = math.log(self.delta / target) + 0.2 * (error - previous) + 0.3 * error
                self.delta = target * math.exp(max(-12.0, min(12.0, offset)))
        elif self.controller == "pi":
            error = target - kl
            weight = 1 - 0.5 ** (self.audit_every / 250)
            self.ema = error if self.ema is None else self.ema + weight * (error - self.ema)
            self.delta = min(0.30, max(0.01, self.delta * math.exp(0.15 * error + 0.02 * self.ema)))

    @staticmethod
    def _set(model: nn.Module, old: dict[str, Tensor], new: dict[str, Tensor], c: float) -> None:
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(old[name] if c == 0 else new[name] if c == 1 else old[name] + c * (new[name] - old[name]))

    @staticmethod
    def _z(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = model(tokens)
            return z
