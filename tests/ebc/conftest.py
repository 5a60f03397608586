"""The fixtures of `support.tiny_gpt`."""

from support.tiny_gpt import (  # noqa: F401
    alphabet,
    backward,
    batches,
    golden,
    make_bases,
    make_gpt,
    own_golden,
    train,
    weights_of,
)
