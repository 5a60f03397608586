"""The candidates of each operation: this library's backends, and what others offer for the same work.

All run on one thread unless their name says otherwise, and write into buffers that are ready before, where
they can be given one. Anchors compute the plain formulas, whose last bits depend on the order of a sum.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ebc_lab.lowbit.backends import NAMES, Backend, BackendUnavailableError, get_backend
from ebc_lab.lowbit.backends.formulas import TOP, Scale
from ebc_lab.lowbit.levels import rounding_key, stochastic_step

from .report import ANCHOR, BACKEND, COMPILED, CONTEXT, MAKING

Call = Callable[[], object]
_DIGITS = {"ternary": 5, "five": 3}  # of a byte in the anchors of packing: neighbours, not planes


@dataclass(frozen=True)
class Candidate:
    """`make` prepares buffers and returns the call that is timed; what it raises is why there is none."""

    name: str
    kind: str
    make: Callable[[], Call]
    threads: int = 1
    note: str = ""


@dataclass(frozen=True)
class Case:
    """One operation on one size, and who does it; `work` values (times passes) are done in a call."""

    operation: str
    levels: str | None
    size: int
    work: float
    candidates: list[Candidate]
    cold: bool = False  # whether the caches hold other things before each call


def all_cases(config: dict[str, Any]) -> Iterator[Case]:
    """Yield every case of a benchmark's settings, made when its turn comes."""
    rng = np.random.default_rng(config["seed"])
    for size in config["sizes"]:
        values = (0.02 * rng.standard_normal(size)).astype(np.float32)
        for levels in TOP:
            yield from _cases_of_values(values, levels, config)
        for levels in TOP:
            yield from _cases_of_codes(rng, size, levels)
    for points, features, clusters in config["kmeans"]:
        yield _kmeans(rng.standard_normal((points, features)), clusters)


# -- backends ------------------------------------------------------------------------------------------------


def _on_backends(
    call: Callable[..., object], inputs: tuple[Any, ...], out: Callable[[], Any]
) -> list[Candidate]:
    """Make `call(backend, *inputs, **ready buffer)` of each backend, with inputs where it wants them."""
    candidates = []
    for name in NAMES:
        make = functools.partial(_prepared, call, name, 1, inputs, out)
        candidates.append(Candidate(name, BACKEND, make))
    cores = os.cpu_count() or 1
    if cores > 1:
        make = functools.partial(_prepared, call, "cpp", cores, inputs, out)
        candidates.append(Candidate(f"cpp, {cores} threads", BACKEND, make, cores))
    return candidates


def _prepared(
    call: Callable[..., object], name: str, threads: int, inputs: tuple[Any, ...], out: Callable[[], Any]
) -> Call:
    backend = get_backend(name, threads)
    if name == "torch":
        inputs = tuple(map(_as_tensor, inputs))
    ready = {"out": out()} if name in COMPILED else {}
    return functools.partial(call, backend, *inputs, **ready)


def _as_tensor(value: object) -> object:
    import torch

    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


# -- codes and values ----------------------------------------------------------------------------------------


def _cases_of_values(values: Any, levels: str, config: dict[str, Any]) -> Iterator[Case]:
    n = len(values)

    def effective(backend: Backend, x: Any, **ready: Any) -> object:
        return backend.effective(x, levels, **ready)

    def stochastic(backend: Backend, x: Any, **ready: Any) -> object:
        return backend.stochastic(x, levels, step, key, **ready)

    compiled = config["torch_compile"]
    mean = float(np.abs(values).mean())
    anchors = _anchors_of_codes(values, levels, compiled=False, step=mean)
    yield Case("codes, step given,", levels, n, n, _codes_on_backends(values, levels, mean) + anchors)
    anchors = _anchors_of_codes(values, levels, compiled)
    yield Case("codes", levels, n, n, _codes_on_backends(values, levels) + anchors)
    anchors = _anchors_of_values(values, levels, compiled)
    of_backends = _on_backends(effective, (values,), lambda: np.empty(n, np.float32))
    yield Case("values", levels, n, n, of_backends + anchors)
    step = float(stochastic_step(values, levels))
    key = rounding_key(config["seed"], 0, 0)
    of_backends = _on_backends(stochastic, (values,), lambda: np.empty(n, np.int8))
    anchors = _anchors_of_stochastic(values, levels, step)
    yield Case("stochastic", levels, n, n, of_backends + anchors)


def _codes_on_backends(values: Any, levels: str, scale: Scale = "absmean") -> list[Candidate]:
    def codes(backend: Backend, x: Any, **ready: Any) -> object:
        return backend.quantize(x, levels, "tensor", scale, **ready)

    return _on_backends(codes, (values,), lambda: np.empty(len(values), np.int8))


def _anchors_of_codes(values: Any, levels: str, compiled: bool, step: float | None = None) -> list[Candidate]:
    """Make the anchors that find the step as the backends do, or take this one."""
    top = TOP[levels]

    def with_numpy() -> Call:
        scratch = np.empty_like(values)
        codes = np.empty(values.shape, np.int8)

        def call() -> None:
            _positions_with_numpy(values, scratch, top, step)
            np.copyto(codes, scratch, casting="unsafe")

        return call

    def with_torch() -> Call:
        import torch

        x = torch.from_numpy(values)
        scratch = torch.empty_like(x)
        codes = torch.empty(x.shape, dtype=torch.int8)

        def call() -> None:
            _positions_with_torch(x, scratch, top, step)
            codes.copy_(scratch)

        return call

    def with_quantize_per_tensor() -> Call:
        import torch

        x = torch.from_numpy(values)
        scratch = torch.empty_like(x)

        def call() -> object:
            size = float(torch.abs(x, out=scratch).mean()) if step is None else step
            return torch.quantize_per_tensor(x, size, 0, torch.qint8)

        return call

    anchors = [
        Candidate("numpy vectorised", ANCHOR, with_numpy),
        Candidate("torch eager", ANCHOR, with_torch),
        Candidate("quantize_per_tensor", ANCHOR, with_quantize_per_tensor, note="not clipped"),
    ]
    if compiled:
        make = functools.partial(_compiled_codes, values, top)
        anchors.append(Candidate("torch.compile", ANCHOR, make))
    return anchors


def _compiled_codes(values: Any, top: int) -> Call:
    import torch

    def formula(x: Any, codes: Any) -> None:
        codes.copy_((x / x.abs().mean()).round().clamp(-top, top))

    x = torch.from_numpy(values)
    codes = torch.empty(x.shape, dtype=torch.int8)
    return functools.partial(torch.compile(formula, dynamic=False), x, codes)


def _positions_with_numpy(values: Any, scratch: Any, top: int, step: float | None = None) -> Any:
    """Write codes as floats to `scratch`; returns the step, the mean magnitude unless it is given."""
    size = np.abs(values, out=scratch).mean() if step is None else step
    np.multiply(values, np.float32(1 / size), out=scratch)
    np.rint(scratch, out=scratch)
    np.clip(scratch, -top, top, out=scratch)
    return size


def _positions_with_torch(x: Any, scratch: Any, top: int, step: float | None = None) -> Any:
    import torch

    size = torch.abs(x, out=scratch).mean() if step is None else step
    torch.mul(x, 1 / size, out=scratch)
    scratch.round_().clamp_(-top, top)
    return size


def _anchors_of_values(values: Any, levels: str, compiled: bool) -> list[Candidate]:
    top = TOP[levels]

    def with_numpy() -> Call:
        result = np.empty_like(values)

        def call() -> None:
            step = _positions_with_numpy(values, result, top)
            np.multiply(result, step, out=result)

        return call

    def with_torch() -> Call:
        import torch

        x = torch.from_numpy(values)
        result = torch.empty_like(x)
        return lambda: result.mul_(_positions_with_torch(x, result, top))

    def with_compile() -> Call:
        import torch

        def formula(x: Any, result: Any) -> None:
            step = x.abs().mean()
            result.copy_((x / step).round().clamp(-top, top) * step)

        x = torch.from_numpy(values)
        return functools.partial(torch.compile(formula, dynamic=False), x, torch.empty_like(x))

    anchors = [
        Candidate("numpy vectorised", ANCHOR, with_numpy),
        Candidate("torch eager", ANCHOR, with_torch),
    ]
    return anchors + ([Candidate("torch.compile", ANCHOR, with_compile)] if compiled else [])


def _anchors_of_stochastic(values: Any, levels: str, step: float) -> list[Candidate]:
    top = TOP[levels]

    def with_numpy() -> Call:
        rng = np.random.default_rng(0)
        position = np.empty_like(values)
        draws = np.empty_like(values)
        codes = np.empty(values.shape, np.int8)

        def call() -> None:
            np.multiply(values, 1 / np.float32(step), out=position)
            np.clip(position, -top, top, out=position)
            rng.random(out=draws, dtype=np.float32)
            np.add(position, draws, out=position)
            np.floor(position, out=position)
            np.copyto(codes, position, casting="unsafe")

        return call

    def with_torch() -> Call:
        import torch

        x = torch.from_numpy(values)
        position = torch.empty_like(x)
        draws = torch.empty_like(x)
        codes = torch.empty(x.shape, dtype=torch.int8)

        def call() -> None:
            torch.mul(x, 1 / step, out=position)
            position.clamp_(-top, top).add_(draws.uniform_()).floor_()
            codes.copy_(position)

        return call

    return [Candidate("numpy vectorised", ANCHOR, with_numpy), Candidate("torch eager", ANCHOR, with_torch)]


# -- packing -------------------------------------------------------------------------------------------------


def _making_codes(values: Any, levels: str) -> list[Candidate]:
    """Make what packing is measured by: the compiled backends making as many codes, in turns."""
    candidates = _codes_on_backends(values, levels)
    return [replace(c, name=f"{MAKING}, {c.name}", kind=CONTEXT) for c in candidates if c.name in COMPILED]


def _cases_of_codes(rng: np.random.Generator, n: int, levels: str) -> Iterator[Case]:
    top = TOP[levels]
    codes = rng.integers(-top, top + 1, n).astype(np.int8)
    data = get_backend("numpy").pack(codes, levels)
    step = np.float32(0.016)

    def pack(backend: Backend, codes: Any, **ready: Any) -> object:
        return backend.pack(codes, levels, **ready)

    def unpack(backend: Backend, packed: Any, **ready: Any) -> object:
        return backend.unpack(packed, n, levels, **ready)

    def unpack_values(backend: Backend, packed: Any, steps: Any, **ready: Any) -> object:
        return backend.unpack_values(packed, (n,), steps, levels, "tensor", **ready)

    making = _making_codes((0.02 * rng.standard_normal(n)).astype(np.float32), levels)
    of_backends = _on_backends(pack, (codes,), lambda: np.empty(len(data), np.uint8))
    anchors = _anchors_of_packing(codes, levels)
    yield Case("pack", levels, n, n, of_backends + anchors + making, cold=True)
    neighbours = _packed_neighbours(codes, levels)
    of_backends = _on_backends(unpack, (data,), lambda: np.empty(n, np.int8))
    anchors = _lookups(neighbours, levels, np.arange(-top, top + 1, dtype=np.int8))
    yield Case("unpack", levels, n, n, of_backends + anchors + making, cold=True)
    of_backends = _on_backends(unpack_values, (data, np.asarray(step)), lambda: np.empty(n, np.float32))
    anchors = _lookups(neighbours, levels, step * np.arange(-top, top + 1, dtype=np.float32))
    yield Case("packed to values", levels, n, n, of_backends + anchors, cold=True)


def _packed_neighbours(codes: Any, levels: str) -> Any:
    digits = _DIGITS[levels]
    data = np.empty(len(codes) // digits, np.uint8)
    _pack_neighbours(codes[: len(data) * digits].reshape(-1, digits), data, levels)
    return data


def _pack_neighbours(codes: Any, data: Any, levels: str) -> None:
    """Pack (n, digits) codes into (n,) bytes by Horner's rule, modulo 256; numpy and torch."""
    base = 2 * TOP[levels] + 1
    digits = codes.shape[1]
    data[:] = codes[:, digits - 1].view(data.dtype)
    for digit in range(digits - 2, -1, -1):
        data *= base
        data += codes[:, digit].view(data.dtype)
    data += TOP[levels] * (base**digits - 1) // (base - 1)


def _anchors_of_packing(codes: Any, levels: str) -> list[Candidate]:
    digits = _DIGITS[levels]
    count = len(codes) // digits
    part = codes[: count * digits].reshape(-1, digits)

    def with_numpy() -> Call:
        return functools.partial(_pack_neighbours, part, np.empty(count, np.uint8), levels)

    def with_torch() -> Call:
        import torch

        data = torch.empty(count, dtype=torch.uint8)
        return functools.partial(_pack_neighbours, torch.from_numpy(part), data, levels)

    note = f"{digits} neighbours a byte, unchecked"
    return [
        Candidate("numpy vectorised", ANCHOR, with_numpy, note=note),
        Candidate("torch eager", ANCHOR, with_torch, note=note),
    ]


def _lookups(data: Any, levels: str, digits: Any) -> list[Candidate]:
    """Look bytes of neighbours up in a table; `digits` (2 top + 1,) is what a digit stands for."""
    count = _DIGITS[levels]
    places = np.indices((len(digits),) * count).reshape(count, -1)[::-1]
    table = np.ascontiguousarray(digits[places].T)  # (bytes, count)

    def with_numpy() -> Call:
        result = np.empty((len(data), count), table.dtype)
        return functools.partial(np.take, table, data, 0, result, "clip")

    def with_torch() -> Call:
        import torch

        rows = torch.from_numpy(table)
        result = torch.empty((len(data), count), dtype=rows.dtype)
        indices = torch.from_numpy(data)
        return lambda: torch.index_select(rows, 0, indices.int(), out=result)

    note = f"a table of {len(table)} rows of {count}"
    return [
        Candidate("numpy lookup", ANCHOR, with_numpy, note=note),
        Candidate("torch lookup", ANCHOR, with_torch, note=note),
    ]


# -- k-means -------------------------------------------------------------------------------------------------


def _kmeans(points: Any, clusters: int) -> Case:
    """Time whole calls: of this library's the grid and the inertia too, of scikit-learn's its checks."""
    from ebc_lab.lowbit.clustering import kmeans

    init = points[np.random.default_rng(0).choice(len(points), clusters, replace=False)]
    result = kmeans(points, clusters, init=init)
    passes = result.iterations
    candidates = []
    for name in NAMES:
        if name != "cupy":
            make = functools.partial(_kmeans_on, name, points, clusters, init)
            candidates.append(Candidate(name, BACKEND, make, note=f"{passes} passes"))
    for dtype in (np.float64, np.float32):
        make = functools.partial(_kmeans_of_sklearn, points.astype(dtype), init.astype(dtype), passes)
        note = _agreement(make, result.labels)
        candidates.append(Candidate(f"scikit-learn {dtype.__name__}", ANCHOR, make, note=note))
    for dtype in (np.float64, np.float32):
        make = functools.partial(_product, points.astype(dtype), init.astype(dtype))
        name = f"BLAS X @ C.T {dtype.__name__}"
        candidates.append(Candidate(name, CONTEXT, make, note="one product, no labels"))
    features = points.shape[1]
    work = math.prod((len(points), passes))
    return Case(f"k-means d={features} k={clusters}", None, len(points), work, candidates)


def _kmeans_on(name: str, points: Any, clusters: int, init: Any) -> Call:
    from ebc_lab.lowbit.clustering import kmeans

    get_backend(name)
    return lambda: kmeans(points, clusters, init=init, backend=name)


def _kmeans_of_sklearn(points: Any, init: Any, passes: int) -> Call:
    try:
        from sklearn.cluster import KMeans
    except ImportError:
        raise ImportError("scikit-learn is not installed: pip install 'ebc-lab[lowbit]'.") from None

    model = KMeans(len(init), init=init, n_init=1, max_iter=passes, tol=0.0, algorithm="lloyd")
    return lambda: model.fit(points)


def _agreement(make: Callable[[], Call], labels: Any) -> str:
    try:
        model: Any = make()()
    except ImportError as error:
        return str(error)
    return f"{model.n_iter_} passes, {np.mean(model.labels_ == labels):.1%} of labels the same"


def _product(points: Any, centres: Any) -> Call:
    out = np.empty((len(points), len(centres)), points.dtype)
    return functools.partial(np.matmul, points, centres.T, out)


def unavailable(error: Exception) -> str:
    """Return why a candidate did not run, on one line."""
    message = " ".join(str(error).split())
    if isinstance(error, BackendUnavailableError):
        return message
    return f"{type(error).__name__}: {message}"[:300]
