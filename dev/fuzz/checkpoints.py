"""States of optimizers and runs, weights and packed tensors."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import struct
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .changes import (
    Draw,
    changed_bytes,
    changed_state,
    changed_tree,
    changed_value,
)
from .target import (
    READ,
    REFUSED,
    SMALL,
    Target,
    Wrong,
    ask,
    module_of_tests,
    small_text,
    tree_of,
    write_tree,
)


class Checkpoints(Target):
    """States of optimizers, weights, packed tensors; what torch.save wrote is changed inside its checksum."""

    def make(self, folder: Path, more: Path | None) -> Any:
        return {name: getattr(self, f"make_{name}")(folder) for name in self.kinds()}

    @classmethod
    def kinds(cls) -> list[str]:
        return [name.removeprefix("make_") for name in vars(cls) if name.startswith("make_")]

    def attack(self, draw: Draw, folder: Path) -> str:
        import torch

        kind = draw.of(self.kinds())
        (folder / "kind.txt").write_text(kind)
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(self, f"read_{kind}")(draw, folder, self.real[kind])

    def _state(self, draw: Draw, folder: Path, state: Any) -> Any:
        """A changed state; kept where it may be looked at."""
        import torch

        state = changed_state(draw, state)
        with contextlib.suppress(Exception):
            torch.save(state, folder / "state.pt")
        return state

    @staticmethod
    def _said(call: Callable[[], Any], *kinds: type[Exception]) -> str:
        """Whether a call reads or refuses; a refusal of these kinds needs a sentence."""
        try:
            call()
        except kinds as error:
            if len(str(error)) < 10 or "\n" in str(error).strip():
                raise Wrong(f"no sentence: {error!r}") from error
            return REFUSED
        return READ

    @staticmethod
    def _saved(value: Any) -> bytes:
        import torch

        out = io.BytesIO()
        torch.save(value, out)
        return out.getvalue()

    @staticmethod
    def _loaded(content: bytes) -> Any:
        import torch

        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    # packed tensors

    @staticmethod
    def _layers(levels: str = "ternary") -> Any:
        import torch

        from ebc_lab.lowbit import quantize_model

        torch.manual_seed(0)
        return quantize_model(
            torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6), torch.nn.Linear(6, 3)), levels
        )

    def make_packed(self, folder: Path) -> Any:
        from ebc_lab.lowbit.linear import save_packed

        contents = []
        for levels in ("ternary", "five"):
            save_packed(folder / "a.ebcpack", self._layers(levels))
            contents.append((folder / "a.ebcpack").read_bytes())
        return contents

    def read_packed(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.lowbit.container import DamagedFileError, inspect_packed, read_packed, write_packed
        from ebc_lab.lowbit.linear import load_packed

        whole = draw.of(real)
        sealed = not draw.one_in(4)
        if sealed:
            length = struct.unpack("<Q", whole[8:16])[0]
            header, payload = whole[16 : 16 + length], whole[16 + length : -32]
            if draw.one_in(4):
                payload = changed_bytes(draw, payload)
            else:
                header = json.dumps(
                    changed_value(draw, json.loads(header)), sort_keys=True, separators=(",", ":")
                ).encode()
            content = whole[:8] + struct.pack("<Q", len(header)) + header + payload
            content += hashlib.sha256(content).digest()
        else:
            content = changed_bytes(draw, whole)
        path = folder / "a.ebcpack"
        path.write_bytes(content)

        def read() -> None:
            inspect_packed(path)
            tensors = read_packed(path)
            if content != whole and not sealed:
                raise Wrong("it is another file, and is read")
            write_packed(folder / "again.ebcpack", tensors)
            again = read_packed(folder / "again.ebcpack")
            parts = [
                [
                    (n, t.shape, *(p.tobytes() for p in ((t.data, t.steps) if hasattr(t, "steps") else (t,))))
                    for n, t in read.items()
                ]
                for read in (tensors, again)
            ]
            if parts[0] != parts[1]:
                raise Wrong("it is read, and written again it is another one")

        answer = self._said(read, DamagedFileError)
        return max(answer, self._said(lambda: load_packed(path, self._layers()), ValueError))

    # the trainer of few levels

    def _low_bit_trainer(self) -> Any:
        from ebc_lab.lowbit import HybridLLMTrainer, TrainingConfig

        settings = TrainingConfig(max_epochs=2, batch_size=16, hidden=12, n_clusters=2, use_adaptive_lr=True)
        return HybridLLMTrainer(settings), module_of_tests("lowbit/test_trainer.py").low_rank(40, 6)

    def make_low_bit_trainer(self, folder: Path) -> Any:
        trainer, rows = self._low_bit_trainer()
        trainer.train(rows)
        trainer.save_checkpoint(folder / "a.ebctrain")
        return (folder / "a.ebctrain").read_bytes()

    def read_low_bit_trainer(self, draw: Draw, folder: Path, real: bytes) -> str:
        from ebc_lab.lowbit.trainer.run import _MAGIC

        body = real[len(_MAGIC) + 32 :]
        inner = (
            self._saved(changed_state(draw, self._loaded(body)))
            if draw.one_in(2)
            else changed_bytes(draw, body)
        )
        content = _MAGIC + hashlib.sha256(inner).digest() + inner
        path = folder / "a.ebctrain"
        path.write_bytes(content if not draw.one_in(5) else changed_bytes(draw, real))
        trainer, rows = self._low_bit_trainer()

        def read() -> None:
            trainer.load_checkpoint(path)
            trainer.train(rows)

        return self._said(read, ValueError)

    # AXIOM

    def make_axiom_trainer(self, folder: Path) -> bytes:
        from axiom.trainer_helpers import batches, quiet, tiny

        trainer = quiet(tiny(), batches(), batches())
        trainer.fit(3)
        return trainer.save_checkpoint(path=folder / "axiom.pt").read_bytes()

    def read_axiom_trainer(self, draw: Draw, folder: Path, real: bytes) -> str:
        from axiom.trainer_helpers import batches, quiet, tiny

        from ebc_lab.axiom.trainer_files import header

        body = real.split(b"\n", 1)[1]
        body = (
            self._saved(changed_state(draw, self._loaded(body)))
            if draw.one_in(2)
            else changed_bytes(draw, body)
        )
        path = folder / "axiom.pt"
        path.write_bytes(header(hashlib.sha256(body).hexdigest()) + body)
        trainer = quiet(tiny(), batches(), batches())

        def read() -> None:
            trainer.load_checkpoint(path)
            trainer.fit(1)

        return self._said(read, ValueError, FloatingPointError)

    def make_axiom_payload(self, folder: Path) -> Any:
        from ebc_lab.axiom.packing import AXIOM_CHECKPOINT

        return AXIOM_CHECKPOINT(seed=3).state_dict()

    def read_axiom_payload(self, draw: Draw, folder: Path, real: Any) -> str:
        import torch

        from ebc_lab.axiom.packing import AXIOM_CHECKPOINT

        state, slots = self._state(draw, folder, real), AXIOM_CHECKPOINT()

        def read() -> None:
            slots.load_state_dict(state)
            slots.store(torch.ones(100), 0)
            slots.restore(0)

        return self._said(read, ValueError)

    def make_axiom_workers(self, folder: Path) -> Any:
        import torch

        return {"residuals": [[torch.zeros(4, 3), torch.zeros(4)]], "sent": 3, "dense": 5}

    def read_axiom_workers(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.axiom.distributed import AxiomDDPState

        state = self._state(draw, folder, real)
        return self._said(lambda: AxiomDDPState().load_state_dict(state), ValueError)

    # EBC on an optimizer

    @staticmethod
    def _attached(budget: str) -> Any:
        import torch
        from support.tokenwise import Tokenwise

        from ebc_lab.ebc import attach

        torch.manual_seed(0)
        model = Tokenwise(width=16)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        return model, optimizer, attach(model, optimizer, target_kl=0.005, budget=budget, probe_sequences=2)

    def make_ebc(self, folder: Path) -> Any:
        states = {}
        for budget in ("surrogate", "tracked", "shadow", "fisher"):
            model, optimizer, _ = self._attached(budget)
            train_attached(model, optimizer, 4)
            states[budget] = copy.deepcopy(optimizer.state_dict())
        return states

    def read_ebc(self, draw: Draw, folder: Path, real: Any) -> str:
        budget = draw.of(sorted(real))
        model, optimizer, ebc = self._attached(budget)
        state = self._state(draw, folder, real[budget]["ebc"])
        (folder / "kind.txt").write_text(f"ebc {budget}")

        def read() -> None:
            if draw.one_in(2):
                ebc.load_state_dict(state)
            else:
                optimizer.load_state_dict({**real[budget], "ebc": state})
            train_attached(model, optimizer, 2)

        return self._said(read, ValueError)

    # a run's checkpoint.pt and weights.pt

    VARIANTS = (
        ("adam", "budget=surrogate"),
        ("muon", "budget=shadow"),
        ("adam", "budget=tracked"),
        ("schedule_free", "projection=stiefel"),
        ("adam", "controller=confidence"),
        ("soap", "stabilizer=zclip"),
    )

    @staticmethod
    def _run(folder: Path, optimizer: str, other: str) -> Any:
        from support.runs import resolved

        from ebc_lab.config.compose import compose
        from ebc_lab.config.dicts import run_part

        text = folder / "words.txt"
        text.write_text(small_text())
        given = [
            *SMALL,
            f"data.file={text}",
            "optimizer.lr=1e-2",
            "steps=12",
            f"optimizer={optimizer}",
            other,
        ]
        return resolved(run_part(compose(given, study=False)))

    def make_run(self, folder: Path) -> Any:
        from ebc_lab.training.run import Training

        kept = {}
        for variant in self.VARIANTS:
            place = folder / "-".join(variant)
            place.mkdir()
            training = Training(self._run(folder, *variant), place)
            training.advance(6)
            training.save_checkpoint()
            training.recording.close()
            kept[variant] = tree_of(place)
        return kept

    def read_run(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.config.errors import UserError
        from ebc_lab.records.weights import seal, unseal
        from ebc_lab.training.run import Training

        variant = draw.of(self.VARIANTS)
        tree = dict(real[variant])
        name = next(name for name in tree if name.endswith("checkpoint.pt"))
        about, body = unseal(tree[name], ["checkpoint"])
        if draw.one_in(6):
            tree = changed_tree(draw, tree)
        elif draw.one_in(8):
            tree[name] = seal("checkpoint", changed_value(draw, about), body)
        else:
            inner = (
                changed_bytes(draw, body)
                if draw.one_in(5)
                else self._saved(changed_state(draw, self._loaded(body)))
            )
            tree[name] = seal("checkpoint", about, inner)
        write_tree(tree, folder)
        run = self._run(folder, *variant)

        def read() -> None:
            training = Training(run, folder)
            try:
                training.advance(2)
            except Exception as error:
                if not any(frame.name == "take_step" for frame in traceback.extract_tb(error.__traceback__)):
                    raise  # what torch's own optimizers make of a state that they took is theirs
            training.recording.close()

        return self._said(read, UserError, FloatingPointError)

    def make_weights(self, folder: Path) -> Any:
        from ebc_lab.config.choices import changed
        from ebc_lab.training.outcome import run_and_record

        run = changed(self._run(folder, "adam", "stabilizer=none"), {"init": {"keep": True}})
        run_and_record(run, folder / "kept", "x")
        return (folder / "kept" / "weights.pt").read_bytes()

    def read_weights(self, draw: Draw, folder: Path, real: bytes) -> str:
        from ebc_lab.records.weights import seal, unseal

        about, body = unseal(real)
        match draw.below(4):
            case 0:
                content = changed_bytes(draw, real)
            case 1:
                content = seal("weights", changed_value(draw, about), body)
            case 2:
                content = seal("weights", about, changed_bytes(draw, body))
            case _:
                content = seal("weights", about, self._saved(changed_state(draw, self._loaded(body))))
        (folder / "weights.pt").write_bytes(content)
        (folder / "words.txt").write_text(small_text())
        given = [
            *SMALL,
            "data.file=words.txt",
            "steps=2",
            "stabilizer=none",
            "optimizer.lr=1e-2",
            "init.run=weights.pt",
        ]
        return ask(["train", *given, "output_dir=out"], folder)

    # the energy-based model

    def make_ebm(self, folder: Path) -> bytes:
        from support.ebm_runs import eventful, tiny_ebm

        from ebc_lab.training.run import Training

        (folder / "ebm.txt").write_text(small_text())
        (folder / "ebm").mkdir()
        training = Training(eventful(tiny_ebm(folder / "ebm.txt")), folder / "ebm")
        training.advance(4)
        training.recording.close()
        training.workload.finished(training.model, training.step, training.files)
        return training.files.model.read_bytes()

    def read_ebm(self, draw: Draw, folder: Path, real: bytes) -> str:
        whole = self._loaded(real)
        if draw.one_in(5):
            content = changed_bytes(draw, real)
        else:
            if draw.one_in(3):
                whole["run"] = json.dumps(changed_value(draw, json.loads(whole["run"])))
            else:
                whole = changed_state(draw, whole)
            content = self._saved(whole)
        (folder / "model.pt").write_bytes(content)
        (folder / "ebm.txt").write_text(small_text())
        command = draw.of(
            [["diagnose", "model.pt"], ["generate", "model.pt", "--prompt", "the cat", "--tokens", "3"]]
        )
        return ask(["ebm", *command], folder)

    # exact training

    def make_verity(self, folder: Path) -> Any:
        _, grids, optimizer = self._exact()
        return {"grids": grids.state_dict(), "optimizer": optimizer.state_dict()}

    @staticmethod
    def _exact() -> Any:
        import torch

        from ebc_lab.verity import ops
        from ebc_lab.verity.grids import Grids
        from ebc_lab.verity.optim import VerityAdam

        torch.manual_seed(0)
        layer = ops.VLALinear(3, 2)
        grids, optimizer = Grids(layer), VerityAdam(layer.parameters(), lr=0.01)
        exact_step(layer, grids, optimizer)
        return layer, grids, optimizer

    def read_verity(self, draw: Draw, folder: Path, real: Any) -> str:
        from ebc_lab.verity.bits import VerityError

        layer, grids, optimizer = self._exact()
        part = draw.of(["grids", "optimizer"])
        state = self._state(draw, folder, real[part])
        (folder / "kind.txt").write_text(f"verity {part}")

        def read() -> None:
            (grids if part == "grids" else optimizer).load_state_dict(state)
            exact_step(layer, grids, optimizer)

        return self._said(read, VerityError, ValueError)

    # what few levels keep

    def make_low_bit_state(self, folder: Path) -> Any:
        return {kind: part.state_dict() for kind, part in self._low_bit_parts().items()}

    @staticmethod
    def _low_bit_parts() -> Any:
        import torch

        from ebc_lab.lowbit.gradients import GradientQuantizer
        from ebc_lab.lowbit.policy import AuxiliaryNetwork

        quantizer = GradientQuantizer("five", error_feedback=True)
        quantizer.compress([torch.ones(3, 2), torch.ones(4, 4)], 0)
        quantizer.commit()
        return {"policy": AuxiliaryNetwork(0), "gradients": quantizer}

    def read_low_bit_state(self, draw: Draw, folder: Path, real: Any) -> str:
        import torch

        kind = draw.of(sorted(real))
        part, state = self._low_bit_parts()[kind], self._state(draw, folder, real[kind])
        (folder / "kind.txt").write_text(f"low bit {kind}")

        def read() -> None:
            part.load_state_dict(state)
            if kind == "policy":
                part.predict([0.1] * 6)
            else:
                part.compress([torch.ones(3, 2), torch.ones(4, 4)], 1)

        return self._said(read, ValueError)


def train_attached(model: Any, optimizer: Any, steps: int) -> None:
    """Some steps of a model of the tests, on tokens that are always the same."""
    import torch

    draw = torch.Generator().manual_seed(0)
    for _ in range(steps):
        ids = torch.randint(8, (6, 9), generator=draw)
        logits = model(ids[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def exact_step(layer: Any, grids: Any, optimizer: Any) -> None:
    """One step of a layer on four tokens; what does not fit its grid is repeated once."""
    import torch

    for _ in range(2):
        layer(torch.ones(4, 3)).backward(torch.ones(4, 2))
        if grids.finish(4):
            optimizer.step()
            return
