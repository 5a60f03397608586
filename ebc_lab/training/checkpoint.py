"""checkpoint.pt: everything the next step depends on that the run's settings do not determine."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ebc_lab.config.errors import UserError
from ebc_lab.ebc import StabilizedOptimizer
from ebc_lab.records.files import write_atomic


@dataclass
class Reached:
    """How far a run has come. Its clocks include earlier attempts, up to their last checkpoint."""

    step: int = 0
    skips: int = 0  # the last steps that were skipped, in a row
    train_s: float = 0.0  # seconds of training, without evaluations
    wall_s: float = 0.0


def save(
    path: Path, identity: str, reached: Reached, model: nn.Module, optimizer: StabilizedOptimizer
) -> None:
    """Write the checkpoint of the run called `identity`."""
    on_gpu = next(model.parameters()).is_cuda
    state = {
        "identity": identity,
        **asdict(reached),
        "probe_s": optimizer.prober.seconds,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state() if on_gpu else None,
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: Path, identity: str, model: nn.Module, optimizer: StabilizedOptimizer) -> Reached:
    """Put a checkpoint into the model, the optimizer and the random generators, if there is one.

    Raises UserError when it is damaged or another run's. Nothing in it is executed.
    """
    if not path.exists():
        return Reached()
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        foreign = state["identity"] != identity
    except Exception as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}): delete it, and the run starts from its first step."
        ) from None
    if foreign:
        raise UserError(f"{path} belongs to another run: delete it, and this run starts from its first step.")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    optimizer.prober.seconds = state["probe_s"]
    torch.set_rng_state(state["rng"])
    if state["cuda_rng"] is not None:
        torch.cuda.set_rng_state(state["cuda_rng"])
    return Reached(state["step"], state["skips"], state["train_s"], state["wall_s"])
