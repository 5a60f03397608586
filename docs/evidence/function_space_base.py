"""How far each tensor alone moves the logits at a rate of 1, twenty times in the tuned base runs of docs/evidence/within.yaml."""

BASE = {}
