"""Shards that tests make, with the header that modded-nanogpt's have, written here by hand."""

import random
import struct
from array import array
from pathlib import Path

END = 120  # the token before each document
VOCABULARY = 128


def shard(path: Path, ids, *, magic=20240520, version=1, count=None) -> Path:
    """Write a shard; its header may say what is not so."""
    header = [magic, version, len(ids) if count is None else count, *[0] * 253]
    path.write_bytes(struct.pack("<256i", *header) + array("H", ids).tobytes())
    return path


def documents(count, seed=0):
    """So many tokens that a model can learn: each of about four follows the one before it."""
    draw = random.Random(seed)
    ids: list[int] = []
    while len(ids) < count:
        token = draw.randrange(END)
        ids.append(END)
        for _ in range(draw.randrange(20, 80)):
            token = (3 * token + draw.randrange(4)) % END
            ids.append(token)
    return ids[:count]


def folder_of_shards(folder: Path) -> Path:
    """Two training shards, which end in the middle of a batch, and one for validation and test."""
    folder.mkdir(exist_ok=True)
    shard(folder / "text_train_000002.bin", documents(9_000, 2))
    shard(folder / "text_train_000001.bin", documents(11_000, 1))
    shard(folder / "text_val_000000.bin", documents(2_400, 3))
    return folder


def overrides_of(folder: Path) -> list[str]:
    """The overrides that train on these shards."""
    return [
        "data=bin",
        f"data.files={folder}/*_train_*.bin",
        f"data.val_files={folder}/*_val_*.bin",
        f"data.vocabulary={VOCABULARY}",
        "data.val_tokens=1024",
    ]
