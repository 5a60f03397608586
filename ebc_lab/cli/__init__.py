"""The `ebc-lab` command: signals and exit codes. Everything else is imported once Ctrl-C is listened to."""

from __future__ import annotations

import shlex
import signal
import sys

INTERRUPTED = 130  # the exit code


def command_line() -> str:
    """The command line of this call."""
    return shlex.join(["ebc-lab", *sys.argv[1:]])


def main() -> None:
    """The `ebc-lab` command."""
    heard: list[int] = []

    def interrupt(number: int, _: object) -> None:
        heard.append(number)
        raise KeyboardInterrupt

    # a closed terminal or a plain kill acts like Ctrl-C, unless the signal is ignored
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, interrupt)
    try:
        try:
            code = _answered()
        finally:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python takes a while to end where it has torch
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception as error:
        code = INTERRUPTED if heard else _told(error)  # a library may make another error of the interrupt
    if code == INTERRUPTED:  # typer turns Ctrl-C into this code itself
        resumed = sys.argv[1:2] in (["autopilot"], ["stage"])
        more = f"; the same command continues from here: {command_line()}" if resumed else ""
        print(f"interrupted{more}", file=sys.stderr)
    sys.exit(code)


def _answered() -> int | None:
    """Run the command that is asked for. -> its exit code; None for 0."""
    import io

    from .commands import app
    from .options import mend_size

    for stream in (sys.stdout, sys.stderr):  # what a terminal's encoding lacks is shown as `?`
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    mend_size()
    code: int | None = app(standalone_mode=False, prog_name="ebc-lab")
    return code


def _told(error: Exception) -> int:
    """Tell a mistake of the user's in one sentence. -> the exit code. Any other error is raised again."""
    import typer

    from ebc_lab.config.errors import UserError, visible

    from .commands import USAGE_ERROR
    from .familiar import explain_misuse

    if isinstance(error, UserError):
        what = str(error)
    elif isinstance(error, OSError):
        place = f"{error.filename}: " if error.filename else ""
        cause = visible(f"{place}{error.strerror or error}")
        what = f"{cause}: fix that, or choose another folder, and try again"
    elif isinstance(error, MemoryError):
        what = "there is not enough memory for this: give less at once, or take a machine with more"
    elif isinstance(error, USAGE_ERROR):
        what = visible(explain_misuse(error))
    else:
        raise error
    typer.echo(f"error: {what}", err=True)
    return 2
