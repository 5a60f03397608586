"""`ebc-lab ebm …`: train an energy-based language model, or use one that a run has kept (docs/ebm.md)."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ebc_lab.config.errors import UserError, visible

from .options import OUTPUT_DIR, PASS_ON, Json, Place, Port, optional, print_json, tell_aside

if TYPE_CHECKING:
    from ebc_lab.ebm.diagnose import Diagnosis
    from ebc_lab.workloads.kept import KeptModel

UNREADABLE = 4  # the exit code where some models of a folder cannot be read
MODEL = typer.Argument(help="A run's folder, a model.pt, or, with --arm, a study.", show_default=False)
Model = Annotated[str, MODEL]
Arm = Annotated[str | None, optional("--arm", help="Of the study MODEL: the first seed's run of this arm.")]

app = typer.Typer(
    help="Energy-based language models on the sphere: train one, or look at one that a run has kept.",
    no_args_is_help=True,
)


@app.command(context_settings=PASS_ON, add_help_option=False)
def train(context: typer.Context) -> None:
    """Train one run: `ebc-lab train workload=ebm …`, with all that it takes, e.g. `scale=smoke seed=1`.

    docs/settings.md has every setting.
    """
    for word in context.args:
        setting = word.lstrip("+")
        if setting.startswith("workload=") and setting != "workload=ebm":
            other = f"for {word} there is `ebc-lab train {word}`"
            raise UserError(f"ebc-lab ebm train is of workload=ebm: {other}.")
    words = [word for word in context.args if word.lstrip("+") != "workload=ebm"]
    context.find_root().command.main(
        ["train", "workload=ebm", *words], standalone_mode=False, prog_name="ebc-lab"
    )


@app.command()
def diagnose(
    model: Annotated[str | None, MODEL] = None,
    arm: Arm = None,
    batch: Annotated[
        Path | None, optional("--batch", help="A folder: one row for each model kept in it.")
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
    from ebc_lab.ebm.diagnose import as_plain
    from ebc_lab.study.store.find import find_model

    from .ebm_view import show_diagnosis

    path = find_model(str(model), arm, output_dir, tell_aside)
    diagnosis = _diagnosed(path, report)
    if as_json:
        print_json({"model": str(path), **as_plain(diagnosis)})
    else:
        show_diagnosis(path, diagnosis)
    return 0


@app.command()
def evaluate(
    model: Model,
    arm: Arm = None,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    samples: Annotated[
        int, typer.Option("--samples", min=1, max=1000, help="Latents a token, of the sampled loss.")
    ] = 8,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Loss, sampled loss, n-gram baselines on the same tokens, energy, R² at every noise level, coverage."""
    from ebc_lab.config.checks import choice
    from ebc_lab.config.schema import SPLITS
    from ebc_lab.workloads.kept import measure

    choice("--split", split, SPLITS)
    kept_model = _loaded(model, arm, output_dir)
    measured = {"model": str(kept_model.path), "step": kept_model.step, "split": split}
    measured |= measure(kept_model, split, samples)
    if as_json:
        return print_json(measured)
    from .ebm_view import show_measured

    show_measured(measured)


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, optional("--prompt", help="What the text begins with.")],
    arm: Arm = None,
    tokens: Annotated[int, typer.Option("--tokens", help="How many more.")] = 200,
    temperature: Annotated[
        float, typer.Option("--temperature", help="Of the choice among the next tokens; 0: the likeliest.")
    ] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", help="Only from the k likeliest; 0: from all.")] = 0,
    langevin_steps: Annotated[
        int, typer.Option(help="Of a latent's chain, 0: settle only; not of sampler=original.")
    ] = 20,
    langevin_step: Annotated[
        float | None, optional("--langevin-step", help="Its size, below 2; the run's if left out.")
    ] = None,
    langevin_temperature: Annotated[
        float, typer.Option("--langevin-temperature", help="Of the chain; 0: settle only.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="The same text for the same seed.")] = 0,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Continue a prompt. Chance in the latent changes the text little, chance in the next token much."""
    from ebc_lab.ebm.apps.writer import Writer, Writing
    from ebc_lab.workloads.kept import sampling_of

    with _refusing():
        writing = Writing(tokens, temperature, top_k, langevin_steps, langevin_temperature, seed)
        kept_model = _loaded(model, arm, output_dir)
        sampling = sampling_of(kept_model.run)
        if langevin_step is not None:
            sampling = replace(sampling, step=langevin_step)
        writer = Writer(kept_model.model, kept_model.tokenizer, kept_model.run.model.context, sampling)
        text = writer.continued(prompt, writing)
    if as_json:
        return print_json({"model": str(kept_model.path), "prompt": prompt, "text": text, **vars(writing)})
    typer.echo(visible(prompt + text))


@app.command()
def serve(model: Model, arm: Arm = None, port: Port = 0, output_dir: Place = OUTPUT_DIR) -> None:
    """Answer POST /generate, /energy, /embed and GET /health on 127.0.0.1 until Ctrl-C.

    Needs the extra `serve` of ebc-lab.
    """
    try:
        from ebc_lab.ebm.apps.serve import address_of, app_of, listening, server_of
    except ImportError as error:
        raise UserError(f"{error}.") from None
    from ebc_lab.workloads.kept import sampling_of

    kept_model = _loaded(model, arm, output_dir)
    run, sampling = kept_model.run, sampling_of(kept_model.run)
    served = (kept_model.model, kept_model.tokenizer)
    application = app_of(*served, context=run.model.context, sampling=sampling, refused=(UserError,))
    with _refusing():
        listener = listening(port)
    with listener:
        typer.echo(f"{visible(str(kept_model.path))}: {address_of(listener)}  (Ctrl-C ends it)")
        try:
            server_of(application).run(sockets=[listener])
        except KeyboardInterrupt:
            typer.echo("no longer serving")


@contextmanager
def _refusing() -> Iterator[None]:
    """Raise UserError for ValueError: what the library refuses is a user's mistake here."""
    try:
        yield
    except ValueError as error:
        raise UserError(f"{str(error).rstrip('.')}.") from None


def _loaded(model: str, arm: str | None, output_dir: str) -> "KeptModel":
    """Load the model that MODEL and --arm name. Raises UserError."""
    from ebc_lab.study.store.find import find_model
    from ebc_lab.workloads.kept import load_model

    return load_model(find_model(model, arm, output_dir, tell_aside))


def _diagnosed(path: Path, report: bool) -> "Diagnosis":
    """Diagnose a kept model, and with `report` write that beside it. Raises UserError."""
    from ebc_lab.workloads import kept

    diagnosis = kept.diagnose(path)
    if report:
        page, plain = kept.write_diagnosis(path, diagnosis)
        typer.echo(visible(f"written {page} and {plain.name}"), err=True)
    return diagnosis


def _diagnose_all(folder: Path, report: bool, as_json: bool) -> int:
    from ebc_lab.ebm.diagnose import ALERT
    from ebc_lab.workloads.kept import models_below, run_folder

    from .ebm_view import show_batch

    rows: list[dict[str, Any]] = []
    trends: dict[str, dict[str, str]] = {}
    for path in models_below(folder):
        try:
            diagnosis = _diagnosed(path, report)
        except UserError as error:
            rows.append({"model": str(path), "problem": str(error)})
            continue
        row: dict[str, Any] = {"model": str(path), **diagnosis.figures}
        row["energy_trend"] = diagnosis.trends.get("energy")
        row["alerts"] = [finding.cause for finding in diagnosis.findings if finding.verdict == ALERT]
        row["critical"] = diagnosis.law is not None and diagnosis.law.critical
        rows.append(row)
        trends[str(run_folder(path))] = diagnosis.trends  # of its last model, which has seen most
    if as_json:
        print_json({"models": rows, "trends": trends})
    else:
        show_batch(folder, rows, trends)
    return UNREADABLE if any("problem" in row for row in rows) else 0
