"""EBC Lab: ablations of Ellipsotope-Budgeted Clipping, run, decided and reported by one command."""

__version__ = "0.2.0"
