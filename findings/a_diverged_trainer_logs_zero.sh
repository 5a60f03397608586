#!/usr/bin/env bash
# transformers' Trainer logs a training loss of 0.0, the best there is, for a model whose every loss is NaN.
#
# Guess: as logging_nan_inf_filter says, a step's NaN is left out of the mean of its logging window: 4 for (NaN, 4)
# and for (4, NaN), and with nothing left the log has NaN or no loss.
# Seen, transformers 5.23.0: a step with NaN or inf adds to the window's sum the sum so far divided by the steps so
# far plus one, which is nothing where it comes first. All NaN: every "loss" of log_history and the "train_loss" are
# 0.0. A constant 4 with every other step NaN: windows of two say 2.0 or 3.0, as NaN comes first or last, and a step a
# window says 4.0, 0.0, 4.0, 0.0. Whoever ranks runs by trainer_state.json has the diverged one first.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 numpy==2.4.6
cd "$place"
"$place/venv/bin/python" -W ignore - <<'PYTHON'
import contextlib
import io
import math

import torch
import transformers
from torch import nn
from transformers import Trainer, TrainingArguments

print("transformers", transformers.__version__, "torch", torch.__version__)


class Scripted(nn.Module):
    """Its losses are those it is given, in turn."""

    def __init__(self, losses):
        super().__init__()
        self.weight, self.losses, self.calls = nn.Parameter(torch.ones(())), losses, 0

    def forward(self, x, labels=None):
        self.calls += 1
        return {"loss": 0 * self.weight * x.mean() + self.losses[(self.calls - 1) % len(self.losses)]}


def logged(losses, steps):
    arguments = TrainingArguments(
        "out",
        per_device_train_batch_size=1,
        num_train_epochs=1,
        logging_steps=steps,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=0.0,
        max_grad_norm=0.0,
    )
    data = [{"x": torch.ones(1), "labels": torch.zeros(1)} for _ in range(4)]
    trainer = Trainer(Scripted(losses), arguments, train_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        whole = trainer.train().training_loss
    windows = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print("losses", losses, "windows of", steps, "logged", windows, "train_loss", whole)
    return [*windows, whole]


assert logged([4.0], 2) == [4, 4, 4]
assert logged([math.nan], 2) == [0, 0, 0]
assert logged([math.inf], 1) == [0, 0, 0, 0, 0]
assert logged([math.nan, 4.0], 2) == [2, 2, 2]
assert logged([4.0, math.nan], 2) == [3, 3, 3]
assert logged([4.0, math.nan], 1) == [4, 0, 4, 0, 2]
PYTHON
