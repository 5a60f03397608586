"""What a text is cut into."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..machine import installed
from ..part import Part, Tail

WORDS = {"bpe": "byte pairs", "gpt2": "GPT-2’s tokens"}


@dataclass
class TokensConfig:
    """What a text is cut into."""

    name: str = setting("characters", "its characters, byte pairs, or GPT-2's tokens", group="tokens")
    size: int = setting(512, "tokens in the vocabulary", "tokens", low=257, high=65536, only=("bpe",))
    folder: str | None = setting(None, "a local folder with its tokenizer", only=("gpt2",), named=False)
    sha256: str | None = setting(
        None, "checksum of the tokenizer; filled in when a run is resolved, then enforced"
    )


def _neutral(tokens: TokensConfig) -> bool:
    return tokens.name == "characters"


def _refuses(tokens: TokensConfig) -> Iterator[str]:
    if not (_neutral(tokens) or installed("tokenizers")):
        yield f"tokens={tokens.name} needs the library tokenizers: pip install 'ebc-lab[ebm]'."
    if tokens.name == "gpt2" and not tokens.folder:
        yield "tokens=gpt2 needs tokens.folder=FOLDER, which holds GPT-2's tokenizer."


def _tail(tokens: TokensConfig) -> Iterator[Tail]:
    if not _neutral(tokens):
        yield Tail(f"_{tokens.name}", WORDS[tokens.name])


TOKENS = Part("tokens", TokensConfig, place=150, neutral=_neutral, refuses=_refuses, tail=_tail)
