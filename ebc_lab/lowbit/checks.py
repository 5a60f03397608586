"""Ten checks of an installation, each on real work: `python -m ebc_lab.lowbit check`.

A check returns what it saw, in a few words, and raises CheckError where it is not as it must be. A backend
that is not there is no failure: the check says which agreed.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .backends import available_backends, get_backend
from .backends.formulas import TOP
from .container import DamagedFileError, PackedTensor, read_packed, write_packed
from .levels import quantize, quantize_stochastic, rounding_key, stochastic_step, uniforms
from .packing import pack, packed_size, unpack

if TYPE_CHECKING:
    from . import HybridLLMTrainer


class CheckError(Exception):
    """A check has failed; the message says what was found instead."""


@dataclass(frozen=True)
class Outcome:
    """One check: its name, whether it passed, and what it saw or what was wrong."""

    name: str
    passed: bool
    message: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.message}"


def _must(condition: object, otherwise: str) -> None:
    if not condition:
        raise CheckError(otherwise)


def _draws(shape: tuple[int, ...], seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _backends() -> list[str]:
    """Return those that work here, numpy first."""
    return [name for name, reason in available_backends().items() if reason is None]


# -- the checks ----------------------------------------------------------------------------------------------


def known_codes() -> str:
    """Check the step and codes of twelve weights against those worked out by hand."""
    weights = [0.3, -0.1, 0.0, 1.7, -2.5, 0.05, 0.8, -0.8, 1e-20, -0.0, 0.45, -1.2]
    ternary = [0, 0, 0, 1, -1, 0, 1, -1, 0, 0, 1, -1]
    five = [0, 0, 0, 2, -2, 0, 1, -1, 0, 0, 1, -2]
    for levels, expected in (("ternary", ternary), ("five", five)):
        quantized = quantize(weights, levels)
        _must(quantized.codes.tolist() == expected, f"{levels} codes are {quantized.codes.tolist()}")
        _must(quantized.steps == np.float32(7.9 / 12), f"the step is {quantized.steps}, not {7.9 / 12:.7f}")
    return "the step is the mean magnitude, the codes the nearest ones"


def ties() -> str:
    """See that half a step is 0, one and a half is 2, and a code of 0 has the value +0."""
    weights = np.array([0.5, -0.5, 1.5, -1.5, 1.4999999, 0.5000001, -0.0], dtype=np.float32)
    expected = [0, 0, 2, -2, 1, 1, 0]
    for name in _backends():
        codes, _ = get_backend(name).quantize(weights, "five", "tensor", 1.0)
        _must(codes.tolist() == expected, f"{name} gives {codes.tolist()} for {weights.tolist()}")
        values = get_backend(name).effective(weights, "five", "tensor", 1.0)
        _must(not np.signbit(values[[0, 1, 6]]).any(), f"{name} gives a negative zero")
    return "to the even code"


def packing() -> str:
    """See that codes of every length come back, in exactly as many bytes as promised."""
    for levels, top in TOP.items():
        for n in (0, 1, 5, 24, 319, 321, 1536, 40_003):
            codes = np.random.default_rng(n).integers(-top, top + 1, n).astype(np.int8)
            data = pack(codes, levels)
            _must(len(data) == packed_size(n, levels), f"{n} {levels} codes take {len(data)} bytes")
            _must(np.array_equal(unpack(data, n, levels), codes), f"{n} {levels} codes changed")
    bits = [8 * packed_size(40_800, levels) / 40_800 for levels in TOP]
    return f"{bits[0]:.3f} bits a ternary code, {bits[1]:.3f} of five levels"


def files() -> str:
    """See that a file returns what was written, and one with a flipped bit is refused."""
    weights = _draws((60, 70))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "check.ebcpack"
        tensor = PackedTensor.of(quantize(weights, "ternary", group="row"))
        write_packed(path, {"w": tensor, "b": weights[0]})
        back = read_packed(path)
        w = back["w"]
        _must(isinstance(w, PackedTensor) and np.array_equal(w.values(), tensor.values()), "w changed")
        _must(np.array_equal(np.asarray(back["b"]), weights[0]), "b changed")
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
        try:
            read_packed(path)
        except DamagedFileError:
            return f"{tensor.nbytes} bytes of codes and steps read as written; a flipped bit was noticed"
    raise CheckError("a flipped bit went unnoticed")


def straight_through_gradient() -> str:
    """See that the forward is the quantized weight, the gradient that of the weight itself."""
    import torch

    from .ste import straight_through

    latent = _draws((30, 40))
    weight = torch.from_numpy(latent.copy()).requires_grad_()
    out = torch.from_numpy(_draws((30, 40), 1))
    used = straight_through(weight, "five")
    (used * out).sum().backward()
    expected = quantize(latent, "five").values()
    _must(used.detach().numpy().tobytes() == expected.tobytes(), "the forward has other bits")
    _must(weight.grad is not None and torch.equal(weight.grad, out), "the gradient is another")
    return "forward quantized, gradient unchanged"


def error_feedback() -> str:
    """See that what was sent and what is left add up to all gradients, but for rounding."""
    import torch

    from .gradients import GradientQuantizer

    compressor = GradientQuantizer("ternary", error_feedback=True)
    total = torch.zeros(20, 30, dtype=torch.float64)
    sent = torch.zeros_like(total)
    for step in range(20):
        gradient = torch.from_numpy(_draws((20, 30), step))
        total += gradient
        sent += compressor.compress([gradient], step)[0]
        compressor.commit()
    residuals = compressor.state_dict()["residuals"]
    off = float((total - sent - residuals[0]).abs().max())
    _must(off < 1e-4, f"sent and left differ from all gradients by {off:.2g}")
    return f"20 steps, sent + left = all to {off:.0e}, {compressor.grad_bits:.2f} bits sent"


def exact_kmeans() -> str:
    """See that labels and centres have the same bits on every backend, and fit together."""
    from .clustering import kmeans

    points = _draws((500, 8))
    names = [name for name in _backends() if name != "cupy"]
    first = kmeans(points, 6, backend="numpy")
    for name in names:
        result = kmeans(points, 6, backend=name)
        same = result.labels.tobytes() == first.labels.tobytes()
        _must(same and result.centroids.tobytes() == first.centroids.tobytes(), f"{name} differs from numpy")
    distances = ((points[:, None] - first.centroids) ** 2).sum(2)
    _must(np.array_equal(distances.argmin(1), first.labels), "a label is not that of the nearest centre")
    return f"{first.iterations} passes alike on {', '.join(names)}"


def stochastic_rounding() -> str:
    """See that the mean of many stochastic codes is the value."""
    values = np.linspace(-1.9, 1.9, 39, dtype=np.float32)
    total = np.zeros(len(values))
    draws = 4000
    for step in range(draws):
        total += quantize_stochastic(values, "five", step=1.0, key=rounding_key(0, step, 0))
    off = float(np.abs(total / draws - values).max())
    _must(off < 5 * 0.5 / draws**0.5, f"the mean is off by {off:.3f}")  # five standard errors at most
    _must(uniforms(2, rounding_key(0, 0, 0)).tolist() == [0.0, 0.5733975768089294], "the uniforms are others")
    return f"{draws} draws, largest difference {off:.3f}"


def backends_agree() -> str:
    """See that codes, values, stochastic codes and packed bytes have the same bits on every backend."""
    names = _backends()
    weights = _draws((130, 331))
    for levels in TOP:
        expected = list(_everything("numpy", weights, levels))
        for name in names[1:]:
            for (what, mine), (_, theirs) in zip(_everything(name, weights, levels), expected, strict=True):
                _must(mine.tobytes() == theirs.tobytes(), f"{name} gives other {levels} {what} than numpy")
    reasons = [f"{name}: {reason}" for name, reason in available_backends().items() if reason is not None]
    return f"{', '.join(names)} alike" + "".join(f" ({reason})" for reason in reasons)


def _everything(name: str, weights: Any, levels: str) -> Iterator[tuple[str, Any]]:
    """Yield what a backend makes of some weights, each thing with its name."""
    backend = get_backend(name)
    for group in ("tensor", "row", 50):
        codes, steps = backend.quantize(weights, levels, group)
        yield f"steps per {group}", steps
        yield f"codes per {group}", codes
        yield f"values per {group}", backend.effective(weights, levels, group)
        data = backend.pack(codes, levels)
        yield f"bytes per {group}", data
        yield f"unpacked values per {group}", backend.unpack_values(data, weights.shape, steps, levels, group)
    yield "stochastic codes", backend.stochastic(weights, levels, float(stochastic_step(weights, levels)), 7)


def training() -> str:
    """See that sixty steps lower the loss, and a training resumed after twenty ends with the same bits."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # matrices are so small that threads would only wait for each other
    try:
        return _trained_and_resumed()
    finally:
        torch.set_num_threads(threads)


def _trained_and_resumed() -> str:
    data = np.tanh(_draws((352, 3)) @ _draws((3, 16), 1))
    whole = _trainer()
    summary = whole.train(data)
    _must(summary["total_steps"] == 60, f"it took {summary['total_steps']} steps")
    before = summary["initial_loss"]
    after = summary["final_loss"]
    _must(after < 0.5 * before, f"the loss went from {before:.3f} to {after:.3f}")
    first = _trainer()
    second = _trainer()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "first"

        def stop(model: object) -> None:
            first.save_checkpoint(path)
            raise InterruptedError

        with contextlib.suppress(InterruptedError):
            first.train(data, eval_fn=stop)
        second.load_checkpoint(path)
    second.train(data)
    for mine, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        _must(mine.equal(theirs), "a resumed training ended with other weights")
    return f"60 steps, loss {before:.3f} to {after:.3f}; resumed after 20: the same bits"


def _trainer() -> HybridLLMTrainer:
    """Make a trainer that takes twenty steps an epoch on 352 rows."""
    from . import HybridLLMTrainer, TrainingConfig

    settings = {"hidden": 32, "batch_size": 16, "max_epochs": 3}
    return HybridLLMTrainer(TrainingConfig(**settings, learning_rate=4e-3, validation_share=1 / 11))


CHECKS: tuple[Callable[[], str], ...] = (
    *(known_codes, ties, packing, files, straight_through_gradient),
    *(error_feedback, exact_kmeans, stochastic_rounding, backends_agree, training),
)


def run_checks() -> Iterator[Outcome]:
    """Yield the outcome of each check, as it ends."""
    for check in CHECKS:
        name = check.__name__.replace("_", " ")
        try:
            yield Outcome(name, True, check())
        except Exception as error:  # whatever goes wrong is this check's outcome
            yield Outcome(name, False, " ".join(f"{type(error).__name__}: {error}".split()))
