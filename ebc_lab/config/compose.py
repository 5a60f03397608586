"""From Hydra overrides to a validated `Config`; the choices themselves are the files in `conf/`.

Mistakes are refused in one sentence, with the nearest valid spelling, before anything is written.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from .choices import conf_dir, offered_parts, with_sources
from .errors import UserError, need
from .hints import STUDY_DECIDES
from .overrides import TRAIN_TOKENS, check_overrides, expand, refuse_references, spelled
from .own.entry_points import OFFERED
from .schema import STAGES, STEPS, Config
from .study_checks import validate

SIZES_OF_GPT = ("model.blocks", "model.width", "model.heads", "model.dropout")


def compose(
    overrides: Sequence[str], *, study: bool = True, here: bool = True, sources: bool = True
) -> Config:
    """Compose and validate the configuration.

    Args:
        overrides: Hydra overrides, e.g. `["scale=smoke", "seeds=[0,1]"]`.
        study: the overrides are a study's, not a run's: `optimizer=`, `projection=` and `budget=` choose
            what the sweep covers, and settings that a stage decides are refused.
        here: this machine trains, so that it must have the device asked for.
        sources: the files of a user's own parts are there, and their checksums are filled in.
    Raises:
        UserError: an unknown key or choice (with the nearest valid ones), a wrong type, a value out of range.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    overrides = list(overrides)
    parsed = check_overrides(overrides)
    need(
        not {"steps", TRAIN_TOKENS} <= set(parsed),
        f"steps and tokens both say how long the run is: give one of steps={parsed.get('steps')} and "
        f"tokens={parsed.get(TRAIN_TOKENS)}.",
    )
    if study:
        overrides += _narrow(parsed)
    if "scale" not in parsed:
        overrides.append(default_scale())
    register_schema()
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir().resolve())):
            composed = hydra_compose("config", [spelled(o) for o in overrides])
        set_length(composed)
        refuse_references(OmegaConf.to_container(composed, resolve=False))
        config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_refusal(error, overrides)) from None
    except (RecursionError, OverflowError):
        raise UserError("a setting refers to itself, or holds a number that is too large.") from None
    validate(config, study=study, here=here)
    for key in SIZES_OF_GPT if config.model.target is not None else ():
        need(key not in parsed, f"{key} is not given to a model of your own: write it as model.arguments.")
    return with_sources(config) if sources else config


def set_length(composed: Any) -> None:
    """Give a composed configuration the steps that its `train_tokens` are at its batch, and empty that.

    What cannot be such a number is left for the checks to refuse. Raises UserError for too many steps.
    """
    tokens, a_step = composed.train_tokens, composed.batch_size * composed.model.context
    if tokens is None or not 1 <= tokens < math.inf or a_step < 1:
        return
    steps = math.ceil(tokens / a_step)
    need(steps <= STEPS, f"tokens={tokens:g} are {steps} steps of {a_step} tokens: at most {STEPS}.")
    composed.steps = steps
    composed.train_tokens = None


def implied(overrides: Sequence[str]) -> list[str]:
    """The overrides of one run, and what they leave no other choice of: updates inside backward are the plain
    optimizer's, where neither a stabilizer nor a budget is asked for; EBC under determinism=verity has
    budget=shadow."""
    parsed = check_overrides(overrides, hydra_keys=True, sweeps=True)
    by_group = parsed.get("memory") in ("hooks", "all")
    hooked = str(parsed.get("memory.hooks", by_group)).lower() in ("true", "yes", "on", "1")
    asked = any(key.partition(".")[0] in ("stabilizer", "budget") for key in parsed)
    exact = parsed.get("determinism", parsed.get("determinism.name")) == "verity"
    with_ebc = parsed.get("stabilizer", "ebc") == "ebc" and "budget" not in parsed
    return [
        *overrides,
        *(["stabilizer=none"] if hooked and not asked else []),
        *(["budget=shadow"] if exact and with_ebc else []),
    ]


def _refusal(error: Exception, overrides: Sequence[str]) -> str:
    """What Hydra or OmegaConf says, in one sentence."""
    told = (line.strip() for line in str(error.__cause__ or error).splitlines())
    lines = [line for line in told if line] or [repr(error)]
    first = " ".join(lines[:2]) if lines[0].endswith("composing config:") else lines[0]
    key = getattr(error, "full_key", None) or getattr(error.__cause__, "full_key", None)
    if any(o.lstrip("+").startswith("ablation.arms.") for o in overrides) and (
        "struct" in first or "subclass" in first
    ):
        first = "a new arm goes into a file of conf/study; overrides change those that the suite has"
        key = "ablation.arms"
    if "is not a ListConfig" in first and key:
        first = f"it is a list, {key}=[…]"
    return f"{key + ': ' if key else ''}{first[:300]}"


def default_scale() -> str:
    """The override for the scale that suits this machine: `paper` where there is a GPU, else `laptop`."""
    from .machine import visible_gpus

    return "scale=paper" if visible_gpus() else "scale=laptop"


@functools.cache
def register_schema() -> None:
    """Make the schema known to Hydra, so that types are enforced however the program is entered, and the
    choices that installed packages offer."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    for group in OFFERED:
        for part in offered_parts(group):
            ConfigStore.instance().store(group=group, name=part["name"], node=part)


def _narrow(parsed: dict[str, Any]) -> list[str]:
    for key, governor in STUDY_DECIDES.items():
        if key in parsed:
            raise UserError(f"{key} is decided by the study itself: it follows {governor}.")
    if parsed.get("stabilizer", "ebc") != "ebc":
        raise UserError(
            f"stabilizer={parsed['stabilizer']} cannot be chosen for a study: the stages run EBC and the "
            "plain optimizer, study=stabilizers the rivals, `ebc-lab train` any one of them."
        )
    covers = {
        "optimizer": "lr_sweep.optimizers",
        "projection": "lr_sweep.projections",
        "budget": "calibrate.budgets",
    }
    return [
        f"{field_}=[{parsed[group]}]"
        for group, field_ in covers.items()
        if group in parsed and field_ not in parsed
    ]


def configurations(
    overrides: Sequence[str], *, multirun: bool = False, stage: str | None = None
) -> list[Config]:
    """The studies asked for: one, or with `multirun` one per combination, named after what varies.

    Raises UserError for anything that is wrong with any of them.
    """
    if stage is not None and stage not in STAGES:
        raise UserError(f"{stage} is not a stage; the stages are {', '.join(STAGES)}.")
    if not multirun:
        return [compose(overrides)]

    combinations = expand(overrides)
    varying = [o for i, o in enumerate(combinations[0]) if any(c[i] != o for c in combinations)]
    keys = [o.partition("=")[0] for o in varying]
    made = []
    for combination in combinations:
        config = compose(combination)
        own = [o.replace("=", "_") for o in combination if o.partition("=")[0] in keys]
        if own and "study.name" not in keys:
            slug = re.sub(r"[^A-Za-z0-9._-]+", "-", "_".join(own)).strip("-")
            config = replace(config, study=replace(config.study, name=f"{config.study.name}_{slug}"[:80]))
        made.append(config)
    for config in made:
        validate(config, study=True, here=True)  # a name made of values may be none
    names = [c.study.name for c in made]
    if len(set(names)) < len(names):
        raise UserError("two combinations would share a study's name: vary study.name as well.")
    return made
