"""Every cache of measurements in the package: what one process measures, the next one reads, and it is equal.

Only what takes long is replaced: the other process, the compiler, Slurm.
"""

import ast
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import house
import pytest

from ebc_lab.bench import speeds, step_timer
from ebc_lab.bench.speeds import Choice
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import from_dict, run_part
from ebc_lab.config.schema import RunConfig
from ebc_lab.records.json_files import as_json, write_json
from ebc_lab.study.launch import submit
from ebc_lab.study.store.study import Study
from ebc_lab.workloads import tokens
from ebc_lab.workloads.corpus import Corpus

ROOT = Path(__file__).parent.parent.parent
CASES = [(1, 2, "float32"), (2, 1, "bfloat16")]


def rates(config, study):
    run = run_part(config)
    return speeds.known_rates(run, CASES) or speeds.measured_rates(run, CASES)


def compile_cost(config, study):
    return speeds.compile_cost(run_part(config))


def byte_pairs(config, study):
    text = Path(config.data.file).read_text()
    corpus = Corpus("path", "words", config.data.file, text, hashlib.sha256(text.encode()).hexdigest())
    return tokens.tokenizer("bpe", corpus, size=280).to_json()


KEPT = {  # the function that makes the cache -> what asks it, then measures
    "ebc_lab.bench.speeds.rate_caches": rates,
    "ebc_lab.bench.speeds.compile_cache": compile_cost,
    "ebc_lab.workloads.tokens._byte_pairs_of": byte_pairs,
}


@pytest.fixture
def measured(monkeypatch, tmp_path):
    """What was measured so far, here and in little time."""
    found = []

    def run_module(name, request, env=None, timeout_s=None):
        if "cases" in request:
            found.append([1e3 / (n + 3) for n in range(len(request["cases"]))])
        else:
            found.append(step_timer.compiling(from_dict(RunConfig, request["run"])))
        return json.loads(json.dumps(found[-1]))

    def submit_jobs(config, folder, name, commands):
        run, path = commands[0].args
        run = from_dict(RunConfig, json.loads(run))
        choice = Choice(run.dtype, 1, "off", {"dtype": "as given"}, (1, 1, run.dtype, 3.5))
        found.append(asdict(choice))
        write_json(path, found[-1])
        return [SimpleNamespace(job_id="1", paths=SimpleNamespace(stdout="log"))]

    learn = tokens._learned
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(step_timer, "forward_of", lambda model, run: model)
    monkeypatch.setattr(speeds, "run_module", run_module)
    monkeypatch.setattr(submit, "submit_jobs", submit_jobs)
    monkeypatch.setattr(tokens, "_learned", lambda *asked: found.append(learn(*asked)) or found[-1])
    return found


@pytest.fixture
def config(tiny):
    return compose([*tiny, "dtype=float32", "threads_per_run=1", "compile=off"])


@pytest.mark.parametrize("ask", KEPT.values(), ids=KEPT)
def test_what_is_measured_once_is_read_by_the_next(ask, config, measured, tmp_path):
    first = ask(config, Study(tmp_path / "s"))
    assert len(measured) == 1
    assert as_json(ask(config, Study(tmp_path / "s"))) == as_json(first)
    assert len(measured) == 1, "it was measured again"


def test_these_are_all_caches():
    sources = {module: path.read_text() for module, path in house.modules(ROOT).items()}
    making = set()
    for module, source in sources.items():
        whole = ast.walk(ast.parse(source)) if "MeasurementCache(" in source else ()
        for function in (node for node in whole if isinstance(node, ast.FunctionDef)):
            if "MeasurementCache(" in ast.unparse(function):
                making.add(f"{module}.{function.name}")
    elsewhere = {  # asked twice in tests/study/launch/test_rehearse.py and tests/workloads/test_shards.py
        "ebc_lab.study.launch.rehearse.rehearse",
        "ebc_lab.workloads.shards._content",
    }
    assert making == {*KEPT, *elsewhere}


def test_what_a_node_chose_is_read_as_it_was_written(config, measured, tmp_path):
    found = submit.choice_on_node(config, Study(tmp_path / "s"))
    assert as_json(asdict(found)) == as_json(measured[0])
