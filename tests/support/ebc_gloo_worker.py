"""A tiny language model trained under EBC by several gloo processes: DDP, FSDP2, and what goes wrong there.

What a process does is a list of cases, each a `Case`'s fields as a dictionary; `gloo_worker.start` begins the
processes. Rank r of n has rows r, r+n, ... of each batch.

usage: as gloo_worker.py; the scenario is `train`.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from support.gloo_worker import main  # noqa: E402

from ebc_lab.components.stabilizers.rivals import NormClip  # noqa: E402
from ebc_lab.ebc import EllipsotopeClip, InBackward, LaggedClip, attach  # noqa: E402
from ebc_lab.ebc.parallel import workers  # noqa: E402
from ebc_lab.ebc.stabilized import StabilizedOptimizer  # noqa: E402
from ebc_lab.ebc.step import Arithmetic  # noqa: E402

VOCABULARY = 11
TOKENS = 12  # of a row
ROWS = 16  # of a batch, over all processes


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 13)
        self.down = nn.Linear(13, width)

    def forward(self, x: Tensor) -> Tensor:
        counts = torch.arange(1, x.shape[1] + 1)[:, None]
        mean = (x.float().cumsum(1) / counts).to(self.norm.weight.dtype)
        return x + self.down(F.gelu(self.up(self.norm(mean))))


class Tiny(nn.Module):
    """Two blocks of width 6, of whose weights two processes can halve few, and `scale`, one element, not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 6)
        self.blocks = nn.ModuleList(Block(6) for _ in range(2))
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, VOCABULARY)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, tokens: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x.to(self.norm.weight.dtype)).to(self.head.weight.dtype)) * self.scale


@dataclass
class Case:
    """One training run; see the functions that read each field."""

    wrap: str = "ddp"  # none, ddp, fsdp
    by: str = "attach"  # attach, attach_inner, clip, clip_inner
    options: dict[str, Any] = field(default_factory=dict)  # of EllipsotopeClip
    check: bool = False  # whether `attach` looks at the first steps
    steps: int = 12
    optimizer: str = "adam"
    accumulate: int = 1
    short: bool = False  # rank 1 has one row less than the probe at every fifth step
    masked: bool = False  # rank 1's probe rows are padding
    bad_at: int | None = None  # a step at which rank 1 has a gradient that is NaN
    bad_from: str = "loss"  # or "gradients": after they were averaged
    scaler: bool = False
    closure: bool = False
    compiled: str = ""  # inside of the wrapper, or around it: without a compiler, by torch.compile's "eager"
    max_norm: float | None = None  # clip_grad_norm_
    frozen: list[str] = field(default_factory=list)  # prefixes of names
    bfloat16: list[str] = field(default_factory=list)  # of weights of that type
    policy: dict[str, str] = field(default_factory=dict)  # FSDP's mixed precision: dtypes by name
    reshard: bool | None = None
    columns: bool = False  # FSDP shares out the last dimension where two can halve that
    resume_at: int | None = None
    folder: str = ""  # for torch.distributed.checkpoint
    attach_first: bool = False  # before the model is wrapped
    group: str = "auto"  # auto, none, given


def batch(case: Case, step: int, part: int, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """This process's rows: tokens, what comes next (-100: nothing), and which positions count."""
    draw = torch.Generator().manual_seed(1000 * part + step)
    start = torch.randint(VOCABULARY, (ROWS, 1), generator=draw)
    steps = torch.randint(1, 3, (ROWS, TOKENS), generator=draw)
    rows = ((start + steps.cumsum(1)) % VOCABULARY)[rank::world]
    if case.short and rank == 1 and step % 5 == 0:
        rows = rows[:1]
    tokens, targets = rows[:, :-1], rows[:, 1:].clone()
    if not case.masked:
        return tokens, targets, None
    mask = torch.ones_like(tokens)
    mask[0::3, 7:] = 0
    if rank == 1:
        mask[: case.options.get("probe_sequences", 2)] = 0
    return tokens, targets.masked_fill(mask == 0, -100), mask


def optimizer_of(name: str, model: nn.Module) -> list[torch.optim.Optimizer]:
    trained = [p for p in model.parameters() if p.requires_grad]
    if name == "two":
        matrices = [p for p in trained if p.ndim == 2]
        rest = [p for p in trained if p.ndim != 2]
        return [torch.optim.SGD(matrices, lr=1.0, momentum=0.9), torch.optim.AdamW(rest, lr=0.05)]
    return [torch.optim.Adam(trained, lr=0.05, fused=name == "fused")]


def shard(model: nn.Module, case: Case) -> None:
    policy = MixedPrecisionPolicy(**{k: getattr(torch, v) for k, v in case.policy.items()})
    settings: dict[str, Any] = {"mp_policy": policy, "reshard_after_forward": case.reshard}
    if case.columns:
        settings["shard_placement_fn"] = lambda p: Shard(p.ndim - 1 if p.shape[-1] % 2 == 0 else 0)
    for block in model.blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)


class Run:
    """A model, wrapped as the case says, its optimizers and EBC around them."""

    def __init__(self, case: Case, rank: int, world: int):
        self.case, self.rank, self.world = case, rank, world
        self.model = Tiny()
        for name, p in self.model.named_parameters():
            p.requires_grad_(not name.startswith(tuple(case.frozen)))
            if name.startswith(tuple(case.bfloat16)):
                p.data = p.data.bfloat16()
        if not case.attach_first:
            self.wrap()
        self.optimizers = optimizer_of(case.optimizer, self.model)
        self.ebc: Any = self.around()
        if case.attach_first:
            before = dict(self.model.named_parameters())
            self.wrap()
            self.swap_parameters(before)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if case.scaler else None
        self.figures: dict[str, list[Any]] = defaultdict(list)  # one of each step

    def wrap(self) -> None:
        self.called: nn.Module = self.model
        if self.case.compiled == "inside":
            self.called = torch.compile(self.model, backend="eager")
        if self.case.wrap == "ddp":
            self.called = DistributedDataParallel(self.called)
        if self.case.wrap == "fsdp":
            shard(self.model, self.case)
        if self.case.compiled == "around":
            self.called = torch.compile(self.called, backend="eager")

    def swap_parameters(self, before: dict[str, Tensor]) -> None:
        """What Accelerate does to an optimizer of a model that it shards."""
        now = dict(self.model.named_parameters())
        new = {id(p): now[name] for name, p in before.items()}
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["params"] = [new[id(p)] for p in group["params"]]

    def around(self) -> Any:
        case = self.case
        options = {"target_kl": 0.005, "audit_every": 4, "audit_tokens": 30, "probe_sequences": 2}
        options |= case.options
        groups = {"auto": lambda: "auto", "none": lambda: None, "given": lambda: dist.group.WORLD}
        options["process_group"] = groups[case.group]()
        given = self.model if case.by.endswith("inner") or case.attach_first else self.called
        if case.by.startswith("attach"):
            return attach(given, self.optimizers, check=case.check, **options)
        return EllipsotopeClip(given, self.optimizers, **options)

    @property
    def attached(self) -> bool:
        return not isinstance(self.ebc, EllipsotopeClip)

    @property
    def steppers(self) -> list[Any]:
        """What training calls `step` of, and saves."""
        return self.optimizers if self.attached else [self.ebc]

    def without_sync(self, last: bool) -> Any:
        if self.case.wrap == "ddp":
            return nullcontext() if last else self.called.no_sync()
        if self.case.wrap == "fsdp":
            self.model.set_requires_gradient_sync(last)
        return nullcontext()

    def gradients(self, step: int) -> tuple[Any, ...]:
        """-> what `EllipsotopeClip.step` takes, of the last part of the batch."""
        case = self.case
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        for part in range(case.accumulate):
            tokens, targets, mask = batch(case, step, part, self.rank, self.world)
            with self.without_sync(part == case.accumulate - 1):
                words = {} if mask is None else {"attention_mask": mask}
                logits = self.called(tokens, **words)
                loss = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
                if (step, self.rank, case.bad_from) == (case.bad_at, 1, "loss"):
                    loss = loss * math.nan
                loss = loss / case.accumulate
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if (step, self.rank, case.bad_from) == (case.bad_at, 1, "gradients"):
            self.model.head.bias.grad.fill_(math.nan)
        return tokens, logits, mask

    def step(self, step: int) -> None:
        if self.case.closure:
            for stepper in self.steppers:
                stepper.step(lambda: self.gradients(step)[1])
            return
        given = self.gradients(step)
        if self.case.max_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.max_norm)
        arguments = () if self.attached else given
        for stepper in self.steppers:
            if self.scaler is None:
                stepper.step(*arguments)
            else:
                self.scaler.step(stepper, *arguments)
        if self.scaler is not None:
            self.scaler.update()

    def run(self, steps: range) -> Run:
        for step in steps:
            with mock.patch.object(workers.dist, "all_reduce", wraps=dist.all_reduce) as reduced:
                self.step(step)
            self.record(reduced.call_count)
        return self

    def record(self, all_reduces: int) -> None:
        stats = self.ebc.last
        for name, value in (
            ("c", stats.clip_coefficient),
            ("kl", stats.applied_kl),
            ("trial_kl", stats.trial_kl),
            ("norm", stats.grad_norm),
            ("skipped", stats.skipped),
        ):
            self.figures[name].append(None if value is None else float(value))
        self.figures["tokens"].append(stats.audit_tokens)
        self.figures["measured"].append(stats.measurements)
        self.figures["all_reduces"].append(all_reduces)

    def result(self) -> dict[str, Any]:
        engine = self.ebc.clip if self.attached else self.ebc
        whole = [getattr(p, "full_tensor", lambda p=p: p)() for p in self.model.parameters()]
        weights = [w.detach().clone() for w in whole]
        return {**self.figures, "weights": weights, "floor": engine.budget.floor}


def resumed(first: Run) -> Run:
    """A new model, new optimizers and a new EBC that have the state of a first one's."""
    second = Run(first.case, first.rank, first.world)
    if first.case.folder:
        through_files(first, second)
    else:
        second.model.load_state_dict(first.model.state_dict())
        for old, new in zip(first.steppers, second.steppers, strict=True):
            new.load_state_dict(old.state_dict())
    second.figures = first.figures
    return second


def through_files(first: Run, second: Run) -> None:
    """By torch.distributed.checkpoint, EBC's own state beside the optimizer's."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    def parts(run: Run) -> dict[str, Any]:
        model, optimizer = states.get_state_dict(run.model, run.optimizers[0])
        return {"model": model, "optimizer": optimizer, "ebc": run.ebc}

    dcp.save(parts(first), checkpoint_id=first.case.folder)
    loaded = parts(second)
    dcp.load(loaded, checkpoint_id=first.case.folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        states.set_state_dict(
            second.model,
            second.optimizers[0],
            model_state_dict=loaded["model"],
            optim_state_dict=loaded["optimizer"],
        )


def trained(case: Case, rank: int, world: int) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = Run(case, rank, world)
        half = case.steps if case.resume_at is None else case.resume_at
        run.run(range(half))
        if case.resume_at is not None:
            run = resumed(run).run(range(half, case.steps))
        return run.result()


def one_step(model: nn.Module, ebc: Any, optimizers: list[torch.optim.Optimizer]) -> None:
    tokens = torch.arange(48).view(4, 12) % VOCABULARY
    logits = model(tokens)
    F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    if isinstance(ebc, StabilizedOptimizer):
        ebc.step(tokens, logits, targets=tokens)
    else:
        for optimizer in optimizers:
            optimizer.step()


def attached_step(model: nn.Module, **options: Any) -> None:
    optimizers = optimizer_of("adam", model)
    one_step(model, attach(model, optimizers, **{"target_kl": 0.01, **options}), optimizers)


def hsdp(model: Tiny) -> None:
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard")))
    attached_step(model)


def tensor_parallel(model: Tiny) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        block.up, block.down = nn.Linear(6, 14), nn.Linear(14, 6)
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    attached_step(model)


def partly_tensor_parallel(model: Tiny) -> None:
    """One block by tensor parallelism, all else by FSDP, over the same processes."""
    block = model.blocks[0]
    block.up, block.down = nn.Linear(6, 14), nn.Linear(14, 6)
    parallelize_module(
        block, init_device_mesh("cpu", (2,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    fully_shard(model, ignored_params=set(block.parameters()))
    attached_step(model)


def older_fsdp(model: Tiny) -> None:
    attached_step(FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True))


def blocks_alone(model: Tiny) -> None:
    for block in model.blocks:
        fully_shard(block)
    attached_step(model)


def two_meshes(model: Tiny) -> None:
    for block in model.blocks:
        fully_shard(block, mesh=DeviceMesh("cpu", [1, 0]))
    sharded(model)


def inner_module(model: Tiny) -> None:
    outer = nn.Sequential(model)
    fully_shard(outer)
    optimizers = optimizer_of("adam", model)
    one_step(outer, attach(model, optimizers, target_kl=0.01), optimizers)


def optimizer_before_sharding(model: Tiny) -> None:
    optimizers = optimizer_of("adam", model)
    ebc = attach(model, optimizers, target_kl=0.01)
    fully_shard(model)
    one_step(model, ebc, optimizers)


def sharded(model: Tiny, **options: Any) -> None:
    fully_shard(model)
    attached_step(model, **options)


def rival(model: Tiny) -> None:
    fully_shard(model)
    optimizers = optimizer_of("adam", model)
    one_step(model, NormClip(model, optimizers, audit_every=0), optimizers)


def replicated(model: Tiny, **options: Any) -> None:
    optimizers = optimizer_of("adam", model)
    ebc = EllipsotopeClip(model, optimizers, target_kl=0.01, **options)
    one_step(DistributedDataParallel(model), ebc, optimizers)


class Hooked(torch.optim.SGD):
    """What those that move weights inside backward look like, such as AXIOM, which itself refuses several
    processes."""

    hooked = True


def moving_in_backward(model: Tiny, kind: type[InBackward], **options: Any) -> None:
    kind(model, Hooked(model.parameters(), lr=0.01), **options).begin_step()


class OwnSums(Arithmetic):
    """Not torch's."""


class Exploding(torch.optim.SGD):
    """Proposes NaN for the smallest weight, of which but one process has a part."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        with torch.no_grad():
            min((p for group in self.param_groups for p in group["params"]), key=torch.Tensor.numel).mul_(
                math.nan
            )


def not_finite(model: Tiny) -> None:
    fully_shard(model)
    optimizers: list[torch.optim.Optimizer] = [Exploding(model.parameters(), lr=0.1)]
    one_step(model, attach(model, optimizers, target_kl=0.01), optimizers)


# what raises, of a new model, and what it says
REFUSED: dict[str, tuple[Callable[[Tiny], None], str]] = {
    "hsdp": (hsdp, "several dimensions"),
    "tensor parallel": (tensor_parallel, "tensor parallelism"),
    "partly tensor parallel": (partly_tensor_parallel, "tensor parallelism"),
    "older fsdp": (older_fsdp, "use fully_shard"),
    "blocks alone": (blocks_alone, "fully_shard to the whole model"),
    "two meshes": (two_meshes, "several meshes"),
    "inner module": (inner_module, "the module that it was applied to last"),
    "optimizer before sharding": (
        optimizer_before_sharding,
        "after anything that replaces them, as fully_shard does",
    ),
    "fisher": (partial(sharded, budget="fisher"), "budget='fisher' takes derivatives"),
    "surrogate": (partial(sharded, budget="surrogate"), "budget='surrogate' takes derivatives"),
    "calibrated": (partial(sharded, budget="calibrated"), "budget='calibrated' takes derivatives"),
    "sensitivity_every": (partial(sharded, sensitivity_every=5), "sensitivity_every takes derivatives"),
    "retract": (partial(sharded, retract=lambda: None), "use DDP"),
    "rival": (rival, "NormClip needs whole tensors"),
    "arithmetic": (partial(replicated, arithmetic=OwnSums()), "process_group=None"),
    "agreement": (partial(replicated, controller="agreement"), "controller='agreement'"),
    "confidence": (partial(replicated, controller="confidence"), "controller='confidence'"),
    "in backward": (partial(moving_in_backward, kind=InBackward), "process_group=None"),
    "lagged": (partial(moving_in_backward, kind=LaggedClip, target_kl=0.01), "process_group=None"),
    "not finite": (not_finite, "NonFiniteUpdateError: step 0"),
}


def refusals() -> dict[str, str]:
    """What each of `REFUSED` raises: the kind and the words."""
    results: dict[str, str] = {}
    for name, (wrong, _) in REFUSED.items():
        try:
            wrong(Tiny())
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
    return results


def train(rank: int, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What every case comes to, and under `refused` what is refused."""
    results = {name: trained(Case(**given), rank, dist.get_world_size()) for name, given in cases.items()}
    return {**results, "refused": refusals()}


if __name__ == "__main__":
    main({"train": train}, *sys.argv[1:])
