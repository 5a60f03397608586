"""What `attach` costs: processor time of a training step with it over that of the plain loop's step.

    python dev/studies/attach_cost.py [--sizes tiny laptop mid] [--sides kl radius] [--rounds 600]
    python dev/studies/attach_cost.py --peers FOLDER       # other packages, by `pip install --target FOLDER`
    python dev/studies/attach_cost.py --profile kl laptop  # where the extra time of a side goes

Each side trains its own copy of one small GPT in plain PyTorch on the same batches of Shakespeare's
characters (float32, one thread, foreach AdamW at a constant rate). In one process the sides take turns step
by step, in an order drawn anew each round, so that whatever slows the machine slows them all. A step is
forward, cross-entropy, backward, optimizer.step() and zero_grad. The first steps (`SKIPPED`), at which EBC
looks more closely, are left out.

The figure is the mean over the rounds without their longest 2%, over the same of the plain side. EBC's audits
would be among these 2%: audited steps and the others are therefore cut apart, and each counts by its number.
Behind it, in brackets, is the median over the rounds of the ratio, of audited, measured and other steps
apart, each by its number: a busy machine scatters it less, but it hides what is rare. The row `plain, a
second copy` says how far two sides that do the same come out apart.

The target is the median KL of the plain loop's own steps, and the radius the median of one that follows the
lengths of the steps that it limits; the last table has the shares of steps that they limit. `peers` are what
other packages do to each step: they limit or watch other things, at prices that people pay.

`--profile` says in which part of the step the extra time is, by the clock, and then by two profilers in which
operations and functions. These lengthen what consists of many short calls: read them for the order, not for
the sums.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import math
import os
import pstats
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ebc_lab.bench.plain_loop import GPT
from ebc_lab.ebc import attach
from ebc_lab.ebc.options import CLIPPED_BELOW

FIRST = 20  # the first step whose KL or length is looked at
SKIPPED = 25  # steps of each side before the rounds that count
CUT = 0.02  # the share of the longest steps that is left out
BLOCKS, HEADS = 3, 4
TOP = 25  # lines of each table of a profile

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Size:
    """A model, its batches, a rate at which it trains well, and how many rounds tell it apart."""

    rows: int
    context: int
    width: int
    lr: float
    rounds: int


SIZES = {
    "tiny": Size(16, 16, 32, 4e-3, 600),
    "laptop": Size(16, 64, 128, 2e-3, 120),
    "mid": Size(8, 128, 256, 1e-3, 60),
}


class Text:
    """Shakespeare as numbers, and the batches drawn from it by a seed."""

    def __init__(self) -> None:
        text = (Path(os.environ["EBC_LAB_DATA"]) / "tinyshakespeare.txt").read_text(encoding="utf-8")
        letters = {letter: i for i, letter in enumerate(sorted(set(text)))}
        self.vocabulary = len(letters)
        self.tokens = torch.tensor([letters[letter] for letter in text])

    def batches(self, size: Size, count: int, seed: int) -> list[Batch]:
        draw = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(self.tokens) - size.context, (count, size.rows, 1), generator=draw)
        windows = self.tokens[starts + torch.arange(size.context + 1)]
        return [(w[:, :-1].contiguous(), w[:, 1:].contiguous()) for w in windows]


class Loop:
    """The plain loop; the other sides change what comes between the backward pass and `zero_grad`."""

    ebc: Any = None  # what `attach` returned

    def __init__(self, size: Size, text: Text, seed: int = 0, lr: float | None = None):
        torch.manual_seed(seed)
        shape = {"blocks": BLOCKS, "width": size.width, "heads": HEADS, "context": size.context}
        self.model: nn.Module = GPT(text.vocabulary, **shape)
        self.weights: list[Any] = list(self.model.parameters())
        self.optimizer = self.made(size.lr if lr is None else lr)

    def made(self, lr: float) -> Any:
        return torch.optim.AdamW(self.weights, lr=lr, foreach=True)

    def loss(self, batch: Batch) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())

    def step(self, batch: Batch) -> Tensor:
        loss = self.loss(batch)
        loss.backward()
        self.update(batch)
        self.optimizer.zero_grad()
        return loss

    def update(self, batch: Batch) -> None:
        self.optimizer.step()


class GradientNorm(Loop):
    def update(self, batch: Batch) -> None:
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()


class RadiusByHand(Loop):
    """What one would write to keep a step's length within a radius, with torch's operations on lists."""

    radius = length = math.inf  # of the last step's proposal

    def update(self, batch: Batch) -> None:
        with torch.no_grad():
            old = [p.clone() for p in self.weights]
            self.optimizer.step()
            moved = torch._foreach_sub(self.weights, old)
            self.length = float(nn.utils.get_total_norm(moved))
            if self.length > self.radius:
                torch._foreach_lerp_(self.weights, old, 1 - self.radius / self.length)


class Average(Loop):
    """An exponential average of the weights beside them, torch's own."""

    def made(self, lr: float) -> Any:
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
        return super().made(lr)

    def update(self, batch: Batch) -> None:
        self.optimizer.step()
        self.average.update_parameters(self.model)


class Adaptive(Loop):
    """Adaptive gradient clipping, by unit (arXiv:2102.06171)."""

    def made(self, lr: float) -> Any:
        self.agc = import_module("pytorch_optimizer.optimizer.agc").agc
        return super().made(lr)

    def update(self, batch: Batch) -> None:
        with torch.no_grad():
            for p in self.weights:
                p.grad = self.agc(p, p.grad)
        self.optimizer.step()


class ZClip(Loop):
    """Gradient clipping at a threshold that follows the norms seen (arXiv:2504.02507)."""

    def made(self, lr: float) -> Any:
        self.clip = import_module("zclip").ZClip()
        return super().made(lr)

    def update(self, batch: Batch) -> None:
        self.clip.step(self.model)
        self.optimizer.step()


class Sharpness(Loop):
    """Sharpness-aware minimization: a second forward and backward at each step (arXiv:2010.01412)."""

    def made(self, lr: float) -> Any:
        sam = import_module("pytorch_optimizer").SAM
        return sam(self.weights, torch.optim.AdamW, rho=0.05, lr=lr, foreach=True)

    def update(self, batch: Batch) -> None:
        self.optimizer.step(lambda: self.loss(batch).backward())


class ScheduleFree(Loop):
    """AdamW without a schedule, in place of the plain one (arXiv:2405.15682)."""

    def made(self, lr: float) -> Any:
        optimizer = import_module("schedulefree").AdamWScheduleFree(self.weights, lr=lr, foreach=True)
        optimizer.train()
        return optimizer


@dataclass(frozen=True)
class Limits:
    """A KL (nats per token) and a radius that limit about half of the steps or more."""

    kl: float
    radius: float


@dataclass(frozen=True)
class Side:
    """A row of the table: its name, its loop, what `attach` is given (None: it is not called)."""

    name: str
    loop: type[Loop] = Loop
    options: Callable[[Limits], dict[str, Any]] | None = None
    peer: bool = False


SIDES = {
    "plain": Side("plain"),
    "again": Side("plain, a second copy"),
    "norm": Side("clip_grad_norm_", GradientNorm),
    "hand": Side("a radius by hand, a few lines", RadiusByHand),
    "infinite": Side("attach, infinite target", options=lambda limits: {"target_kl": math.inf}),
    "radius": Side("attach, radius", options=lambda limits: {"target_kl": math.inf, "radius": limits.radius}),
    "kl": Side("attach, KL by default", options=lambda limits: {"target_kl": limits.kl}),
    "tracked": Side(
        "attach, tracked, when needed",
        options=lambda limits: {"target_kl": limits.kl, "budget": "tracked", "measure": "when_needed"},
    ),
    "zclip": Side("ZClip", ZClip, peer=True),
    "agc": Side("adaptive gradient clipping (pytorch_optimizer)", Adaptive, peer=True),
    "ema": Side("average of the weights (torch's AveragedModel)", Average, peer=True),
    "schedulefree": Side("AdamWScheduleFree", ScheduleFree, peer=True),
    "sam": Side("SAM (pytorch_optimizer)", Sharpness, peer=True),
}


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """The logits, by the module's forward itself, so that no hook of `attach` sees this call."""
    with torch.no_grad():
        return torch.Tensor(model.forward(tokens)).double()


def kl(before: Tensor, after: Tensor) -> float:
    """KL(before ‖ after) of logits, nats per token, by torch's own functions."""
    p, q = before.log_softmax(-1).flatten(0, -2), after.log_softmax(-1).flatten(0, -2)
    return float(F.kl_div(q, p, reduction="batchmean", log_target=True))


def natural(size: Size, text: Text, batches: Sequence[Batch], lr: float | None = None) -> float:
    """The median KL of the plain loop's steps, from the first that counts on."""
    loop = Loop(size, text, lr=lr)
    found = []
    for tokens, targets in batches:
        before = logits(loop.model, tokens)
        loop.step((tokens, targets))
        found.append(kl(before, logits(loop.model, tokens)))
    return float(np.median(found[FIRST:]))


def ruling(size: Size, text: Text, batches: Sequence[Batch]) -> float:
    """A radius that rules at about half of the steps: the median of one that follows their lengths."""
    loop = RadiusByHand(size, text)
    found = []
    for batch in batches:
        loop.step(batch)
        start = loop.length if math.isinf(loop.radius) else loop.radius
        loop.radius = start * (1.05 if loop.length > start else 1 / 1.05)
        found.append(loop.radius)
    return float(np.median(found[FIRST:]))


def limits(size: Size, text: Text, batches: Sequence[Batch]) -> Limits:
    return Limits(natural(size, text, batches), ruling(size, text, batches))


def built(side: Side, size: Size, text: Text, found: Limits) -> Loop:
    """A side's loop. Raises ImportError where its package is not installed."""
    loop = side.loop(size, text)
    if isinstance(loop, RadiusByHand):
        loop.radius = found.radius
    if side.options is not None:
        loop.ebc = attach(loop.model, loop.optimizer, **side.options(found))
    return loop


def kinds(of_steps: Iterable[Any]) -> list[list[int]]:
    """The numbers of the steps of each kind."""
    found: dict[Any, list[int]] = {}
    for t, kind in enumerate(of_steps):
        found.setdefault(kind, []).append(t)
    return list(found.values())


@dataclass
class Record:
    """The steps of a side that count: processor seconds, and what EBC did."""

    seconds: list[float] = field(default_factory=list)
    audited: list[bool] = field(default_factory=list)
    measured: list[bool] = field(default_factory=list)
    limited: list[bool] = field(default_factory=list)

    def step(self, loop: Loop, batch: Batch) -> Tensor:
        """Let the loop take a step, note it, and return its loss."""
        began = time.process_time()
        loss = loop.step(batch)
        self.seconds.append(time.process_time() - began)
        last = None if loop.ebc is None else loop.ebc.last
        self.audited.append(last is not None and last.applied_kl is not None)
        self.measured.append(last is not None and last.measurements > 0)
        self.limited.append(last is not None and float(last.clip_coefficient) < CLIPPED_BELOW)
        return loss.detach()

    def mean(self) -> float:
        """Seconds of a step without the longest, audited steps and the others apart."""
        total = 0.0
        for part in kinds(self.audited):
            seconds = np.sort(np.array(self.seconds)[part])
            total += len(seconds) * float(seconds[: len(seconds) - round(CUT * len(seconds))].mean())
        return total / len(self.seconds)

    def median(self, plain: Record) -> float:
        """The median of a step over the plain one of its round, audited, measured and other steps apart."""
        rounds = np.array(self.seconds) / np.array(plain.seconds)
        parts = kinds(zip(self.audited, self.measured, strict=True))
        return sum(len(part) * float(np.median(rounds[part])) for part in parts) / len(rounds)

    def did(self) -> str:
        """How many of its steps were limited, measured and audited, in words."""
        parts = {"limited": self.limited, "measured": self.measured, "audited": self.audited}
        return ", ".join(f"{100 * sum(part) / len(part):.0f}% {name}" for name, part in parts.items())


def race(loops: Mapping[str, Loop], batches: Sequence[Batch]) -> dict[str, Record]:
    """Let the loops take turns, and time all but the first steps."""
    order, shuffle = list(loops), random.Random(0)
    records = {name: Record() for name in loops}
    for t, batch in enumerate(batches):
        if t == SKIPPED:
            gc.collect()
            gc.freeze()  # so that what one side throws away is not looked for among what all others keep
        shuffle.shuffle(order)
        for name in order:
            (records[name] if t >= SKIPPED else Record()).step(loops[name], batch)
    gc.unfreeze()
    return records


def measured(size: Size, text: Text, rounds: int, sides: Sequence[str]) -> dict[str, Record]:
    """The records of every side that is there."""
    batches = text.batches(size, SKIPPED + rounds, seed=0)
    found = limits(size, text, batches)
    loops: dict[str, Loop] = {}
    for key in dict.fromkeys(["plain", *sides]):
        try:
            loops[key] = built(SIDES[key], size, text, found)
        except ImportError:
            print(f"{SIDES[key].name}: not installed", file=sys.stderr)
    return race(loops, batches)


# -- what is printed -----------------------------------------------------------------------------------------


def ratio(record: Record, plain: Record) -> str:
    """The ratio of the means and, in brackets, the median of the ratios."""
    return f"{record.mean() / plain.mean():.3f} ({record.median(plain):.3f})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows, the first of which is the head, as Markdown."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def machine() -> str:
    """The processor, whether it has AMX, torch, and the threads used."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    about = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    amx = "with" if "amx_tile" in about.get("flags", "") else "without"
    model = f"{about.get('model name', '?')}, family {about.get('cpu family')}, model {about.get('model')}"
    return f"{model}, {amx} AMX; torch {torch.__version__}; {torch.get_num_threads()} thread"


def show(found: Mapping[str, Mapping[str, Record]], sides: Sequence[str]) -> None:
    """Print what each side cost, and what it did."""
    for name, records in found.items():
        plain, rounds = records["plain"], len(records["plain"].seconds)
        print(f"{name}: {rounds} rounds, a plain step {1000 * plain.mean():.2f} ms of processor time")
    head = ["processor time of a step over the plain loop's", *found]
    rows, did = [head], [["what it did", *found]]
    for key in sides:
        side = SIDES[key]
        if key != "plain":
            cells = [ratio(r[key], r["plain"]) if key in r else "not installed" for r in found.values()]
            rows.append([("peer: " if side.peer else "") + side.name, *cells])
        if side.options is not None:
            did.append([side.name, *(r[key].did() for r in found.values())])
    print(f"\n{table(rows)}\n\n{table(did)}")


# -- where the time goes -------------------------------------------------------------------------------------

Times = dict[str, tuple[float, float]]  # seconds a step and calls a step


def by_part(loop: Loop, batches: Sequence[Batch]) -> Times:
    """The median processor time of each part of the step, whose parts are the same for every side."""
    names = "forward and loss", "backward", "optimizer.step() and what hangs on it", "zero_grad"
    seconds = []
    for batch in batches:
        marks = [time.process_time()]
        loss = loop.loss(batch)
        marks.append(time.process_time())
        loss.backward()
        marks.append(time.process_time())
        loop.update(batch)
        marks.append(time.process_time())
        loop.optimizer.zero_grad()
        seconds.append(np.diff([*marks, time.process_time()]))
    return {name: (float(s), 1.0) for name, s in zip(names, np.median(seconds, axis=0), strict=True)}


def by_operation(loop: Loop, batches: Sequence[Batch]) -> Times:
    """The own processor time of each of torch's operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for batch in batches:
            loop.step(batch)
    n = len(batches)
    return {e.key: (e.self_cpu_time_total / 1e6 / n, e.count / n) for e in profile.key_averages()}


def by_function(loop: Loop, batches: Sequence[Batch]) -> tuple[Times, Times]:
    """The time of each Python function, by itself and with all that it calls."""
    profile = cProfile.Profile()
    profile.enable()
    for batch in batches:
        loop.step(batch)
    profile.disable()
    own: Times = {}
    whole: Times = {}
    n = len(batches)
    entries: Any = pstats.Stats(profile)
    for (file, line, function), (_, calls, alone, total, _) in entries.stats.items():
        place = f"{'/'.join(Path(file).parts[-3:])}:{line} {function}" if line else function
        own[place] = alone / n, calls / n
        whole[place] = total / n, calls / n
    return own, whole


def difference(side: Times, plain: Times, step: float) -> list[list[str]]:
    """Rows of what a side does longer than the plain one, the longest first."""
    none = 0.0, 0.0
    extra = {
        name: (seconds - plain.get(name, none)[0], calls - plain.get(name, none)[1])
        for name, (seconds, calls) in side.items()
    }
    longest = sorted(extra.items(), key=lambda item: -item[1][0])[:TOP]
    return [[f"{1e6 * s:.0f}", f"{100 * s / step:.2f}%", f"{n:.2f}", name] for name, (s, n) in longest]


def profiled(key: str, size: Size, text: Text) -> None:
    """Print where the extra time of a side goes, in microseconds and shares of a plain step."""
    steps = max(40, size.rounds // 3 // 20 * 20)  # whole cycles of audits
    batches = text.batches(size, SKIPPED + 3 * steps, seed=0)
    found = limits(size, text, batches[: SKIPPED + steps])
    loops = {name: built(SIDES[name], size, text, found) for name in ("plain", key)}
    records = race(loops, batches[: SKIPPED + steps])
    step = records["plain"].mean()
    print(
        f"{SIDES[key].name}, {steps} steps: {ratio(records[key], records['plain'])} of a plain step's "
        f"{1000 * step:.2f} ms; {records[key].did()}"
    )
    rest = batches[SKIPPED + steps :]
    plain_parts, parts = (by_part(loop, rest[:steps]) for loop in loops.values())
    plain_operations, operations = (by_operation(loop, rest[steps : steps + 40]) for loop in loops.values())
    (plain_own, _), (own, whole) = (by_function(loop, rest[steps:]) for loop in loops.values())
    library = {place: times for place, times in whole.items() if "/ebc/" in f"/{place}"}
    for what, rows in (
        ("parts of the step, by the clock", difference(parts, plain_parts, step)),
        ("torch's operations, their own time", difference(operations, plain_operations, step)),
        ("Python functions, their own time", difference(own, plain_own, step)),
        ("functions of ebc_lab.ebc, with all they call", difference(library, {}, step)),
    ):
        head = ["extra µs a step", "of a plain step", "extra calls a step", what]
        print(f"\n{table([head, *rows])}")


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What `attach` costs, over the plain loop.")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=SIZES)
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--rounds", type=int, help="that count; by default as many as a size needs")
    parser.add_argument("--peers", type=Path, help="a folder with other packages")
    parser.add_argument("--profile", nargs=2, metavar=("SIDE", "SIZE"), help=f"sides: {', '.join(SIDES)}")
    return parser.parse_args()


def main() -> None:
    asked = options()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of few probe tokens, which the tiny model cannot help
    if asked.peers is not None:
        sys.path.append(str(asked.peers))
    text = Text()
    print(machine())
    if asked.profile:
        key, name = asked.profile
        profiled(key, SIZES[name], text)
        return
    show(
        {n: measured(SIZES[n], text, asked.rounds or SIZES[n].rounds, asked.sides) for n in asked.sizes},
        asked.sides,
    )


if __name__ == "__main__":
    main()
