"""What is held in memory between steps, by purpose, and at the peak of a step.

Counted in tensors, not in the process's pages, which depend on the allocator's history and on all imports.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebc_lab.axiom.optimizer import AXIOM
from ebc_lab.components.memory import Memory, reachable, storages
from ebc_lab.config.parts.stabilizer import StabilizerConfig
from ebc_lab.config.schema import RunConfig

from .loops import Loop, opened
from .pairs import Effort, measure_each, variants

CPU = 0  # the device type of the profiler's memory events


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's C++ part reports its start, its end and every scalar freed meanwhile on the terminal."""
    sys.stderr.flush()
    stderr_copy = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr_copy, 2)
        os.close(stderr_copy)
        os.close(nowhere)


def peak_on_cpu(step: Callable[[], object]) -> int:
    """The most bytes allocated at a time during `step`, beyond those before it, as the allocator reports."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with _without_stderr(), torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == CPU]
    now = peak = 0
    for e in sorted(changes, key=lambda e: e["ts"]):
        now += e["args"]["Bytes"]
        peak = max(peak, now)
    return int(peak)


def _peak_on_cuda(step: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def saved_bytes(forward: Callable[[], object], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd saves for backward during `forward`: once each, and without the weights."""
    weight_storages = storages(weights)
    saved: dict[int, int] = {}
    saved_tensors = []

    def pack(tensor: Tensor) -> Tensor:
        saved_tensors.append(tensor)  # an address is not used again meanwhile
        saved.update(storages([tensor]))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(n for at, n in saved.items() if at not in weight_storages)


def _activations(loop: Loop) -> int:
    """Return bytes that the step's forward saves for backward, packed if the run packs them."""
    [packed] = [hook.activations for hook in loop.training.hooks if isinstance(hook, Memory)]
    if packed is None:
        return saved_bytes(lambda: loop.forward(*loop.batch()), loop.training.model.parameters())
    loop.forward(*loop.batch())
    stats = packed.memory_stats()
    return int(stats["compressed_bytes"] + stats["kept_bytes"])


def _held(loop: Loop) -> dict[str, int]:
    """Return bytes of parameters, gradients at their height, activations, base optimizers and stabilizer."""
    training = loop.training
    activations = _activations(loop)
    last, _ = loop.forward_backward(*loop.batch())
    parameters = storages([*training.model.parameters(), *training.model.buffers()])
    gradients = storages(p.grad for p in training.model.parameters() if p.grad is not None)
    bases = training.optimizer.bases
    loop.update(last)
    loop.zero_grad()
    state = storages(t for base in bases for t in reachable(base.state))
    state_storages = {} if loop.bare else storages(reachable(training.optimizer))
    counted = parameters.keys() | gradients.keys() | state.keys()
    hooked = [base.peak_gradient_bytes for base in bases if isinstance(base, AXIOM) and base.hooked]
    return {
        "parameters": sum(parameters.values()),
        "gradients": sum(hooked) or sum(gradients.values()),
        "activations": activations,
        "optimizer_state": sum(n for at, n in state.items() if at not in parameters),
        "stabilizer": sum(n for at, n in state_storages.items() if at not in counted),
    }


def held_bytes(run: RunConfig, *, bare: bool = False) -> dict[str, int]:
    """Return bytes by purpose, and `peak`: the most that a step with an audit holds beyond what stays."""
    with opened(run, bare=bare) as loop:
        loop.steps(run.audit_every - 1)  # the optimizer's state is there, and the stabilizer's buffers
        by_kind = _held(loop)
        peak_of = _peak_on_cuda if run.device == "cuda" else peak_on_cpu
        return {**by_kind, "peak": peak_of(lambda: loop.steps(1))}


def memory(run: RunConfig, effort: Effort) -> dict[str, Any]:
    """Return the bytes of the bare step and of every variant.

    `extra_copies` is what the stabilizer holds between steps in units of the parameters' bytes (EBC: two at
    most); `peak_extra_copies` how much higher its peak is than the bare step's, in the same unit.
    """
    bare = held_bytes(dataclasses.replace(run, stabilizer=StabilizerConfig()), bare=True)

    def added(variant: RunConfig, _: Effort) -> dict[str, Any]:
        figures = held_bytes(variant)
        stabilizer_bytes = figures["stabilizer"]
        return {
            "held_bytes": stabilizer_bytes,
            "peak_bytes": figures["peak"],
            "extra_copies": stabilizer_bytes / figures["parameters"],
            "peak_extra_copies": (figures["peak"] + stabilizer_bytes - bare["peak"]) / figures["parameters"],
        }

    by_name = measure_each(variants(run), "memory", added, effort)
    rows = [{"stabilizer": name, **found} for name, found in by_name.items()]
    purposes = ("parameters", "gradients", "activations", "optimizer_state", "peak")
    tensors = {k: bare[k] for k in purposes}
    on_gpu = run.device == "cuda"
    method = "torch.cuda.max_memory_allocated" if on_gpu else "torch.profiler, allocations on the CPU"
    return {"bare_bytes": tensors, "peak_by": method, "stabilizers": rows}
