"""Nearest directions by inner product: exactly, or by faiss's HNSW graph or inverted lists (docs/ebm.md).

Exact search is one matrix product and a top-k, and the way on a GPU. The two approximate kinds raise their
effort (efSearch, nprobe) by doubling when they are built, until they find the wanted share of the true
neighbours of noisy copies of their own points, and keep what they reached. They answer from the points they
were built with: whoever moves the points ranks the answers anew, and builds again from time to time.

HNSW: Malkov & Yashunin, arXiv:1603.09320. Inverted lists: Jégou, Douze & Schmid 2011. faiss: Douze et al.,
arXiv:2401.08281.
"""

from __future__ import annotations

import difflib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeAlias

import numpy as np
import torch
from torch import Tensor

KINDS: Final = ("exact", "hnsw", "ivf")
CHUNK: Final = 2**26  # elements of a product of states and splats held at once
BLOCK: Final = 8  # columns for which the CPU's top-k first takes the largest
EXACT_UP_TO: Final = 16_384  # splats below which a matrix product is as fast as any graph

LINKS: Final = 32  # M of the HNSW graph
FIRST_EF: Final = 16
PROBES: Final = 256  # noisy points on which recall is measured
PROBE_ANGLE: Final = 0.3  # radians: the width of a splat of concentration 11
FLOOR: Final = -80.0  # of a logit below the best; exp is slow where it underflows
TIE: Final = 1e-6  # two cosines this close are the same neighbour

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

HEADER: Final = struct.Struct("<4sqqqqqdd")  # magic, kind, bytes, seed, n, effort, recall reached and wanted
MAGIC: Final = b"EBI1"


def check_kind(kind: str, kinds: tuple[str, ...] = KINDS) -> str:
    """Return `kind` itself; ValueError for an unknown one, with the nearest valid name."""
    if kind in kinds:
        return kind
    near = difflib.get_close_matches(kind, kinds, n=1, cutoff=0.0)[0]
    raise ValueError(f"index {kind!r} is unknown, did you mean {near!r}? Choose one of {', '.join(kinds)}.")


def chosen(kind: str, splats: int, on_gpu: bool) -> str:
    """Resolve "auto": exact up to 16,384 splats or on a GPU, else hnsw; other kinds stay."""
    if check_kind(kind, ("auto", *KINDS)) != "auto":
        return kind
    return "exact" if on_gpu or splats <= EXACT_UP_TO else "hnsw"


def exact_search(x: Tensor, mu: Tensor, k: int) -> Tensor:
    """Find the k rows of mu (N, n) of largest inner product with each x (M, n), best first: int64 (M, k)."""
    _check_count(k, mu.shape[0])
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = torch.split(x, rows_at_once(mu.shape[0]))
        return torch.cat([largest(part.to(mu.dtype) @ mu.T, k)[1] for part in parts])


def rows_at_once(places: int) -> int:
    """Return how many rows of so many elements are held at once."""
    return max(1, CHUNK // max(1, places))


def largest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the k largest of each row of values (M, N) and their columns, (M, k) each, the largest first.

    On the CPU torch.topk takes longer than the matrix product before it. The k largest lie in the k blocks of
    columns with the largest maxima, whose search is vectorised: a partition sees an eighth of the row twice.
    Under the transforms of `torch.func` a tensor has no storage that numpy could read.
    """
    width = values.shape[1] // BLOCK
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(values)
    if values.is_cuda or width < 2 * k or transformed:
        best = values.topk(k, dim=1)
        return best.values, best.indices
    # the k best blocks of columns, and those columns that no block has
    blocks = values[:, : width * BLOCK].reshape(-1, BLOCK, width).amax(dim=1)
    steps = torch.arange(BLOCK) * width
    columns = (_among_largest(blocks, k).unsqueeze(1) + steps.unsqueeze(1)).flatten(1)  # (M, BLOCK * k)
    rest = torch.arange(width * BLOCK, values.shape[1]).expand(len(values), -1)
    columns = torch.cat([columns, rest], dim=1)
    candidates = values.gather(1, columns)
    places = _among_largest(candidates, k)
    top = candidates.gather(1, places).sort(dim=1, descending=True)
    return top.values, columns.gather(1, places.gather(1, top.indices))


def best_logits(x: Tensor, scaled: Tensor, offset: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find where the k largest of offset + scaled.x are, and the mean softmax mass of the others."""
    best, dropped = [], []
    for part in torch.split(x, rows_at_once(len(scaled))):
        logits = torch.addmm(offset, part, scaled.T)  # (m, N)
        top, places = largest(logits, k)
        rest = (logits - top[:, :1]).clamp_(min=FLOOR).exp_().scatter_(1, places, 0.0).sum(1)
        mass = (top - top[:, :1]).exp().sum(1)
        best.append(places)
        dropped.append(rest / (rest + mass))
    return torch.cat(best), torch.cat(dropped).mean()


def _among_largest(values: Tensor, k: int) -> Tensor:
    """Find the columns of the k largest of each row on the CPU, int64 (M, k), in no order.

    numpy's partition takes a third of torch.topk's time.
    """
    return torch.from_numpy(np.argpartition(values.detach().numpy(), -k, axis=1)[:, -k:])


def first_largest(values: Tensor) -> Tensor:
    """Find the column of the largest of each row of values (M, N), int64 (M,), the first of equal ones.

    On the CPU numpy's search is vectorised, ten times as fast as torch's.
    """
    if values.is_cuda:
        return values.argmax(dim=1)
    return torch.from_numpy(values.detach().numpy().argmax(axis=1))


def _check_count(k: int, points: int) -> None:
    if not 1 <= k <= points:
        raise ValueError(f"{k} neighbours were asked of {points} points: ask for 1 to {points}.")


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ValueError(
            "an index of kind hnsw or ivf needs faiss-cpu: pip install 'ebc-lab[ebm]', or take index=exact."
        ) from error
    return faiss


@contextmanager
def _one_thread() -> Iterator[Any]:
    """Run faiss on one thread, for the same graph each time; the process's own count comes back after."""
    faiss = _faiss()
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield faiss
    finally:
        faiss.omp_set_num_threads(before)


def _array(x: Tensor) -> Floats:
    return np.ascontiguousarray(x.detach().to("cpu", torch.float32).numpy())


class NeighbourIndex:
    """An index of one kind over points (N, n), unit vectors; `recall` is the share it has to find.

    After `build`: `recall` is what it reached (1 for exact), `effort` the efSearch or nprobe it needed (0 for
    exact), `wanted` what was asked for. A graph that misses it at an effort of N keeps that effort.
    ValueError for an unknown kind, a recall outside (0, 1], and without faiss for any kind but exact.
    """

    def __init__(self, kind: str, recall: float = 0.95, seed: int = 0) -> None:
        if not 0 < recall <= 1:
            raise ValueError(f"the recall an index has to reach must lie in (0, 1], not {recall}.")
        self.kind = check_kind(kind)
        self.wanted = recall
        self.seed = seed
        self.recall = 0.0
        self.effort = 0
        self.n = 0
        self._points = torch.empty(0, 0)  # of the exact kind
        self._index: Any = None  # of the others: faiss's own
        if kind != "exact":
            _faiss()

    def __len__(self) -> int:
        return len(self._points) if self.kind == "exact" else int(self._index.ntotal if self._index else 0)

    def build(self, mu: Tensor, k: int = 32) -> NeighbourIndex:
        """Index mu (N, n) and raise the effort until recall@k is the wanted one; returns itself."""
        if mu.dim() != 2 or len(mu) == 0:
            raise ValueError(f"an index is built from points (N, n) with N >= 1, not {tuple(mu.shape)}.")
        self.n = mu.shape[1]
        if self.kind == "exact":
            self._points, self.recall = mu.detach().clone(), 1.0
            return self
        points = _array(mu)
        with _one_thread() as faiss:
            if self.kind == "hnsw":
                self._index = faiss.IndexHNSWFlat(self.n, LINKS, faiss.METRIC_INNER_PRODUCT)
            else:
                self._index = _lists(faiss, points, self.seed)
            self._index.add(points)
            self._tune(points, min(k, len(points)))
        return self

    def search(self, x: Tensor, k: int) -> Tensor:
        """Find the k points nearest to each x (M, n), best first: int64 (M, k), on x's device."""
        _check_count(k, len(self))
        if self.kind == "exact":
            return exact_search(x, self._points.to(x.device), k)
        with _one_thread():
            return torch.from_numpy(self._find(_array(x), k)[0]).to(x.device)

    def computations(self, x: Tensor, k: int) -> float:
        """Count the distances computed for a query, mean over x (M, n), by faiss's counters; N if exact."""
        _check_count(k, len(self))
        if self.kind == "exact":
            return float(len(self))
        with _one_thread() as faiss:
            stats = faiss.cvar.hnsw_stats if self.kind == "hnsw" else faiss.cvar.indexIVF_stats
            stats.reset()
            completed = self._find(_array(x), k)[1]
            counted = float(stats.ndis) / len(x) + completed * len(self) / len(x)
        # the counter leaves out the comparisons with the lists' centres
        return counted if self.kind == "hnsw" else counted + float(self._index.nlist)

    def to_bytes(self) -> Tensor:
        """Return all that a search needs, uint8 (B,): the index read `from_bytes` gives the same answers."""
        if self.kind == "exact":
            body = np.frombuffer(_array(self._points).tobytes(), np.uint8)
        else:
            body = _faiss().serialize_index(self._index)
        kind, size = KINDS.index(self.kind), len(body)
        header = HEADER.pack(MAGIC, kind, size, self.seed, self.n, self.effort, self.recall, self.wanted)
        return torch.from_numpy(np.concatenate([np.frombuffer(header, np.uint8), body]))

    @classmethod
    def from_bytes(cls, kind: str, data: Tensor) -> NeighbourIndex:
        """Read the index that wrote `data`; ValueError for foreign or truncated bytes or another kind's."""
        raw = data.cpu().numpy()
        if len(raw) < HEADER.size or raw[:4].tobytes() != MAGIC:
            raise ValueError("these bytes are no index of this program: build the index anew.")
        _, number, size, seed, n, effort, recall, wanted = HEADER.unpack(raw[: HEADER.size].tobytes())
        if KINDS[number] != check_kind(kind):
            raise ValueError(f"these bytes hold an index of kind {KINDS[number]}, not {kind}: build it anew.")
        body = np.ascontiguousarray(raw[HEADER.size :])
        if len(body) != size:
            raise ValueError(f"these bytes of an index are truncated, {len(body)} of {size}: build it anew.")
        index = cls(kind, wanted, seed)
        index.n, index.recall = n, recall
        if kind == "exact":
            index._points = torch.from_numpy(body.view(np.float32).reshape(-1, n).copy())
        else:
            index._index = _faiss().deserialize_index(body)
            index._spend(effort)
        return index

    def _find(self, queries: Floats, k: int) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """Ask faiss; queries for which it found fewer than k are answered exactly, and counted."""
        places = self._index.search(queries, k)[1]
        short = np.flatnonzero((places < 0).any(axis=1))
        if len(short):
            points = torch.from_numpy(self._index.reconstruct_n(0, len(self)))
            places[short] = exact_search(torch.from_numpy(queries[short]), points, k).numpy()
        return places, len(short)

    def _spend(self, effort: int) -> None:
        self.effort = effort
        if self.kind == "hnsw":
            self._index.hnsw.efSearch = effort
        else:
            self._index.nprobe = effort

    def _tune(self, points: Floats, k: int) -> None:
        """Double the effort until the share of true neighbours of noisy points is the wanted one."""
        rng = np.random.Generator(np.random.Philox(self.seed))
        picked = points[rng.integers(len(points), size=PROBES)]
        noise = rng.standard_normal(picked.shape) * (PROBE_ANGLE / np.sqrt(self.n))
        queries = (picked + noise).astype(np.float32)
        queries /= np.linalg.norm(queries, axis=1, keepdims=True)
        cosines = queries @ points.T
        worst = -np.partition(-cosines, k - 1, axis=1)[:, k - 1 : k] - TIE
        limit = len(points) if self.kind == "hnsw" else int(self._index.nlist)
        effort = FIRST_EF if self.kind == "hnsw" else 1
        while True:
            self._spend(min(effort, limit))
            places = self._index.search(queries, k)[1]
            reached = np.take_along_axis(cosines, places.clip(0), axis=1) >= worst
            self.recall = float((reached & (places >= 0)).mean())
            if self.recall >= self.wanted or effort >= limit:
                return
            effort *= 2


def _lists(faiss: Any, points: Floats, seed: int) -> Any:
    n = points.shape[1]
    lists = min(len(points), max(1, round(4 * len(points) ** 0.5)))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(n), n, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = seed + 1
    index.cp.min_points_per_centroid = 1  # a list is short by design: no warning
    index.train(points)
    return index
