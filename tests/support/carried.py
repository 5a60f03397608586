"""The small suite of the stage carry that its tests share."""

from pathlib import Path

SUITE = Path(__file__).with_name("carry.yaml")
