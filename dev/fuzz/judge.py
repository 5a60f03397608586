"""Runs of other trainers, as `ebc-lab judge` and `ebc_lab.judge` read them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .changes import (
    ARMS,
    TEXTS,
    Draw,
    Tree,
    changed_frame,
    changed_tree,
)
from .target import (
    READ,
    REFUSED,
    Target,
    Wrong,
    ask,
    module_of_tests,
    small_study,
    tree_of,
    write_tree,
)


class Judge(Target):
    """Runs of other trainers, in every format, and frames of pandas."""

    options = tuple(
        option.split()
        for option in (
            *(
                "--json",
                "--outcome best",
                "--outcome target --target 2.5",
                "--pairs",
                "--distinct",
                "--paired",
            ),
            *("--unpaired", "--margin 0.01", "--sigma pooled", "--sigma 0.1", "--exchange 0.0045/100"),
            *("--rule track3", "--better higher", "--at 200", "--at adam=9", "--chain adam,muon"),
            *("--reference adam", "--loss val_loss", "--arm optimizer", "--seed seed", "--step step"),
            *(
                "--run run",
                "--where seed=0",
                "--setting lr",
                "--lr lr",
                "--planned step",
                "--choose val_loss",
            ),
        )
    )

    def make(self, folder: Path, more: Path | None) -> Any:
        from support.runs_of_others import row_a_run, row_a_step

        made: dict[str, tuple[Tree, list[str]]] = {}

        def add(name: str, argv: Sequence[str] = (".",)) -> Path:
            place = folder / name
            place.mkdir()
            made[name] = ({}, list(argv))
            return place

        frames = {
            "run": row_a_run(),
            "step": row_a_step(),
            "many": row_a_run(arms=("sgd", "adam", "muon", "soap")),
        }
        tuned = row_a_step(seeds=2)
        frames["tuned"] = tuned.assign(lr=[0.1, 0.2, 0.4] * (len(tuned) // 3), stage="final")
        for name, frame in frames.items():
            frame.to_csv(add(f"csv-{name}") / "runs.csv", index=False)
            frame.to_json(add(f"jsonl-{name}") / "runs.jsonl", orient="records", lines=True)
            frame.to_parquet(add(f"parquet-{name}") / "runs.parquet")
        wide = frames["step"].assign(run=frames["step"].optimizer + "-s" + frames["step"].seed.astype(str))
        wide.pivot(index="step", columns="run", values="val_loss").to_csv(add("csv-wide") / "wide.csv")
        wide[:12].to_json(add("json") / "runs.json", orient="records")
        tests = "judging/readers/test_{}.py"
        (add("wandb-csv") / "export.csv").write_text(module_of_tests(tests.format("wandb_csv")).CHART)
        (add("wandb-table") / "export.csv").write_text(
            "Name,State,Created,optimizer,lr,seed,val/loss\nadam-s0,finished,2024-01-01T00:00:00Z,adam,0.1,0,2.5\n"
            "adam-s1,finished,2024-01-01T00:00:01Z,adam,0.1,1,2.6\nmuon-s0,crashed,,muon,0.1,0,2.1\nmuon-s1,,,muon,0.1,1,\n"
        )
        lightning = module_of_tests(tests.format("lightning_logs"))
        lightning.folder.__wrapped__(add("lightning"))
        trainer = module_of_tests(tests.format("trainer_state"))
        trainer.folder.__wrapped__(add("trainer"))
        board, place = module_of_tests(tests.format("tensorboard_events")), add("tensorboard")
        for arm, seed in (("sgd", 0), ("sgd", 1), ("adam", 0), ("adam", 1)):
            values = {"loss__val": lambda step, seed=seed: 1 + step / 4 + seed}
            params = {"lr": 0.5, "opt": arm}
            board.write(place / arm / f"seed{seed}", range(4), new_style=seed == 1, hparams=params, **values)
        hydra, place = module_of_tests(tests.format("hydra")), add("hydra")
        for n, arm in enumerate(["adam", "adam", "muon", "muon"]):
            config = f"optimizer: {{name: {arm}, lr: 0.5}}\nseed: {n % 2}\n"
            hydra.job(
                place / "multirun/2024-05-01/10-11-12" / str(n), [f"optimizer={arm}", f"seed={n % 2}"], config
            )
        pattern = r"step:(?P<step>\d+)/(?P<planned>\d+) val_loss:(?P<loss>[\d.]+|nan)"
        place, text = add("logs", [".", "--pattern", pattern]), module_of_tests(tests.format("logs")).LOG
        for name in ("adam-s0", "adam-s1", "muon-s0", "muon-s1"):
            (place / f"{name}.txt").write_text(text)
        optuna = module_of_tests(tests.format("optuna_storage"))
        optuna.fill(add("optuna-database") / "study.db")
        optuna.fill(add("optuna-journal") / "journal.log")
        os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
        mlflow = module_of_tests(tests.format("mlflow_store"))
        mlflow.fill(f"sqlite:///{add('mlflow-database') / 'mlflow.db'}")
        mlflow.fill(f"file:{add('mlflow-files') / 'mlruns'}")
        place = add("wandb-offline")
        quiet = {
            "WANDB_MODE": "offline",
            "WANDB_DIR": str(place),
            "WANDB_SILENT": "true",
            "WANDB_CONSOLE": "off",
        }
        script = module_of_tests(tests.format("wandb_offline")).WRITE
        subprocess.run(
            [sys.executable, "-c", script, "40"], check=True, env={**os.environ, **quiet}, cwd=place
        )
        shutil.copytree(small_study(folder), add("study") / "done")
        if more is not None:
            for path in sorted(more.iterdir()):
                shutil.copy(path, add(f"more-{path.name}"))
        trees = {name: (tree_of(folder / name), argv) for name, (_, argv) in made.items()}
        unused = (".lock", ".png", ".svg", "debug.log", "debug-internal.log")
        for tree, _ in trees.values():
            for name in [name for name in tree if name.endswith(unused)]:
                del tree[name]
        return trees, frames

    def attack(self, draw: Draw, folder: Path) -> str:
        match draw.below(8):
            case 0:
                return self._frame(draw, folder)
            case 1:
                return self._right(draw, folder)
        trees, _ = self.real
        tree, argv = trees[draw.of(sorted(trees))]
        write_tree(changed_tree(draw, tree), folder)
        argv = list(argv)
        for _ in range(draw.of([0, 0, 0, 1, 2])):
            argv += draw.of(self.options)
        if draw.one_in(12):
            argv[-1] = draw.of(TEXTS).replace("\0", "") or "x"
        argv += draw.of([["--no-page"]] * 5 + [["-o", "page"]])
        return ask(["judge", *argv], folder)

    def _frame(self, draw: Draw, folder: Path) -> str:
        from ebc_lab import judge
        from ebc_lab.config.errors import UserError

        _, frames = self.real
        frame = changed_frame(draw, frames[draw.of(sorted(frames))])
        with contextlib.suppress(Exception):
            frame.to_pickle(folder / "frame.pickle")
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            try:
                judgement = judge(frame)
                json.dumps(judgement.record, allow_nan=False)
                _ = judgement.answer, judgement.arms(), judgement.differences()
            except UserError:
                return REFUSED
        return READ

    def _right(self, draw: Draw, folder: Path) -> str:
        """A sound table in one of the formats: arms, counts and means must be those that it has."""
        import pandas as pd

        arms = sorted({draw.of(ARMS) for _ in range(draw.of([2, 3, 4]))})
        scale, seeds = draw.of([1e-3, 1.0, 1e6, 1e12]), draw.of([2, 3, 5])
        rows = [
            (arm, seed, scale * (3 + n + draw.rest.gauss(0, 0.1)) * draw.of([1, 1, 1, -1]))
            for n, arm in enumerate(arms)
            for seed in range(seeds)
        ]
        frame = pd.DataFrame(rows, columns=["arm", "seed", "val_loss"]).sample(
            frac=1, random_state=draw.below(1000)
        )
        if draw.one_in(4):
            frame = frame[["val_loss", "arm", "seed"]]
        if draw.one_in(6):
            frame.loc[draw.of(list(frame.index)), "val_loss"] = math.inf
        match kind := draw.of(["csv", "tsv", "csv", "decimal.csv", "jsonl", "parquet", "csv.gz"]):
            case "parquet":
                frame.to_parquet(folder / "runs.parquet")
            case "jsonl":
                text = "\n".join(json.dumps(row) for row in frame.to_dict("records"))
                (folder / "runs.jsonl").write_text(text)
            case "decimal.csv":
                frame.to_csv(folder / f"runs.{kind}", index=False, sep=";", decimal=",")
            case _:
                line_end = draw.of(["\n", "\r\n"])
                encoding = draw.of(["utf-8", "utf-8-sig"])
                sep = "\t" if kind == "tsv" else ","
                frame.to_csv(
                    folder / f"runs.{kind}", index=False, sep=sep, lineterminator=line_end, encoding=encoding
                )
        from support.called import called

        done = called(
            "judge", ".", "--json", "--arm", "arm", "--seed", "seed", "--loss", "val_loss", cwd=folder
        )
        if done.returncode:
            raise Wrong(f"a sound table is refused: {done.stderr[:200]}")
        found = {one["arm"]: one for one in json.loads(done.stdout)["arms"]}
        if set(found) != set(arms):
            raise Wrong(f"the arms {arms} became {sorted(found)}")
        for arm, own in frame.groupby("arm").val_loss:
            one, mean = found[arm], own.mean()
            same = (
                one["mean"] is None
                if math.isinf(mean)
                else math.isclose(one["mean"], mean, rel_tol=1e-9, abs_tol=1e-300)
            )
            if one["runs"] != len(own) or not same:
                raise Wrong(f"{arm} has {len(own)} runs of mean {mean}, not {one['runs']} of {one['mean']}")
        return READ
