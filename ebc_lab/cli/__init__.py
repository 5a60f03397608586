"""The `ebc-lab` command: signals and exit codes."""

from __future__ import annotations

import io
import re
import signal
import sys
from typing import Any

import typer

from ebc_lab.config.errors import UserError, visible

from .commands import USAGE_ERROR, app, command_line
from .options import mend_size


def misused(error: Any) -> str:
    """A mistake in how a command is called, in one sentence."""
    from . import familiar

    what = " ".join(error.format_message().split()).rstrip(".")
    what = re.sub(r"\. Did you mean '(.*)'\?", r" (did you mean \1?)", what[:1].lower() + what[1:])
    what = what.replace("', '", " or ")
    words, context = sys.argv[1:], error.ctx
    path = words[: 2 if words[:1] == ["ebm"] else 1]
    called = context.command_path if context else " ".join(["ebc-lab", *path])
    if found := re.match("no such command '(.*?)'", what):
        commands = ", ".join(context.command.list_commands(context))
        meant = familiar.explain_command(found[1], called, context.find_root().command, words)
        return meant or f"{what}; the commands are {commands}."
    if what.startswith("no such option"):
        options = familiar.options_of(context.command)
        if meant := familiar.explain_flags(path, options, words[len(path) :]):
            return meant
        dashes = "settings are given without dashes: scale=smoke, optimizer.lr=1e-3"
        return f"{what}; {dashes}; `{called} --help` lists the options."
    return f"{what or 'a command is missing'}: `{called} --help` says what it takes."


def main() -> None:
    """The `ebc-lab` command."""
    # a closed terminal or a plain kill acts like Ctrl-C, unless the signal is ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    mend_size()
    try:
        code = app(standalone_mode=False, prog_name="ebc-lab")
    except UserError as error:
        typer.echo(f"error: {error}", err=True)
        code = 2
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        what = error.strerror or error
        typer.echo(
            f"error: {visible(f'{place}{what}')}: fix that, or choose another folder, and try again", err=True
        )
        code = 2
    except USAGE_ERROR as error:
        typer.echo(f"error: {visible(misused(error))}", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # typer turns Ctrl-C into this code itself
        resumed = sys.argv[1:2] in (["autopilot"], ["stage"])
        more = f"; the same command continues from here: {command_line()}" if resumed else ""
        typer.echo(f"interrupted{more}", err=True)
    sys.exit(code if isinstance(code, int) else 0)
