"""study.json: a study's settings, its corpus, and what was chosen automatically when the study began.

Every later command on the study adopts what the first one resolved (corpus, device, precision, threads,
compiling). So no change of machine, network or default causes finished runs to be trained again. A run of
`ebc-lab train` is resolved alike, from the spec.json in its folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ebc_lab import __version__
from ebc_lab.bench.speeds import (
    CHOSEN,
    Choice,
    Work,
    choose,
    choose_for_study,
    chosen_by_rule,
    is_open,
    job_cores,
    one_run,
)
from ebc_lab.config.checks import check_run
from ebc_lab.config.dicts import run_part, study_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import study_environment
from ebc_lab.config.machine import chosen_device, cores, git_revision, hardware, versions
from ebc_lab.config.own.parts import with_names, with_sources
from ebc_lab.config.schema import STAGES, Config, RunConfig
from ebc_lab.records.json_files import write_checksummed
from ebc_lab.records.spec import RunSpec
from ebc_lab.workloads.corpus import Corpus
from ebc_lab.workloads.named import anchored
from ebc_lab.workloads.starts import arms_pinned, pinned
from ebc_lab.workloads.text import checked_text

from .launch.pool import Say
from .launch.submit import choice_on_node
from .stages.runs import check_lengths
from .stages.stage import stage_of
from .store import changes, manifest, own
from .store.index import Index
from .store.neighbours import earlier_answers, judged_candidates, seed_plan
from .store.reuse import environment_changes, remaining_work, reusable_results, work_in_words
from .store.study import CorpusRecord, EarlierAnswer, Study, StudyHeader, recorded_config

WorkOf = Callable[[Config], Work | None]
HALVED = " An answer that judges seeds again has half the error; seeds that are all fresh have all of it."


def resolve_study(
    config: Config, study: Study, say: Say, *, force: bool, work: WorkOf = lambda config: None
) -> tuple[Config, Corpus]:
    """Return the configuration with nothing left open, and the corpus, and write study.json. A study that was
    begun before keeps what was resolved then. Raises UserError if the corpus cannot be used.

    `work`: a function that returns the total work of a resolved configuration, to decide about compiling.

    With `force`, a study that was begun with other settings, or under another torch, is changed. Conclusions
    from the old settings are removed; runs that are still the same are kept. Without `force`, such a change
    raises UserError, which says what would be trained again.
    """
    asked = changes.requested(config)
    known: Mapping[str, Any] = study.header() if study.exists() else {}
    different = changes.from_recorded(config, known) if known else []
    changed = all_changes(config, known, Index(study)) if known else []
    config = adopt(config, known) if known else replace(config, answered_before=0)
    earlier = _answered_here(config, known, study) if known else []
    corpus, tokenizer_sha256 = checked_text(config)
    check_lengths(config, corpus)
    config = arms_pinned(pinned(config, corpus, tokenizer_sha256))
    shown = changes.summarize(changed or different, asked, own.edited(config, known))
    if changed and not force:
        edits = any(changes.is_edit(change, asked) for change in changed)
        copied = f"; a copy of what it was is in the study's {study.own.name}/" if edits else ""
        fresh = HALVED if any(answer["shared"] for answer in earlier) else ""
        if environment_changes(recorded_config(known), known):
            began = f"ebc-lab {known['ebc_lab']} with torch {known['versions']['torch']}"
            fresh += f" To go on with all of its runs, use what began it, {began}."
        raise UserError(
            f"study {study.name} was begun with other settings ({shown}{copied}): choose another study.name, "
            "or add --force to change this one; runs that are still the same are kept "
            f"({_retrained(config, study)}).{fresh}"
        )
    if known and known["corpus"]["sha256"] == corpus.sha256:  # keeps the first call's warning of a fallback
        corpus = replace(corpus, warning=known["corpus"]["warning"])
    config, why = _resolve(config, corpus, study, say, work)
    check_run(config)
    if changed:
        config = replace(config, answered_before=len(changes.looks_of({**known, "earlier": earlier})))
        say(f"other settings than before ({shown}): {_retrained(config, study)}")
    elif mended := [change for change in different if changes.is_edit(change, asked)]:
        say(f"{changes.summarize(mended, asked, own.edited(config, known))}; no run of it had finished")
    stale = bool(different or changed)
    if stale:
        study.drop_conclusions()
    if stale or not known or own.lacking(study, known, config):
        _write_header(_header(config, corpus, study, asked, known, why, earlier), study)
        if seen := changes.describe_earlier_looks(study.header()):
            say(f"warning: {seen}")
    return config, corpus


def _answered_here(config: Config, known: Mapping[str, Any], study: Study) -> list[EarlierAnswer]:
    """Return the earlier answers to the study's question. They are those listed in study.json (`known`) and,
    if the study has an answer that rests on other seeds than are planned now, that answer."""
    earlier: list[EarlierAnswer] = known.get("earlier", [])
    judged = judged_candidates(config, study.decisions())
    seeds = sorted({*known["config"]["seeds"], *(c["seed"] for c in judged)})
    if not judged or seed_plan(known["config"]) == seed_plan(to_dict(config)):
        return earlier
    every = [*earlier, EarlierAnswer(study=study.name, seeds=seeds, shared=[])]
    return [{**answer, "shared": sorted({*answer["seeds"]} & {*config.seeds})} for answer in every]


def with_earlier(study: Study, config: Config, stage: str, specs: Sequence[RunSpec], say: Say) -> Config:
    """Return the settings with `answered_before` set to the number of earlier answers, of this study or
    others, to the same question from some of the same seeds. List the earlier answers in study.json."""
    header = study.header()
    earlier = earlier_answers(study, config, specs, header.get("earlier", []))
    if earlier == header.get("earlier", []):
        return config
    header["earlier"] = earlier
    again = len(changes.looks_of(header))
    header["config"] |= {"answered_before": again} if again else {}
    _write_header(header, study)
    say(f"{stage}: {changes.describe_earlier_looks(header)}")
    return replace(config, answered_before=again)


def _write_header(header: StudyHeader, study: Study) -> None:
    manifest.remove_entries(study.root, study.header_file.name)
    write_checksummed(study.header_file, header)


def _header(
    config: Config,
    corpus: Corpus,
    study: Study,
    asked: dict[str, Any],
    known: Mapping[str, Any],
    why: Mapping[str, str],
    earlier: list[EarlierAnswer],
) -> StudyHeader:
    """Return the new content of study.json. `known`: the present content, which is empty for a new study."""
    copied = own.keep(study, config)
    text = CorpusRecord(name=corpus.name, title=corpus.title, sha256=corpus.sha256, warning=corpus.warning)
    left_out = ["tracker", "notify", "own_files", *([] if config.answered_before else ["answered_before"])]
    settings = {k: v for k, v in to_dict(config).items() if k not in left_out}
    header: StudyHeader = {
        "study": study.name,
        "created": known.get("created") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "ebc_lab": __version__,
        "requested": asked,
        # without the tracker's address and the command, which may contain a password
        "config": {**settings, "study": study_part(config)},
        "environment": study_environment(config),
        "chosen": {**known.get("chosen", {}), **why},
        "corpus": text,
        "versions": versions(),
        "git": git_revision(),
        "hardware": hardware(),
    }
    if copied["files"]:
        header["own"] = copied
    if earlier:
        header["earlier"] = earlier
    if looks := known.get("looks"):
        header["looks"] = looks
    return header


def all_changes(config: Config, known: Mapping[str, Any], runs: Index) -> list[changes.Change]:
    """Return (what, value in study.json, value now) for each change of settings, torch or numerics that needs
    --force. `runs`: the study's. An edit to a user-defined part counts only if a run with it has finished."""
    settings = changes.from_recorded(config, known)
    settings = changes.refused(settings, changes.requested(config), runs.records) if settings else []
    return settings + environment_changes(recorded_config(known), known)


def adopt(config: Config, known: Mapping[str, Any]) -> Config:
    """Return the configuration, with the settings that it leaves open taken from the study in `known`."""
    recorded = recorded_config(known)
    if changes.same_corpus(config.data, known):
        shards = config.data.name == "bin"  # whose files may have moved
        data = replace(config.data, sha256=recorded.data.sha256) if shards else recorded.data
        config = replace(config, data=data)
    left_open = {k: getattr(recorded, k) for k in (*CHOSEN, "device") if is_open(config, k)}
    before = changes.as_this_version_says(known["requested"])
    same = {s: getattr(recorded, s) for s in STAGES if before.get(s) == to_dict(getattr(config, s))}
    return replace(config, **left_open, **same, answered_before=recorded.answered_before)


def _retrained(config: Config, study: Study) -> str:
    """Return a phrase that says which runs this command would train again and which it would keep."""
    runs = Index(study)
    if runs.problems:
        return f"which ones is not known: {runs.problems[0]}"
    return work_in_words(remaining_work(config, reusable_results(runs.records, finished=False)))


def _resolve(
    config: Config, corpus: Corpus, study: Study, say: Say, work: WorkOf
) -> tuple[Config, dict[str, str]]:
    """Return the configuration with nothing left open, and by setting why an open value was chosen."""
    config = replace(config, data=replace(config.data, file=anchored(config.data.file)))
    config = replace(config, device=chosen_device(config.device))
    for stage in config.study.stages:
        config = stage_of(stage).resolve(config, say)
    chosen: dict[str, str] = {}
    if any(is_open(config, k) for k in CHOSEN):
        if config.launcher.name == "slurm":
            run, why = chosen_by_rule(run_part(config), cores(), job_cores(config.launcher))
            choice = Choice(run.dtype, run.threads_per_run, run.compile, why)
            if is_open(run, "dtype"):
                say("measuring float32 against bfloat16 autocast on a node …")
                measured = choice_on_node(choice.apply_to(config), study)
                choice = replace(measured, why={**why, "dtype": measured.why["dtype"]})
        else:
            choice = choose_for_study(config, work=work, say=say)
        for line in choice.reasons(config):
            say(line)
        chosen = {k: choice.why[k] for k in CHOSEN if is_open(config, k)}
        config = choice.apply_to(config)
    return config, chosen


def resolve_run(
    run: RunConfig, begun: RunConfig | None, say: Say, *, cores_of_job: int | None = None, processes: int = 1
) -> RunConfig:
    """Return a run outside studies with nothing left open; what it leaves open is as in the run that was
    `begun` in its folder, if one was. Raises UserError if it cannot be trained.

    `cores_of_job`: those of a launcher's job; `processes`: how many train the run together.
    """
    for key in (*CHOSEN, "device"):
        if begun and is_open(run, key):
            setattr(run, key, getattr(begun, key))
    run = with_sources(with_names(pinned(run, *checked_text(run))))
    run.device = chosen_device(run.device)
    if any(is_open(run, key) for key in CHOSEN):
        each = None if cores_of_job is None else max(1, cores_of_job // processes)
        choice = choose(run, work=one_run, limit=1, job_cores=each, together=processes, say=say)
        say("\n".join(choice.reasons(run)))
        run = choice.apply_to(run)
    check_run(run)
    if run.stabilizer.name == "ebc" and run.controller.name == "energy" and run.controller.a is None:
        raise UserError(
            "controller=energy needs controller.a, natural KL over the median predicted decrease; a study "
            "finds it."
        )
    return run
