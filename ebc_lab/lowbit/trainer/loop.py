"""The training itself, and what it comes to.

* Only latent float32 weights are in the optimizer (torch's Adam); every forward, of training as of
  evaluation, goes through the quantizer. So all losses are those of the quantized model.
* Gradients are rounded at random. At the default learning rate that left less loss than nearest codes with
  error feedback on three kinds of rows (0.39, 0.041, 0.572 against 0.40, 0.046, 0.583, means of two seeds; at
  a third of the rate it is the other way round on two of them), and there is no residual to keep.
* With `use_adaptive_lr` the policy `auxnn` scales the learning rate, and the trust radius within which the
  norm of the whole update is kept: RADIUS * learning_rate * sqrt(weights). Adam's first update moves every
  weight by the learning rate, later ones by a third of it or less, so that the radius tames the start, a rate
  that is too high, and what the policy raises. Of 0.15, 0.3, 0.5 and 1 this one served rates from 3e-4 to
  4e-3 best.
* Batches are a function of (seed, step), so a run resumed from a checkpoint ends with the same bits. It runs
  on the CPU.

The maths is in docs/lowbit.md.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..backends.planes import matrices_size
from ..container import damage_of
from ..gradients import GradientQuantizer
from ..levels import Quantized, quantize
from ..linear import quantize_model
from ..names import Familiar, Summary
from ..policy import Observed, make_policy
from ..ste import straight_through
from .data import Rows, Text, tokens_of
from .models import Perceptron, text_model
from .run import Run, read_checkpoint, write_checkpoint
from .settings import TrainingConfig

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])

RADIUS = 0.3
CHECKPOINT = "checkpoint.ebctrain"


class HybridLLMTrainer(Familiar):
    """Trains a quantized perceptron on rows, the lab's GPT on text, or your model, and says what it took.

    Args:
        config: see `TrainingConfig`.
        model_dim: width of the GPT (128), or of the perceptron (`config.hidden`).
        num_layers: blocks of the GPT (3), or matrices between the perceptron's first and last (1).
        model: trained instead, from the weights that it has: rows, or (B, T) tokens, to a prediction or to an
            object with `logits`. `quantize_weights` calls `quantize_model` for it.
    """

    def __init__(
        self,
        config: TrainingConfig | None = None,
        *,
        model_dim: int | None = None,
        num_layers: int | None = None,
        model: nn.Module | None = None,
    ):
        self.config = TrainingConfig() if config is None else config
        if not isinstance(self.config, TrainingConfig):
            raise TypeError(f"config is a {type(config).__name__}: give a TrainingConfig.")
        self.config.check()
        for name, value in (("model_dim", model_dim), ("num_layers", num_layers)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}: give an integer of at least 1, or None.")
            if value is not None and model is not None:
                raise ValueError(f"{name} is {value}, but a model is given, which has its own: leave it out.")
        self.model_dim = model_dim
        self.num_layers = num_layers
        self._given = model
        self._run: Run | None = None
        self._is_loaded = False

    @property
    def model(self) -> nn.Module:
        """Return the model: its parameters are the latent weights, its forward is the quantized one."""
        return self._started().model

    def train(
        self,
        training_data: object,
        training_targets: object = None,
        loss_fn: Loss | None = None,
        eval_fn: Callable[[nn.Module], float | None] | None = None,
    ) -> dict[str, Any]:
        """Train from the start, or on from a loaded checkpoint, to the end that the settings give.

        Args:
            training_data: (n, d) real numbers; or text: a string, a path (as a string too, where the file
                exists), or a 1-D array of token numbers.
            training_targets: (n, e) for rows; None reconstructs them.
            loss_fn: (prediction, target) -> a 0-dim tensor; by default the mean squared error, or the
                cross-entropy of (B, T, V) logits in nats.
            eval_fn: called with the model after each epoch; what it returns is `eval` in the history.
        Returns:
            `get_training_summary()`.
        Raises:
            ValueError: data of another shape, with NaN or infinity, or too short; a checkpoint of other data.
        """
        self.config.check()
        source = self._source(training_data, training_targets)
        loss = noted(loss_fn, "loss_fn gets torch tensors: ((y_pred - y_true) ** 2).mean(), for instance.")
        loss = loss or source.loss
        eval_fn = noted(eval_fn, "eval_fn gets the model: model(inputs) is what it predicts.")
        if not self._is_loaded:
            sizes = self._sizes(source)
            self._run = self._built(source.kind, sizes, source.digest)
        run = self._started()
        if run.digest != source.digest:
            raise ValueError(
                "the checkpoint was made with other data: give the same, or train a new trainer."
            )
        self._is_loaded = False
        if run.step == 0:
            run.zero_loss = _mean_loss(source, lambda x, y: source.zeros(y), loss)
            run.initial_loss = _validated(run, source, loss)
        last = self.config.last_step(source.steps_per_epoch)
        begun = time.perf_counter() - run.seconds
        while run.step < last:
            self._step(run, source, loss, run.step / last)
            if run.step % source.steps_per_epoch == 0 or run.step == last:
                run.seconds = time.perf_counter() - begun
                self._end_epoch(run, source, loss, eval_fn)
        run.seconds = time.perf_counter() - begun
        return self.get_training_summary()

    def get_training_summary(self) -> dict[str, Any]:
        """Tell what the training so far came to; losses are of the quantized forward, in the loss's own unit.

        `final_loss` is on the validation part, `final_train_loss` the mean of the last epoch's steps, skipped
        ones left out. `zero_predictor_loss` is what a prediction of 0 scores on the validation part: for
        text, all characters as likely. `compression` counts packed codes and steps, and all other weights in
        float32, but no header of a file.
        """
        run = self._started()
        last = run.history[-1] if run.history else {}
        final = last.get("validation_loss", run.initial_loss)
        hidden = [p.numel() for p in run.hidden().values()]
        everything = sum(t.nbytes for t in [*run.model.parameters(), *run.model.buffers()])
        hidden_float = 4 * sum(hidden)
        packed = matrices_size(hidden, self.config.levels)
        used = packed if self.config.quantize_weights else hidden_float
        whole = everything - hidden_float + used
        sizes = {
            "hidden_matrices": hidden_float / used,
            "whole_model": everything / whole,
            "hidden_bytes": used,
            "hidden_bytes_float32": hidden_float,
            "model_bytes": whole,
            "model_bytes_float32": everything,
        }
        sent = hidden_float if run.gradients is None else packed  # by one worker, of these gradients
        return Summary(
            {
                "total_steps": run.step,
                "initial_loss": run.initial_loss,
                "final_loss": final,
                "final_train_loss": last.get("train_loss", math.nan),
                "zero_predictor_loss": run.zero_loss,
                "total_loss_reduction": run.initial_loss - final,
                "total_time": run.seconds,
                "bits_per_weight": 8 * used / sum(hidden),
                "compression": sizes,
                "optimizer_summary": self._optimizer_summary(run, 8 * sent / sum(hidden)),
                "metrics_history": [dict(record) for record in run.history],
            }
        )

    def quantized_weights(self) -> dict[str, Quantized]:
        """Return the codes and steps of each hidden matrix, those that the forward uses."""
        if not self.config.quantize_weights:
            raise ValueError("the weights are float32 (quantize_weights=False): they have no codes.")
        hidden = self._started().hidden()
        return {name: quantize(p, self.config.levels) for name, p in hidden.items()}

    def save_checkpoint(self, path: str | Path) -> None:
        """Write all that a resumed training needs; a reader, or a crash, meets a whole file or none."""
        write_checkpoint(Path(path), {"settings": self._settings(), "run": self._started().state_dict()})

    def load_checkpoint(self, path: str | Path) -> None:
        """Take up what `save_checkpoint` wrote; the next `train` on the same data goes on from there.

        Raises:
            ValueError: made with other settings (more epochs or steps are no other settings).
            DamagedFileError: no checkpoint, or not as it was written; it is a ValueError.
        """
        saved = read_checkpoint(Path(path))
        foreign = "it is not what save_checkpoint wrote"
        own = self._settings()
        with damage_of(path, foreign):
            theirs = {name: saved["settings"][name] for name in own}
            other = next((name for name in own if theirs[name] != own[name]), None)
            state = saved["run"]
        if other is not None:
            what = f"{other}={theirs[other]!r}, not {own[other]!r}"
            raise ValueError(f"{path} was made with {' '.join(what.split())}: give the same setting.")
        with damage_of(path, foreign):
            if state["kind"] not in (Rows.kind, Text.kind):
                raise ValueError(f"it knows no data of the kind {state['kind']!r}")
            run = self._built(state["kind"], state["sizes"], state["digest"])
            run.load_state_dict(state)
        self._run = run
        self._is_loaded = True

    # -- the parts -------------------------------------------------------------------------------------------

    def _started(self) -> Run:
        if self._run is None:
            raise ValueError("nothing is trained yet: call train or load_checkpoint first.")
        return self._run

    def _settings(self) -> dict[str, Any]:
        return self.config.identity() | {"model_dim": self.model_dim, "num_layers": self.num_layers}

    def _source(self, data: object, targets: object) -> Rows | Text:
        tokens = tokens_of(data)
        if tokens is None:
            return Rows(data, targets, self.config)
        if targets is not None:
            raise ValueError("text is its own target: leave training_targets out.")
        return Text(tokens, self.config)

    def _sizes(self, source: Rows | Text) -> dict[str, Any]:
        model = self._given
        if model is None:
            return source.sizes(self.model_dim, self.num_layers, self.config)
        if isinstance(source, Text) and hasattr(model, "get_input_embeddings"):
            known = cast(Any, model).get_input_embeddings().num_embeddings
            if source.vocabulary > known:
                raise ValueError(
                    f"training_data has the token {source.vocabulary - 1}, but the model knows {known}: give "
                    "tokens of the model's own tokenizer."
                )
        return {"model": type(model).__name__}

    def _built(self, kind: str, sizes: dict[str, Any], digest: str) -> Run:
        config = self.config
        if self._given is None and kind == "text":
            through = functools.partial(straight_through, levels=config.levels)
            quantizer = through if config.quantize_weights else None
            model = text_model()(**sizes, seed=config.seed, quantize=quantizer)
        else:
            model = Perceptron(**sizes, seed=config.seed) if self._given is None else self._given
            if config.quantize_weights:
                quantize_model(model, config.levels, keep=() if self._given is None else None)
        gradients = None
        if config.quantize_gradients:
            gradients = GradientQuantizer(config.levels, rounding="stochastic", seed=config.seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        policy = make_policy("auxnn" if config.use_adaptive_lr else "constant", config.seed)
        return Run(kind, sizes, digest, model, optimizer, gradients, policy)

    def _step(self, run: Run, source: Rows | Text, loss_fn: Loss, progress: float) -> None:
        """Take a step on the batch of the run's step; skipped where the loss or a gradient is not finite."""
        inputs, targets = source.batch(run.step)
        loss = loss_fn(run.predict(inputs), targets)
        if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
            raise ValueError("loss_fn must return a 0-dim tensor that depends on the prediction.")
        run.optimizer.zero_grad()
        # in units of its own, so that Adam's eps means the same for data of any unit
        (loss / source.unit if loss_fn is source.loss else loss).backward()
        value = float(loss.detach())
        gradient = _flat(p.grad if p.grad is not None else torch.zeros_like(p) for p in run.parameters())
        norm = float(gradient.norm())
        if run.update is not None and norm * run.update_norm > 0:
            cosine = float(gradient @ run.update) / (norm * run.update_norm)
            run.policy.feedback(cosine, run.clipped)
        if math.isfinite(value) and math.isfinite(norm):
            seen = Observed(value, norm, run.update_norm, progress, run.clipped)
            run.factors = run.policy.factors(run.step, seen)
            run.losses.append(value)
            self._move(run)
        else:
            run.update = None
            run.skipped_steps += 1
        run.step += 1

    def _move(self, run: Run) -> None:
        """Adam's update from the gradients at hand, shortened to the trust radius where there is one."""
        rate, radius = run.factors
        if run.gradients is not None:
            hidden = [p for p in run.hidden().values() if p.grad is not None]
            sent = run.gradients.compress([cast(Tensor, p.grad) for p in hidden], run.step)
            for p, gradient in zip(hidden, sent, strict=True):
                p.grad = gradient
            run.gradients.commit()
        for group in run.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * rate
        if not self.config.use_adaptive_lr:
            run.optimizer.step()
            return
        with torch.no_grad():
            before = _flat(run.parameters())
            run.optimizer.step()
            update = _flat(run.parameters()) - before
            norm = float(update.norm())
            limit = self._radius(run) * radius
            run.clipped = norm > limit
            if run.clipped:
                run.clipped_steps += 1
                update *= limit / norm
                norm = limit
                _set_flat(run.parameters(), before + update)
        run.update = update
        run.update_norm = norm

    def _radius(self, run: Run) -> float:
        return RADIUS * self.config.learning_rate * math.sqrt(sum(p.numel() for p in run.parameters()))

    def _end_epoch(
        self,
        run: Run,
        source: Rows | Text,
        loss: Loss,
        eval_fn: Callable[[nn.Module], float | None] | None,
    ) -> None:
        record: dict[str, float] = {
            "epoch": -(-run.step // source.steps_per_epoch),
            "step": run.step,
            "train_loss": float(np.mean(run.losses)) if run.losses else math.nan,
            "validation_loss": _validated(run, source, loss),
            "learning_rate": self.config.learning_rate * run.factors[0],
            "radius_factor": run.factors[1],
            "time": run.seconds,
        }
        run.history.append(record)
        run.losses = []
        if eval_fn is not None:
            answer = eval_fn(run.model)
            if answer is not None:
                record["eval"] = float(answer)
        if self.config.checkpoint_dir is not None:
            folder = Path(self.config.checkpoint_dir)
            folder.mkdir(parents=True, exist_ok=True)
            self.save_checkpoint(folder / CHECKPOINT)

    def _optimizer_summary(self, run: Run, gradient_bits: float) -> Summary:
        adaptive = self.config.use_adaptive_lr
        return Summary(
            {
                "optimizer": "adam",
                "policy": run.policy.name,
                "learning_rate": self.config.learning_rate * run.factors[0],
                "learning_rate_factor": run.factors[0],
                "radius_factor": run.factors[1],
                "trust_radius": self._radius(run) * run.factors[1] if adaptive else math.inf,
                "constraints_active": run.clipped_steps,
                "constraints_active_share": run.clipped_steps / max(1, run.step),
                "skipped_steps": run.skipped_steps,
                "gradient_bits": gradient_bits,
            }
        )


def noted(function: Function | None, note: str) -> Function | None:
    """Return a user's function that adds the note to what it raises."""
    if function is None:
        return None

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except Exception as error:
            error.add_note(note)
            raise

    return cast(Function, call)


def _validated(run: Run, source: Rows | Text, loss: Loss) -> float:
    run.model.eval()
    mean = _mean_loss(source, lambda x, y: run.predict(x), loss)
    run.model.train()
    return mean


def _mean_loss(source: Rows | Text, predict: Callable[[Tensor, Tensor], Tensor], loss: Loss) -> float:
    """Return the mean loss over the validation part, each row of it (or window) counted once."""
    total = 0.0
    count = 0
    with torch.no_grad():
        for inputs, targets in source.validation():
            total += float(loss(predict(inputs, targets), targets)) * len(inputs)
            count += len(inputs)
    return total / count


def _flat(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def _set_flat(parameters: list[nn.Parameter], values: Tensor) -> None:
    parts = torch.split(values, [p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.copy_(part.view_as(p))
