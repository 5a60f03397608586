"""pytorch_optimizer's own tests, with EBC attached to every optimizer that they build.

    python dev/studies/foreign_suite.py
    python dev/studies/foreign_suite.py --only test_wrapper_optimizers.py --target-kl inf

Downloads the source distribution of the installed version (`pip download`), unpacks it in a temporary folder
and runs pytest there with this file as a plugin: once plainly, and once for each target, by default infinity,
one that never binds and one that does. Prints how many tests pass, in how many an attached optimizer stepped,
and the failures by cause. A test that fails plainly too is not counted.

How an optimizer is attached, without a change of the suite: every `torch.optim.Optimizer` is noted when it is
made. When a module is called with gradients on, those that train its parameters are attached to it, the
outermost of nested ones; of the SAM family, which moves the weights twice, the inner one. The suite's models
end in one output, for a binary cross-entropy: two logits, 0 and that one, are its classes. An optimizer that
trains bare tensors is attached at its first step, to a module that holds them and whose logits are made of
their sums. Where a test steps without a forward since the last step, the plugin calls the module for it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ebc_lab.ebc import EllipsotopeClip, NonFiniteUpdateError, attach

TARGET = "EBC_FOREIGN_TARGET"  # environment variables for the plugin
RECORD = "EBC_FOREIGN_RECORD"
PROBE = 50  # of the 100 rows of the suite's data
BUDGET = "a budget holds back the loss"
OWN = "the base's own update is not finite"


class Bare(nn.Module):
    """Holds tensors that no module of the suite owns; two logits for each, 0 and a sum over it."""

    def __init__(self, tensors: list[Tensor]):
        super().__init__()
        for i, tensor in enumerate(tensors):
            self._parameters[f"p{i}"] = tensor  # type: ignore[assignment]  # some are no nn.Parameter

    def forward(self, rows: Tensor) -> Tensor:
        sums = [_real(p).float().sum() for p in self._parameters.values() if p is not None]
        z = torch.stack(sums).tanh() * rows
        return torch.stack([torch.zeros_like(z), z], -1)


def _real(x: Tensor) -> Tensor:
    return torch.view_as_real(x) if x.is_complex() else x


def two_classes(output: Any) -> Any:
    """The logits of a binary classifier with one output."""
    if isinstance(output, Tensor) and output.shape[-1] == 1:
        return torch.cat([torch.zeros_like(output), output], -1)
    return output


class Plugin:
    """Attaches, and records for each test its outcome, how often EBC stepped and its least c."""

    def __init__(self, target: float):
        self.target = target
        self.testing = False  # some tests are made of what optimizers do while tests are collected
        self.made: list[weakref.ref[torch.optim.Optimizer]] = []
        self.on: dict[int, Any] = {}  # id of an optimizer -> what is attached to it, None if refused
        self.modules: dict[int, nn.Module] = {}  # by id of the optimizer that trains it
        self.inputs: dict[int, Any] = {}  # by id of the module that was called with them
        self.last: dict[int, Any] = {}  # StepStats by id of what is attached
        self.steps = 0
        self.least_c = 1.0
        self.refused = ""
        self.tests: dict[str, dict[str, Any]] = {}

    # -- finding optimizers ----------------------------------------------------------------------------------

    def install(self) -> None:
        plain = torch.optim.Optimizer

        def made(cls: Any, *args: Any, **kwargs: Any) -> Any:
            new = object.__new__(cls)
            self.made.append(weakref.ref(new))
            return new

        plain.__new__ = staticmethod(made)  # type: ignore[method-assign]
        plainly = nn.Module.__call__

        def called(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self._called(module, args)
            return plainly(module, *args, **kwargs)

        nn.Module.__call__ = called  # type: ignore[method-assign]
        register_optimizer_step_pre_hook(self._steps)
        register_optimizer_step_post_hook(self._stepped)

    def _alive(self) -> Iterator[torch.optim.Optimizer]:
        for reference in self.made:
            found = reference()
            if isinstance(found, EllipsotopeClip) or getattr(found, "param_groups", None) is None:
                continue
            if found is not None:
                yield found

    def _stands_for_itself(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether it is the one of nested optimizers that EBC goes on."""
        if hasattr(optimizer, "base_optimizer"):  # the SAM family
            return False
        for other in self._alive():
            inner = vars(other).get("optimizer")
            if inner is optimizer:
                return False
        return True

    def _may(self) -> bool:
        """In a test, of one process: the suite starts others, which this plugin does not reach."""
        return self.testing and not dist.is_initialized()

    def _called(self, module: nn.Module, args: Any) -> None:
        if not self._may() or not torch.is_grad_enabled() or isinstance(module, Bare):
            return
        self.inputs[id(module)] = args
        own = {id(p) for p in module.parameters()}
        for optimizer in list(self._alive()):
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            if id(optimizer) not in self.on and held and held <= own and self._stands_for_itself(optimizer):
                self._attach(module, optimizer)

    def _attach(self, module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.on[id(optimizer)] = None
        self.modules[id(optimizer)] = module
        try:
            self.on[id(optimizer)] = attach(
                module, optimizer, target_kl=self.target, logits_of=two_classes, probe_sequences=PROBE
            )
        except (ValueError, TypeError) as refusal:
            self.refused = f"{type(optimizer).__name__}: {refusal}"

    def _steps(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if not self._may():
            return
        if id(optimizer) not in self.on and self._stands_for_itself(optimizer):
            tensors = [p for group in optimizer.param_groups for p in group["params"]]
            if tensors:
                bare = Bare(tensors)
                self.inputs[id(bare)] = (torch.ones(100, 1),)
                self._attach(bare, optimizer)
        found = self.on.get(id(optimizer))
        if found is not None and found.capture.last is None:
            module = self.modules[id(optimizer)]
            with torch.enable_grad():
                module(*self.inputs[id(module)])

    def _stepped(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        found = self.on.get(id(optimizer))
        if found is not None and found.last is not None and found.last is not self.last.get(id(found)):
            self.last[id(found)] = found.last  # not of a call inside the step, where it has not ended
            self.steps += 1
            self.least_c = min(self.least_c, float(found.last.clip_coefficient))

    # -- pytest ----------------------------------------------------------------------------------------------

    @pytest.hookimpl
    def pytest_runtest_setup(self, item: Any) -> None:
        self.testing = True
        self.made = []
        self.on = {}
        self.modules = {}
        self.inputs = {}
        self.last = {}
        self.steps = 0
        self.least_c = 1.0
        self.refused = ""

    @pytest.hookimpl
    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.when != "call" and call.excinfo is None:
            return
        error = call.excinfo
        outcome = "passed"
        if error is not None:
            outcome = "skipped" if error.errisinstance(pytest.skip.Exception) else "failed"
        self.tests[item.nodeid] = {
            "outcome": outcome,
            "steps": self.steps,
            "least c": self.least_c,
            "refused": self.refused,
            "cause": "" if error is None else self._cause(error),
        }

    def _cause(self, error: Any) -> str:
        if error.errisinstance(NonFiniteUpdateError):
            return OWN
        if error.errisinstance(AssertionError) and self.least_c < 0.999:
            return BUDGET
        return (
            f"{error.typename}: {str(error.value).strip().splitlines()[0][:150]}"
            if str(error.value)
            else error.typename
        )

    @pytest.hookimpl
    def pytest_sessionfinish(self) -> None:
        Path(os.environ[RECORD]).write_text(json.dumps(self.tests))


class Watching(Plugin):
    """The suite as it is."""

    def install(self) -> None:
        return


def pytest_configure(config: Any) -> None:
    target = os.environ[TARGET]
    plugin = Watching(math.inf) if target == "none" else Plugin(float(target))
    plugin.install()
    config.pluginmanager.register(plugin, "ebc")


def unpacked(folder: Path) -> Path:
    """The source distribution of the installed version, in `folder`."""
    name = f"pytorch-optimizer=={version('pytorch-optimizer')}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", name]
    subprocess.run([*pip, "--dest", str(folder)], check=True)
    with tarfile.open(next(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    return next(path for path in folder.iterdir() if path.is_dir())


def run(suite: Path, target: str, only: list[str]) -> dict[str, dict[str, Any]]:
    """Every test's outcome."""
    record = suite.parent / f"record-{target}.json"
    here = Path(__file__).resolve()
    path = os.pathsep.join([str(here.parent), str(here.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {
        TARGET: target,
        RECORD: str(record),
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
    }
    options = [
        "-q",
        "-p",
        here.stem,
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=",
        "--disable-warnings",
        "--tb=no",
    ]
    tests = [str(Path("tests") / name) for name in only]
    command = [sys.executable, "-m", "pytest", *options, *tests]
    with (suite.parent / f"output-{target}.txt").open("w") as output:
        subprocess.run(command, cwd=suite, env=environment, stdout=output, stderr=output, check=False)
    found: dict[str, dict[str, Any]] = json.loads(record.read_text())
    return found


def report(target: str, tests: dict[str, dict[str, Any]], plainly: set[str]) -> None:
    """Passes, and failures by cause. `plainly`: the tests that fail without EBC."""
    known = [test for name, test in tests.items() if name not in plainly]
    outcomes = Counter(test["outcome"] for test in known)
    counts = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
    stepped = [test["steps"] for test in known if test["steps"]]
    print(f"\ntarget {target}: {counts}; EBC stepped in {len(stepped)}, {sum(stepped)} steps")
    for kind in ("cause", "refused"):
        found = Counter(test[kind] for test in known if test["outcome"] != "skipped" and test[kind])
        for text, number in found.most_common():
            print(f"  {number:5d}  {'refused: ' if kind == 'refused' else ''}{text}")


def main() -> None:
    parser = argparse.ArgumentParser(description="pytorch_optimizer's tests with EBC attached.")
    parser.add_argument("--target-kl", nargs="+", default=["inf", "1e9", "0.003"])
    parser.add_argument("--only", nargs="+", default=[], help="files below its tests/")
    parser.add_argument("--suite", type=Path, help="an unpacked source distribution, instead of a download")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        suite = options.suite or unpacked(Path(folder))
        plain = run(suite, "none", options.only)
        plainly = {name for name, test in plain.items() if test["outcome"] == "failed"}
        passed = sum(test["outcome"] == "passed" for test in plain.values())
        print(f"without EBC: {passed} pass, {len(plainly)} fail")
        for target in options.target_kl:
            report(target, run(suite, target, options.only), plainly)


if __name__ == "__main__":
    main()
