"""EBC again, as a slow plain transcription of docs/method.md: the tests compare the fast path with it.

Python floats and one tensor at a time, deep copies of the model, derivatives by central differences. It
imports nothing of the package: geometry, surrogates, budgets, controllers and schedules are all
written out again, in the order of docs/method.md.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

Weights = dict[str, Tensor]


# -- how far logits moved, token by token --------------------------------------------------------------------


def rows(z: Tensor) -> list[list[float]]:
    """Logits (..., V) -> one list of V numbers for each token."""
    out: list[list[float]] = z.flatten(0, -2).tolist()
    return out


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    norm = top + math.log(sum(math.exp(a - top) for a in row))
    return [a - norm for a in row]


def mean_kl(z: Tensor, z_new: Tensor) -> float:
    kls = []
    for row, row_new in zip(rows(z), rows(z_new), strict=True):
        if not all(map(math.isfinite, row_new)):
            return math.nan
        pairs = zip(log_softmax(row), log_softmax(row_new), strict=True)
        kls.append(sum(math.exp(a) * (a - b) for a, b in pairs))
    return sum(kls) / len(kls)


def movement(dz: Tensor) -> float:
    """rms(centre(dz)), logits per token."""
    squares = []
    for row in rows(dz):
        mean = sum(row) / len(row)
        squares.append(sum((a - mean) ** 2 for a in row))
    return math.sqrt(sum(squares) / len(squares))


def half_variance(z: Tensor, dz: Tensor) -> float:
    """½·Var_p(dz), the KL to second order, nats per token."""
    halves = []
    for row, row_moved in zip(rows(z), rows(dz), strict=True):
        p = [math.exp(a) for a in log_softmax(row)]
        mean = sum(a * b for a, b in zip(p, row_moved, strict=True))
        halves.append(0.5 * sum(a * (b - mean) ** 2 for a, b in zip(p, row_moved, strict=True)))
    return sum(halves) / len(halves)


def cross_entropy(z: Tensor, targets: Tensor) -> float:
    losses: list[float] = [
        -log_softmax(row)[y] for row, y in zip(rows(z), targets.flatten().tolist(), strict=True)
    ]
    return sum(losses) / len(losses)


def cross_entropy_rise(z: Tensor, dz: Tensor, targets: Tensor) -> float:
    """<∇loss, dW> where dz = J·dW."""
    rises: list[float] = []
    for row, row_moved, y in zip(rows(z), rows(dz), targets.flatten().tolist(), strict=True):
        expected = sum(math.exp(a) * b for a, b in zip(log_softmax(row), row_moved, strict=True))
        rises.append(expected - row_moved[y])
    return sum(rises) / len(rises)


def overconfidence(z: Tensor, targets: Tensor) -> float:
    """d(loss)/d(ln s) of the logits s·z at s = 1, in standard errors."""
    slopes: list[float] = []
    for row, y in zip(rows(z), targets.flatten().tolist(), strict=True):
        slopes.append(sum(math.exp(a) * x for a, x in zip(log_softmax(row), row, strict=True)) - row[y])
    mean = sum(slopes) / len(slopes)
    variance = sum((s - mean) ** 2 for s in slopes) / (len(slopes) - 1)
    return mean / math.sqrt(variance / len(slopes))


# -- one budgeted run ----------------------------------------------------------------------------------------


@dataclass
class ReferenceStep:
    c: float
    delta: float
    target: float  # delta*, scheduled
    skipped: bool = False
    trace: list[tuple[float, float]] = field(default_factory=list)  # of what is measured: (trial, KL)
    p: float = 2.0  # KL ~ c^p, of `shadow`
    most: float = 1.0  # the largest c that the radius allows
    ruled: str = ""  # which bound limits the step, beside a radius
    P: float | None = None  # of `tracked`, like these four
    x: float | None = None
    v: float | None = None
    w: float | None = None
    innovation: float | None = None
    guard: float = 1.0  # the factor on the trust radius, under `surrogate`
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
    """What a step starts from: the model at W (a deep copy), W, W + dW, and the tokens that choose c."""

    before: nn.Module
    old: Weights
    new: Weights
    gradients: Weights  # at W, of the whole batch
    tokens: Tensor
    targets: Tensor | None


@dataclass
class ReferenceClip:
    """One model, its base optimizers, one budget. `step(tokens)` needs the gradients in place.

    Tensors that are in none of `groups` are not budgeted and move freely. `retract` puts the model it is
    given back on its manifold, in place.
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
    radius: float | None = None
    radius_unit: str = "absolute"
    ramp: int = 0
    steers: str = "kl"
    probe_sequences: int = 2
    audit_every: int = 20
    audit_tokens: int = 512
    floor: float = 1e-7
    measure_every: int = 1  # of `tracked`
    measure: str = "every"  # of `tracked`, like the next
    measure_above: float = 0.25
    stretch: float | None = 1.5
    exponent: str = "square"  # of `shadow`
    refine_steps: int | None = None  # of `shadow` and `tracked`
    cadence: str = "warm"
    retract: Callable[[nn.Module], None] | None = None

    def __post_init__(self) -> None:
        self.t = 0
        self.peak_lr = self._lr()
        self.trial = 0.1
        self.x: float | None = None
        self.v: float | None = None
        self.w = 0.04
        self.log_k: float | None = None
        self.exponents: list[float] = []  # one for each audit
        self.delta = self.target_kl
        self.previous_target = self.target_kl
        self.previous_error: float | None = None
        self.observed: list[float] = []  # of `confidence`, since the last audit
        self.boldness = 0.0  # their mean at the last audit
        self.beta: list[float | None] = [None] * len(self.groups)
        self.seen = [0] * len(self.groups)
        self.budgeted = {name for members in self.groups for name in members}
        weights = dict(self.model.named_parameters())
        self.start = math.sqrt(sum(float(weights[n].detach().double().square().sum()) for n in self.budgeted))

    def step(
        self, tokens: Tensor, targets: Tensor | None = None, probe: tuple[Tensor, Tensor | None] | None = None
    ) -> ReferenceStep:
        t = self.t
        self.t += 1
        target = self._multiplier(t) * self.target_kl
        self.delta *= target / self.previous_target
        self.previous_target = target
        names = dict(self.model.named_parameters())
        gradients = {n: p.grad.detach().clone() for n, p in names.items() if p.grad is not None}
        if not all(bool(torch.isfinite(g).all()) for g in gradients.values()):
            return ReferenceStep(0.0, self.delta, target, skipped=True)

        # the base's proposal, and the tokens that choose c
        before = copy.deepcopy(self.model)
        old = {n: p.detach().clone() for n, p in names.items()}
        for base in self.bases:
            base.step()
        new = {n: p.detach().clone() for n, p in names.items()}
        rows, labels = (tokens, targets) if probe is None else probe
        k = self.probe_sequences
        first = None if labels is None else labels[:k]
        proposal = Proposal(before, old, new, gradients, rows[:k], first)

        if self.controller == "confidence":
            assert targets is not None
            self.observed.append(overconfidence(self._z(before, tokens), targets))

        # c, and the update it leaves
        self.moved = self.delta / target
        if self.steers == "radius":
            self.delta = target
        done = ReferenceStep(1.0, self.delta, target, guard=self._guard_factor())
        done.most = self._most(proposal, t)
        if self.target_kl == math.inf:
            pass
        elif self.budget == "shadow":
            done.p = p = self._exponent()
            self._search(done, proposal, t, self.trial, lambda kl, c: c * (self.delta / kl) ** (1 / p))
        elif self.budget == "tracked":
            self._tracked(done, proposal, t)
        else:
            self._predicted(done, proposal, t)
        if self.radius is not None:
            done.ruled = "kl" if done.c < done.most else "radius" if done.most < 1 else "nothing"
            done.c = min(done.c, done.most)
        if self.steers == "radius":
            self.delta = self.moved * target  # what the controller has made of it
        if done.skipped:
            self._set(self.model, proposal, 0.0, free=0.0)
            return done
        self._set(self.model, proposal, done.c, free=1.0)

        if t % self.audit_every == 0:
            parts = ((g.double() * (new[n] - old[n]).double()).sum() for n, g in gradients.items())
            done.slope = sum(map(float, parts))
            last = k + math.ceil(self.audit_tokens / tokens.shape[1])
            self._audit(done, proposal, tokens[k:last])
            self._control(done, proposal, t)
            if self.budget == "tracked":
                self.audited_tokens = tokens[k:last].numel()
                self._learn_from_audit(done)
        return done

    def _audit(self, done: ReferenceStep, proposal: Proposal, held: Tensor) -> None:
        z = self._z(proposal.before, held)
        z_new = self._z(self.model, held)
        done.applied_kl = max(0.0, mean_kl(z, z_new))
        done.T = movement(z_new - z)
        if done.S is not None:
            # what is not budgeted stays where it was: its movement is not S's
            budgeted = copy.deepcopy(proposal.before)
            self._set(budgeted, proposal, done.c, free=0.0)
            T = movement(self._z(budgeted, held) - z)
            done.tightness = T / (done.c * done.S) if done.c * done.S else math.nan
        if self.exponent == "auto":
            self._observe_exponent(done, proposal, held)

    # -- how KL grows with c

    def _exponent(self) -> float:
        """p, the median of the last five audits'."""
        last = sorted(self.exponents[-5:])
        if not last:
            return 2.0
        half = len(last) // 2
        return last[half] if len(last) % 2 else (last[half - 1] + last[half]) / 2

    def _observe_exponent(self, done: ReferenceStep, proposal: Proposal, held: Tensor) -> None:
        z = self._z(proposal.before, held)
        moved = copy.deepcopy(proposal.before)
        kls = []
        for c in (done.c, done.c / 4):
            self._set(moved, proposal, c, free=0.0)
            kls.append(mean_kl(z, self._z(moved, held)))
        if not all(map(math.isfinite, kls)):
            return
        p = math.log(kls[0] / kls[1]) / math.log(4) if min(kls) >= self.floor else 2.0
        self.exponents.append(max(1.0, min(2.0, p)))

    # -- budgets: how c is found

    def _search(
        self,
        done: ReferenceStep,
        proposal: Proposal,
        t: int,
        trial: float,
        scale: Callable[[float, float], float],
    ) -> None:
        """Measure the KL at `trial`, again where that was far off; `scale`: (KL, trial) -> c, unlimited."""
        z = self._z(proposal.before, proposal.tokens)
        trial_model = copy.deepcopy(proposal.before)
        trial = min(trial, done.most)
        left = 3 if self.refine_steps is None or t < self.refine_steps else 1
        while True:
            self._set(trial_model, proposal, trial, free=0.0)
            kl = mean_kl(z, self._z(trial_model, proposal.tokens))
            kl = max(0.0, kl) if math.isfinite(kl) else kl
            done.trace.append((trial, kl))
            left -= 1
            if not math.isfinite(kl):
                again = True
                c = 0.0
                following = trial / 10
            elif kl < self.floor:
                again = trial < done.most
                c = trial
                following = min(done.most, 10 * trial)
            else:
                c = min(done.most, scale(kl, trial))
                again = not 1 / 1.5 <= c / trial <= 1.5
                following = c if c > 0 else trial
            trial = following
            if not again or left == 0:
                break
        self.trial = trial
        done.c = c if self.stretch is None else min(c, self.stretch * done.trace[-1][0])
        done.skipped = not math.isfinite(kl)

    def _tracked(self, done: ReferenceStep, proposal: Proposal, t: int) -> None:
        P = done.P = self._proposal_scale(proposal)
        x = self.x
        v = None if self.v is None else self.v + (0.04 if t < 20 else 0.002)
        w = self.w
        reach = None if x is None or P == 0 else math.sqrt(self.delta / (P * math.exp(x)))
        expected = None if reach is None else min(done.most, reach)
        first = self.trial if v is None or expected is None else expected

        # between measurements: the prediction, or what an upper bound of x allows
        far = False  # whether the radius rules for all that is known
        spares = self.radius is not None and self.measure == "when_needed" and t >= 20
        if spares and v is not None and reach is not None:
            far = 2 * math.log(done.most / reach) + 2 * math.sqrt(v + w) < 0
        if far or not self._measures(t):
            first = min(first, done.most)
            done.c = first if expected is None else min(first, expected)
            self.trial = done.c or self.trial
            if P > 0:
                self.v = v
            done.x, done.v, done.w = self.x, self.v, self.w
            return

        noise = 9 / proposal.tokens.numel()

        def scale(kl: float, trial: float) -> float:
            whole = kl / trial**2
            here = self._measured(v, math.log(whole / P) + noise / 2, noise)[3] if P else 0.0
            return math.sqrt(self.delta / (P * math.exp(here) if P else whole))

        self._search(done, proposal, t, first or self.trial, scale)
        trial, kl = done.trace[-1]
        if P > 0 and not math.isfinite(kl):
            self.v = None
        elif P > 0:
            y = math.log(max(kl, self.floor) / trial**2 / P)
            if kl >= self.floor:
                self.x, self.v, self.w, _ = self._measured(v, y + noise / 2, noise)
            else:
                self.x, self.v = y, None
            if v is not None and x is not None and kl >= self.floor:
                done.innovation = y + noise / 2 - x
        done.x, done.v, done.w = self.x, self.v, self.w

    def _learn_from_audit(self, done: ReferenceStep) -> None:
        """The KL of an audit as a measurement, where none was made because the radius ruled."""
        if self.radius is None or self.measure != "when_needed" or done.trace:
            return
        if len(self.budgeted) < len(dict(self.model.named_parameters())):
            return
        assert done.applied_kl is not None
        assert done.P is not None
        noise = 9 / self.audited_tokens
        y = math.log(done.applied_kl / done.c**2 / done.P) + noise / 2
        self.x, self.v, self.w, _ = self._measured(self.v, y, noise)

    def _measured(self, v: float | None, y: float, noise: float) -> tuple[float, float, float, float]:
        """What is seen, y, beside x of variance v -> x, v, w, and ln(KL/P) of this very step."""
        x, w = self.x, self.w
        if v is None or x is None:
            return y, w + noise, w, y
        off = y - x
        spread = v + w + noise
        extra = off**2 - spread if off**2 > 16 * spread else 0.0
        gain = (v + extra) / (spread + extra)
        here = (v + extra + w) / (spread + extra)
        new_w = max(0.0, w + 0.02 * (min(off**2, 16 * spread) - spread))
        return x + gain * off, gain * (w + noise), new_w, x + here * off

    def _most(self, proposal: Proposal, t: int) -> float:
        """r/||dW||, at most 1."""
        if self.radius is None:
            return 1.0
        r = self.radius * math.sqrt(max(self._multiplier(t), 1e-12))
        r *= min(1.0, (t + 1) / self.ramp) if self.ramp else 1.0
        r *= self.start if self.radius_unit == "initial" else 1.0
        r *= math.sqrt(self.moved) if self.steers == "radius" else 1.0
        norm = self._norm(proposal, self.budgeted)
        return 1.0 if norm == 0 else min(1.0, r / norm)

    def _measures(self, t: int) -> bool:
        if t < 20:
            return True
        if self.measure == "every":
            return (t + t // math.lcm(self.measure_every, self.audit_every)) % self.measure_every == 0
        if self.v is None or math.sqrt(self.v + self.w + 0.002) > self.measure_above:
            return True
        audits, since = divmod(t, self.audit_every)
        return since == 1 + audits % min(7, max(1, self.audit_every - 1))

    def _proposal_scale(self, proposal: Proposal) -> float:
        """P = max(u, 0.05·||g||·n)·n, of what is budgeted."""
        u = g = n = 0.0
        for name in self.budgeted:
            moved = (proposal.new[name] - proposal.old[name]).double()
            n += float(moved.square().sum())
            if name in proposal.gradients:
                gradient = proposal.gradients[name].double()
                u -= float((gradient * moved).sum())
                g += float(gradient.square().sum())
        n = math.sqrt(n)
        return max(u, 0.05 * math.sqrt(g) * n) * n

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
        due = self._due(t)
        probed = False
        done.s = []
        for g, members in enumerate(self.groups):
            norm = self._norm(proposal, members)
            if norm > 0 and (g in due or self.beta[g] is None):
                self._observe(g, movement(self._derivative(proposal, members)[1]) / norm)
                probed = True
            beta = self.beta[g] or 0.0
            done.s.append(self._contribution(beta, norm))
        moving = sum(1 for s in done.s if s != 0)
        l2 = math.sqrt(sum(s * s for s in done.s))
        done.S = {"l1": sum(done.s), "sqrtl_l2": math.sqrt(moving) * l2, "l2": l2}[self.aggregate]
        return probed

    def _due(self, t: int) -> set[int]:
        everything = set(range(len(self.groups)))
        sweeps = {0, 10, 20, 50} | {100 * 2**i for i in range(20)}
        if self.cadence == "sweep":
            return everything if t % 20 == 0 else set()
        if t in sweeps:
            return everything
        every = 5 if self.cadence == "dense" else 20
        if t % every == 0:
            first = 2 * (t // every - 1)
            return {first % len(self.groups), (first + 1) % len(self.groups)}
        return set()

    def _observe(self, g: int, observed: float) -> None:
        self.seen[g] += 1
        n = self.seen[g]
        beta = self.beta[g]
        if beta is None:
            self.beta[g] = observed
            return
        weight, limited = self._weight(n)
        residual = observed - beta
        if limited:
            residual = max(-0.5 * beta, min(0.5 * beta, residual))
        self.beta[g] = beta + weight * residual

    def _derivative(self, proposal: Proposal, members: Sequence[str] | set[str]) -> tuple[Tensor, Tensor]:
        """(z, J·dW) with dW of these tensors alone, by a central difference 1e-5 long on either side."""
        z = self._z(proposal.before, proposal.tokens)
        norm = self._norm(proposal, members)
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

    # -- what mistakes of the earlier study change: see the tests of `forensics`

    def _guard_factor(self) -> float:
        return 1.0

    def _contribution(self, beta: float, norm: float) -> float:
        return beta * norm

    def _weight(self, n: int) -> tuple[float, bool]:
        """The weight of the n-th observation of a beta, and whether its residual is limited."""
        return max(0.05, 1 / n), n >= 4

    # -- how delta and delta* evolve

    def _multiplier(self, t: int) -> float:
        if self.schedule == "linear":
            return max(0.05, 1 - t / self.total_steps)
        if self.schedule == "cosine":
            return 0.05 + 0.475 * (1 + math.cos(math.pi * min(1.0, t / self.total_steps)))
        if self.schedule == "hold_decay":
            left = max(0.0, 1 - t / self.total_steps)
            return max(0.05, (left / 0.4) ** 2) if left < 0.4 else 1.0
        if self.schedule == "lr_squared":
            return (self._lr() / self.peak_lr) ** 2
        return 1.0

    def _control(self, done: ReferenceStep, proposal: Proposal, t: int) -> None:
        target = done.target
        clipped = done.c < 0.999 and done.ruled in ("", self.steers)
        kl = done.applied_kl
        assert kl is not None
        assert done.slope is not None
        if self.controller == "log_pi":
            error = math.log(target) - math.log(max(kl, 1e-12))
            previous = error if self.previous_error is None else self.previous_error
            self.previous_error = error
            if clipped or error <= 0:
                offset = math.log(self.delta / target) + 0.2 * (error - previous) + 0.3 * error
                self.delta = target * math.exp(max(-12.0, min(12.0, offset)))
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
        elif self.controller == "confidence":
            mean = sum(self.observed) / len(self.observed)
            rise = max(-math.log(2) / 10, min(math.log(1.25) / 10, -mean / 20))
            healing = self.boldness < -1 and mean > self.boldness * 0.5 ** (len(self.observed) / 10)
            if not clipped or t < 20 or healing:
                rise = min(rise, 0.0)
            self.boldness = mean
            self.delta *= math.exp(len(self.observed) * rise * target / self.target_kl)
            self.observed = []

    def _fall(self, done: ReferenceStep, proposal: Proposal) -> tuple[float, float]:
        """By how much the loss on the probe tokens fell over the budgeted c·dW, and the prediction."""
        assert proposal.targets is not None
        z, dz = self._derivative(proposal, self.budgeted)
        done.q = half_variance(z, dz)
        arrived = copy.deepcopy(proposal.before)
        self._set(arrived, proposal, done.c, free=0.0)
        after = cross_entropy(self._z(arrived, proposal.tokens), proposal.targets)
        rise = cross_entropy_rise(z, dz, proposal.targets)
        return cross_entropy(z, proposal.targets) - after, -done.c * rise - done.c**2 * done.q

    # -- weights

    def _set(self, model: nn.Module, proposal: Proposal, c: float, free: float) -> None:
        """Put `model` at W + c·dW, at W + free·dW where it is not budgeted, and back on its manifold."""
        with torch.no_grad():
            for name, p in model.named_parameters():
                old = proposal.old[name]
                new = proposal.new[name]
                scale = c if name in self.budgeted else free
                p.copy_(new if scale == 1 else old + scale * (new - old))
            if self.retract is not None:
                self.retract(model)

    def _norm(self, proposal: Proposal, members: Sequence[str] | set[str]) -> float:
        moved = [(proposal.new[n] - proposal.old[n]).double() for n in members]
        return math.sqrt(sum(float(m.square().sum()) for m in moved))

    def _lr(self) -> float:
        return float(self.bases[0].param_groups[0]["lr"])

    @staticmethod
    def _z(model: nn.Module, tokens: Tensor) -> Tensor:
        with torch.no_grad():
            z: Tensor = model(tokens)
            return z
