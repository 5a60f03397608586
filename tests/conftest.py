"""What every test starts from: one thread, so that bits repeat, and a small text."""

import random

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_text() -> str:
    """About 4,000 characters of plain words, always the same: something a tiny model can learn."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "rain", "run", "down", "to", "sea", "under", "moon"]
    draw = random.Random(0)
    return "".join(" ".join(draw.choices(words, k=6)) + ".\n" for _ in range(170))
