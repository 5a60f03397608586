"""`AXIOM_Trainer`: trains a model with `AXIOM`, validates, and keeps checkpoints and results (docs/axiom.md).

with AXIOM_Trainer(model, train_loader, val_loader, lr=5e-4) as trainer:
    results = trainer.fit(1000)  # also written as axiom.json and axiom.png
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from itertools import accumulate, islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from .checks import AnomalyError
from .optimizer import AXIOM

IGNORED = -100  # a label that torch's and transformers' losses leave out
GIGABYTE = 1e9
SMOOTHED = 25  # points of the smoothed training curve that share no step
FAR = 10  # the ratio of perplexities from which their axis is logarithmic
LOOK: dict[Any, Any] = {  # of the picture; the colours are Okabe and Ito's, safe for the colour-blind
    "figure.dpi": 120,
    "savefig.dpi": 120,
    "font.size": 9,
    "text.parse_math": False,  # a name may hold a dollar sign
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.6,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.08,
    "lines.linewidth": 1.8,
    "lines.markersize": 4,
    "legend.frameon": False,
}
HEADER = "AXIOM checkpoint 1, sha256 {}\n"
Batch = tuple[Tensor, Tensor, dict[str, Any]]  # input_ids, labels, what else the model is given


@dataclass
class Course:
    """What training has been through, over all calls of `fit` and all resumptions."""

    train_losses: list[float] = field(default_factory=list)  # of each step
    val_losses: list[float] = field(default_factory=list)
    val_steps: list[int] = field(default_factory=list)
    val_ppls: list[float] = field(default_factory=list)
    tokens: int = 0
    train_s: float = 0.0  # seconds of training steps
    wall_s: float = 0.0  # and with validation and checkpoints
    peak_gradient_bytes: int = 0
    peak_vram_bytes: int | None = None


class AXIOM_Trainer:
    """Trains a model for a number of steps, with little memory beside its weights.

    Args:
        model: called as model(input_ids, labels=labels); returns a scalar, an object with `.loss`, a
            tuple whose first is the loss, or a dict with "loss". Its parameters that require a gradient are
            trained.
        train_loader: of batches, begun again when it is exhausted. A batch is a pair (input_ids, labels) or a
            dict with these keys; the other keys of a dict are given to the model by name.
        val_loader: the same, for validation.
        lr: learning rate, after a linear warm-up constant. It may be set between calls of `fit`.
        weight_decay, max_grad_norm, rank: of `AXIOM`.
        eval_interval: steps from one validation to the next; the first is before any step, and each `fit`
            ends with one. 0: these only.
        log_interval: steps from one printed line to the next; 0: nothing is printed.
        checkpoint_interval: steps from one checkpoint to the next; 0: none.
        checkpoint_dir: folder of the checkpoints, `<results_prefix>_step_<step>.pt`.
        save_results: whether `fit` writes `<results_prefix>.json` and `<results_prefix>.png` in the end.
        device: where to train; without it where the model is, or on CUDA if the model is on the CPU and there
            is one.
        hooks: whether the weights move inside backward, and gradients live one tensor at a time.
        warmup_steps: at step t of them the learning rate is lr·t/warmup_steps.
        lr_scale: of the hooks, see `AXIOM.register_hooks`.
        results_dir: folder of the results.

    A checkpoint does not hold the position of `train_loader`: after `load_checkpoint` it is begun anew. Give
    one that starts at the batch of `trainer.step`, and a resumed run has the bits of one that was never
    interrupted: the loader draws from a random stream of its own, and validation changes no stream.

    Raises:
        ValueError: a setting out of its range, an empty loader, or a model without anything to train.
        OSError: a folder that cannot be written.
        ImportError: results are to be saved, and matplotlib is missing.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loader: Iterable[Any],
        val_loader: Iterable[Any] | None = None,
        lr: float = 5e-4,
        weight_decay: float = 0.01,
        max_grad_norm: float | None = None,
        eval_interval: int = 200,
        log_interval: int = 100,
        checkpoint_interval: int = 0,
        checkpoint_dir: str | os.PathLike[str] = "checkpoints",
        save_results: bool = True,
        results_prefix: str = "axiom",
        device: str | torch.device | None = None,
        *,
        hooks: bool = True,
        warmup_steps: int = 100,
        lr_scale: float = 1.0,
        rank: int = 4,
        results_dir: str | os.PathLike[str] = ".",
    ):
        self.model = model
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.lr = lr
        self.eval_interval = eval_interval
        self.log_interval = log_interval
        self.checkpoint_interval = checkpoint_interval
        self.checkpoint_dir = Path(checkpoint_dir)
        self.save_results = save_results
        self.results_prefix = results_prefix
        self.warmup_steps = warmup_steps
        self.lr_scale = lr_scale
        self.results_dir = Path(results_dir)
        self._check_settings(hooks)
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not trained:
            raise ValueError("no parameter of the model requires a gradient: unfreeze what is to be trained.")
        self.device = chosen_device(device, trained[0][1].device)
        self.optimizer = AXIOM(trained, lr, weight_decay, max_grad_norm, rank=rank)
        to_device(model, self.device)
        self._course = Course()
        self._batches: Iterator[Any] | None = None
        self._loader_rng: Tensor | None = None  # the loader's random stream; None before its first batch
        self._clock: float | None = None  # up to when `fit` has counted its time
        self._compressions: dict[str, float] | None = None  # once cleaned up
        if hooks:
            self.optimizer.register_hooks(lr_scale)

    def __enter__(self) -> AXIOM_Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cleanup()

    @property
    def step(self) -> int:
        """Steps taken, those before a resumption included."""
        return len(self._course.train_losses)

    # -- training --------------------------------------------------------------------------------------------

    def fit(self, steps: int) -> dict[str, Any]:
        """Train for `steps` more steps. -> `results()`, which are written too, if they are to be saved.

        Raises:
            AnomalyError: a loss or a gradient is not finite. No result is written, `results()` has what was
                reached, and the weights are those of the last step; but under hooks tensors with a finite
                gradient have moved where another's was not.
            ValueError: steps is below 1, or a batch, a loss or a loader cannot be used.
        """
        self._refuse_cleaned()
        check_count("steps", steps, 1)
        self._check_folders()
        target = self.step + steps
        self._clock = time.perf_counter()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        try:
            if not self._course.val_steps:
                self._validate()
            self.model.train()
            while self.step < target:
                self._train_step()
                self._after_step(target)
        except BaseException:
            self._set_hooks(self.optimizer.hooked)
            raise
        finally:
            self._tick()
            self._clock = None
        results = self.results()
        if self.save_results:
            self._write_results(results)
        return results

    def _train_step(self) -> None:
        began = time.perf_counter()
        input_ids, labels, others = on_device(self._next_batch(), self.device)
        step = self.step + 1
        self.optimizer.set_lr(self.lr * min(1.0, step / max(1, self.warmup_steps)))
        loss = loss_of(self.model(input_ids, labels=labels, **others))
        value = loss.item()
        if not math.isfinite(value):
            raise AnomalyError(
                f"the loss of step {step} is {value}: the weights are those of step {step - 1}. "
                "Lower the learning rate, or look at the batch."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step(loss=value)
        self.optimizer.zero_grad()
        course = self._course
        course.train_losses.append(value)
        course.tokens += input_ids.numel()
        course.train_s += time.perf_counter() - began
        course.peak_gradient_bytes = max(course.peak_gradient_bytes, self.optimizer.peak_gradient_bytes)
        if self.device.type == "cuda":
            reached = torch.cuda.max_memory_allocated(self.device)
            course.peak_vram_bytes = max(course.peak_vram_bytes or 0, reached)

    def _after_step(self, target: int) -> None:
        """Log, validate and save after a step where it is time to."""
        step = self.step
        if due(step, self.log_interval):
            recent = self._course.train_losses[-self.log_interval :]
            speed = self._course.tokens / self._course.train_s
            self._say(
                f"step {step:>6}/{target}  loss {sum(recent) / len(recent):.4f}  "
                f"lr {self.optimizer.get_lr():.2e}  {speed:,.0f} tokens/s"
            )
        if due(step, self.eval_interval) or step == target:
            self._validate()
        if due(step, self.checkpoint_interval):
            self.save_checkpoint()

    def _set_hooks(self, wanted: bool) -> None:
        """Register the hooks anew, or remove them; nothing is left of a step that broke off."""
        self.optimizer.remove_hooks()
        self.optimizer.zero_grad()
        if wanted:
            self.optimizer.register_hooks(self.lr_scale)

    def _next_batch(self) -> Any:
        """The next batch; the loader is begun again when it is exhausted."""
        if self._loader_rng is None:
            seed = int(torch.randint(2**62, ()))
            self._loader_rng = torch.Generator().manual_seed(seed).get_state()
        with self._loader_stream():
            for _ in range(2):
                if self._batches is None:
                    self._batches = iter(self.train_loader)
                for batch in self._batches:
                    return batch
                self._batches = None
        raise ValueError(
            f"train_loader has no batch (more) after {self.step} steps: give one that is not empty and can "
            "be iterated again, such as a DataLoader or a list."
        )

    @contextmanager
    def _loader_stream(self) -> Iterator[None]:
        """Has the loader draw from its own random numbers, so that it takes none of the model's."""
        assert self._loader_rng is not None
        models = torch.get_rng_state()
        torch.set_rng_state(self._loader_rng)
        try:
            yield
        finally:
            self._loader_rng = torch.get_rng_state()
            torch.set_rng_state(models)

    def _tick(self) -> None:
        """Count the time that `fit` has taken so far."""
        if self._clock is not None:
            now = time.perf_counter()
            self._course.wall_s += now - self._clock
            self._clock = now

    def _say(self, line: str) -> None:
        if self.log_interval:
            print(line, flush=True)

    # -- validation ------------------------------------------------------------------------------------------

    def _validate(self) -> None:
        """Add a point to the validation curve, where there is a loader for it."""
        if self.val_loader is None:
            return
        loss, ppl = self.evaluate()
        self._course.val_losses.append(loss)
        self._course.val_steps.append(self.step)
        self._course.val_ppls.append(ppl)
        self._say(f"step {self.step:>6}  validation loss {loss:.4f}  perplexity {ppl:.4g}")

    @torch.no_grad()
    def evaluate(self, max_batches: int | None = None) -> tuple[float, float]:
        """(loss, perplexity) on the validation loader, or its first batches; training is not disturbed.

        The mean over labels other than -100 where labels are whole numbers, else over rows. A model that
        shifts labels has one fewer in each row, which matters only where rows differ in length.

        Raises ValueError: max_batches is below 1, or there are no validation data.
        """
        if max_batches is not None:
            check_count("max_batches", max_batches, 1)
        if self.val_loader is None:
            raise ValueError("there is no val_loader to evaluate on: give the trainer one.")
        total, weight = 0.0, 0
        devices = [self.device] if self.device.type == "cuda" else []
        with in_eval_mode(self.model), torch.random.fork_rng(devices):
            for batch in islice(self.val_loader, max_batches):
                input_ids, labels, others = on_device(batch, self.device)
                count = counted(labels)
                if count:  # the mean over no label is NaN
                    total += count * loss_of(self.model(input_ids, labels=labels, **others)).item()
                    weight += count
        if not weight:
            raise ValueError(
                "val_loader has no batch with labels: give one that is not empty and can be iterated again."
            )
        loss = total / weight
        return loss, exp(loss)

    # -- results ---------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any]:
        """What has been reached. A figure that is not finite, or does not exist yet, is None.

        train_improvement_pct compares the losses of the first and the last step; val_improvement_pct the
        perplexities. tokens_per_sec counts input_ids, and training steps only. compression_*: times smaller
        than AdamW's in float32. peak_vram_gb is in units of 1e9 bytes.
        """
        course = self._course
        train, ppls = course.train_losses, course.val_ppls
        vram = course.peak_vram_bytes
        found = {
            "train_losses": list(train),
            **ends("train_loss", train),
            "train_improvement_pct": improvement(train),
            "val_losses": list(course.val_losses),
            "val_steps": list(course.val_steps),
            "val_ppls": list(ppls),
            **ends("val_ppl", ppls),
            "val_improvement_pct": improvement(ppls),
            "peak_vram_gb": None if vram is None else vram / GIGABYTE,
            "peak_gradient_bytes": course.peak_gradient_bytes,
            "tokens_per_sec": course.tokens / course.train_s if course.train_s else None,
            "total_time_min": course.wall_s / 60,
            **(self._compressions or self._measured_compressions()),
            "steps": self.step,
        }
        return {name: only_finite(value) for name, value in found.items()}

    def _measured_compressions(self) -> dict[str, float]:
        usage = self.optimizer.memory_usage(verbose=False)
        return {
            "compression_state": usage["state_compression"],
            "compression_gradients": usage["gradient_compression"],
            "compression_total": usage["total_compression"],
        }

    def _write_results(self, results: Mapping[str, Any]) -> None:
        self.results_dir.mkdir(parents=True, exist_ok=True)
        base = self.results_dir / self.results_prefix
        with replaced(Path(f"{base}.json")) as f:
            f.write(json.dumps(results, indent=1, allow_nan=False).encode() + b"\n")
        with replaced(Path(f"{base}.png")) as f:
            f.write(picture(results, self.results_prefix))

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int | None = None, path: str | os.PathLike[str] | None = None) -> Path:
        """Write model, optimizer, curves, random states and whether there are hooks. -> the file.

        Args:
            step: the number in the file's name, by default of the steps taken.
            path: another name.

        The file is complete or not there; its checksum precedes what torch.save writes. Raises OSError when
        it cannot be written.
        """
        self._refuse_cleaned()
        name = f"{self.results_prefix}_step_{self.step if step is None else step}.pt"
        place = self.checkpoint_dir / name if path is None else Path(path)
        self._tick()
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "curves": asdict(self._course),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "loader_rng": self._loader_rng,
            "hooks": self.optimizer.hooked,
        }
        place.parent.mkdir(parents=True, exist_ok=True)
        with replaced(place) as f:
            start = f.write(header("0" * 64))
            torch.save(state, f)
            f.seek(start)
            checksum = hashlib.file_digest(f, "sha256").hexdigest()
            f.seek(0)
            f.write(header(checksum))
        return place

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Continue as the trainer that wrote the checkpoint, with hooks if it had them; nothing is executed.

        Learning rate, weight decay, limits and intervals stay those of this trainer; train_loader is begun
        anew.

        Raises:
            ValueError: the file is damaged, or of another model or rank; nothing has changed.
            OSError: it cannot be read.
        """
        self._refuse_cleaned()
        state = read_checkpoint(Path(path))
        try:
            course = Course(**state["curves"])
            hooks = state["hooks"]
            check_weights(state["model"], self.model.state_dict())
            optimizer = self._own_groups(state["optimizer"])
            self._check_random(state)
            if state["step"] != len(course.train_losses):
                raise ValueError("its curve has another number of steps")
            self._another_optimizer().load_state_dict(optimizer)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{path} is not of this trainer ({error}): build model and trainer as they were when it was "
                "written."
            ) from None
        self._set_hooks(hooks)  # which may refuse: before anything else
        self.optimizer.load_state_dict(optimizer)
        self.model.load_state_dict(state["model"])
        self._course = course
        self._batches = None
        self._loader_rng = state["loader_rng"]
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)

    def _own_groups(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The optimizer's state of a checkpoint, with the settings of this trainer."""
        groups = self.optimizer.state_dict()["param_groups"]
        for own, other in zip(groups, saved["param_groups"], strict=True):
            if own["rank"] != other["rank"]:
                raise ValueError(f"its rank is {other['rank']}, not {own['rank']}")
            if own["param_names"] != other["param_names"]:
                raise ValueError("other parameters were trained")
        return {**saved, "param_groups": groups}

    def _another_optimizer(self) -> AXIOM:
        """One of the same parameters, to try a state on."""
        groups = []
        for group in self.optimizer.param_groups:
            named = zip(group["param_names"], group["params"], strict=True)
            groups.append({"params": list(named), "rank": group["rank"]})
        return AXIOM(groups)

    def _check_random(self, saved: Mapping[str, Any]) -> None:
        """Raises RuntimeError or TypeError for random states that torch does not take."""
        torch.Generator().set_state(saved["rng"])
        if saved["loader_rng"] is not None:
            torch.Generator().set_state(saved["loader_rng"])
        if self.device.type == "cuda" and saved["cuda_rng"] is not None:
            torch.Generator(self.device).set_state(saved["cuda_rng"])

    # -- the end, and what is refused ------------------------------------------------------------------------

    def cleanup(self) -> None:
        """Remove the hooks and free the optimizer's state. The model and `results()` stay; `fit` does not."""
        if self._compressions is not None:
            return
        self._compressions = self._measured_compressions()
        self.optimizer.remove_hooks()
        self.optimizer.zero_grad()
        self.optimizer.state.clear()
        self._batches = None

    def _refuse_cleaned(self) -> None:
        if self._compressions is not None:
            raise RuntimeError("this trainer was cleaned up, its optimizer's state is gone: make a new one.")

    def _check_settings(self, hooks: bool) -> None:
        for name in ("eval_interval", "log_interval", "checkpoint_interval", "warmup_steps"):
            check_count(name, getattr(self, name), 0)
        if self.lr_scale != 1 and not hooks:
            raise ValueError(
                f"lr_scale={self.lr_scale} acts under hooks only: set hooks=True, or leave it at 1."
            )
        if not self.results_prefix or Path(self.results_prefix).name != self.results_prefix:
            raise ValueError(
                f"results_prefix={self.results_prefix!r} must be the beginning of a file's name, without a "
                "folder: name that in results_dir."
            )
        for name in ("train_loader", "val_loader"):
            if length_of(getattr(self, name)) == 0:
                raise ValueError(f"{name} is empty: give it at least one batch.")
        if self.save_results and find_spec("matplotlib") is None:
            raise ImportError(
                "results are drawn with matplotlib, which is missing: install it, or set save_results=False."
            )
        self._check_folders()

    def _check_folders(self) -> None:
        if self.save_results:
            check_writable("results_dir", self.results_dir)
        if self.checkpoint_interval:
            check_writable("checkpoint_dir", self.checkpoint_dir)


# -- batches and losses --------------------------------------------------------------------------------------


def on_device(batch: Any, device: torch.device) -> Batch:
    """A batch on the device. Raises ValueError unless it is a pair or a dict of input_ids and labels."""
    if isinstance(batch, Mapping):
        named = dict(batch)
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        named = dict(zip(("input_ids", "labels"), batch, strict=True))
    else:
        raise ValueError(
            f"a batch is a {type(batch).__name__}: give pairs (input_ids, labels), or dicts with these keys."
        )
    for name in ("input_ids", "labels"):
        if not isinstance(named.get(name), Tensor):
            keys = ", ".join(map(str, named))
            raise ValueError(f"{name} is missing in a batch, or is no tensor; it has {keys}: add it.")
    here = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in named.items()}
    return here.pop("input_ids"), here.pop("labels"), here


def loss_of(output: Any) -> Tensor:
    """The loss in what a model returned, 0-dim. Raises ValueError where there is none."""
    if isinstance(output, Mapping):
        found = output.get("loss")
    elif isinstance(output, tuple | list) and output and not hasattr(output, "loss"):
        found = output[0]
    else:
        found = getattr(output, "loss", output)
    if isinstance(found, Tensor) and found.numel() == 1:
        return found.reshape(())
    what = f"of shape {tuple(found.shape)}" if isinstance(found, Tensor) else repr(type(found).__name__)
    raise ValueError(
        f"model(input_ids, labels=labels) returned no scalar loss ({what}): return one, or an object with "
        ".loss."
    )


def counted(labels: Tensor) -> int:
    """How many labels a mean loss is over; rows, where labels are not whole numbers."""
    if labels.is_floating_point():
        return len(labels) if labels.ndim else 1
    return int((labels != IGNORED).sum())


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Has dropout and the like switched off; each module is then again in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


# -- settings ------------------------------------------------------------------------------------------------


def chosen_device(given: str | torch.device | None, models: torch.device) -> torch.device:
    """Where to train, CUDA with its number."""
    device = torch.device(given) if given is not None else models
    if given is None and models.type == "cpu" and torch.cuda.is_available():
        device = torch.device("cuda")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device


def to_device(model: nn.Module, device: torch.device) -> None:
    """Move the model, unless all of it is there."""
    if any(t.device != device for t in (*model.parameters(), *model.buffers())):
        model.to(device)


def length_of(loader: Any) -> int | None:
    """Its number of batches, None where it does not say, or is None."""
    try:
        return len(loader)
    except TypeError:
        return None


def due(step: int, interval: int) -> bool:
    """Whether a step ends an interval; never of an interval of 0."""
    return interval > 0 and step % interval == 0


def check_count(name: str, value: Any, least: int) -> None:
    """Raises ValueError unless the value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}.")


def check_writable(name: str, folder: Path) -> None:
    """Raises OSError for a folder that cannot be created or written; creates nothing."""
    whole = folder.resolve()
    existing = next(p for p in (whole, *whole.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OSError(f"{name}={str(folder)!r} cannot be written: {existing} is no folder that allows it.")


# -- results -------------------------------------------------------------------------------------------------


def exp(x: float) -> float:
    """e^x, infinite where that is too large."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


def ends(name: str, curve: list[float]) -> dict[str, float | None]:
    """The first and the last value of a curve."""
    return {
        f"initial_{name}": curve[0] if curve else None,
        f"final_{name}": curve[-1] if curve else None,
    }


def improvement(curve: list[float]) -> float | None:
    """How far a curve has fallen, in percent of its first value."""
    if not curve or not curve[0]:
        return None
    return 100 * (curve[0] - curve[-1]) / curve[0]


def only_finite(value: Any) -> Any:
    """The value, or the values of a list, with None for what JSON has no number for."""
    if isinstance(value, list):
        return [only_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def picture(results: Mapping[str, Any], title: str) -> bytes:
    """A PNG of the training loss and, where there was validation, of its loss and perplexity."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # a reader's own style may need what is not installed
        matplotlib.rcParams.update(LOOK)
        panels = 2 if results["val_steps"] else 1
        figure = Figure(figsize=(6.5 + 4.0 * (panels - 1), 4.2), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        draw_losses(axes[0], results)
        if panels == 2:
            draw_perplexities(axes[1], results)
        for one in axes:
            one.set_xlabel("step")
            one.xaxis.set_major_locator(MaxNLocator(integer=True))
        figure.suptitle(headline(results, title), x=0.015, ha="left", fontsize=10, wrap=True)
        out = io.BytesIO()
        figure.savefig(out, format="png")
    return out.getvalue()


def headline(results: Mapping[str, Any], title: str) -> str:
    return (
        f"{title}: {results['steps']:,} steps, optimizer state and gradients "
        f"{results['compression_total']:.1f}× smaller than AdamW's"
    )


def draw_losses(axes: Any, results: Mapping[str, Any]) -> None:
    losses = drawable(results["train_losses"])
    steps = range(1, len(losses) + 1)
    window = max(1, len(losses) // SMOOTHED)
    few = "o" if len(losses) < 2 else None
    axes.plot(steps, losses, color="#B5D1E6", linewidth=0.8, marker=few, label="training, each step")
    if window > 1:
        label = f"training, mean of the last {window}"
        axes.plot(steps, running_mean(losses, window), color="#0072B2", label=label)
    if results["val_steps"]:
        style = {"color": "#D55E00", "marker": "o"}
        axes.plot(results["val_steps"], drawable(results["val_losses"]), label="validation", **style)
    axes.set_title("Loss")
    axes.legend()


def draw_perplexities(axes: Any, results: Mapping[str, Any]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    ppls = drawable(results["val_ppls"])
    axes.plot(results["val_steps"], ppls, color="#D55E00", marker="o")
    known = [x for x in ppls if x > 0]
    ratio = max(known) / min(known) if known else 1
    if ratio > FAR:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < FAR**4 else (1.0,)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    if ppls[-1] > 0:
        axes.annotate(
            f"{ppls[-1]:.4g}",
            (results["val_steps"][-1], ppls[-1]),
            xytext=(0, 7),
            textcoords="offset points",
            ha="right",
        )
    axes.set_title("Validation perplexity")


def drawable(curve: list[float | None]) -> list[float]:
    """NaN, which leaves a gap, for None."""
    return [math.nan if x is None else x for x in curve]


def running_mean(curve: list[float], window: int) -> list[float]:
    """The mean of the last `window` values up to each one, of fewer at the beginning."""
    sums = [0.0, *accumulate(curve)]
    starts = [max(0, i - window) for i in range(1, len(sums))]
    return [(sums[i] - sums[start]) / (i - start) for i, start in enumerate(starts, 1)]


# -- files ---------------------------------------------------------------------------------------------------


@contextmanager
def replaced(path: Path) -> Iterator[io.BufferedRandom]:
    """A file to write, which takes the place of the old one when it is complete: a crash leaves either."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w+b") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def header(digest: str) -> bytes:
    """The first line of a checkpoint."""
    return HEADER.format(digest).encode()


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What `save_checkpoint` wrote, on the CPU. ValueError for any other content, OSError without a file."""
    other = f"{path} is damaged, or no checkpoint of AXIOM_Trainer"
    start = len(header("0" * 64))
    with open(path, "rb") as f:
        line = f.read(start)
        if line != header(hashlib.file_digest(f, "sha256").hexdigest()):
            raise ValueError(f"{other} (its checksum does not match): load another one.")
        f.seek(start)
        try:
            return dict(torch.load(f, map_location="cpu", weights_only=True))
        except Exception as error:
            raise ValueError(f"{other} ({type(error).__name__}): load another one.") from None


def check_weights(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raises ValueError unless both have the same names, shapes and dtypes."""
    for name in [*own, *saved]:
        if name not in saved or name not in own:
            where = "it" if name in own else "the model"
            raise ValueError(f"{where} has no {name}")
        kinds = [form(state[name]) for state in (saved, own)]
        if kinds[0] != kinds[1]:
            raise ValueError(f"its {name} is {kinds[0]}, not {kinds[1]}")


def form(x: Any) -> str:
    """Shape and dtype of a tensor, the type of anything else."""
    return f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
