"""What multiplies the learning rate and the trust radius from step to step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part, Tail, Unfit

WORDS = {"auxnn": "policy of a small network", "random": "random policy"}


@dataclass
class PolicyConfig:
    """What multiplies the learning rate and the trust radius from step to step (docs/lowbit.md)."""

    name: str = setting("constant", "nothing; random factors; or a small network that learns", group="policy")


def _neutral(policy: PolicyConfig) -> bool:
    return policy.name == "constant"


def _unfit(policy: PolicyConfig, mode: Mode) -> Unfit | None:
    if _neutral(policy) or mode is Mode.EBM:
        return None
    return Unfit(f"policy={policy.name}", "choose policy=constant")


def _tail(policy: PolicyConfig) -> Iterator[Tail]:
    if not _neutral(policy):
        yield Tail(f"_{policy.name}", WORDS[policy.name])


POLICY = Part("policy", PolicyConfig, neutral=_neutral, unfit=_unfit, tail=_tail)
