"""The command line: parse, call one function, print.

Exit codes: 0 done, 1 `rerun` found a difference, 2 bad usage or configuration, 3 a stage could not decide,
4 finished but some runs failed (or a check found something wrong), 130 interrupted. Heavy imports stay inside
the commands, so that `--help` and `status` answer in 0.3 seconds. Modules of commands do without
`from __future__ import annotations`: typer would compile every annotation at each call.
"""

import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer

from ebc_lab import __version__
from ebc_lab.config.errors import require, visible

from . import INTERRUPTED, collection, command_line, completion, ebm
from .hydra.flags import INFO, Given, TrainCommand
from .judge import judge
from .options import HELP_NAMES, OUTPUT_DIR, Json, Place, Port, optional, print_json, tell_aside
from .options import console as _console

USAGE_ERROR: Any = typer.BadParameter.__mro__[1]  # typer exports its children only


def _noting_own(overrides: list[str] | None) -> list[str] | None:
    """Say of each choice that is a file of the user's own although ebc-lab has one of that name."""
    from ebc_lab.config.choices import groups
    from ebc_lab.config.own.files import own_choices

    for override in overrides or ():
        group, _, name = override.partition("=")
        own = own_choices(group).get(name) if name in groups().get(group, ()) else None
        if own:
            tell_aside(f"note: {override} is your {own.relative_to(Path.cwd())}, not ebc-lab's own")
    return overrides


Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="Settings: scale=laptop seeds=[0,1,2] …; `ebc-lab train --help` lists groups and choices.",
        show_default=False,
        autocompletion=completion.overrides,
        callback=_noting_own,
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Change the settings of a study that was begun with others.")
]
MaxRuns = Annotated[int | None, optional("--max-runs", help="Train at most this many runs in this call.")]
MaxHours = Annotated[
    float | None, optional("--max-hours", help="Stop before the workers' hours together exceed this.")
]


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"ebc-lab {__version__}")
        raise typer.Exit


Version = Annotated[
    bool,
    typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
]
Name = Annotated[
    str | None,
    typer.Argument(
        help="Study name (in --output-dir, else in this folder), path of a folder or of a bundle; the newest "
        "study if left out.",
        show_default=False,
        autocompletion=completion.studies,
    ),
]
Names = Annotated[
    list[str] | None,
    typer.Argument(
        help="Studies, folders of studies or patterns ('shape_*'); the newest study if left out.",
        show_default=False,
        autocompletion=completion.studies,
    ),
]

app = typer.Typer(
    help="Is an optimizer, a stabilizer or a schedule better? One command tunes each alike, trains over "
    "several seeds, decides, and reports a verdict with its evidence.",
    no_args_is_help=True,
    context_settings=HELP_NAMES,
    pretty_exceptions_enable=False,
)


@app.callback()
def every_command(version: Version = False) -> None:
    """What stands before the name of a command."""


def _show(answer: Any, as_json: bool, draw: Callable[[Any], None]) -> None:
    """Print an answer as JSON, or let `draw` show it with the module `screen`."""
    if as_json:
        return print_json(answer)
    from . import screen

    draw(screen)


@app.command()
def autopilot(
    overrides: Overrides = None,
    multirun: Annotated[
        bool, typer.Option("-m", "--multirun", help="One study per combination of the overrides.")
    ] = False,
    force: Force = False,
    max_runs: MaxRuns = None,
    max_hours: MaxHours = None,
    as_json: Json = False,
) -> int:
    """Run the whole study, or continue it: sweep, calibrate, scale, finals, verdict.

    Is an optimizer of your own better? `ebc-lab autopilot study=optimizers mine=./my_opt.py:Cautious`
    """
    from ebc_lab.config.compose import configurations
    from ebc_lab.study.guards import Limits

    limits = Limits(max_runs, max_hours)
    # what continues it later, without the limits of this call and without a tracker's or a command's address
    handed_on = [o for o in overrides or [] if not o.lstrip("+").startswith(("tracker", "notify"))]
    lasting = ["ebc-lab", "autopilot", *(["-m"] if multirun else []), *handed_on]
    configs = configurations(overrides or [], multirun=multirun)
    return _piloted(configs, multirun, as_json, force=force, limits=limits, lasting=lasting)


@app.command()
def stage(
    name: Annotated[
        str,
        typer.Argument(
            help="A stage of the study: lr_sweep, calibrate, lr_scale, finals …",
            autocompletion=completion.stages,
        ),
    ],
    overrides: Overrides = None,
    force: Force = False,
    max_runs: MaxRuns = None,
    max_hours: MaxHours = None,
    as_json: Json = False,
) -> int:
    """Run one stage, with the decisions of the earlier ones."""
    from ebc_lab.config.compose import configurations
    from ebc_lab.study.guards import Limits

    configs = configurations(overrides or [], stage=name)
    return _piloted(configs, False, as_json, stages=[name], force=force, limits=Limits(max_runs, max_hours))


def _piloted(configs: Sequence[Any], several: bool, as_json: bool, **how: Any) -> int:
    """Run these studies one after another. -> the highest exit code."""
    from .pilot import pilot

    console = _console(aside=as_json)
    endings: list[dict[str, Any]] = []
    for config in configs:
        endings.append(pilot(config, console, command_line(), **how))
        if endings[-1]["exit_code"] == INTERRUPTED:
            break
    if as_json:
        print_json(endings if several else endings[0])
    if endings[-1]["outcome"] == "cancelled":  # which is said already
        raise SystemExit(INTERRUPTED)
    return max(int(one["exit_code"]) for one in endings)


@app.command(cls=TrainCommand)
def train(
    overrides: Overrides = None,
    run: Annotated[bool, typer.Option("-r", "--run", help="Train one run, which is the default.")] = False,
    multirun: Annotated[
        bool,
        typer.Option(
            *("-m", "--multirun"),
            help="One run per combination: optimizer.lr=1e-3,2e-3 or range(…), glob(…).",
        ),
    ] = False,
    cfg: Annotated[
        str | None, optional("-c", "--cfg", help="Print the settings instead of training: job, hydra or all.")
    ] = None,
    resolve: Annotated[
        bool, typer.Option("--resolve", help="With --cfg: references between settings filled in.")
    ] = False,
    package: Annotated[
        str | None, optional("-p", "--package", help="With --cfg: print only this part, such as optimizer.")
    ] = None,
    info: Annotated[
        str | None, optional("-i", "--info", help=f"How Hydra composed them: {', '.join(INFO)}.")
    ] = None,
    version: Version = False,
    as_json: Json = False,
) -> None:
    """Train one run, or with -m several; the flags are Hydra's. EBC is on unless you say stabilizer=none,
    which trains the optimizer alone.
    """
    from . import train as train_module

    given = Given(overrides or [], run, multirun, cfg, resolve, package, info, as_json)
    train_module.train(given)


@app.command()
def new(
    name: Annotated[
        str | None, typer.Argument(help="What it is called: cautious.", show_default=False)
    ] = None,
    schema: Annotated[
        bool,
        typer.Option("--schema", help="Instead a schema, by which an editor completes and checks suites."),
    ] = False,
) -> None:
    """Write a starter suite, an optimizer and its test into this folder, for you to edit."""
    from .new import new as write
    from .new import write_schema

    if schema:
        line = write_schema(Path.cwd())
        typer.echo(f"the schema is written; editors check a suite that begins with\n  {line}")
        return
    require(name is not None, "give a name: ebc-lab new cautious.")
    files, commands = write(str(name), Path.cwd())
    typer.echo(f"wrote {', '.join(files)}; next:")
    typer.echo("\n".join(f"  {command}" for command in commands))


@app.command()
def plan(overrides: Overrides = None, as_json: Json = False) -> None:
    """Runs, steps, tokens and time of each stage (min, expected, max). Changes nothing."""
    from ebc_lab.config.compose import configurations
    from ebc_lab.config.study_checks import lacking_for
    from ebc_lab.study.inspect.forecast import planned

    [config] = configurations(overrides or [], trains=False)
    forecast = planned(config)
    for sentence in [*lacking_for(config, study=True), *forecast["not_fetched"]]:
        tell_aside(f"warning: {sentence}")
    _show(forecast, as_json, lambda screen: screen.plan(_console(), forecast, overrides or []))


@app.command()
def status(study: Name = None, output_dir: Place = OUTPUT_DIR, as_json: Json = False) -> None:
    """How far a study is: stages, runs, progress, failures and how to repeat them. Changes nothing of it."""
    from ebc_lab.study.inspect import status as status_module
    from ebc_lab.study.store import find as find_module

    where = find_module.find(study, output_dir, tell_aside)
    state = status_module.status(where)
    with where.blame_files():
        _show(state, as_json, lambda screen: screen.status(_console(), state))


@app.command()
def why(
    study: Name = None,
    stage: Annotated[
        str | None,
        typer.Argument(
            help="One stage; all that are decided if left out.",
            show_default=False,
            autocompletion=completion.stages,
        ),
    ] = None,
    again: Annotated[
        bool, typer.Option("--replay", help="Make the decisions again from the results, and compare.")
    ] = False,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> int:
    """Why a stage decided as it did: candidates, rule, margin in units of noise, what would have changed
    it.
    """
    from ebc_lab.config.dicts import from_dict
    from ebc_lab.config.schema import STAGES, Config
    from ebc_lab.study.inspect import why as why_module
    from ebc_lab.study.store import find as find_module
    from ebc_lab.study.store import replay as replay_module

    if study in STAGES and stage is None and not find_module.find(study, output_dir).exists():
        study, stage = None, study
    where = find_module.find(study, output_dir, tell_aside)
    if again:
        comparison = replay_module.replay(where, stage)
        if as_json:
            print_json(comparison)
        else:
            typer.echo("\n".join(replay_module.replay_in_words(comparison)))
        return 0 if comparison["same"] else 4
    reasons = why_module.why(where, stage)

    def draw(screen: Any) -> None:
        screen.why(_console(), reasons, from_dict(Config, where.header()["config"]))

    with where.blame_files():
        _show(reasons, as_json, draw)
    return 0


@app.command()
def rerun(
    study: Annotated[
        str, typer.Argument(help="Study name, folder or bundle.", autocompletion=completion.studies)
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            help="Where its text, weights or own parts lie here: data.file=…, init.run=….",
            show_default=False,
            autocompletion=completion.overrides,
        ),
    ] = None,
    arm: Annotated[str | None, optional("--arm", help="Of its runs one of this arm …")] = None,
    seed: Annotated[int | None, optional("--seed", help="… with this seed …")] = None,
    stage: Annotated[
        str | None,
        optional("--stage", help="… in this stage; the last if left out.", autocompletion=completion.stages),
    ] = None,
    run: Annotated[
        str | None, optional("--run", help="Or the run's id, or the ten digits at its end.")
    ] = None,
    output: Annotated[
        Path | None,
        optional("--output", "-o", help="Folder to train in; outputs/rerun/STUDY/RUN if left out."),
    ] = None,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> int:
    """Train one run again from its recording, beside the study, and compare: the same bits, or where they
    part.

    Exit code 0: the same; 1: not the same. The study is only read.
    """
    from ebc_lab.study.inspect import rerun as rerun_module
    from ebc_lab.study.store.find import find

    from .train import train_again

    where = find(study, output_dir, tell_aside)
    spec = rerun_module.chosen(where, arm=arm, seed=seed, stage=stage, run=run)
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        folder = train_again(where, spec, overrides or [], output, command_line())
    comparison = rerun_module.compare(where, spec, folder)
    if as_json:
        print_json(comparison)
    else:
        typer.echo("\n".join(map(visible, rerun_module.in_words(comparison))))
    return 0 if comparison["same"] else 1


@app.command()
def export(
    study: Name = None,
    output: Annotated[
        Path | None,
        optional("--output", "-o", help="The bundle; STUDY.zip beside the study's folder if left out."),
    ] = None,
    brief: Annotated[
        bool,
        optional("--brief", help="Without pictures and what runs logged: the same decisions, 1 kB a run."),
    ] = False,
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Pack a study into one .zip: settings, decisions, runs, tables, pictures, and the sha256 of each
    file.
    """
    from ebc_lab.study.store.bundle import export as pack
    from ebc_lab.study.store.find import find

    bundle = pack(find(study, output_dir, tell_aside), output, brief=brief)
    _show(bundle, as_json, lambda screen: screen.exported(_console(), bundle))


@app.command()
def verify(
    study: Name = None,
    output_dir: Place = OUTPUT_DIR,
    sha256: Annotated[str | None, optional("--sha256", help="Of a bundle: what `export` printed.")] = None,
    as_json: Json = False,
) -> int:
    """Check every file of a study, or in a bundle of one, against its recorded sha256, and every run against
    its name.

    Exit code 4: something does not match.
    """
    from ebc_lab.study.store.find import verify_named

    verdict = verify_named(study, output_dir, sha256, tell_aside)
    _show(verdict, as_json, lambda screen: screen.verified(_console(), verdict))
    return 0 if verdict["ok"] else 4


@app.command()
def diff(
    a: Annotated[str, typer.Argument(help="Study name, folder or bundle.")],
    b: Annotated[str, typer.Argument(help="The one to compare it with.")],
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Compare two studies: settings, corpus, machine, runs in common, decisions, verdicts, arms."""
    from ebc_lab.study.inspect.compare import compare
    from ebc_lab.study.store.find import find

    first, second = find(a, output_dir, tell_aside), find(b, output_dir, tell_aside)
    comparison = compare(first, second)
    with first.blame_files(), second.blame_files():
        _show(comparison, as_json, lambda screen: screen.compared(_console(), comparison))


@app.command()
def report(
    study: Name = None,
    output_dir: Place = OUTPUT_DIR,
    output: Annotated[
        Path | None,
        optional(
            *("--output", "-o"),
            help="Of a bundle: the folder to unpack it into; beside it, under its name, if left out.",
        ),
    ] = None,
) -> None:
    """Rebuild the tables, plots and page of a study from its runs, and say what is known of one that is not
    finished; a bundle is unpacked for it and left unchanged."""
    from ebc_lab.report.conclude import report as rebuild
    from ebc_lab.study.inspect import status as status_module
    from ebc_lab.study.store.find import to_rebuild

    from . import screen

    with to_rebuild(study, output_dir, output, tell_aside) as where:
        rebuild(where, typer.echo)
    state = status_module.status(where)
    if not state["state"].startswith("finished"):
        screen.status(_console(), state)
    typer.echo(f"rebuilt in {visible(str(where.root))}")
    typer.echo(f"page {visible(str(where.page_file))}")


@app.command()
def watch(
    studies: Names = None,
    port: Port = 0,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Also open it in a browser.")] = False,
    output_dir: Place = OUTPUT_DIR,
) -> int:
    """Serve a study's page to this machine while it runs, until Ctrl-C. Changes nothing of it.

    Of several studies it shows a line each, until all have ended.
    """
    from ebc_lab.study.store.find import find_all

    watched, *others = found = find_all(studies or [], output_dir, tell_aside)
    try:
        if others:
            from .watching import watch_all

            several = "--port and --open are for the page of one study, and these are several."
            require(not (port or show), several)
            return watch_all(found, _console())
        from ebc_lab.report.page.serve import address_of, server

        with server(watched, port) as made:
            typer.echo(f"study {watched.name}: {address_of(made)}  (Ctrl-C stops watching, not the study)")
            if show:
                typer.launch(address_of(made))
            made.serve_forever()
    except KeyboardInterrupt:
        typer.echo("no longer watching")
    return 0


@app.command()
def cancel(
    study: Annotated[str, typer.Argument(help="Study name or folder.")],
    output_dir: Place = OUTPUT_DIR,
    as_json: Json = False,
) -> None:
    """Stop a study's driver, workers and Slurm jobs, and wait for their end.

    Results stay; autopilot continues.
    """
    from ebc_lab.study.inspect import status as status_module
    from ebc_lab.study.inspect.reproduce import continuing
    from ebc_lab.study.launch.cancel import cancel as end
    from ebc_lab.study.store.find import find

    where = find(study, output_dir, tell_aside)
    ending = end(where, tell_aside)
    state = status_module.status(where)
    ending |= {"state": state["state"], "continue": continuing(where, where.header(checked=False))}
    _show(ending, as_json, lambda screen: typer.echo(screen.cancelled(ending, state)))


@app.command()
def data(overrides: Overrides = None, as_json: Json = False) -> None:
    """Where the corpus is, its checksum and its splits. Fetches it if necessary."""
    from ebc_lab.config.compose import configurations
    from ebc_lab.workloads.corpus import describe

    [config] = configurations(overrides or [])
    corpus = describe(config.data)
    _show(corpus, as_json, lambda screen: screen.corpus(_console(), corpus))


@app.command()
def doctor(overrides: Overrides = None, as_json: Json = False) -> None:
    """What this machine can do: cores, GPUs, measured speeds and their consequences, corpus, output folder,
    Slurm."""
    from ebc_lab.bench.doctor import examine
    from ebc_lab.config.compose import configurations

    [config] = configurations(overrides or [])
    examination = examine(config, tell_aside)
    _show(examination, as_json, lambda screen: screen.doctor(_console(), examination))


@app.command()
def bench(
    overrides: Overrides = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Of its sections this one, by its key in JSON, three times as long."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Seconds instead of minutes: whether it works, not how fast.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokens/s against a plain loop, the cost of each stabilizer, where time and memory go.

    Overrides as for train.
    """
    from ebc_lab.bench.measure import bench as measure

    figures = measure(overrides or [], only=only or (), quick=quick, say=tell_aside)
    if as_json:
        return print_json(figures)
    from . import bench_screen

    bench_screen.benchmark(_console(), figures)


@app.command()
def pull(
    address: Annotated[
        str, typer.Argument(help="Where it is mirrored: its study.mirror, or what is below it by name.")
    ],
    folder: Annotated[
        str, typer.Argument(help="The folder of studies that it is fetched into: its output_dir from now on.")
    ] = OUTPUT_DIR,
    if_there: Annotated[
        bool, typer.Option("--if-there", help="Exit code 0 where nothing is mirrored there yet.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Fetch a study that was mirrored with study.mirror, every file checked against its sha256.

    The study's command then goes on with it here. Exit code 4: files were damaged, and are left out.
    """
    from ebc_lab.study.inspect.reproduce import continuing
    from ebc_lab.study.mirror.pull import NothingThere
    from ebc_lab.study.mirror.pull import pull as fetch
    from ebc_lab.study.store.study import Study

    try:
        pulled = fetch(address, Path(folder).expanduser(), tell_aside)
    except NothingThere as error:
        if not if_there:
            raise
        tell_aside(f"{error} A new one can begin.")
        return 0
    study = Study(Path(pulled["root"]))
    command = continuing(study, study.header())
    if command and study.noted_command() is None:
        command = f"{command} {shlex.quote('study.mirror=' + pulled['mirror'])}"
    if as_json:
        print_json({**pulled, "continue": command})
    else:
        for path, what in pulled["damaged"].items():
            tell_aside(f"damaged there: {path} {what}")
        typer.echo(f"{pulled['files']} files, {pulled['fetched']} fetched now: {visible(pulled['root'])}")
        typer.echo(f"this continues the study:\n  {command or 'the command that began it'}")
    return 4 if pulled["damaged"] else 0


@app.command()
def worker(
    session: Annotated[
        str, typer.Argument(help="The study's name or folder, or its session's folder in .sessions/.")
    ],
    wait: Annotated[
        float,
        optional("--wait", help="Seconds to wait for the study's command, at the start and when it is gone."),
    ] = 0.0,
    output_dir: Place = OUTPUT_DIR,
) -> int:
    """Join a running study as one more worker, from any machine that sees its folder.

    Its command needs launcher.join=true. Ends when the study does; with --wait, waits for its next command.
    """
    from ebc_lab.study.launch.join import join
    from ebc_lab.study.store.find import place_of

    return join(place_of(session, output_dir, tell_aside), wait, tell_aside)


app.command("list")(collection.list_studies)
app.command("board")(collection.board)
app.command()(judge)
app.command("columns")(collection.columns)
app.add_typer(ebm.app, name="ebm")
