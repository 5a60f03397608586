"""Invented runs for tests of `judge`: frames as somebody's CSV would have them."""

import itertools
import math

import numpy as np
import pandas as pd


def row_a_run(arms=("adam", "muon"), seeds=5, gap=0.05, noise=0.01, number=0):
    """Return a frame with a row a run: optimizer, seed, val_loss. Each arm is worse by `gap`."""
    rng = np.random.default_rng(number)
    rows = [
        (arm, seed, 3 + gap * place + noise * rng.standard_normal())
        for place, arm in enumerate(arms)
        for seed in range(seeds)
    ]
    return pd.DataFrame(rows, columns=["optimizer", "seed", "val_loss"])


def row_a_step(arms=("adam", "muon"), seeds=4, last=500, gap=0.05, noise=0.01, number=0):
    """Return a frame with a row an evaluation, each 100 steps: optimizer, seed, step, val_loss."""
    rng = np.random.default_rng(number)
    rows = [
        (arm, seed, step, 3 + gap * place + 2 * np.exp(-step / 200) + noise * rng.standard_normal())
        for place, arm in enumerate(arms)
        for seed in range(seeds)
        for step in range(0, last + 1, 100)
    ]
    return pd.DataFrame(rows, columns=["optimizer", "seed", "step", "val_loss"])


def tuned_runs():
    """Return curves of three arms, tuned over rates: optimizer, lr, seed, step, val_loss. AdamW's runs are
    the longest; of lion's, which tried fewer rates, one seed diverges and one is cut short."""
    rng = np.random.default_rng(0)
    rows = []
    for place, (arm, rates, last) in enumerate(
        (("muon", (0.1, 0.2, 0.4), 500), ("adamw", (0.1, 0.2, 0.4), 600), ("lion", (0.1, 0.2), 500))
    ):
        for lr, seed in itertools.product(rates, range(4)):
            off = 0.05 * (1 + place) * abs(math.log2(lr / 0.2))
            for step in range(0, last + 1 - 100 * (arm == "lion" and seed == 1), 100):
                loss = 3 + 0.05 * place + off + 2 * math.exp(-step / 150) + 0.01 * rng.standard_normal()
                lost = arm == "lion" and seed == 3 and step >= 300
                rows.append((arm, lr, seed, step, math.inf if lost else loss))
    return pd.DataFrame(rows, columns=["optimizer", "lr", "seed", "step", "val_loss"])


def with_cell(frame, column, row, value):
    """Return the frame with another value in one cell. Rows count from 1, as messages do."""
    values = frame[column].astype(object)
    values.iloc[row - 1] = value
    return frame.assign(**{column: values})


def written(path, text):
    """Write a file of text, in folders that are made where they are missing, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
