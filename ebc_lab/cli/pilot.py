"""`ebc-lab autopilot` and `stage`: the study runs behind its view, and this says what came of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import typer
from rich.console import Console

from ebc_lab.config.errors import MISTAKEN, UserError, visible
from ebc_lab.report.conclude import concluding
from ebc_lab.report.text.words import plural, tracks_in_words
from ebc_lab.study.autopilot import Outcome, autopilot
from ebc_lab.study.guards import Limits, StageFailed
from ebc_lab.study.inspect.forecast import expected_left, expected_work
from ebc_lab.study.inspect.reproduce import deciding
from ebc_lab.study.launch.pool import WorkersFailed
from ebc_lab.study.stages.rules import Undecidable
from ebc_lab.study.stages.stage import decision_that_shows
from ebc_lab.study.stages.verdict import verdict_of
from ebc_lab.study.store.changes import looks_of
from ebc_lab.study.store.study import Cancelled, study_of
from ebc_lab.study.trackers.notify import FAILED, FINISHED, STALLED, Notifier

from . import INTERRUPTED, screen

Forecast = TypeVar("Forecast")


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
    place = {"study": study.name, "folder": str(study.root)}
    view = screen.View(console)
    notifier = Notifier(config.notify, study.root, view.say)
    listener = concluding(
        say=view.say,
        decided=view.decided,
        watch=view.watch,
        expect=_unless_unknown(expected_left),
        work=_unless_unknown(expected_work),
        stalled=lambda text: notifier.tell(STALLED, text, wait=False),
    )
    try:
        with view.following():
            done = autopilot(config, listener, stages=stages, force=force, limits=limits, command=lasting)
    except Cancelled as error:
        typer.echo(f"{visible(str(error))}; the same command continues from here:\n  {command}", err=True)
        return {"outcome": "cancelled", "exit_code": INTERRUPTED, **place}
    except KeyboardInterrupt:  # which `main` speaks of
        return {"outcome": "interrupted", "exit_code": INTERRUPTED, **place}
    except (StageFailed, WorkersFailed) as error:
        why = visible(str(error))
        typer.echo(f"stopped: {why}\nthe command:\n  {command}", err=True)
        notifier.tell(FAILED, why)
        return {"outcome": "stopped", "cause": why, "exit_code": 3, **place}
    except Exception as error:
        if view.watched:  # of a mistake in the settings whoever made it has read
            notifier.tell(FAILED, str(error))
        raise
    screen.outcome(console, done)
    ending = _ending(done)
    failed = [f"{plural(len(done.failed), 'run')} failed"] if done.failed else []
    notifier.tell(FAILED if done.failed else FINISHED, "; ".join([*failed, *ending["answer"]]))
    return {**ending, **place}


def _unless_unknown(forecast: Callable[..., Forecast]) -> Callable[..., Forecast | None]:
    """Return a forecast that is None where it cannot be made: it never stops a study."""

    def known(*asked: Any) -> Forecast | None:
        try:
            return forecast(*asked)
        except (UserError, Undecidable, *MISTAKEN):
            return None

    return known


def _answers(done: Outcome) -> list[dict[str, Any]]:
    """Return what a suite says of each arm of one's own or, without any, of each against its rival."""
    answers = []
    for track, arms in (decision_that_shows("arms", done.decisions) or {"tracks": {}})["tracks"].items():
        by_question = arms.get("answers") or {}
        answers += [{"track": track, "arm": label, **answer} for label, answer in by_question.items()]
        for label, arm in arms["arms"].items() if not by_question else ():
            if (difference := arm.get("difference")) is not None:
                about = {"rival": arm.get("versus") or arms["reference"], "difference": difference}
                answers.append({"track": track, "arm": label, **about, "verdict": verdict_of(difference)})
    return answers


def _ending(done: Outcome) -> dict[str, Any]:
    """A finished call for programs."""
    page, header = done.study.page_file, done.study.header()
    return {
        "outcome": "runs failed" if done.failed else "done",
        "answer": [tracks_in_words(line) for line in done.answer],
        "verdict": done.acceptance,
        "answers": _answers(done),
        "looks": looks_of(header),
        "decide": deciding(done.study, header, done.decisions),
        "stages": done.stages,
        "runs": done.runs,
        "failed": done.failed,
        "warning": done.warning,
        "page": str(page) if page.exists() else None,
        "exit_code": 4 if done.failed else 0,
    }
