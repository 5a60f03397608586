"""The energy-based language model on the sphere (`ebc_lab.ebm`, docs/ebm.md) as a workload of the lab.

What moves beside the trained parameters, the splats' statistics and places, moves after the step's audit, and
is a function of the seed and the step: no generator carries anything from one step to the next.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ebc_lab.config.errors import UserError
from ebc_lab.config.parts.ebm import EbmConfig
from ebc_lab.config.schema import RunConfig
from ebc_lab.ebc import StepStats
from ebc_lab.ebc.logits import mean_kl
from ebc_lab.ebm.diagnose import alert_in_words, alerts
from ebc_lab.ebm.embeddings import cooccurrence, load_gpt2
from ebc_lab.ebm.evaluate import energy_trend, held_out, held_out_names, ngram_baselines, sampled_loss
from ebc_lab.ebm.model import Draws, EnergyModel, Kept, LossWeights, Scored, objective, r2_column, score_shift
from ebc_lab.ebm.soc import drive
from ebc_lab.ebm.starts import phase_at, splats_at
from ebc_lab.records.files import write_atomic
from ebc_lab.records.paths import RunFiles

from .batches import windows
from .corpus import Corpus
from .kept import JUDGED, SAMPLED, build, sampling_of, settings_of, write_model
from .losses import autocast
from .partition import TextSplits
from .text import tokenised_of, tokenizer_of

PRESENT = 8192  # states of training text that a revival or new splats are chosen from
REVIVED_AT = (10, 20)  # steps, beside every ebm.revive_every
EVALUATED = 1024  # states of validation text at every evaluation
SAMPLES = 8  # latents a token, of the sampled loss
# what chance decides at a step
PURPOSES = ("losses", "noise", "present", "revive", "grow", "evaluate", "sample")
OF_STEPS = ("dropped_mass", "soc_rate", "load_max")  # figures that no evaluation measures
OURS = 1  # in the counter of the generator: batches and partitions have 0

# parameters of two dimensions that are no hidden matrices
OUTSIDE = re.compile(r"router|head|positions|(^|\.)(into|out)\.weight$")

Renew = Callable[[nn.Parameter, Tensor], None]


@dataclass
class Tape:
    """What one forward leaves for the losses and for what comes after the step."""

    inputs: Tensor  # (B, T)
    kept: Kept
    scored: Scored | None = None  # filled in by the losses


class Audited(NamedTuple):
    """The rows that audit a step, their logits after the update, and what changed on them."""

    inputs: Tensor
    logits: Tensor
    found: dict[str, Tensor]


def _block(name: str) -> str:
    """The group of a parameter under budget.grouping=block."""
    if match := re.search(r"\.experts\.(\d+)\.", name):
        return f"expert{match.group(1)}"
    if match := re.match(r"decoder\.blocks\.layers\.(\d+)\.", name):
        return f"block{match.group(1)}"
    lead = name.partition(".")[0]
    return {"embeddings": "embeddings", "encoder": "encoder", "decoder": "head"}.get(lead, "splats")


def _type(name: str) -> str:
    """The group of a parameter under budget.grouping=type."""
    if "norm" in name:
        return "norm"
    return "experts" if ".experts." in name else _block(name).rstrip("0123456789")


GROUPS: dict[str, Callable[[str], str]] = {"block": _block, "type": _type}


def step_columns(run: RunConfig) -> tuple[str, ...]:
    """What such a run adds to steps.csv."""
    ebm = run.ebm
    splats = ebm.splats > 0
    columns = ["loss_total"]
    columns += ["loss_mle", "energy"] if splats and ebm.mle else []
    columns += ["loss_dsm", *map(r2_column, ebm.levels)] if splats and ebm.score else []
    columns += ["loss_noised"] if ebm.noised else []
    columns += ["dropped_mass", "splats", "revived", "kappa_median"] if splats else []
    columns += ["soc_rate", "topplings", "consolidations"] if splats and ebm.soc else []
    if run.decoder.name == "moe":
        columns += ["balance", "router_z", "route_flips"]
        columns += [f"load_{e}" for e in range(run.decoder.experts)]
    return (*columns, "splat_flips", "score_shift", "event_kl") if splats else (*columns, "event_kl")


def eval_columns(run: RunConfig, vocabulary: int) -> tuple[str, ...]:
    """What such a run adds to evals.csv."""
    recent = ["dropped_mass"] if run.ebm.splats else []
    recent += ["soc_rate"] if run.ebm.splats and run.ebm.soc else []
    recent += ["load_max"] if run.decoder.name == "moe" and run.decoder.experts > 1 else []
    return (*held_out_names(settings_of(run, vocabulary)), *recent)


class EBMWorkload(TextSplits):
    """An energy-based model that predicts the next token of a text. Raises UserError as its parts do."""

    capturable = False  # places and candidates of its splats are chosen on the host

    def __init__(self, run: RunConfig, corpus: Corpus, device: torch.device):
        super().__init__(run, corpus, device)
        self.ebm: EbmConfig = run.ebm
        self.corpus = corpus
        self.train_ids = tokenised_of(run, corpus).splits["train"]
        self.step_columns = step_columns(run)
        self.eval_columns = eval_columns(run, self.vocabulary)
        self.weights = LossWeights(**{f.name: getattr(self.ebm, f.name) for f in fields(LossWeights)})
        self._model: EnergyModel | None = None
        self.states_seen = 0  # since the last look at the pile
        self.soc_rate = math.nan  # at that look
        self.latest: dict[str, Tensor] = {}  # parts of the last step's loss
        self.curve: list[dict[str, float]] = []  # what every evaluation found
        self.alerts: list[dict[str, Any]] = []  # one for each cause

    # -- the model -------------------------------------------------------------------------------------------

    def build(self) -> EnergyModel:
        ebm, seed = self.ebm, self.run.seed
        try:
            if ebm.embeddings == "gpt2":
                first = load_gpt2(str(ebm.gpt2), ebm.n)
            else:
                first = cooccurrence(self.train_ids, self.vocabulary, ebm.n, seed)
            model = build(self.run, self.vocabulary, torch.as_tensor(first))
        except ValueError as error:
            raise UserError(str(error)) from None
        self._model = model
        if model.store is not None:
            model.store.kappa_divisor = ebm.temperature[0]
            model.store.grow(self._present(0), self._splats_at(0), self._rng(0, "grow"))
        return model

    @property
    def model(self) -> EnergyModel:
        assert self._model is not None
        return self._model

    def _splats_at(self, step: int) -> int:
        return splats_at(step, self.run.steps, self.ebm.splats, len(self.train_ids))

    def _rng(self, step: int, purpose: str) -> np.random.Generator:
        counter = [0, 0, OURS, PURPOSES.index(purpose)]
        return np.random.Generator(np.random.Philox(key=[self.run.seed, step], counter=counter))

    def _generator(self, step: int, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(int(self._rng(step, purpose).integers(2**62)))

    @torch.no_grad()
    def _present(self, step: int) -> Tensor:
        """States of training text at the present weights, (at least PRESENT, n)."""
        T = self.run.model.context
        tokens = self.tokens["train"]
        count = min(-(-PRESENT // T), (len(tokens) - 1) // T)
        starts = self._rng(step, "present").integers(0, len(tokens) - T, count)
        at = torch.from_numpy(starts)[:, None] + torch.arange(T)
        rows = tokens[at.to(tokens.device)].to(self.model.embeddings.device)
        with autocast(self.run):
            states, _ = self.model.encode(rows)
        return states

    # -- a step ----------------------------------------------------------------------------------------------

    def forward(self, called: nn.Module, inputs: Tensor) -> tuple[Tensor, Tape]:
        assert isinstance(called, EnergyModel)
        with autocast(self.run):
            logits, states = called.detailed(inputs)
        return logits, Tape(inputs, states)

    def loss(
        self, logits: Tensor, targets: Tensor, tape: Tape, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        with autocast(self.run):
            terms = objective(self.model, logits, targets, tape.kept, self.weights, self._draws(step, tape))
        tape.scored = terms.scored
        self.latest = terms.parts
        return terms.total, terms.parts

    def _draws(self, step: int, tape: Tape) -> Draws:
        B, T = tape.inputs.shape
        rng = self._rng(step, "losses")
        count = min(self.ebm.states, B * T)
        picked = rng.choice(B * T, count, replace=False)
        noised = picked
        if self.run.decoder.name != "moe":  # blocks read whole sequences
            rows = rng.choice(B, max(1, count // T), replace=False)
            noised = (rows[:, None] * T + np.arange(T)).ravel()
        device = tape.inputs.device
        scored, noised_at = (torch.from_numpy(x).to(device) for x in (picked, noised))
        return Draws(scored, noised_at, self._generator(step, "noise"), self.ebm.noise)

    def event_at(self, step: int) -> bool:
        return True

    def after_step(self, step: int, stats: StepStats, tape: Tape, renew: Renew) -> dict[str, Tensor]:
        if bool(stats.skipped):
            return {}
        audited = None if stats.applied_kl is None else self._audit(tape, stats.audit_tokens)
        figures = {} if audited is None else audited.found
        if self.model.store is not None:
            figures |= self._events(step, tape.kept.states.detach(), renew)
        if audited is not None:
            after = self._predicted(audited.inputs)[0]
            figures["event_kl"] = mean_kl(audited.logits, after)
        return figures

    # -- what an audit sees beside the logits ----------------------------------------------------------------

    @torch.no_grad()
    def _predicted(self, inputs: Tensor) -> tuple[Tensor, Kept]:
        training = self.model.training
        self.model.eval()
        with autocast(self.run):
            prediction = self.model.detailed(inputs)
        self.model.train(training)
        return prediction

    def _audit(self, tape: Tape, tokens: int) -> Audited:
        """What changed between W and W + c·dW, on the rows that audit the step."""
        T = tape.inputs.shape[1]
        first = self.run.budget.probe_sequences
        rows = slice(first, first + max(1, tokens // T))
        at = slice(first * T, rows.stop * T)
        logits, now = self._predicted(tape.inputs[rows])
        figures = {}
        if tape.kept.routing is not None and now.routing is not None:
            before = tape.kept.routing.indices[at].sort(-1).values
            figures["route_flips"] = (before != now.routing.indices.sort(-1).values).any(-1).float().mean()
        if self.model.store is not None:
            figures["splat_flips"] = (tape.kept.neighbours[at, 0] != now.neighbours[:, 0]).float().mean()
        if tape.scored is not None:
            figures["score_shift"] = score_shift(self.model, tape.scored)
        return Audited(tape.inputs[rows], logits, figures)

    # -- statistics and events -------------------------------------------------------------------------------

    def _events(self, step: int, states: Tensor, renew: Renew) -> dict[str, Tensor]:
        """Statistics of this step's states, then what is due: revival, toppling, new splats, a new index."""
        store, ebm = self.model.store, self.ebm
        assert store is not None
        moved: list[Tensor] = []
        events: dict[str, Tensor] = {}
        wins = store.observe(states)
        pile = self.model.pile
        if pile is not None:
            pile.buffer.add(states, wins)
            drive(store, wins)
            self.states_seen += len(states)
        if ebm.revive and (step in REVIVED_AT or (step > 0 and step % ebm.revive_every == 0)):
            rows = store.revive(self._present(step), self._rng(step, "revive"))
            moved.append(rows)
            events["revived"] = states.new_tensor(float(len(rows)))
            if pile is not None:
                pile.buffer.forget(rows)
        if pile is not None and step > 0 and step % ebm.soc_every == 0:
            event = pile.check(store, limit=self._splats_at(step))
            moved.append(event.rows_changed)
            self.soc_rate = 1000 * event.consolidations / self.states_seen
            counts: dict[str, float] = {"topplings": event.topplings, "consolidations": event.consolidations}
            counts["soc_rate"] = self.soc_rate
            events |= {name: states.new_tensor(float(count)) for name, count in counts.items()}
            self.states_seen = 0
        moved.append(self._next_phase(step))
        changed = torch.cat(moved)
        if len(changed):
            renew(store.mu, changed)
        if len(changed) or (step + 1) % self.run.index.rebuild_every == 0:
            store.rebuild_index()
        in_use = store.width()[store.active]
        return events | {"splats": states.new_tensor(float(len(store))), "kappa_median": in_use.median()}

    def _next_phase(self, step: int) -> Tensor:
        """Rows of the splats that the next step is the first to have."""
        store = self.model.store
        assert store is not None
        store.kappa_divisor = self.ebm.temperature[phase_at(step + 1, self.run.steps)]
        count = self._splats_at(step + 1) - len(store)  # also those of a step that was skipped
        if count <= 0 or step + 1 >= self.run.steps:
            return torch.empty(0, dtype=torch.int64, device=store.mu.device)
        return store.grow(self._present(step + 1), count, self._rng(step + 1, "grow"))

    # -- what it is to the optimizers ------------------------------------------------------------------------

    def matrices(self, model: nn.Module) -> list[nn.Parameter]:
        assert isinstance(model, EnergyModel)
        inside = [*model.encoder.named_parameters(), *model.decoder.named_parameters()]
        return [p for name, p in inside if p.ndim == 2 and not OUTSIDE.search(name)]

    def directions(self, model: nn.Module) -> list[nn.Parameter]:
        assert isinstance(model, EnergyModel)
        splats = [] if model.store is None else [model.store.mu]
        return [model.embeddings, *splats, model.pair_a, model.pair_b]

    def groups(self, names: Sequence[str], kind: str) -> dict[str, list[str]] | None:
        if kind not in GROUPS:
            return None
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(GROUPS[kind](name), []).append(name)
        return groups

    # -- figures and the kept model --------------------------------------------------------------------------

    def evaluated(self, model: nn.Module, step: int, loss: float, files: RunFiles) -> dict[str, float]:
        assert isinstance(model, EnergyModel)
        tokens = self._windows("val", EVALUATED)[0]
        figures = held_out(model, tokens, self._generator(0, "evaluate"), self.ebm.noise) | self._recent()
        self.curve.append({"step": float(step), "val_loss": loss, **figures})
        self._alert(step, figures, files)
        if self.ebm.keep_every and step % self.ebm.keep_every == 0:
            self._keep(model, step, files.models / f"step_{step}.pt")
        return figures

    def _recent(self) -> dict[str, float]:
        """Figures of `eval_columns` from the last step and the last look at the pile; NaN: none yet."""
        names = [name for name in self.eval_columns if name in OF_STEPS]
        known = {name: float(part) for name, part in self.latest.items() if name in names}
        known["soc_rate"] = self.soc_rate
        return {name: known.get(name, math.nan) for name in names}

    def _alert(self, step: int, figures: Mapping[str, float], files: RunFiles) -> None:
        """Write what is wrong for the first time into alerts.jsonl, and into the log."""
        known = {alert["cause"] for alert in self.alerts}
        new = [finding for finding in alerts(figures, self.curve) if finding.cause not in known]
        if not new:
            return
        lines: list[dict[str, Any]] = [{"step": step, **asdict(finding)} for finding in new]
        self.alerts += lines
        write_atomic(files.alerts, "".join(f"{json.dumps(alert)}\n" for alert in self.alerts).encode())
        with open(files.log, "a", encoding="utf-8") as log:
            log.writelines(f"{alert_in_words(alert)}\n" for alert in lines)

    def _windows(self, split: str, count: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of about `count` tokens of a split, in windows spread over it, (B, T) each."""
        T = self.run.model.context
        [pair] = windows(self.tokens[split], T, max(1, count // T))
        return pair

    def finished(self, model: nn.Module, step: int, files: RunFiles) -> dict[str, Any]:
        assert isinstance(model, EnergyModel)
        self._keep(model, step, files.model)
        return {"workload": self._figures(model)}

    def _figures(self, model: EnergyModel) -> dict[str, Any]:
        """What result.json says of the model itself, on validation text."""
        model.eval()
        tokens = self._windows("val", JUDGED)[0]
        figures: dict[str, Any] = held_out(model, tokens, self._generator(0, "evaluate"), self.ebm.noise)
        inputs, targets = self._windows("val", SAMPLED)
        try:
            figures |= sampled_loss(
                model, inputs, targets, sampling_of(self.run), self._generator(0, "sample"), SAMPLES
            )
        except ValueError as error:  # a chain that left the finite numbers
            figures["sampling"] = str(error)
        unigram, bigram = ngram_baselines(self.train_ids, self.tokens["val"].cpu().numpy(), self.vocabulary)
        trend = energy_trend([row["energy"] for row in self.curve if "energy" in row])
        return figures | {"unigram": unigram, "bigram": bigram, "energy_trend": trend}

    def _keep(self, model: EnergyModel, step: int, path: Path) -> None:
        write_model(path, model, self.run, tokenizer_of(self.run, self.corpus), step, self.curve)

    def state_dict(self) -> dict[str, Any]:
        return {
            "states_seen": self.states_seen,
            "soc_rate": self.soc_rate,
            "curve": self.curve,
            "alerts": self.alerts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states_seen = state["states_seen"]
        self.soc_rate = state["soc_rate"]
        self.alerts = list(state["alerts"])
        self.curve = list(state["curve"])
