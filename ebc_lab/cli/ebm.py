"""`ebc-lab ebm …`: train an energy-based language model, or use one that a run has kept (docs/ebm.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebc_lab.config.errors import UserError, any_of, blamed, nearest, visible

from .options import OUTPUT_DIR, PASS_ON, Json, Place
from .options import console as _console

if TYPE_CHECKING:
    from torch import Tensor

    from ebc_lab.ebm.diagnose import Diagnosis
    from ebc_lab.workloads.kept import KeptModel

UNREADABLE = 4  # the exit code where some models of a folder cannot be read
MOST_SAMPLES = 1000
KEPT = ("model.pt", "models/step_*.pt")  # under a run's folder
BATCH_COLUMNS = {  # of diagnose --batch: figure -> the words over its column
    "val_loss": ">val loss",
    "energy": ">energy",
    "state_spread": ">spread",
    "splat_coverage": ">coverage",
    "kappa_median": ">κ",
    "soc_rate": ">soc_rate",
}

Model = Annotated[
    str,
    typer.Argument(help="A run's folder, a model.pt, or, with --arm, a study.", show_default=False),
]
Arm = Annotated[
    str | None,
    typer.Option("--arm", help="Of the study MODEL: the first seed's run of this arm.", show_default=False),
]

app = typer.Typer(
    help="Energy-based language models on the sphere: train one, or look at one that a run has kept.",
    no_args_is_help=True,
)


# -- the commands --------------------------------------------------------------------------------------------


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train one run: `ebc-lab train workload=ebm …`, with all that it takes, e.g. `scale=smoke seed=1`.

    docs/settings.md has every setting.
    """
    from . import train as train_module

    for word in context.args:
        name, _, value = word.lstrip("+").partition("=")
        if name == "workload" and value != "ebm":
            raise UserError(
                f"ebc-lab ebm train is of workload=ebm: for {word} there is `ebc-lab train {word}`."
            )
    own = [word for word in context.args if word.lstrip("+") != "workload=ebm"]
    train_module.train(["workload=ebm", *own])


@app.command()
def diagnose(
    model: Annotated[
        str | None,
        typer.Argument(help="A run's folder, a model.pt, or, with --arm, a study.", show_default=False),
    ] = None,
    arm: Arm = None,
    batch: Annotated[
        Path | None,
        typer.Option("--batch", help="A folder: one row for each model kept in it.", show_default=False),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write it beside the model, as Markdown and as JSON.")
    ] = False,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> int:
    """What the evaluations of a run say of its model: figure, threshold, verdict, and what to try.

    Exit code 4: some models of a --batch cannot be read.
    """
    if (model is None) == (batch is None):
        raise UserError("diagnose takes a MODEL, or a folder of them with --batch FOLDER.")
    if batch is not None:
        if arm:
            raise UserError("--arm is of one MODEL: leave it out, or --batch.")
        return _diagnose_all(batch.expanduser(), report, as_json)
    assert model is not None
    path = _path_of(model, arm, output_dir)
    found = _diagnosis_of(path)
    if report:
        _write_reports(path, found)
    if as_json:
        _json({"model": str(path), **_plain(found)})
    else:
        _show_diagnosis(path, found)
    return 0


@app.command()
def evaluate(
    model: Model,
    arm: Arm = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    samples: Annotated[int, typer.Option("--samples", help="Latents a token, of the sampled loss.")] = 8,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Loss, sampled loss, n-gram baselines on the same tokens, energy, R² at every noise level, coverage."""
    from ebc_lab.config.schema import SPLITS

    if split not in SPLITS:
        raise UserError(f"--split {split} is unknown{nearest(split, SPLITS)}: choose {any_of(SPLITS)}.")
    if not 1 <= samples <= MOST_SAMPLES:
        raise UserError(f"--samples {samples} must lie between 1 and {MOST_SAMPLES}.")
    kept = _loaded(_path_of(model, arm, output_dir))
    found = {"model": str(kept.path), "step": kept.step, "split": split} | _measured(kept, split, samples)
    if as_json:
        return _json(found)
    _show_measured(found)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="What the text begins with.", show_default=False)],
    arm: Arm = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How many more.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the choice among the next tokens; 0: the likeliest.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Only from the k likeliest; 0: from all.")] = 0,
    langevin_steps: Annotated[
        int,
        typer.Option(
            "--langevin-steps", help="Of a latent's chain, 0: settle only; not of sampler=original."
        ),
    ] = 20,
    langevin_step: Annotated[
        float | None,
        typer.Option("--langevin-step", help="Its size, below 2; the run's if left out.", show_default=False),
    ] = None,
    langevin_temperature: Annotated[
        float, typer.Option("--langevin-temperature", help="Of the chain; 0: settle only.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same text for the same seed.")] = 0,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Go on from a prompt. The latent's chance moves the text little, that of the next token much."""
    from ebc_lab.ebm.apps.writer import Writer, Writing
    from ebc_lab.workloads.kept import sampling_of

    with _refusing():
        writing = Writing(tokens, temperature, top_k, langevin_steps, langevin_temperature, seed)
    kept = _loaded(_path_of(model, arm, output_dir))
    with _refusing():
        sampling = sampling_of(kept.run)
        if langevin_step is not None:
            sampling = replace(sampling, step=langevin_step)
        writer = Writer(kept.model, kept.tokenizer, kept.run.model.context, sampling)
        text = writer.continued(prompt, writing)
    if as_json:
        return _json({"model": str(kept.path), "prompt": prompt, "text": text, **vars(writing)})
    typer.echo(visible(prompt + text))


@app.command()
def serve(
    model: Model,
    arm: Arm = None,
    port: Annotated[
        int, typer.Option("--port", help="Port on 127.0.0.1; a free one if left out.", show_default=False)
    ] = 0,
    output_dir: Place = OUTPUT_DIR,
) -> None:
    """Answer POST /generate, /energy, /embed and GET /health on 127.0.0.1 until Ctrl-C.

    Needs the extra `serve` of ebc-lab.
    """
    try:
        from ebc_lab.ebm.apps.serve import address_of, app_of, listening, server_of
    except ImportError as error:
        raise UserError(f"{error}.") from None
    from ebc_lab.workloads.kept import sampling_of

    kept = _loaded(_path_of(model, arm, output_dir))
    application = app_of(
        kept.model,
        kept.tokenizer,
        context=kept.run.model.context,
        sampling=sampling_of(kept.run),
        refused=(UserError,),
    )
    with _refusing():
        made = listening(port)
    with made:
        typer.echo(f"{visible(str(kept.path))}: {address_of(made)}  (Ctrl-C ends it)")
        try:
            server_of(application).run(sockets=[made])
        except KeyboardInterrupt:
            typer.echo("no longer serving")


# -- which model ---------------------------------------------------------------------------------------------


@contextmanager
def _refusing() -> Iterator[None]:
    """What the library refuses is a user's mistake here. Raises UserError for ValueError."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}.") from None


def _path_of(model: str, arm: str | None, output_dir: str) -> Path:
    """The model.pt that MODEL and --arm name. Raises UserError where they name none."""
    from ebc_lab.records.paths import RunFiles
    from ebc_lab.study.store.find import find
    from ebc_lab.study.store.study import Study

    path = Path(model).expanduser()
    if arm is None:
        if path.is_dir() and Study(path).exists():
            arms = dict.fromkeys(arm for arm, _ in _models_in(Study(path)))
            if not arms:
                raise UserError(f"the study {path} has no model: it is of another workload, or not done yet.")
            raise UserError(f"{path} is a study: name one of its arms with --arm, {any_of([*arms])}.")
        return RunFiles(path).model if path.is_dir() else path
    study = find(model, output_dir, lambda text: typer.echo(text, err=True))
    study.must_exist()
    models = _models_in(study)
    found = next((path for name, path in models if name == arm), None)
    if found is None:
        arms = dict.fromkeys(name for name, _ in models)
        named = f"it has {any_of([*arms])}" if arms else "it has no model at all"
        raise UserError(f"no run of {study.root} with arm {arm}{nearest(arm, [*arms])} has a model: {named}.")
    return found


def _models_in(study: Any) -> list[tuple[str, Path]]:
    """Arm and model.pt of every run of a study that has one: those of the last stage first, then by seed."""
    from ebc_lab.config.schema import STAGES

    found = []
    for record in study.records():
        path = study.run_files(record.run_id).model
        if record.spec is not None and record.spec["kind"] == "train" and path.is_file():
            place = STAGES.index(record.spec["stage"]) if record.spec["stage"] in STAGES else -1
            found.append((-place, record.spec["config"]["seed"], record.run_id, record.spec["arm"], path))
    return [(arm, path) for *_, arm, path in sorted(found)]


def _loaded(path: Path) -> KeptModel:
    """The model on its run's device, where this machine has it, with as many threads as in training: their
    number changes bits. Raises UserError."""
    import torch

    from ebc_lab.workloads.kept import read_model

    kept = read_model(path)
    device = "cuda" if kept.run.device == "cuda" and torch.cuda.is_available() else "cpu"
    if kept.run.threads_per_run > 0 and kept.run.threads_per_run != torch.get_num_threads():
        torch.set_num_threads(kept.run.threads_per_run)
    kept.model.to(device)
    return replace(kept, run=replace(kept.run, device=device))


# -- what is measured ----------------------------------------------------------------------------------------


def _measured(kept: KeptModel, split: str, samples: int) -> dict[str, Any]:
    """The figures of a split, by name. Raises UserError where the run's text is not at hand."""
    import torch

    from ebc_lab.ebm.evaluate import held_out, ngram_baselines
    from ebc_lab.workloads.batches import windows
    from ebc_lab.workloads.corpus import locate
    from ebc_lab.workloads.ebm import JUDGED
    from ebc_lab.workloads.losses import evaluate as losses_of
    from ebc_lab.workloads.tokens import tokenised

    run, model = kept.run, kept.model
    text = tokenised(kept.tokenizer, locate(run.data, quiet=True))
    T = run.model.context
    ids = torch.from_numpy(text.splits[split]).to(run.device)
    if len(ids) <= T:
        raise UserError(f"the {split} split has {len(ids)} tokens, a window of this model {T}: take another.")
    loss = losses_of(model, run, windows(ids, T))
    model.eval()
    [(judged, _)] = windows(ids, T, max(1, JUDGED // T))
    figures = held_out(model, judged, torch.Generator().manual_seed(run.seed), run.ebm.noise)
    unigram, bigram = ngram_baselines(text.splits["train"], text.splits[split], text.vocabulary)
    characters = text.characters_per_token()[split]
    return {
        "tokens": int(loss["tokens"]),
        "characters_per_token": characters,
        "loss": loss["loss"],
        "loss_se": loss["se"],
        "perplexity": math.exp(loss["loss"]),
        "bits_per_character": loss["loss"] / characters / math.log(2),
        "sampled_loss": _sampled(kept, ids, samples),
        "baselines": {"unigram": unigram, "bigram": bigram},
        **{name: value for name, value in figures.items() if not name.startswith(("r2_", "matched_"))},
        "levels": _by_level(figures),
    }


def _sampled(kept: KeptModel, ids: Tensor, samples: int) -> dict[str, Any]:
    """The sampled loss of a few windows of a split, beside the settled one on the same tokens."""
    import torch

    from ebc_lab.ebm.evaluate import sampled_loss
    from ebc_lab.workloads.batches import windows
    from ebc_lab.workloads.ebm import SAMPLED
    from ebc_lab.workloads.kept import sampling_of

    run = kept.run
    [(inputs, targets)] = windows(ids, run.model.context, max(1, SAMPLED // run.model.context))
    told: dict[str, Any] = {"tokens": targets.numel(), "samples": samples}
    chance = torch.Generator().manual_seed(run.seed)
    try:
        return told | sampled_loss(kept.model, inputs, targets, sampling_of(run), chance, samples)
    except ValueError as error:  # a chain that left the finite numbers
        return told | {"settled": None, "sampled": None, "problem": str(error)}


def _by_level(figures: Mapping[str, float]) -> list[dict[str, float]]:
    """R², its standard error and its matched value at every noise level, in radians."""
    from ebc_lab.ebm.diagnose import levels_of

    levels = []
    for name in levels_of(figures):
        known = {kind: figures[f"{kind}_{name}"] for kind in ("r2", "r2_se", "matched")}
        levels.append({"sigma": float(name.replace("p", "."))} | known)
    return levels


# -- what is diagnosed ---------------------------------------------------------------------------------------


def _diagnosis_of(path: Path) -> Diagnosis:
    """The diagnosis of a kept model. Raises UserError."""
    from ebc_lab.ebm.diagnose import diagnosed
    from ebc_lab.workloads.kept import read_model

    kept = read_model(path)
    with blamed(str(path), "train it again"):
        curve = [{name: float(value) for name, value in row.items()} for row in kept.curve]
        return diagnosed(curve, [] if kept.model.pile is None else kept.model.pile.sizes)


def _run_folder(path: Path) -> Path:
    """The folder of the run that has kept a model."""
    from ebc_lab.records.paths import RunFiles

    above = path.parent
    return above.parent if above.name == RunFiles(above.parent).models.name else above


def _kept_in(folder: Path) -> list[Path]:
    """Every model kept in a folder, by run and step. Raises UserError where there is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: give one that holds runs of workload=ebm.")
    found = [path for pattern in KEPT for path in folder.rglob(pattern)]
    if not found:
        raise UserError(
            f"{folder} holds no model.pt: give a folder that holds finished runs of workload=ebm."
        )
    return sorted(found, key=lambda path: (str(_run_folder(path)), len(path.name), path.name))


def _diagnose_all(folder: Path, report: bool, as_json: bool) -> int:
    from ebc_lab.ebm.diagnose import ALERT

    rows: list[dict[str, Any]] = []
    trends: dict[str, dict[str, str]] = {}
    for path in _kept_in(folder):
        try:
            found = _diagnosis_of(path)
        except UserError as error:
            rows.append({"model": str(path), "problem": str(error)})
            continue
        if report:
            _write_reports(path, found)
        row: dict[str, Any] = {"model": str(path), **found.figures}
        row["energy_trend"] = found.trends.get("energy")
        row["alerts"] = [finding.cause for finding in found.findings if finding.verdict == ALERT]
        row["critical"] = found.law is not None and found.law.critical
        rows.append(row)
        trends[str(_run_folder(path))] = found.trends  # of its last model, which has seen most
    if as_json:
        _json({"models": rows, "trends": trends})
    else:
        _show_batch(folder, rows, trends)
    return UNREADABLE if any("problem" in row for row in rows) else 0


def _plain(found: Diagnosis) -> dict[str, Any]:
    from ebc_lab.ebm.diagnose import as_plain

    return as_plain(found)


def _write_reports(path: Path, found: Diagnosis) -> None:
    """model.diagnosis.md and model.diagnosis.json beside model.pt."""
    from ebc_lab.ebm.diagnose import as_markdown
    from ebc_lab.records.files import write_atomic
    from ebc_lab.records.json_files import write_json
    from ebc_lab.records.paths import DIAGNOSES

    page, plain = (path.with_suffix(ending) for ending in DIAGNOSES)
    write_atomic(page, as_markdown(f"Diagnosis of {visible(path.name)}", found))
    write_json(plain, {"model": path.name, **_plain(found)})
    typer.echo(visible(f"written {page} and {plain.name}"), err=True)


# -- what is shown -------------------------------------------------------------------------------------------


def _json(value: Any) -> None:
    from ebc_lab.records.json_files import as_json

    typer.echo(json.dumps(as_json(value), indent=1))


def _show_diagnosis(path: Path, found: Diagnosis) -> None:
    from ebc_lab.ebm.diagnose import COMPARED, COMPARED_WITH, number

    from .screen import plain_table

    figures = found.figures
    step = number(figures.get("step", math.nan))
    typer.echo(visible(f"{path}: " + (f"step {step}" if figures else "no evaluation in it")))
    console = _console()
    table = plain_table("figure", ">value", ">threshold", "verdict", "~recommendation")
    for finding in found.findings:
        shown = (number(finding.figure), number(finding.threshold))
        table.add_row(finding.cause, *shown, finding.verdict, finding.recommendation or "–")
    console.print(table)
    if any(finding.cause in COMPARED for finding in found.findings):
        typer.echo(COMPARED_WITH)
    if "energy" in found.trends:
        spread = number(figures.get("state_spread", math.nan))
        typer.echo(f"energy trend: {found.trends['energy']}; state spread {spread}, 0 where states collapse")
    typer.echo(f"avalanches: {found.criticality}")


def _show_batch(
    folder: Path, rows: Sequence[Mapping[str, Any]], trends: Mapping[str, Mapping[str, str]]
) -> None:
    from ebc_lab.ebm.diagnose import number
    from ebc_lab.ebm.evaluate import TREND_OVER

    from .screen import plain_table

    def name_of(path: str) -> str:
        return visible(str(Path(path).relative_to(folder)))

    console = _console()
    table = plain_table("model", ">step", *BATCH_COLUMNS.values(), "~alerts")
    for row in rows:
        if "problem" in row:
            table.add_row(name_of(row["model"]), *["–"] * (1 + len(BATCH_COLUMNS)), row["problem"])
            continue
        cells = [number(row.get(name, math.nan)) for name in ("step", *BATCH_COLUMNS)]
        table.add_row(name_of(row["model"]), *cells, ", ".join(row["alerts"]) or "none")
    console.print(table)
    typer.echo(f"\ntrends of each run over its last {TREND_OVER} evaluations:")
    table = plain_table("~run", *(heading.lstrip(">") for heading in BATCH_COLUMNS.values()))
    for run, words in trends.items():
        table.add_row(name_of(run), *(words.get(name, "–") for name in BATCH_COLUMNS))
    console.print(table)


def _show_measured(found: Mapping[str, Any]) -> None:
    from .screen import plain_table

    def nats(name: str, loss: float, more: str = "") -> None:
        bits = loss / found["characters_per_token"] / math.log(2)
        table.add_row(name, f"{loss:.4f}", f"{math.exp(loss):.2f}", f"{bits:.3f}", more)

    sampled = found["sampled_loss"]
    some = f"on {sampled['tokens']} tokens"
    console = _console()
    typer.echo(
        visible(f"{found['model']}, step {found['step']}: {found['split']}, {found['tokens']:,} tokens")
    )
    table = plain_table("", ">nats/token", ">perplexity", ">bits/character", "~")
    nats("loss", found["loss"], f"± {found['loss_se']:.4f}")
    if sampled["sampled"] is None:
        table.add_row("sampled loss", "–", "–", "–", sampled["problem"])
    else:
        bound = f"an upper bound, {sampled['samples']} samples {some}"
        nats("sampled loss", sampled["sampled"], bound)
        nats("settled", sampled["settled"], f"{some}, without chance")
    for name, loss in found["baselines"].items():
        nats(name, loss, "counted on the training split")
    console.print(table)
    if not found["levels"]:
        typer.echo("no splats: no energy, no score")
        return
    typer.echo(f"\nenergy {found['energy']:.3f} nats from the uniform law's; ", nl=False)
    typer.echo(f"state spread {found['state_spread']:.3f}")
    typer.echo(
        f"coverage: {found['splat_coverage']:.0%} of the splats won lately, {found['winners']:.0%} win here; "
        f"{found['state_coverage']:.0%} of the states lie within their splat"
    )
    table = plain_table(">σ, radians", ">R²", ">s.e.", ">matched")
    for level in found["levels"]:
        table.add_row(f"{level['sigma']:g}", *(f"{level[kind]:.4f}" for kind in ("r2", "r2_se", "matched")))
    console.print(table)
