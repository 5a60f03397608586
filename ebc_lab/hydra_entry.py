"""Hydra's own command line, behind our validation: `ebc-lab train …` and the sweeps of `-m`.

Overrides are composed and validated first, every combination of a sweep, so that nothing is written for a mistake; then
`hydra.main` takes over with the arguments as they were given.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Config, RunConfig, UserError, from_dict, run_part
from .overrides import check_overrides, compose, conf_dir, register_schema


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The combinations of a sweep (`optimizer.lr=1e-3,2e-3`), each a list of plain overrides. Raises UserError."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    check_overrides(overrides, hydra_keys=True)
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    return [list(combination) for combination in BasicSweeper.split_arguments(parsed, None)[0]]


def _own(overrides: Sequence[str]) -> list[str]:
    return [o for o in overrides if not o.lstrip("+~").startswith(("hydra.", "hydra/"))]


def train(arguments: Sequence[str]) -> None:
    """`ebc-lab train`: validate, then hand over to Hydra. Raises UserError, and SystemExit as Hydra does."""
    import hydra
    from hydra._internal.utils import get_args_parser

    given = get_args_parser().parse_args(list(arguments))
    if not given.hydra_help and not given.help:
        for combination in expand(given.overrides) if given.multirun else [given.overrides]:
            check_overrides(combination, hydra_keys=True)
            compose(_own(combination), study=False)
    register_schema()
    scale = [] if any(o.lstrip("+").startswith("scale=") for o in given.overrides) else [_default_scale()]
    sys.argv = ["ebc-lab train", *arguments, *scale]
    hydra.main(version_base="1.3", config_path=str(conf_dir().resolve()), config_name="config")(task)()


def _default_scale() -> str:
    return f"scale={compose([], study=False).scale}"


def task(composed: Any) -> float | None:
    """What Hydra calls for each job: train one run in the job's output folder. -> its validation loss, for sweepers."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from .training import Interrupted

    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    try:
        result = train_one(run_part(config), Path(HydraConfig.get().runtime.output_dir), config.launcher.checkpoint_every_s)
    except UserError as error:
        sys.exit(_complain(str(error)))
    except (Interrupted, KeyboardInterrupt):
        print("interrupted; the same command with the same hydra.run.dir carries on from the checkpoint", file=sys.stderr)
        sys.exit(130)
    if result["outcome"] not in ("completed", "diverged"):
        print(f"the run {result['outcome']}: {result['cause']}", file=sys.stderr)
        sys.exit(4)
    return result.get("val_loss")


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2


def train_one(run: RunConfig, directory: Path, checkpoint_every_s: float) -> dict[str, Any]:
    """Resolve what is left to choose, train in `directory`, and say what came out."""
    import signal

    from .config import digest, identity, to_dict
    from .data import check_length, locate
    from .doctor import speeds, visible_gpus
    from .telemetry import read_json, write_json
    from .training import run_and_record

    known = directory / "spec.json"
    if known.exists():  # carry on with what was chosen the first time
        begun: RunConfig = from_dict(RunConfig, read_json(known)["config"])
        run.dtype = begun.dtype if run.dtype == "auto" else run.dtype
        run.device = begun.device if run.device == "auto" else run.device
    corpus = locate(run.data)
    check_length(corpus, run.model.context)
    run.data.name, run.data.sha256 = corpus.name, corpus.sha256
    run.device = ("cuda" if visible_gpus() else "cpu") if run.device == "auto" else run.device
    run.dtype = speeds(run)["faster"] if run.dtype == "auto" else run.dtype
    run_id = digest(identity(run))[:10]
    directory.mkdir(parents=True, exist_ok=True)
    write_json(known, {"run_id": run_id, "kind": "train", "identity": identity(run), "config": to_dict(run)})
    asked: list[int] = []
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda number, _: asked.append(number))
    result = run_and_record(run, directory, run_id, checkpoint_every_s=checkpoint_every_s, should_stop=lambda: bool(asked))
    losses = ", ".join(f"{s} {result[f'{s}_loss']:.4f}" for s in ("val", "test") if result.get(f"{s}_loss") is not None)
    print(f"{result['outcome']} after {result['steps']} steps; {losses or result.get('cause')}; {directory}")
    return result
