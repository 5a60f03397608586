"""The dispatcher: the quickest backend of those that agree with numpy, whatever comes in; its metrics."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from ebc_lab import lowbit
from ebc_lab.lowbit import dispatch
from ebc_lab.lowbit.backends import BackendUnavailableError, NumpyBackend, get_backend
from ebc_lab.lowbit.clustering import kmeans
from ebc_lab.lowbit.dispatch import (
    BackendConfig,
    HybridDispatcher,
)
from ebc_lab.lowbit.levels import quantize, quantize_stochastic
from ebc_lab.lowbit.packing import pack

HOST = BackendConfig(prefer_gpu=False)


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def answering(name: str, answer) -> NumpyBackend:
    """numpy's backend under another name, whose effective values are `answer(values, *settings)`."""
    backend = NumpyBackend()
    backend.name = name
    backend.effective = answer
    return backend


def right(values: np.ndarray, *settings) -> np.ndarray:
    return NumpyBackend().effective(values, *settings)


def slow(values: np.ndarray, *settings) -> np.ndarray:
    return [right(values, *settings) for _ in range(40)][-1]


def fail(values: np.ndarray, *settings) -> np.ndarray:
    raise RuntimeError("driver\nshutting down")


@pytest.fixture
def only(monkeypatch):
    """Leaves numpy and the given backends by name; the others are unavailable."""

    def leave(**backends) -> None:
        def get(name: str, threads: int = 1):
            if name == "numpy":
                return get_backend("numpy")
            if name not in backends:
                raise BackendUnavailableError(f"no {name} in this test")
            return backends[name]

        monkeypatch.setattr(dispatch, "get_backend", get)

    return leave


# -- operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", ["ternary", "five"])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_every_operation_gives_the_bits_of_numpy(levels, kind):
    dispatcher = HybridDispatcher(HOST)
    values = weights(30, 50)
    for group in ("tensor", "row", 7):
        expected = quantize(values, levels, group=group)
        found = dispatcher.encode(kind(values), levels, group=group)
        assert found.codes.tobytes() == expected.codes.tobytes()
        assert found.steps.tobytes() == expected.steps.tobytes()
        effective = dispatcher.quantize(kind(values), levels, group=group)
        assert type(effective) is type(kind(values))
        assert np.asarray(effective).tobytes() == expected.values().tobytes()
        data = dispatcher.pack(kind(expected.codes), levels)
        assert np.asarray(data).tobytes() == pack(expected.codes, levels).tobytes()
        assert np.asarray(dispatcher.unpack(data, 1500, levels)).tolist() == expected.codes.ravel().tolist()
        back = dispatcher.unpack_values(data, (30, 50), kind(expected.steps), levels, group)
        assert type(back) is type(kind(values))
        assert np.asarray(back).tobytes() == expected.values().tobytes()
    drawn = dispatcher.stochastic(kind(values), levels, 0.5, 7)
    expected_codes = quantize_stochastic(values, levels, step=0.5, key=7)
    assert np.asarray(drawn).tobytes() == expected_codes.tobytes()
    labels, centroids = dispatcher.kmeans(values, 5, seed=3)
    clusters = kmeans(values, 5, seed=3, backend="numpy")
    assert labels.tobytes() == clusters.labels.tobytes()
    assert centroids.tobytes() == clusters.centroids.tobytes()


def test_large_input_is_timed_on_its_start_and_computed_whole(monkeypatch, recwarn):
    monkeypatch.setattr(dispatch, "SAMPLE", 4000)
    dispatcher = HybridDispatcher(HOST)
    values = weights(40, 500)
    for group in ("tensor", "row", 9):
        expected = quantize(values, "five", group=group)
        effective = HybridDispatcher(HOST).quantize(values, group=group)
        assert effective.tobytes() == expected.values().tobytes()
        data = dispatcher.pack(expected.codes, "five")
        back = HybridDispatcher(HOST).unpack_values(data, values.shape, expected.steps, "five", group)
        assert back.tobytes() == expected.values().tobytes()
        codes = dispatcher.unpack(data.tobytes(), values.size, "five")
        assert codes.tolist() == expected.codes.ravel().tolist()
    assert not recwarn.list


@pytest.mark.parametrize("operation", ["unpack", "unpack_values"])
def test_a_candidate_that_unpacks_the_start_otherwise_is_dropped(operation, only, monkeypatch):
    monkeypatch.setattr(dispatch, "SAMPLE", 4000)
    wrong = NumpyBackend()
    wrong.name = "c"
    monkeypatch.setattr(wrong, operation, lambda *given: -getattr(NumpyBackend(), operation)(*given))
    only(c=wrong)
    coded = quantize(weights(40, 500))
    data = pack(coded.codes, "five")
    dispatcher = HybridDispatcher(HOST)
    rest = {"unpack": (20_000, "five"), "unpack_values": ((40, 500), coded.steps, "five")}[operation]
    with pytest.warns(RuntimeWarning, match=f"its bits in {operation} differ from numpy's"):
        getattr(dispatcher, operation)(data, *rest)


def test_lists_and_nothing(recwarn):
    dispatcher = HybridDispatcher(HOST)
    assert dispatcher.quantize([0.5, -2.0, 0.1], scale=1.0).tolist() == [0.0, -2.0, 0.0]
    assert dispatcher.quantize(np.zeros((0, 3), np.float32), group="row").shape == (0, 3)
    assert dispatcher.pack([], "five").size == 0
    assert dispatcher.unpack(b"", 0, "five").size == 0
    assert not recwarn.list


@pytest.mark.parametrize("group", ["tensor", "row", 2])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_what_is_not_finite_is_refused_at_every_call(group, kind):
    dispatcher = HybridDispatcher(HOST)
    values = weights(6, 5)
    dispatcher.quantize(kind(values), group=group)
    values[4, 4] = np.inf
    for operation in (dispatcher.quantize, dispatcher.encode, dispatcher.quantize):
        with pytest.raises(ValueError, match=r"1 of 30 values are NaN or infinite.*index \(4, 4\)"):
            operation(kind(values), group=group)
    with pytest.raises(ValueError, match="levels must be one of"):
        dispatcher.quantize(kind(values), "six")
    assert dispatcher.get_metrics()["unavailable"] == {}


# -- choosing ------------------------------------------------------------------------------------------------


def test_the_quickest_is_chosen_once_for_a_power_of_two(only):
    only(c=answering("c", slow))
    dispatcher = HybridDispatcher()
    for n in (1024, 1500, 2047):
        dispatcher.quantize(weights(n))
    assert len(dispatcher.get_metrics()["choices"]) == 1
    dispatcher.quantize(weights(2048))
    dispatcher.quantize(weights(2047), "ternary")
    dispatcher.quantize(torch.from_numpy(weights(2047)))
    metrics = dispatcher.get_metrics()
    assert metrics["total_operations"] == 6
    (summary,) = metrics["backend_summary"].items()
    assert summary[0] == "numpy"
    times = summary[1]
    assert times["count"] == 6
    assert 0 < times["min_time_ms"] <= times["avg_time_ms"] <= times["max_time_ms"] <= times["total_time_ms"]
    assert times["avg_time_ms"] * 6 == pytest.approx(times["total_time_ms"])
    first = metrics["choices"][0]
    assert (first["operation"], first["levels"], first["size"]) == ("quantize", "five", 1024)
    assert (first["input"], first["backend"]) == ("numpy", "numpy")
    assert 0 < first["measured_ms"]["numpy"] < first["measured_ms"]["c"]
    assert len(metrics["choices"]) == 4
    assert metrics["unavailable"]["cpp"] == "no cpp in this test"


@pytest.mark.parametrize(
    ("config", "n", "left_out"),
    [
        (BackendConfig(prefer_c=False), 500, {"c", "cuda"}),
        (BackendConfig(prefer_cpp=False), 500, {"cpp", "cuda"}),
        (BackendConfig(min_size_for_c=1000), 500, {"c", "cuda"}),
        (BackendConfig(min_size_for_cpp=1000, min_size_for_c=501), 500, {"c", "cpp", "cuda"}),
        (BackendConfig(min_size_for_gpu=500), 500, set()),
        (BackendConfig(min_size_for_gpu=500, prefer_gpu=False), 500, {"cuda"}),
    ],
)
def test_what_is_not_preferred_or_too_small_is_no_candidate(only, config, n, left_out):
    names = ("c", "cpp", "torch", "cuda")
    only(**{name: answering(name, right) for name in names})
    dispatcher = HybridDispatcher(config)
    dispatcher.quantize(weights(n))
    assert dispatcher.get_metrics()["choices"][0]["measured_ms"].keys() == {"numpy", *names} - left_out


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (lambda values, *settings: 0 * values, "bits"),
        (lambda values, *settings: right(values, *settings).reshape(2, -1), "bits"),
        (fail, "driver shutting down"),
    ],
)
def test_a_backend_that_is_wrong_is_dropped(only, wrong, reason):
    only(c=answering("c", wrong), cpp=answering("cpp", right))
    dispatcher = HybridDispatcher(HOST)
    values = weights(1000)
    with pytest.warns(RuntimeWarning, match=f"the backend c is no longer used: .*{reason}"):
        found = dispatcher.quantize(values)
    assert found.tobytes() == quantize(values, "five").values().tobytes()
    metrics = dispatcher.get_metrics()
    assert "quantize" in metrics["unavailable"]["c"]
    assert "c" not in metrics["choices"][0]["measured_ms"]
    dispatcher.pack(np.zeros(9, np.int8), "five")
    assert "c" not in dispatcher.get_metrics()["choices"][1]["measured_ms"]


def test_a_backend_that_lies_later_loses_what_it_was_chosen_for(only):
    first = quantize(weights(1000), "five").values()
    only(c=answering("c", lambda values, *settings: first))
    dispatcher = HybridDispatcher(HOST)
    dispatcher.quantize(weights(1000))
    assert [choice["backend"] for choice in dispatcher.get_metrics()["choices"]] == ["c"]
    with pytest.warns(RuntimeWarning, match="no longer used"):
        dispatcher.quantize(weights(3000))
    choices = dispatcher.get_metrics()["choices"]
    assert [(choice["size"], choice["backend"]) for choice in choices] == [(2048, "numpy")]


def test_every_name_of_the_library_loads():
    assert {"HAS_GPU", "BackendConfig", "create_auto_dispatcher"} < set(lowbit.__all__)
    for name in lowbit.__all__:
        getattr(lowbit, name)
        assert name in dir(lowbit)


def test_torch_is_not_imported_for_numpy():
    code = (
        "import sys, numpy as np\n"
        "from ebc_lab.lowbit.dispatch import HybridDispatcher, BackendConfig\n"
        "d = HybridDispatcher(BackendConfig(prefer_gpu=False))\n"
        "d.encode(np.ones(100, np.float32))\n"
        "import ebc_lab.lowbit.container\n"
        "print('torch' in sys.modules, *d.get_metrics()['choices'][0]['measured_ms'])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split()[:3] == ["False", "numpy", "c"]
