"""An energy-based model that a run has kept: model.pt, whole and checked, the model in it, and its figures.

model.pt is what `torch.save` writes of plain values and tensors, and nothing in it is executed: its format's
number, the run's settings, the tokenizer, the step, the weights with the splats, what its evaluations found.
"""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebc_lab.config.dicts import from_dict, to_dict
from ebc_lab.config.errors import MISTAKEN, UserError, blamed, visible
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebm.diagnose import Diagnosis, as_markdown, as_plain, diagnosed
from ebc_lab.ebm.evaluate import held_out, ngram_baselines, sampled_loss
from ebc_lab.ebm.generate import Sampling
from ebc_lab.ebm.index import chosen
from ebc_lab.ebm.model import EnergyModel, ModelSettings, level_name
from ebc_lab.records.files import opened, write_atomic
from ebc_lab.records.json_files import write_json
from ebc_lab.records.paths import DIAGNOSES, RunFiles

from .batches import windows
from .corpus import locate
from .gpt import Block, draw_weights, drawn
from .losses import evaluate
from .tokens import Tokenizer, from_json, tokenised

FORMAT = 1
PATTERNS = ("model.pt", "models/step_*.pt")  # of kept models, in a run's folder
JUDGED = 4096  # states of held-out text that a model is judged by
SAMPLED = 512  # tokens of it for the sampled loss


class Blocks(nn.Module):
    """The GPT's blocks, sized by a run's `model`: (B·T, width), B -> the same shape."""

    def __init__(self, run: RunConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(run.model) for _ in range(run.model.blocks))
        draw_weights(self, run.model.blocks)

    def forward(self, x: Tensor, B: int) -> Tensor:
        for block in self.layers:
            x = block(x, B)
        return x


def settings_of(run: RunConfig, vocabulary: int) -> ModelSettings:
    """The model's settings in a run's: those of `conf/ebm` by the same names, and what other parts say."""
    ebm, decoder = run.ebm, run.decoder
    settings = {f.name: getattr(ebm, f.name) for f in fields(ModelSettings) if hasattr(ebm, f.name)}
    settings |= {
        "vocabulary": vocabulary,
        "encoder": run.encoder.name,
        "decoder": decoder.name,
        "hidden": round(ebm.hidden * decoder.hidden_scale),
        "experts": decoder.experts,
        "active": decoder.active,
        "width": run.model.width,
        "context": run.model.context,
        "index": chosen(run.index.name, ebm.splats, run.device == "cuda"),
        "levels": tuple(ebm.levels),
    }
    return ModelSettings(**settings)


def build(run: RunConfig, vocabulary: int, embeddings: Tensor | None = None) -> EnergyModel:
    """The model with its initial weights drawn from the run's seed alone, on the CPU, no splat in use."""
    settings = settings_of(run, vocabulary)
    return drawn(lambda: EnergyModel(settings, embeddings, lambda: Blocks(run)), run.seed)


def sampling_of(run: RunConfig) -> Sampling:
    """How the run draws a latent."""
    s = run.sampler
    return Sampling(s.name, s.steps, s.step, s.friction, s.temperature)


@dataclass(frozen=True, eq=False)
class KeptModel:
    """What model.pt holds."""

    path: Path
    model: EnergyModel
    run: RunConfig
    tokenizer: Tokenizer
    step: int
    curve: list[dict[str, float]]  # what every evaluation found


def write_model(
    path: Path,
    model: EnergyModel,
    run: RunConfig,
    tokenizer: Tokenizer,
    step: int,
    curve: Sequence[dict[str, float]],
) -> None:
    """Write the model after `step` steps of a run, whole or not at all."""
    content = {
        "format": FORMAT,
        "run": json.dumps(to_dict(run), sort_keys=True),
        "tokenizer": {"kind": tokenizer.kind, "json": tokenizer.to_json()},
        "step": step,
        "weights": model.state_dict(),
        "curve": _interned(curve),
    }
    buffer = io.BytesIO()
    torch.save(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, buffer.getvalue())


def _interned(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The same rows with each name one object, whether a row was found or read back: a pickle writes a known
    object as a reference, and equal models should be equal bytes."""
    return [{sys.intern(name): value for name, value in row.items()} for row in rows]


def read_model(path: Path) -> KeptModel:
    """The model that `write_model` wrote. Raises UserError where it is missing, truncated, another program's,
    of another format, or its weights do not fit its settings."""
    try:
        with opened(path) as f:
            whole = f.read()
    except FileNotFoundError:
        raise UserError(
            f"there is no model {path}: give a run folder of workload=ebm, or its model.pt."
        ) from None
    try:
        content = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(
            f"{path} is damaged, or no model of this program ({type(error).__name__}): train it again."
        ) from None
    if not isinstance(content, dict) or not isinstance(content.get("format"), int):
        raise UserError(f"{path} is no model of this program: give the model.pt of a run of workload=ebm.")
    if content["format"] != FORMAT:
        raise UserError(
            f"{path} has format {content['format']}, this version reads {FORMAT}: train it again."
        )
    try:
        return _built(path, content)
    except (*MISTAKEN, RuntimeError) as error:
        first = str(error).partition("\n")[0][:200]
        raise UserError(
            f"{path} holds weights that do not fit its settings ({first}): train it again."
        ) from None


def load_model(path: Path) -> KeptModel:
    """Return a kept model on its run's device, if that is here, and with its run's threads, on which
    bits depend. Raises UserError as `read_model` does."""
    kept = read_model(path)
    device = "cuda" if kept.run.device == "cuda" and torch.cuda.is_available() else "cpu"
    if kept.run.threads_per_run > 0 and kept.run.threads_per_run != torch.get_num_threads():
        torch.set_num_threads(kept.run.threads_per_run)
    kept.model.to(device)
    return replace(kept, run=replace(kept.run, device=device))


def run_folder(path: Path) -> Path:
    """Return the folder of the run that has kept the model at `path`."""
    above = path.parent
    return above.parent if above.name == RunFiles(above.parent).models.name else above


def models_below(folder: Path) -> list[Path]:
    """Return every model kept below a folder, by run and step. Raises UserError if there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds runs of workload=ebm.")
    paths = [path for pattern in PATTERNS for path in folder.rglob(pattern)]
    if not paths:
        raise UserError(
            f"{folder} holds no model.pt: give a folder that holds finished runs of workload=ebm."
        )
    return sorted(paths, key=lambda path: (str(run_folder(path)), len(path.name), path.name))


def _built(path: Path, content: dict[str, Any]) -> KeptModel:
    try:
        run: RunConfig = from_dict(RunConfig, json.loads(content["run"]))
    except UserError as error:  # which cannot name the file
        raise ValueError(str(error)) from None
    tokenizer = from_json(content["tokenizer"]["kind"], content["tokenizer"]["json"])
    model = build(run, tokenizer.vocabulary)
    if odd := [n for n, w in content["weights"].items() if isinstance(w, Tensor) and w.is_complex()]:
        raise ValueError(f"{odd[0]} has complex numbers")  # of which torch would take the real parts
    model.load_state_dict(content["weights"])
    model.eval()
    return KeptModel(path, model, run, tokenizer, content["step"], content["curve"])


# -- how good it is ------------------------------------------------------------------------------------------


def measure(kept: KeptModel, split: str, samples: int) -> dict[str, Any]:
    """Return what `ebc-lab ebm evaluate --json` says of a model on a split of its run's text.

    Raises UserError where the text is not at hand, has changed, or is shorter than a window.
    """
    run, model, context = kept.run, kept.model, kept.run.model.context
    text = tokenised(kept.tokenizer, locate(run.data, quiet=True))
    ids = torch.from_numpy(text.splits[split]).to(run.device)
    if len(ids) <= context:
        raise UserError(
            f"the {split} split has {len(ids)} tokens, a window of this model {context}: take another."
        )
    loss = evaluate(model, run, windows(ids, context))
    model.eval()
    [(judged, _)] = windows(ids, context, max(1, JUDGED // context))
    figures = held_out(model, judged, torch.Generator().manual_seed(run.seed), run.ebm.noise)
    unigram, bigram = ngram_baselines(text.splits["train"], text.splits[split], text.vocabulary)
    characters = text.characters_per_token()[split]
    levels = []
    for sigma in run.ebm.levels if run.ebm.splats else ():
        kinds = ("r2", "r2_se", "matched")
        levels.append({"sigma": sigma} | {kind: figures.pop(f"{kind}_{level_name(sigma)}") for kind in kinds})
    return {
        "tokens": int(loss["tokens"]),
        "characters_per_token": characters,
        "loss": loss["loss"],
        "loss_se": loss["se"],
        "perplexity": math.exp(loss["loss"]),
        "bits_per_character": loss["loss"] / characters / math.log(2),
        "sampled_loss": _sampled(kept, ids, samples),
        "baselines": {"unigram": unigram, "bigram": bigram},
        **figures,
        "levels": levels,
    }


def _sampled(kept: KeptModel, ids: Tensor, samples: int) -> dict[str, Any]:
    """Measure the sampled loss of a few windows of a split, beside the settled one on the same tokens."""
    run = kept.run
    [(inputs, targets)] = windows(ids, run.model.context, max(1, SAMPLED // run.model.context))
    losses: dict[str, Any] = {"tokens": targets.numel(), "samples": samples}
    chance = torch.Generator().manual_seed(run.seed)
    try:
        return losses | sampled_loss(kept.model, inputs, targets, sampling_of(run), chance, samples)
    except ValueError as error:  # a chain that left the finite numbers
        return losses | {"settled": None, "sampled": None, "problem": str(error)}


def diagnose(path: Path) -> Diagnosis:
    """Return the diagnosis of the model at `path`. Raises UserError as `read_model` does."""
    kept = read_model(path)
    pile = kept.model.pile
    with blamed(str(path), "train it again"):
        curve = [{name: float(value) for name, value in row.items()} for row in kept.curve]
        return diagnosed(curve, [] if pile is None else pile.sizes)


def write_diagnosis(path: Path, diagnosis: Diagnosis) -> tuple[Path, Path]:
    """Write the diagnosis of the model at `path` beside it, as Markdown and as JSON. -> the two files."""
    page, plain = (path.with_suffix(ending) for ending in DIAGNOSES)
    write_atomic(page, as_markdown(f"Diagnosis of {visible(path.name)}", diagnosis))
    write_json(plain, {"model": path.name, **as_plain(diagnosis)})
    return page, plain
