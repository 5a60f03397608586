"""`ebc-lab pull` and `ebc-lab worker`: a study that goes on, or is helped, on another machine."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ebc_lab.config.errors import visible

from .options import OUTPUT_DIR, Json, Place, optional, print_json, tell_aside


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
