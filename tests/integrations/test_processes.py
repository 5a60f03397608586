"""Both trainers with DDP over two processes, each of which runs this file with a folder as its argument."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ebc_lab.records.json_files import read_json, write_json

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_both_processes_of_a_trainer_take_the_same_steps(tmp_path):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*run, __file__, str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("lightning", "hugging_face"):
        first, second = (read_json(tmp_path / f"{name}-{rank}.json") for rank in (0, 1))
        assert first == second
        assert len(first["c"]) == 8
        assert min(first["c"]) < 0.9


def by_lightning(folder):
    """The model, and c of each step."""
    import torch
    from test_lightning import EBC, OPTIONS, Model, fit

    clipped = []
    model = Model()
    model.on_train_batch_end = lambda *_: clipped.append(model.trainer.callback_metrics["ebc/c"].item())
    rows = torch.randint(64, (256, 51), generator=torch.Generator().manual_seed(0))
    loader = torch.utils.data.DataLoader(rows, 8)
    several = {"strategy": "ddp", "devices": 2, "max_steps": 8, "max_epochs": 1}
    quiet = {"logger": False, "enable_checkpointing": False}
    fit(model, folder, EBC(**OPTIONS), loader=loader, **several, **quiet)
    return model, clipped


def by_hugging_face(folder):
    from test_transformers import EBC, OPTIONS, clipped, make_trainer

    trainer = make_trainer(folder, EBC(**OPTIONS), ddp_backend="gloo", save_strategy="no", eval_strategy="no")
    trainer.train()
    return trainer.model, clipped(trainer)


def main(folder):
    for name, train in (("lightning", by_lightning), ("hugging_face", by_hugging_face)):
        model, clipped = train(folder)
        total = sum(p.double().sum().item() for p in model.parameters())
        write_json(folder / f"{name}-{os.environ['RANK']}.json", {"c": clipped, "weights": total})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
