"""Training by DDP in Lightning and in Hugging Face's Trainer, one process of several.

usage: torchrun --nproc-per-node 2 trainers_worker.py FOLDER

writes FOLDER/TRAINER-RANK.json: c of every step, and the sum of the weights at the end
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from ebc_lab.integrations import lightning, transformers

STEPS = 8
OPTIONS = {"target_kl": 1e-3, "audit_every": 3}
ROWS = torch.randint(64, (256, 51), generator=torch.Generator().manual_seed(0))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(64, 16), nn.Linear(16, 64))
        self.clipped = []

    def forward(self, tokens):
        return self.net(tokens)

    def training_step(self, batch, index):
        return F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())

    def on_train_batch_end(self, outputs, batch, index):
        self.clipped.append(self.trainer.callback_metrics["ebc/c"].item())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.02)


def by_lightning():
    model = Model()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    ways = {"accelerator": "cpu", "strategy": "ddp", "devices": 2, "max_steps": STEPS}
    trainer = pl.Trainer(callbacks=[lightning.EBC(**OPTIONS)], **quiet, **ways)
    trainer.fit(model, torch.utils.data.DataLoader(ROWS, 8))
    return model, model.clipped


def by_hugging_face(folder):
    sizes = {"vocab_size": 64, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    given = {"max_steps": STEPS, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no"}
    args = TrainingArguments(folder, use_cpu=True, ddp_backend="gloo", report_to="none", **given)
    rows = [{"input_ids": row, "labels": row} for row in ROWS]
    trainer = Trainer(model, args, train_dataset=rows)
    ebc = transformers.EBC(**OPTIONS).add_to(trainer)
    clipped = []

    class Seen(transformers.TrainerCallback):
        def on_optimizer_step(self, args, state, control, **others):
            clipped.append(ebc.attached.last.clip_coefficient.item())

    trainer.add_callback(Seen)
    trainer.train()
    return model, clipped


def main():
    folder = sys.argv[1]
    rank = os.environ["RANK"]
    torch.manual_seed(0)
    found = {"lightning": by_lightning(), "hugging_face": by_hugging_face(folder)}
    for name, (model, clipped) in found.items():
        total = sum(p.double().sum().item() for p in model.parameters())
        Path(folder, f"{name}-{rank}.json").write_text(json.dumps({"c": clipped, "weights": total}))


if __name__ == "__main__":
    main()
