"""The GPUs under the slots of a pool on this machine: which slot has which, and which can still be used.

A slot is retired, for the rest of a call, once nvidia-smi no longer lists its GPU, or its worker finds it out
of reach (another process holds it, say). Neither is a run's fault, so no run is charged. A slot whose workers
keep dying, while those of others do not, is retired as well (`WorkerPool._blame_place`). Memory that runs out
on one GPU of several may have been taken by another process: the run is tried once more, on another GPU, and
what comes of it there is its result.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from ebc_lab.config.machine import listing, named_by, processes_on
from ebc_lab.training.ends import OUT_OF_MEMORY, UNUSABLE


class Devices:
    """The slots of a pool, numbered from 0, and their GPUs; without GPUs every slot is usable."""

    def __init__(self, gpus: Sequence[str], together: int, slots: int):
        """`gpus`: as CUDA_VISIBLE_DEVICES takes them; a slot has `together` of them."""
        count = len(gpus) // together
        self.groups = [tuple(gpus[i * together : (i + 1) * together]) for i in range(count)]
        self.slots = slots
        self.retired: dict[int, str] = {}  # slot -> why it is not used again
        self._failed_on: dict[str, set[int]] = {}  # run id -> slots whose GPUs failed under it

    def gpus_of(self, slot: int) -> tuple[str, ...]:
        """Return the GPUs of a slot, one for each process of a run; slots beyond the last share them in
        turn."""
        return self.groups[slot % len(self.groups)] if self.groups else ()

    def places(self, slot: int) -> list[str]:
        """Return what a slot's worker holds for as long as it lives, a share of each of its GPUs, as parts of
        files' names. These are the same in every call, whatever else is visible, and sorted, so that workers
        with overlapping groups of GPUs never wait for each other in a circle."""
        gpus = self.gpus_of(slot)
        return sorted(re.sub(r"[^\w.-]", "_", f"{gpu}-{slot // len(self.groups)}") for gpu in gpus)

    @property
    def usable(self) -> list[int]:
        """Return the slots that are not retired."""
        return [slot for slot in range(self.slots) if slot not in self.retired]

    @property
    def several(self) -> bool:
        """Return whether a run can be tried again on another GPU than its first."""
        return len({self.gpus_of(slot) for slot in range(self.slots)}) > 1

    def barred(self) -> dict[str, list[str]]:
        """Return, for each run under which a GPU has failed, the workers that leave it to others: none where
        no others are left."""
        usable = set(self.usable)
        return {
            run_id: sorted(map(str, slots)) if usable - slots else []
            for run_id, slots in self._failed_on.items()
        }

    def failed(self, slot: int, said: str | None, run_id: str | None) -> tuple[bool, str]:
        """Note that a worker has died, and what it `said` of its GPU's failure: its run is then tried on
        another. A GPU that is lost may also leave it hanging, or let it die by a signal.

        Returns whether the GPU alone is to blame, and what there is to say.
        """
        if not self.groups:
            return False, ""
        gpus = self.gpus_of(slot)
        if said is not None and run_id is not None:
            same = {other for other in range(self.slots) if self.gpus_of(other) == gpus}
            self._failed_on.setdefault(run_id, set()).update(same)
        there = listing()
        gone = [name for name in gpus if not there.failure and not named_by(name, there.gpus)]
        if gone:
            shared = [s for s in range(self.slots) if set(self.gpus_of(s)) & set(gone)]
            return True, self.retire(shared, f"{' and '.join(gone)} is not listed by nvidia-smi any more")
        if said is not None and any(words in said for words in UNUSABLE):
            what = "".join([said, *(_holders(name, only=len(gpus) == 1) for name in gpus)])
            return True, self.retire([slot], f"{' and '.join(gpus)} cannot be used ({what})")
        if said is not None and said.startswith(OUT_OF_MEMORY):
            where = " and ".join(gpus)
            return True, f"{run_id} ran out of memory on {where}: it is tried again on another GPU"
        return False, ""

    def retire(self, slots: Iterable[int], why: str) -> str:
        """Use these slots no more in this call. Returns what there is to say."""
        self.retired |= dict.fromkeys((slot for slot in slots if slot not in self.retired), why)
        return f"{why}: no more workers are started there, and its runs go to others"


def _holders(name: str, *, only: bool) -> str:
    """Return in words which processes nvidia-smi shows on a GPU; empty where it shows none. `only`: it is the
    worker's only GPU."""
    where = "it" if only else name
    if name.isdecimal():  # where CUDA may count otherwise
        where = f"nvidia-smi's GPU {name}"
    elif name.startswith("MIG-"):
        where = "its GPU, all instances together,"
    processes = processes_on(name)
    return f"; on {where} is process {', '.join(processes)}" if processes else ""
