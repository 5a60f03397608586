"""The tokens of a text, as in `tokens=bpe`, and the length of a run in tokens, as in `tokens=2e6`."""

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import require
from ..fields import STEPS, setting
from ..part import Part, Run

TRAIN_TOKENS = "train_tokens"  # the key that holds `tokens=2e6` until the batch size is known


@dataclass
class TokensConfig(Part):
    """What a text is cut into."""

    name: str = setting(
        "characters", "its characters, its bytes, byte pairs, or GPT-2's tokens", group="tokens"
    )
    size: int = setting(512, "tokens in the vocabulary", "tokens", low=257, high=65536, only=("bpe",))
    folder: str | None = setting(None, "a local folder with its tokenizer", only=("gpt2",), in_run_id=False)
    sha256: str | None = setting(
        None, "checksum of the tokenizer; filled in when a run is resolved, then enforced"
    )

    off = "characters"
    place = 150
    required = dict.fromkeys(("bpe", "gpt2"), ("tokenizers", "ebm"))
    words = {"bytes": "bytes", "bpe": "byte pairs", "gpt2": "GPT-2’s tokens"}

    def refuses(self, run: Run) -> Iterator[str]:
        if self.name == "gpt2" and not self.folder:
            yield "tokens=gpt2 needs tokens.folder=FOLDER, which holds GPT-2's tokenizer."


def renamed(override: str) -> str:
    """Return `train_tokens=2000000` for `tokens=2e6`, and likewise for several numbers. Return any other
    override, such as `tokens=bpe`, unchanged."""
    key, _, values = override.partition("=")
    if key.lstrip("+") != TokensConfig.group_name:
        return override
    try:
        numbers = [(text, float(text)) for text in values.split(",")]
    except ValueError:
        return override
    plain = (f"{number:.0f}" if number.is_integer() else text for text, number in numbers)
    return f"{TRAIN_TOKENS}={','.join(plain)}"


def refuse_two_lengths(parsed: Mapping[str, Any]) -> None:
    """Raise UserError if overrides (key -> value) give the length of a run both in steps and in tokens."""
    parsed = {key: value for key, value in parsed.items() if value is not None}
    for key in (key for key in parsed if key.rpartition(".")[2] == TRAIN_TOKENS):
        steps = key.replace(TRAIN_TOKENS, "steps")
        named, what = (key, "the stage's runs are") if "." in key else ("tokens", "the run is")
        require(
            steps not in parsed,
            f"{steps} and {named} both say how long {what}: give one of {steps}={parsed.get(steps)} and "
            f"{named}={parsed[key]}.",
        )


def set_steps(composed: Any, given: Collection[str] = ()) -> None:
    """Convert `train_tokens` to `steps` in a composed configuration and its stages, and empty `train_tokens`.

    `given` are the keys set on the command line; `steps` among them overrides `train_tokens` in a file. An
    impossible number of tokens is left for the checks to refuse. Raises UserError for too many steps.
    """
    from omegaconf import OmegaConf

    a_step = composed.batch_size * composed.model.context
    plain = [name for name in composed if not OmegaConf.is_interpolation(composed, name)]
    timed = {name: composed[name] for name in plain if OmegaConf.is_dict(composed[name])}
    stages = {f"{name}.{TRAIN_TOKENS}": stage for name, stage in timed.items() if TRAIN_TOKENS in stage}
    for key, config in {"tokens": composed, **stages}.items():
        if key not in given and key.replace(TRAIN_TOKENS, "steps") in given:
            config.train_tokens = None
        tokens = config.train_tokens
        if tokens is None or not 1 <= tokens < math.inf or a_step < 1:
            continue
        steps = math.ceil(tokens / a_step)
        require(steps <= STEPS, f"{key}={tokens:g} are {steps} steps of {a_step} tokens: at most {STEPS}.")
        config.steps = steps
        config.train_tokens = None
