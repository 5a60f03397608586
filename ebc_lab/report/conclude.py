"""Everything that a study leaves behind at its end: tables, pictures, verdict, page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, recorded_environment
from ebc_lab.config.schema import Config
from ebc_lab.records.decisions import Acceptance, Decision
from ebc_lab.records.figures import RunResult
from ebc_lab.records.files import read_regular, write_atomic
from ebc_lab.records.json_files import write_json
from ebc_lab.records.paths import PAPERS, PICTURES
from ebc_lab.records.spec import RunSpec
from ebc_lab.study.autopilot import Listener
from ebc_lab.study.launch.pool import Say
from ebc_lab.study.stages.stage import concluding_stages, planned_runs, stage_of
from ebc_lab.study.store import crate, manifest
from ebc_lab.study.store.changes import describe_earlier_looks
from ebc_lab.study.store.snapshot import read
from ebc_lab.study.store.study import Study

from . import kinds


def concluding(**calls: Any) -> Listener:
    """Return a listener that writes a table when a stage is decided, and everything else at the end.

    `calls`: its other fields.
    """
    return Listener(tabulate=write_table, conclude=write_conclusions, **calls)


def write_table(study: Study, stage: str, specs: Sequence[RunSpec], results: Mapping[str, RunResult]) -> None:
    """Write the table of a stage's runs."""
    from .text import summaries

    manifest.remove_entries(study.root, stage_of(stage).summary_csv)
    summaries.write(study.root / stage_of(stage).summary_csv, summaries.summary(specs, results))


def write_conclusions(
    config: Config, study: Study, decisions: dict[str, Decision], say: Say
) -> Acceptance | None:
    """Write results, tables, pictures and the page of a study whose last stage is decided.

    -> the verdict with its study and corpus, also in acceptance.json; None where no stage makes one.
    """
    from .page import html
    from .text import papers, summaries

    header = study.header()  # the corpus itself need not be here any more
    corpus = header["corpus"]
    about = {"study": header["study"], "corpus": corpus["title"], "warning": corpus["warning"]}
    accepted: Acceptance | None = None
    files = [kind.file for kind in kinds.KINDS.values() if kind.file]
    manifest.remove_entries(study.root, study.acceptance_file.name, study.results_file.name, *files, *PAPERS)
    for decision in decisions.values():
        kind = kinds.kind_of(decision)
        if not kind.concludes:
            continue
        found = kinds.Evidence(decision, config, decisions, study.results_of(decision))
        if kind.file:
            summaries.write_rows(study.root / kind.file, kind.rows(found), kind.columns)
        if tables := kind.papers(found):
            source = papers.source(config, corpus, kind.seeds(found), describe_earlier_looks(header))
            papers.write(study.root, config.study.name, tables, source)
        if judged := kind.acceptance(found):
            accepted = cast(Acceptance, {**about, **judged})
            write_json(study.acceptance_file, accepted)
    [answering, *_] = [*concluding_stages(decisions), config.study.stages[-1]]
    write_json(study.results_file, {**about, **decisions[answering]})
    _draw(study, decisions, say)
    html.write_page(study.root)
    return accepted


def _draw(study: Study, decisions: Mapping[str, Decision], say: Say) -> None:
    """Draw the pictures unless those that are there show these very decisions."""
    from . import pictures

    stamp = study.plotted_file
    inputs = digest({s: d["inputs_sha256"] for s, d in decisions.items()})
    try:
        drawn = read_regular(stamp, len(inputs)) == inputs.encode()
    except (FileNotFoundError, UserError):
        drawn = False
    if not drawn:
        say("drawing the plots …")
        manifest.remove_entries(study.root, *PICTURES)
        pictures.draw_study(study.root)
        write_atomic(stamp, inputs)


def report(study: Study, say: Say = lambda text: None) -> None:
    """Rebuild tables, plots and page of a study from its runs; trains nothing.

    Of an unfinished study the page says what is known so far.
    """
    from .page.html import write_page

    snapshot = read(study)
    config = snapshot.config
    decisions = snapshot.sound_decisions()
    with study.held(), study.blame_files():
        manifest.refuse_changed(study.root)
        manifest.begin(study.root)
        study.plotted_file.unlink(missing_ok=True)
        with recorded_environment(snapshot.header["environment"]):  # which its runs are named by
            for stage in decisions:
                specs, results = planned_runs(stage, config, decisions, snapshot.results_of)
                write_table(study, stage, specs, results)
        if snapshot.finished:
            write_conclusions(config, study, decisions, say)
        else:
            write_page(study.root)
        crate.complete(study)
