"""What is refused of a run's workload and tokens before anything is written, each in one sentence."""

from __future__ import annotations

import importlib.util

from .errors import need
from .schema import RunConfig

EXTRA = "pip install 'ebc-lab[ebm]'"
SEARCHED = ("hnsw", "ivf")  # indices that faiss builds


def check_workload(run: RunConfig) -> None:
    """Refuse tokens that cannot be had, and settings that an ebm does not take. Raises UserError."""
    _check_tokens(run)
    need(
        run.workload.name == "ebm" or run.projection.name != "sphere",
        "projection=sphere keeps the directions of workload=ebm on the sphere, and "
        f"workload={run.workload.name} has none.",
    )
    if run.workload.name == "ebm":
        _check_ebm(run)
        _check_beside_ebm(run)


def installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _check_tokens(run: RunConfig) -> None:
    tokens = run.tokens
    need(
        tokens.name == "characters" or installed("tokenizers"),
        f"tokens={tokens.name} needs the library tokenizers: {EXTRA}.",
    )
    need(
        tokens.name != "gpt2" or bool(tokens.folder),
        "tokens=gpt2 needs tokens.folder=FOLDER, which holds GPT-2's tokenizer.",
    )


def _check_ebm(run: RunConfig) -> None:
    ebm, decoder, index = run.ebm, run.decoder, run.index.name
    need(
        ebm.kappa_min < ebm.kappa_max,
        f"ebm.kappa_min={ebm.kappa_min:g} must be below ebm.kappa_max={ebm.kappa_max:g}.",
    )
    need(
        decoder.active <= decoder.experts,
        f"decoder.active={decoder.active} must be at most decoder.experts={decoder.experts}.",
    )
    need(
        ebm.splats == 0 or ebm.neighbours <= ebm.splats,
        f"ebm.neighbours={ebm.neighbours} splats act on a state, of at most ebm.splats={ebm.splats}: "
        "choose fewer, or ebm.splats=0 for none.",
    )
    need(
        ebm.splats > 0 or ebm.adapt == "statistics",
        "ebm.adapt=gradient trains the splats, and ebm.splats=0 has none.",
    )
    need(
        index not in SEARCHED or installed("faiss"),
        f"index={index} needs the library faiss: {EXTRA}, or index=exact.",
    )
    need(
        ebm.embeddings != "gpt2" or bool(ebm.gpt2),
        "ebm.embeddings=gpt2 needs ebm.gpt2=FOLDER, which holds GPT-2's weights.",
    )
    need(
        ebm.embeddings != "gpt2" or run.tokens.name == "gpt2",
        "ebm.embeddings=gpt2 are those of GPT-2's own tokens: add tokens=gpt2.",
    )


def _check_beside_ebm(run: RunConfig) -> None:
    """What an ebm does not take of other groups."""
    quantizer = run.quantizer
    for given, refused, why in (
        (f"compile={run.compile}", run.compile == "on", "its splats are picked anew at every step"),
        (f"param_dtype={run.param_dtype}", run.param_dtype != "float32", "its energy needs float32"),
        (
            f"controller={run.controller.name}",
            run.controller.name == "agreement",
            "it compares the fall of one loss with the slope of the sum of six",
        ),
        (
            "budget.grouping=matrices",
            run.budget.grouping == "matrices",
            "it knows a GPT's matrices by their names; block has a group for each expert",
        ),
        (
            f"model={run.model.name}",
            run.model.name != "gpt",
            "it has a model of its own; leave model=gpt",
        ),
        (
            "a quantizer",
            {quantizer.name, quantizer.gradients, quantizer.state} != {"none"},
            "only a GPT's hidden matrices are quantized",
        ),
    ):
        need(not refused, f"workload=ebm does not go with {given}: {why}.")
