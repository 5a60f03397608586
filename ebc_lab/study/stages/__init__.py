"""The stages of a study: each plans runs and decides from their results; `stage.py` finds them by name."""
