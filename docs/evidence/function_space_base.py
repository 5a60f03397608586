"""How far each tensor alone moves the logits at a rate of 1, fifteen times in the tuned runs of `within`."""

BASE = {}
