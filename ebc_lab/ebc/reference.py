"""EBC once more, as a slow plain transcription of docs/method.md, for the tests to hold the fast path against.

Python floats and one tensor at a time; whole deep copies of the model; derivatives by central differences. It imports nothing
of the other files here: geometry, surrogates, budgets, controllers, schedules and guards are all written out again. To be read
beside docs/method.md, in its order.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


# -- what logits are and how far they moved, token by token ----------------------------------------------------------------


def rows(z: Tensor) -> list[list[float]]:
    """Logits (..., V) -> one list of V numbers for each token."""
    out: list[list[float]] = z.flatten(0, -2).tolist()
    return out


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(sum(math.exp(a - top) for a in row))
    return [a - norm for a in row]


def mean_kl(z: Tensor, z_new: Tensor) -> float:
    total, tokens = 0.0, 0
    for row, row_new in zip(rows(z), rows(z_new), strict=True):
        if not all(map(math.isfinite, row_new)):
            return math.nan
        total += sum(
            math.exp(a) * (a - b) for a, b in zip(log_softmax(row), log_softmax(row_new), strict=True)
        )
        tokens += 1
    return total / tokens


def movement(dz: Tensor) -> float:
    """rms(centre(dz)), logits per token."""
    total, tokens = 0.0, 0
    for row in rows(dz):
        mean = sum(row) / len(row)
        total += sum((a - mean) ** 2 for a in row)
        tokens += 1
    return math.sqrt(total / tokens)


def half_variance(z: Tensor, dz: Tensor) -> float:
    """½·Var_p(dz), the KL to second order, nats per token."""
    total, tokens = 0.0, 0
    for row, row_moved in zip(rows(z), rows(dz), strict=True):
        p = [math.exp(a) for a in log_softmax(row)]
        mean = sum(a * b for a, b in zip(p, row_moved, strict=True))
        total += 0.5 * sum(a * (b - mean) ** 2 for a, b in zip(p, row_moved, strict=True))
        tokens += 1
    return total / tokens


def cross_entropy(z: Tensor, targets: Tensor) -> float:
    total, tokens = 0.0, 0
    for row, y in zip(rows(z), targets.flatten().tolist(), strict=True):
        total -= log_softmax(row)[y]
        tokens += 1
    return total / tokens


def cross_entropy_rise(z: Tensor, dz: Tensor, targets: Tensor) -> float:
    """<∇loss, dW> where dz = J·dW."""
    total, tokens = 0.0, 0
    for row, row_moved, y in zip(rows(z), rows(dz), targets.flatten().tolist(), strict=True):
        total += sum(math.exp(a) * b for a, b in zip(log_softmax(row), row_moved, strict=True)) - row_moved[y]
        tokens += 1
    return total / tokens


# -- one budgeted run ------------------------------------------------------------------------------------------------------


@dataclass
class ReferenceStep:
    c: float
    delta: float
    target: float  # delta*, scheduled
    skipped: bool = False
    trace: list[tuple[float, float]] = field(default_factory=list)  # of `shadow`: (trial, KL)
    guard: float = 1.0
    S: float | None = None
    s: list[float] | None = None
    q: float | None = None
    r: float | None = None  # of `agreement`
    slope: float | None = None
    tightness: float | None = None  # T/(c·S) of the budgeted part
    applied_kl: float | None = None
    T: float | None = None


@dataclass
class Proposal:
    """What a step starts from: the model at W (a deep copy), W and W + dW, and the tokens that choose c."""

    before: nn.Module
    old: Weights
    new: Weights
    tokens: Tensor
    targets: Tensor | None


@dataclass
class ReferenceClip:
    """One model, its base optimizers, one budget. `step(tokens)` needs the gradients in place, as torch's `step` does.

    Tensors that stand in none of `groups` are not budgeted and move freely. `retract` puts the model it is given back on its
    manifold, in place.
    """

    model: nn.Module
    bases: Sequence[torch.optim.Optimizer]
    groups: Sequence[Sequence[str]]
    target_kl: float
    budget: str = "shadow"
    aggregate: str = "l1"
    controller: str = "fixed"
    gain: float = math.nan  # a, of `energy`
    schedule: str = "constant"
    total_steps: int = 1
    guard: str = "none"
    units: str = "logits"
    probe_sequences: int = 2
    audit_every: int = 10
    audit_tokens: int = 512
    floor: float = 1e-7
    cadence: str = "warm"
    retract: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        self.t = 0
        self.peak_lr = self._lr()
        self.trial = 0.1
        self.log_k: float | None = None
        self.delta = self.target_kl
        self.previous_target = self.target_kl
        self.previous_error: float | None = None
        self.ema: float | None = None
        self.log_g = 0.0
        self.last_audit = 0
        self.beta: list[float | None] = [None] * len(self.groups)
        self.seen = [0] * len(self.groups)
        self.budgeted = {name for members in self.groups for name in members}

    def step(
        self, tokens: Tensor, targets: Tensor | None = None, probe: tuple[Tensor, Tensor | None] | None = None
    ) -> ReferenceStep:
        t, self.t = self.t, self.t + 1
        target = self._multiplier(t) * self.target_kl
        self.delta *= target / self.previous_target
        self.previous_target = target
        names = dict(self.model.named_parameters())
        gradients = {n: p.grad.detach().clone() for n, p in names.items() if p.grad is not None}
        if not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
            return ReferenceStep(0.0, self.delta, target, skipped=True)

        before = copy.deepcopy(self.model)
        old = {n: p.detach().clone() for n, p in names.items()}
        for base in self.bases:
            base.step()
        new = {n: p.detach().clone() for n, p in names.items()}

        k = self.probe_sequences
        chosen = (tokens, targets) if probe is None else probe
        proposal = Proposal(before, old, new, chosen[0][:k], None if chosen[1] is None else chosen[1][:k])
        audits = t % self.audit_every == 0
        done = ReferenceStep(1.0, self.delta, target, guard=math.exp(self.log_g))
        slope = sum(float((g.double() * (new[n] - old[n]).double()).sum()) for n, g in gradients.items())
        if self.budget == "shadow":
            self._shadow(done, proposal, t)
        else:
            self._predicted(done, proposal, t)
        if done.skipped:
            self._set(self.model, proposal, 0.0, free=0.0)
            return done
        self._set(self.model, proposal, done.c, free=1.0)
        if audits:
            last = min(len(tokens), k + math.ceil(self.audit_tokens / tokens.shape[1]))
            z, z_new = self._z(before, tokens[k:last]), self._z(self.model, tokens[k:last])
            done.applied_kl, done.T, done.slope = max(0.0, mean_kl(z, z_new)), movement(z_new - z), slope
            if done.S is not None:
                budgeted = copy.deepcopy(
                    before
                )  # what is not budgeted stays where it was: its movement is not S's
                self._set(budgeted, proposal, done.c, free=0.0)
                T = movement(self._z(budgeted, tokens[k:last]) - z)
                done.tightness = T / (done.c * done.S) if done.c * done.S else math.nan
            self._guard(done, t)
            self._control(done, proposal)
        return done

    # -- budgets: how c is found

    def _shadow(self, done: ReferenceStep, proposal: Proposal, t: int) -> None:
        z, trial_model = self._z(proposal.before, proposal.tokens), copy.deepcopy(proposal.before)
        left, trial = 3 if t < 20 else 1, self.trial
        while True:
            self._set(trial_model, proposal, trial, free=0.0)
            kl = mean_kl(z, self._z(trial_model, proposal.tokens))
            kl = max(0.0, kl) if math.isfinite(kl) else kl
            done.trace.append((trial, kl))
            left -= 1
            if not math.isfinite(kl):
                again, c, following, skipped = True, 0.0, trial / 10, True
            elif kl < self.floor:
                again, c, following, skipped = trial < 1, trial, min(1.0, 10 * trial), False
            else:
                c = min(1.0, trial * math.sqrt(self.delta / kl))
                following = c if c > 0 else trial
                again, skipped = not 1 / 1.5 <= c / trial <= 1.5, False
            trial = following
            if not again or left == 0:
                break
        self.trial, done.c, done.skipped = trial, c, skipped

    def _predicted(self, done: ReferenceStep, proposal: Proposal, t: int) -> None:
        """`surrogate`, `fisher` and `calibrated`: c from S, from q, or from S corrected by q now and then."""
        if self.budget == "fisher":
            z, dz = self._derivative(proposal, self.budgeted)
            done.q = half_variance(z, dz)
            done.c = 1.0 if done.q == 0 else min(1.0, math.sqrt(self.delta / done.q))
            return
        probed = self._contributions(done, proposal, t)
        S = done.S
        assert S is not None
        if self.budget == "surrogate":
            done.c = 1.0 if S == 0 else min(1.0, done.guard * 2 * math.sqrt(self.delta) / S)
            return
        if probed:
            z, dz = self._derivative(proposal, self.budgeted)
            done.q = half_variance(z, dz)
            if done.q > 0 and S > 0:
                seen = math.log(done.q / S**2)
                self.log_k = seen if self.log_k is None else self.log_k + 0.5 * (seen - self.log_k)
        k = 0.25 if self.log_k is None else math.exp(self.log_k)
        done.c = 1.0 if S == 0 else min(1.0, math.sqrt(self.delta / (k * S**2)))

    def _contributions(self, done: ReferenceStep, proposal: Proposal, t: int) -> bool:
        """s_g = beta_g·||dW_g|| and S; -> whether any beta was measured."""
        due, probed = self._due(t), False
        done.s = []
        for g, members in enumerate(self.groups):
            norm = self._norm(proposal, members)
            if norm > 0 and (g in due or self.beta[g] is None):
                self._observe(g, movement(self._derivative(proposal, members)[1]) / norm)
                probed = True
            beta = self.beta[g] or 0.0
            done.s.append(beta * norm / (self._lr() if self.units == "per_lr" else 1.0))
        moving = sum(1 for s in done.s if s != 0)
        l2 = math.sqrt(sum(s * s for s in done.s))
        done.S = {"l1": sum(done.s), "sqrtl_l2": math.sqrt(moving) * l2, "l2": l2}[self.aggregate]
        return probed

    def _due(self, t: int) -> set[int]:
        everything = set(range(len(self.groups)))
        sweeps = {0, 10, 20, 50} | {100 * 2**i for i in range(20)}
        if self.cadence == "sweep":
            return everything if t % 20 == 0 else set()
        if t % 200 == 0 if self.cadence == "published" else t in sweeps:
            return everything
        every = 5 if self.cadence == "dense" else 20
        if t % every == 0:
            first = 2 * (t // every - 1)
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

    def _derivative(self, proposal: Proposal, members: Sequence[str] | set[str]) -> tuple[Tensor, Tensor]:
        """(z, J·dW) with dW of these tensors alone, by a central difference 1e-5 long on either side."""
        z, norm = self._z(proposal.before, proposal.tokens), self._norm(proposal, members)
        if norm == 0:
            return z, torch.zeros_like(z)
        eps = 1e-5 / norm
        sides = []
        for sign in (+1, -1):
            moved = copy.deepcopy(proposal.before)
            with torch.no_grad():
                for name, p in moved.named_parameters():
                    if name in members:
                        p.add_(proposal.new[name] - proposal.old[name], alpha=sign * eps)
            sides.append(self._z(moved, proposal.tokens))
        return z, (sides[0] - sides[1]) / (2 * eps)

    # -- how delta, delta* and the guard evolve

    def _multiplier(self, t: int) -> float:
        if self.schedule == "linear":
            return max(0.05, 1 - t / self.total_steps)
        if self.schedule == "cosine":
            return 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, t / self.total_steps)))
        if self.schedule == "lr_squared":
            return (self._lr() / self.peak_lr) ** 2
        return 1.0

    def _guard(self, done: ReferenceStep, t: int) -> None:
        if self.guard == "none":
            return
        assert done.tightness is not None
        self.log_g *= 0.5 ** ((t - self.last_audit) / 200)
        self.last_audit = t
        rho = done.guard * done.tightness  # what is left of the under-estimate: T/tau on a clipped step
        if rho > 1:
            self.log_g -= math.log(rho)
            if self.guard == "shrink_inflate":
                self.beta = [None if beta is None else rho * beta for beta in self.beta]

    def _control(self, done: ReferenceStep, proposal: Proposal) -> None:
        target, clipped = done.target, done.c < 0.999
        assert done.applied_kl is not None
        assert done.slope is not None
        kl = done.applied_kl
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
        elif self.controller == "rsl":
            if kl > 2 * target:
                self.delta /= 1.5
            elif kl < target / 2 and clipped:
                self.delta *= 1.5
        elif self.controller == "agreement":
            fall, promised = self._fall(done, proposal)
            done.r = fall / promised if promised > 0 else None
            if done.r is None or done.r < 1 / 4:
                self.delta /= 1.5
            elif done.r > 3 / 4 and clipped:
                self.delta *= 1.5
        elif self.controller == "energy":
            self.delta = target / self.target_kl * self.gain * max(-done.slope, 0.0)

    def _fall(self, done: ReferenceStep, proposal: Proposal) -> tuple[float, float]:
        """By how much the loss on the probe tokens fell over the budgeted c·dW, and what slope and q promised."""
        assert proposal.targets is not None
        z, dz = self._derivative(proposal, self.budgeted)
        done.q = half_variance(z, dz)
        arrived = copy.deepcopy(proposal.before)
        self._set(arrived, proposal, done.c, free=0.0)
        fall = cross_entropy(z, proposal.targets) - cross_entropy(
            self._z(arrived, proposal.tokens), proposal.targets
        )
        return fall, -done.c * cross_entropy_rise(z, dz, proposal.targets) - done.c**2 * done.q

    # -- weights

    def _set(self, model: nn.Module, proposal: Proposal, c: float, free: float) -> None:
        """Put `model` at W + c·dW, at W + free·dW where it is not budgeted, and back on its manifold."""
        with torch.no_grad():
            for name, p in model.named_parameters():
                old, new, scale = proposal.old[name], proposal.new[name], c if name in self.budgeted else free
                p.copy_(old if scale == 0 else new if scale == 1 else old + scale * (new - old))
            if self.retract is not None:
                self.retract(model)

    def _norm(self, proposal: Proposal, members: Sequence[str] | set[str]) -> float:
        return math.sqrt(
            sum(float((proposal.new[n] - proposal.old[n]).double().square().sum()) for n in members)
        )

    def _lr(self) -> float:
        return float(self.bases[0].param_groups[0]["lr"])

    @staticmethod
    def _z(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = model(tokens)
            return z
