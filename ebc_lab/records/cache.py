"""What is kept for the user between studies: corpora and measurements."""

from __future__ import annotations

from pathlib import Path


def cache_dir() -> Path:
    """The user's cache folder for corpora and measurements."""
    from platformdirs import user_cache_path

    return user_cache_path("ebc-lab")
