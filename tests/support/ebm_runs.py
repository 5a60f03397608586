"""Small runs of workload=ebm."""

from dataclasses import replace
from pathlib import Path

from support.runs import resolved

from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part

TINY = (
    "model.context=16",
    "batch_size=10",
    "budget.probe_sequences=2",
    "eval_every=10",
    "eval_windows=8",
    "audit_tokens=48",
    "ebm.n=8",
    "ebm.splats=24",
    "ebm.neighbours=4",
    "ebm.hidden=16",
    "ebm.window=2",
    "ebm.states=8",
    "sampler.steps=2",
)


def ebm_run(text: Path, *overrides: str):
    """A resolved run of the smoke scale on a text."""
    given = ["workload=ebm", "scale=smoke", "data=path", f"data.file={text}", "device=cpu"]
    return resolved(run_part(compose([*given, "stabilizer=none", "index=exact", *overrides], study=False)))


def tiny_ebm(text: Path, *overrides: str):
    """One so small that a step takes hundredths of a second."""
    return ebm_run(text, *TINY, "steps=30", *overrides)


def eventful(run, **changes):
    """The run with each kind of event several times in 30 steps: revival, toppling, new splats."""
    ebm = replace(run.ebm, revive_every=7, soc_every=6, soc_threshold=0.05, **changes)
    return replace(run, ebm=ebm, index=replace(run.index, rebuild_every=9))
