"""The `ebc-lab` command: signals and exit codes."""

from __future__ import annotations

import io
import signal
import sys

import typer

from ebc_lab.config.errors import UserError, visible

from .commands import USAGE_ERROR, app, command_line


def main() -> None:
    """The `ebc-lab` command."""
    # a closed terminal or a plain kill acts like Ctrl-C, unless the signal is ignored
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        code = app(standalone_mode=False)
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
        error.show()
        typer.echo("Settings are given without dashes: scale=smoke, optimizer.lr=1e-3.", err=True)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    if code == 130:  # typer turns Ctrl-C into this code itself
        resumed = sys.argv[1:2] in (["autopilot"], ["stage"])
        more = f"; the same command continues from here: {command_line()}" if resumed else ""
        typer.echo(f"interrupted{more}", err=True)
    sys.exit(code if isinstance(code, int) else 0)
