"""What a run that starts from another's weights must have in common with it, and the text that it may forget.
No torch here."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from ebc_lab.config.choices import changed
from ebc_lab.config.dicts import run_part, to_dict
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import read_settings
from ebc_lab.config.parts.data import DataConfig, data_of_another_text
from ebc_lab.config.parts.init import InitConfig
from ebc_lab.config.parts.quantizer import QuantizerConfig
from ebc_lab.config.schema import Config, RunConfig
from ebc_lab.records.weights import FORMAT, About, KeptWeights, find_weights, read_weights

from .corpus import Corpus, locate
from .text import checked_text, tokenizer_of

SHARDS = "shards"  # the kind of tokens of data=bin
FREE = ("name", "dropout", "sha256")  # settings of a model that its weights do not depend on
Settings = TypeVar("Settings", bound=RunConfig)


def placed(run: Settings, folders: Iterable[Path] = ()) -> Settings:
    """Return the run with the file that `init.run` names: see `weights.find_weights`. Raises UserError."""
    init = InitConfig.from_run(run)
    if init.name == "none":
        return run
    return replace(init, run=str(find_weights(init.run or "", folders))).put_into(run)


def pinned_start(run: Settings) -> Settings:
    """Return settings that name exactly the weights that a run starts from, and the text of which it may
    forget. Raises UserError where there are none, or they do not fit the run."""
    init = InitConfig.from_run(run)
    if init.name == "none":
        return run
    run = placed(run, [Path(run.output_dir).expanduser()] if isinstance(run, Config) else [])
    init = InitConfig.from_run(run)
    kept = read_weights(Path(init.run or ""), init.sha256)
    refuse_misfit(kept, run)
    init = replace(init, sha256=kept.sha256)
    if init.text == "source":
        name, sha256 = kept.about["text"]["name"], kept.about["text"]["sha256"]
        if name == "bin":
            raise UserError(
                f"the weights {kept.path} come from tokens, not a text: choose init.text=none, or a text in "
                "the same tokens."
            )
        if name == "path" and not init.file:
            raise UserError(
                f"the weights {kept.path} come from a text of one's own: give it as init.text=path "
                "init.file=FILE, to measure what is forgotten of it, or choose init.text=none."
            )
        init = replace(init, text=name, text_sha256=sha256)
    if init.text != "none":
        init = replace(init, text_sha256=old_text(init.put_into(run)).sha256)
    return init.put_into(run)


def pinned(settings: Settings, corpus: Corpus, tokenizer_sha256: str | None) -> Settings:
    """Settings that name exactly this text and this tokenizer, and the weights that a run starts from."""
    data = replace(settings.data, name=corpus.name, sha256=corpus.sha256)
    tokens = replace(settings.tokens, sha256=tokenizer_sha256)
    return pinned_start(replace(settings, data=data, tokens=tokens))


def arms_pinned(config: Config) -> Config:
    """Return a resolved study's settings whose arms name exactly the texts that they train on, where these
    are their own. Raises UserError."""
    arms = dict(config.ablation.arms)
    base = run_part(config)
    for label, arm in arms.items():
        if not {"data", "tokens"} & set(arm.settings):
            continue
        own = {key: {"sha256": None, **arm.settings.get(key, {})} for key in ("data", "tokens")}
        if "data" in arm.settings:
            own["data"] = data_of_another_text(base.data, arm.settings["data"])
        run = changed(base, {**arm.settings, **own})
        corpus, tokenizer = checked_text(run)
        own["data"] |= {"name": corpus.name, "sha256": corpus.sha256}
        own["tokens"]["sha256"] = tokenizer
        arms[label] = replace(arm, settings={**arm.settings, **own})
    return replace(config, ablation=replace(config.ablation, arms=arms))


def old_text(run: RunConfig) -> Corpus:
    """Return the text whose forgetting a run measures. Raises UserError where it is gone."""
    init = InitConfig.from_run(run)
    return locate(DataConfig(init.text, init.file, init.text_sha256), quiet=True)


def _tokens_of(run: RunConfig) -> str:
    """What kind of tokens a run's model knows."""
    return SHARDS if run.data.name == "bin" else run.tokens.name


def tokenizer_sha256(run: RunConfig) -> tuple[str, int]:
    """Return the checksum of the run's tokenizer, and how many tokens it has; of shards, whose tokenizer is
    not known, that of this number."""
    if run.data.name == "bin":
        size = run.data.vocabulary
        return hashlib.sha256(f"{size} tokens of shards".encode()).hexdigest(), size
    tokenizer = tokenizer_of(run, locate(run.data, quiet=True))
    return hashlib.sha256(tokenizer.to_json().encode()).hexdigest(), tokenizer.vocabulary


def about_of(run: RunConfig) -> About:
    """Describe the weights of a resolved run."""
    sha256, vocabulary = tokenizer_sha256(run)
    return {
        "format": FORMAT,
        "model": _model_of(run),
        "levels": QuantizerConfig.from_run(run).name,
        "tokens": _tokens_of(run),
        "tokenizer": sha256,
        "vocabulary": vocabulary,
        "text": {"name": run.data.name, "sha256": run.data.sha256},
    }


def _model_of(run: RunConfig) -> dict[str, Any]:
    whole = to_dict(run.model)
    read = read_settings(run.model)
    return {key: whole[key] for key in read if key not in FREE}


def refuse_misfit(kept: KeptWeights, run: RunConfig) -> None:
    """Raise UserError where weights are another model's than the run's, or of other tokens."""
    if differences := list(_differences(kept.about, run)):
        raise UserError(f"the weights {kept.path} do not fit this run: {'; '.join(differences)}.")


def _differences(about: About, run: RunConfig) -> Iterator[str]:
    here = _model_of(run)
    for key in sorted({*here, *about["model"]}):
        there, now = about["model"].get(key), here.get(key)
        if there != now:
            yield f"model.{key} is {there} there and {now} here: give this run model.{key}={there}"
    levels = QuantizerConfig.from_run(run).name
    if about["levels"] != levels:
        yield f"quantizer is {about['levels']} there and {levels} here: choose quantizer={about['levels']}"
    if about["tokens"] != _tokens_of(run):
        yield f"tokens is {about['tokens']} there and {_tokens_of(run)} here: train both with tokens=bytes"
        return
    if about["tokens"] == SHARDS and about["vocabulary"] != run.data.vocabulary:
        there = about["vocabulary"]
        yield f"data.vocabulary is {there} there and {run.data.vocabulary} here: give both the same"
        return
    sha256, vocabulary = tokenizer_sha256(run)
    if sha256 != about["tokenizer"]:
        yield (
            f"their tokens are {about['vocabulary']} {run.tokens.name} of another text than these "
            f"{vocabulary}: train both with tokens=bytes, which are the same for every text"
        )
