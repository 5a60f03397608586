"""`ebc-lab autopilot` and `stage`: the study runs behind its view, and this says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console

from ebc_lab.config.errors import MISTAKEN, UserError, visible
from ebc_lab.report.conclude import concluding
from ebc_lab.report.text.words import tracks_in_words
from ebc_lab.study.autopilot import Outcome, autopilot, study_of
from ebc_lab.study.guards import Limits, StageFailed
from ebc_lab.study.inspect.forecast import expected_left, expected_work
from ebc_lab.study.launch.pool import WorkersFailed
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.verdict import verdict_of
from ebc_lab.study.store.study import Cancelled

from . import screen
from .options import INTERRUPTED

Told = TypeVar("Told")


def pilot(
    config: Any,
    console: Console,
    command: str,
    *,
    limits: Limits,
    force: bool = False,
    stages: list[str] | None = None,
    lasting: Sequence[str] = (),
) -> dict[str, Any]:
    """Run or continue a study and show it. `command`: this call's own; `lasting`: what continues it later.

    -> what `--json` prints: `exit_code` is 4 where runs failed, 3 where the study stopped undecided, 130
    where it was cancelled or interrupted. Raises UserError.
    """
    study = study_of(config)
    about: dict[str, Any] = {"study": study.name, "folder": str(study.root)}
    view = screen.View(console)
    listener = concluding(
        say=view.say,
        decided=view.decided,
        watch=view.watch,
        expect=_told_only(expected_left),
        work=_told_only(expected_work),
    )
    try:
        with view.following():
            done = autopilot(config, listener, stages=stages, force=force, limits=limits, command=lasting)
    except Cancelled as error:
        typer.echo(f"{visible(str(error))}; the same command continues from here:\n  {command}", err=True)
        return {"outcome": "cancelled", "exit_code": INTERRUPTED, **about}
    except KeyboardInterrupt:  # `main` says so
        return {"outcome": "interrupted", "exit_code": INTERRUPTED, **about}
    except (StageFailed, WorkersFailed) as error:
        typer.echo(f"stopped: {visible(str(error))}\nthe command:\n  {command}", err=True)
        return {"outcome": "stopped", "cause": visible(str(error)), "exit_code": 3, **about}
    screen.outcome(console, done)
    return {**_told(done), **about}


def _told_only(forecast: Callable[..., Told]) -> Callable[..., Told | None]:
    """Return None where what is still to be trained cannot be said: a forecast never stops a study."""

    def said(*asked: Any) -> Told | None:
        try:
            return forecast(*asked)
        except (UserError, Undecidable, *MISTAKEN):
            return None

    return said


def _answers(done: Outcome) -> list[dict[str, Any]]:
    """Return what a suite says of each arm of one's own or, without any, of each against its rival."""
    answers = []
    for track, arms in (done.ablation or {"tracks": {}})["tracks"].items():
        by_question = arms.get("answers") or {}
        answers += [{"track": track, "arm": label, **answer} for label, answer in by_question.items()]
        for label, arm in arms["arms"].items() if not by_question else ():
            if (difference := arm.get("difference")) is not None:
                about = {"rival": arm.get("versus") or arms["reference"], "difference": difference}
                answers.append({"track": track, "arm": label, **about, "verdict": verdict_of(difference)})
    return answers


def _told(done: Outcome) -> dict[str, Any]:
    """A finished call for programs."""
    page = done.study.page_file
    return {
        "outcome": "runs failed" if done.failed else "done",
        "answer": [tracks_in_words(line) for line in done.answer],
        "verdict": done.acceptance,
        "answers": _answers(done),
        "looks": done.study.header().get("looks", []),
        "stages": done.stages,
        "runs": done.runs.as_dict(),
        "failed": done.failed,
        "warning": done.warning,
        "page": str(page) if page.exists() else None,
        "exit_code": 4 if done.failed else 0,
    }
