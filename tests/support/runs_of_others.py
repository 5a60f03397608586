"""Invented runs for tests of `judge`: frames as somebody's CSV would have them."""

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
