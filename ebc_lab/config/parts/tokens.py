"""What a text is cut into, `tokens=bpe`, and how long a run is in tokens: `tokens=2e6`, not `steps`."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import require
from ..fields import setting
from ..limits import STEPS
from ..part import Need, Part, Tail

TRAIN_TOKENS = "train_tokens"  # what `tokens=2e6` is kept as until the batch is known
WORDS = {"bytes": "bytes", "bpe": "byte pairs", "gpt2": "GPT-2’s tokens"}
OF_LIBRARY = ("bpe", "gpt2")  # which the library tokenizers makes


@dataclass
class TokensConfig:
    """What a text is cut into."""

    name: str = setting(
        "characters", "its characters, its bytes, byte pairs, or GPT-2's tokens", group="tokens"
    )
    size: int = setting(512, "tokens in the vocabulary", "tokens", low=257, high=65536, only=("bpe",))
    folder: str | None = setting(None, "a local folder with its tokenizer", only=("gpt2",), in_run_id=False)
    sha256: str | None = setting(
        None, "checksum of the tokenizer; filled in when a run is resolved, then enforced"
    )


def _neutral(tokens: TokensConfig) -> bool:
    return tokens.name == "characters"


def _refuses(tokens: TokensConfig) -> Iterator[str]:
    if tokens.name == "gpt2" and not tokens.folder:
        yield "tokens=gpt2 needs tokens.folder=FOLDER, which holds GPT-2's tokenizer."


def _needs(tokens: TokensConfig) -> Iterator[Need]:
    if tokens.name in OF_LIBRARY:
        yield Need(f"tokens={tokens.name}", "tokenizers", "ebm")


def _tail(tokens: TokensConfig) -> Iterator[Tail]:
    if not _neutral(tokens):
        yield Tail(f"_{tokens.name}", WORDS[tokens.name])


TOKENS = Part("tokens", TokensConfig, place=150, neutral=_neutral, refuses=_refuses, needs=_needs, tail=_tail)


def renamed(override: str) -> str:
    """Return the override under the name of its setting: `tokens=2e6`, one number or several, is
    `train_tokens=2e6`; `tokens=bpe` stays."""
    key, _, values = override.partition("=")
    if key.lstrip("+") != TOKENS.name or not all(map(_is_number, values.split(","))):
        return override
    return f"{TRAIN_TOKENS}={','.join(map(_plain_number, values.split(',')))}"


def _plain_number(text: str) -> str:
    """`2000000` for 2e6."""
    return f"{float(text):.0f}" if float(text).is_integer() else text


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def refuse_two_lengths(parsed: Mapping[str, Any]) -> None:
    """Raise UserError where both steps and tokens say how long a run is."""
    parsed = {key: value for key, value in parsed.items() if value is not None}
    require(
        not {"steps", TRAIN_TOKENS} <= set(parsed),
        f"steps and tokens both say how long the run is: give one of steps={parsed.get('steps')} and "
        f"tokens={parsed.get(TRAIN_TOKENS)}.",
    )
    for key in (key for key in parsed if key.endswith(f".{TRAIN_TOKENS}")):
        steps = key.replace(TRAIN_TOKENS, "steps")
        require(
            steps not in parsed,
            f"{steps} and {key} both say how long the stage's runs are: give one of {steps}="
            f"{parsed.get(steps)} and {key}={parsed[key]}.",
        )


def set_steps(composed: Any, given: Collection[str] = ()) -> None:
    """Give a composed configuration, and each of its stages, the steps that its `train_tokens` are at its
    batch, and empty that.

    `given`: the settings that a command line sets: of a stage whose `steps` it sets, a file's tokens do not
    count. What cannot be such a number is left for the checks to refuse. Raises UserError for too many steps.
    """
    from omegaconf import OmegaConf

    a_step = composed.batch_size * composed.model.context
    said = [name for name in composed if not OmegaConf.is_interpolation(composed, name)]
    timed = {name: composed[name] for name in said if OmegaConf.is_dict(composed[name])}
    stages = {f"{name}.{TRAIN_TOKENS}": of for name, of in timed.items() if TRAIN_TOKENS in of}
    for key, of in {"tokens": composed, **stages}.items():
        if key not in given and key.replace(TRAIN_TOKENS, "steps") in given:
            of.train_tokens = None
        tokens = of.train_tokens
        if tokens is None or not 1 <= tokens < math.inf or a_step < 1:
            continue
        steps = math.ceil(tokens / a_step)
        require(steps <= STEPS, f"{key}={tokens:g} are {steps} steps of {a_step} tokens: at most {STEPS}.")
        of.steps = steps
        of.train_tokens = None
