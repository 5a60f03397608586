"""EBC around optimizers that other code calls: one line in a loop or a trainer that stays as it is.

`capture` keeps what the last training forward was given and said, `attach` puts a step of `EllipsotopeClip`
around the optimizers' own.
"""
