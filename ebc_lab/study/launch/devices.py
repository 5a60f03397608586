"""The GPUs under the slots of a pool on this machine: which slot has which, and which can still be used.

A GPU is retired, for the rest of a call, once nvidia-smi no longer lists it, once workers find it out of
reach twice in a row (another process holds it, say), or once two runs that ran out of memory there fit
elsewhere. None of that is a run's fault, so none is charged. A slot whose workers keep dying, while those of
others do not, is retired as well (`WorkerPool._blame_place`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ebc_lab.config.machine import listing, named_by, processes_on
from ebc_lab.training.turns import UNUSABLE

STRIKES = 2  # workers in a row that find a GPU out of reach, or runs that fit elsewhere, before it is retired


class Devices:
    """The slots of a pool, numbered from 0, and their GPUs; without GPUs every slot is usable."""

    def __init__(self, gpus: Sequence[str], together: int, slots: int):
        """`gpus`: as CUDA_VISIBLE_DEVICES takes them; a slot has `together` of them."""
        count = len(gpus) // together
        self.groups = [tuple(gpus[i * together : (i + 1) * together]) for i in range(count)]
        self.slots = slots
        self.retired: dict[int, str] = {}  # slot -> why it is not used again
        self._strikes: dict[int, int] = {}  # slot -> workers in a row that found its GPU out of reach
        self._elsewhere: dict[str, set[int]] = {}  # run id -> slots on which it is not tried again
        self._short: dict[str, tuple[str, ...]] = {}  # run id -> GPUs on which its memory ran out
        self._misfits: dict[tuple[str, ...], int] = {}  # GPUs -> runs whose memory ran out there alone

    def of(self, slot: int) -> tuple[str, ...]:
        """Return the GPUs of a slot, one for each process of a run; slots beyond the last share them in
        turn."""
        return self.groups[slot % len(self.groups)] if self.groups else ()

    def places(self, slot: int) -> list[str]:
        """Name what a slot's worker holds for as long as it lives, each as part of a file's name: a share of
        every GPU it has. The names are the same in every call, whatever else is visible, and sorted, so that
        workers with overlapping groups of GPUs never wait for each other in a circle."""
        return sorted(re.sub(r"[^\w.-]", "_", f"{g}-{slot // len(self.groups)}") for g in self.of(slot))

    @property
    def usable(self) -> list[int]:
        return [slot for slot in range(self.slots) if slot not in self.retired]

    @property
    def several(self) -> bool:
        """Whether there is another GPU than a run's first."""
        return len({self.of(slot) for slot in range(self.slots)}) > 1

    def barred(self, run_id: str) -> set[int]:
        """Return the slots that leave this run to others, as long as there are others."""
        slots = self._elsewhere.get(run_id, set())
        return slots if set(self.usable) - slots else set()

    def all_barred(self) -> dict[str, list[str]]:
        """Return run id -> names of the workers that leave it to others."""
        found = {run_id: sorted(map(str, self.barred(run_id))) for run_id in self._elsewhere}
        return {run_id: workers for run_id, workers in found.items() if workers}

    # -- what happens to them --------------------------------------------------------------------------------

    def failed(self, slot: int, said: str | None, run_ids: Iterable[str]) -> tuple[bool, str]:
        """Note that a worker has died, and what it said of its GPU: where it said that this failed, its runs
        are tried elsewhere. A GPU that is lost may also leave it hanging, or let it die by a signal.

        Returns whether the GPU alone is to blame, and what there is to say.
        """
        for run_id in run_ids if said is not None else ():
            self._elsewhere.setdefault(run_id, set()).update(self._beside(slot))
        if not self.groups:
            return False, ""
        there = listing()
        gone = [name for name in self.of(slot) if not there.failure and not named_by(name, there.gpus)]
        if gone:
            shared = [s for s in range(self.slots) if set(self.of(s)) & set(gone)]
            return True, self.retire(shared, f"{' and '.join(gone)} is not listed by nvidia-smi any more")
        if said is None or not any(words in said for words in UNUSABLE):
            return False, ""
        self._strikes[slot] = self._strikes.get(slot, 0) + 1
        if self._strikes[slot] < STRIKES:
            return True, ""
        what = "".join([said, *(_held(name, of=len(self.of(slot))) for name in self.of(slot))])
        return True, self.retire([slot], f"{' and '.join(self.of(slot))} cannot be used ({what})")

    def worked(self, slot: int) -> None:
        """Note that a worker on this slot has finished a run."""
        self._strikes.pop(slot, None)

    def ran_short(self, run_id: str, gpus: str, *, alone: bool) -> bool:
        """Note that a run's memory ran out on these GPUs, named as in CUDA_VISIBLE_DEVICES. `alone`: no other
        run was in its worker, so that none of ours may have taken what it lacked.

        Returns whether it is tried elsewhere; not where these are all that is left.
        """
        names = tuple(gpus.split(","))
        slots = {slot for slot in range(self.slots) if self.of(slot) == names}
        if not slots or not self._others(names):
            return False
        self._elsewhere.setdefault(run_id, set()).update(slots)
        if alone and len(slots) == 1:
            self._short[run_id] = names
        return True

    def waiting_for(self) -> list[str]:
        """Return the runs of which `fitted` is to be told."""
        return list(self._short)

    def fitted(self, run_id: str, gpus: str) -> str:
        """Note on which GPUs a run was finished that ran out of memory before; empty: on none. Returns what
        there is to say."""
        names = self._short.pop(run_id)
        if not gpus or gpus.split(",") == [*names]:
            return ""
        self._misfits[names] = self._misfits.get(names, 0) + 1
        if self._misfits[names] < STRIKES or not self._others(names):
            return ""
        slots = [slot for slot in self.usable if self.of(slot) == names]
        why = f"runs that run out of memory on {' and '.join(names)} fit elsewhere"
        return self.retire(slots, why) if slots else ""

    def _others(self, names: tuple[str, ...]) -> bool:
        """Tell whether GPUs other than these can still be used."""
        return any(self.of(slot) != names for slot in self.usable)

    def _beside(self, slot: int) -> list[int]:
        return [other for other in range(self.slots) if self.of(other) == self.of(slot)]

    def retire(self, slots: Iterable[int], why: str) -> str:
        """Use these slots no more in this call. Returns what there is to say."""
        self.retired |= dict.fromkeys((slot for slot in slots if slot not in self.retired), why)
        return f"{why}: no more workers are started there, and its runs go to others"


def _held(name: str, of: int) -> str:
    """Say which processes nvidia-smi shows on a GPU, one `of` so many; empty where it shows none."""
    where = "it" if of == 1 else name
    if name.isdecimal():  # where CUDA may count otherwise
        where = f"nvidia-smi's GPU {name}"
    elif name.startswith("MIG-"):
        where = "its GPU, all instances together,"
    processes = processes_on(name)
    return f"; on {where} is process {', '.join(processes)}" if processes else ""
