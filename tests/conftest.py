"""What every test starts from: one thread, so that bits repeat; Ctrl-C heard; a small text; own caches."""

import gc
import os
import pickle
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from filelock import FileLock
from hypothesis import settings
from support import emulated

emulated.install_if_wanted()

import torch  # noqa: E402

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells ignore it in background jobs
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup ignores this one
settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=200, deadline=None)  # of make test-slow
settings.load_profile("quick")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test with more than a dozen cases `make test` runs the first and then one in seven."""
    functions = [item.nodeid.partition("[")[0] for item in items]
    cases = Counter(functions)
    seen: Counter[str] = Counter()
    for item, function in zip(items, functions, strict=True):
        # seven is a prime: of a grid every row and column is met
        if cases[function] > 12 and seen[function] % 7:
            item.add_marker("thorough")
        seen[function] += 1


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What is imported stays: the collector need not look through it again and again, nor while it grows."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(10_000, 20, 20)
        gc.enable()


WORDS = "the cat sat on a mat and saw rain run down to sea under moon".split()  # noqa: SIM905


@pytest.fixture(scope="session")
def small_text() -> str:
    """About 4,000 characters of plain words, always the same: something a tiny model can learn."""
    draw = random.Random(0)
    return "".join(" ".join(draw.choices(WORDS, k=6)) + ".\n" for _ in range(170))


@pytest.fixture(scope="session")
def text_file(small_text: str, once) -> Path:
    def write(folder: Path) -> Path:
        path = folder / "words.txt"
        path.write_text(small_text * 3)
        return path

    return once("corpus", write)


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> list[str]:
    """Overrides of a study so small that all of it takes seconds."""
    return [
        "scale=smoke",
        "data=path",
        f"data.file={text_file}",
        "model.blocks=1",
        "model.width=16",
        "model.context=16",
        "batch_size=10",
        "budget.probe_sequences=2",
        "eval_every=10",
        "eval_windows=8",
        "lr_sweep.steps=15",
        "lr_sweep.grids.adam=[1e-2,2e-2,4e-2]",
        "lr_sweep.max_extensions=0",
        "calibrate.max_extra=1",
        "finals.steps=25",
        "device=cpu",
    ]


@pytest.fixture(scope="session", autouse=True)
def own_places(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest):
    """The user's caches, state and corpora are neither used nor changed; a GPU is used by `-m cuda` only."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        patch.setenv("XDG_STATE_HOME", str(home / "state"))
        # compiled once for all processes that run tests: their folders have this one's parent in common
        patch.setenv("EBC_LAB_LOWBIT_CACHE", str(tmp_path_factory.getbasetemp().parent / "lowbit"))
        if emulated.wanted():
            patch.setattr("ebc_lab.config.machine.first_listing", emulated.listing)
        elif request.config.option.markexpr != "cuda":
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.delenv("EBC_LAB_DATA", raising=False)
        yield


@pytest.fixture(autouse=True)
def subnormals():
    """A run switches them off for its process."""
    yield
    torch.set_flush_denormal(False)


@pytest.fixture
def beside_a_pool():
    """Calls a function beside a second thread of torch's that `flushes` subnormal numbers, or keeps them,
    since it began, as after another run; the caller does the contrary. Each caller has a pool of its own."""

    def call(function, flushes):
        def prepared():
            torch.set_num_threads(2)
            torch.set_flush_denormal(flushes)
            torch.zeros(1 << 17).add_(1)
            torch.set_flush_denormal(not flushes)
            return function()

        if not torch.set_flush_denormal(False):
            pytest.skip("this CPU cannot flush subnormal numbers")
        threads = torch.get_num_threads()
        try:
            with ThreadPoolExecutor(1) as caller:
                return caller.submit(prepared).result()
        finally:
            torch.set_num_threads(threads)

    return call


@pytest.fixture(scope="session", autouse=True)
def composed_once():
    """A composition takes a fifth of a second, and half of all tests begin with one."""
    from support.composed import composed_once, conf_read_once

    with conf_read_once(), composed_once():
        yield


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory, own_places):
    """`once(name, make)`: what `make(folder)` returned in the first process of this test run that asked.

    Every later one waits for it and gets its own copy. Files in the folder are the same for all: nobody may
    change them.
    """
    base = tmp_path_factory.getbasetemp()
    # xdist's workers have folders of their own in that of the run
    of_run = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    shared = Path(os.environ.get("TESTS_SHARED", of_run / "shared"))

    def make_once(name, make):
        result = shared / f"{name}.pickle"
        shared.mkdir(parents=True, exist_ok=True)
        with FileLock(shared / f"{name}.lock"):
            if not result.exists():
                folder = shared / name
                folder.mkdir()
                made = make(folder)
                result.write_bytes(pickle.dumps(made))
            seen.setdefault(shared / name, stamps(shared / name))
        return pickle.loads(result.read_bytes())

    make_once.seen = seen = {}
    return make_once


def stamps(folder: Path) -> dict[Path, int]:
    """When something last came, went or was written anew in a shared folder and in its studies."""
    there = folder, *folder.glob("*"), *folder.glob("*/runs")
    return {path: path.stat().st_mtime_ns for path in there}


@pytest.fixture(autouse=True)
def shared_folders_are_as_they_were(once):
    """One that another process's test copies while it is written fails that test, once in many runs."""
    yield
    for folder, before in once.seen.items():
        once.seen[folder] = stamps(folder)
        assert once.seen[folder] == before, f"this test, or one beside it, wrote in {folder}, which is shared"


@pytest.fixture(scope="session")
def finished(tiny: list[str], once):
    """A finished study, trained once in a test run, and everything it said. Tests must not change it."""
    from ebc_lab.config.compose import compose
    from ebc_lab.report.conclude import concluding
    from ebc_lab.study.autopilot import autopilot

    def train(folder: Path):
        said: list[str] = []
        config = compose([*tiny, "launcher=inline", f"output_dir={folder}", "study.name=done"])
        return config, autopilot(config, concluding(say=said.append)), said

    return once("finished", train)


@pytest.fixture
def resolved(finished):
    """The finished study's configuration as study.json resolved it."""
    from ebc_lab.config.dicts import from_dict
    from ebc_lab.config.schema import Config

    return from_dict(Config, finished[1].study.header()["config"])


@pytest.fixture
def own_copy(finished, tmp_path: Path):
    """(configuration, study) of the finished study, copied for a test that changes it."""
    import shutil
    from dataclasses import replace

    from ebc_lab.study.store.study import Study

    config, outcome, _ = finished
    shutil.copytree(outcome.study.root, tmp_path / "done")
    return replace(config, output_dir=str(tmp_path)), Study(tmp_path / "done")


@pytest.fixture
def machine_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`machine_with(8, mig={1: ["1g.10gb"]})`: nvidia-smi shows so many GPUs, here and in what is started;
    torch finds none of them. Nothing binds this process to some of them, until the test does."""
    from support.smi import Machine

    from ebc_lab.config import machine

    def begin(count: int, mig: dict[int, list[str]] | None = None) -> Machine:
        made = Machine(tmp_path / "gpus", count, mig)
        monkeypatch.setenv("PATH", made.path)
        for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "SLURM_STEP_GPUS", "SLURM_JOB_GPUS"):
            monkeypatch.delenv(name, raising=False)
        machine.first_listing.cache_clear()
        return made

    yield begin
    machine.first_listing.cache_clear()


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch):
    """Studies are concluded without drawing their pictures, which takes seconds; existing ones stay."""
    monkeypatch.setattr("ebc_lab.report.pictures.draw_study", lambda root: [])


@pytest.fixture(scope="session")
def results_schema():
    """What results_final.json may hold, and must."""
    import json
    from importlib import resources

    import jsonschema

    schema = json.loads((resources.files("ebc_lab") / "records" / "results_final.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
