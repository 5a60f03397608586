"""What is trained: a GPT, or an energy-based language model on the sphere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..fields import setting
from ..part import Mode, Part, Tail, Unfit


@dataclass
class WorkloadConfig:
    """What is trained: a GPT, or an energy-based language model on the sphere (docs/ebm.md)."""

    name: str = setting("gpt", "which workload", group="workload")


def _neutral(workload: WorkloadConfig) -> bool:
    return workload.name == "gpt"


def _unfit(workload: WorkloadConfig, mode: Mode) -> Unfit | None:
    if not _neutral(workload) and mode in (Mode.EXACT, Mode.SEVERAL_PROCESSES):
        return Unfit(f"workload={workload.name}", "only the GPT is built for that; choose workload=gpt")
    return None


def _tail(workload: WorkloadConfig) -> Iterator[Tail]:
    if not _neutral(workload):
        yield Tail(f"_{workload.name}", "energy-based model")


WORKLOAD = Part("workload", WorkloadConfig, place=140, neutral=_neutral, unfit=_unfit, tail=_tail)
