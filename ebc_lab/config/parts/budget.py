from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ebc_lab.ebc import options

from ..errors import any_of
from ..fields import EVEN_UNREAD, LENGTH, LENGTH_OR_0, STEPS, number, setting
from ..part import Figure, Mode, Part, Run, Tail
from .stabilizer import NO_WHOLE_STEP, RADIUS_UNIT, RAMP, SCHEDULES, tail_of_radius


@dataclass
class BudgetConfig(Part):
    """EBC's budget of predicted change, and how the clip coefficient c is found."""

    name: str = setting("tracked", "how c is found", group="budget")
    target_kl: float = setting(0.01, "δ*, the target KL of a step", "nats/token", above=0, high=100)
    schedule: str = setting("constant", "of δ* over the run", choices=options.SCHEDULES)
    probe_sequences: int = setting(2, "sequences that choose c; the rest is for the audit", low=1, high=65536)
    probe_tokens: str = setting(
        "train", "where these come from: the batch, or training text held back", choices=("train", "held")
    )
    aggregate: str = setting(
        "l1", "how contributions add up to S; l2 gives no bound", choices=options.AGGREGATES
    )
    grouping: str = setting(
        "block",
        "parameters that share one β; matrices: all others move freely; kmeans: tensors alike in size, "
        "shape, weights and depth",
        choices=(*options.GROUPINGS, "kmeans"),
    )
    clusters: int = setting(
        6, "number of groups", "groups", low=1, high=1000, by="grouping", only=("kmeans",)
    )
    guard: str = setting(
        "none",
        "corrects the radius τ after audits",
        choices=options.GUARDS,
        only=options.GUARDED,
        **EVEN_UNREAD,
    )
    probe: str = setting("jvp", "how β is measured", choices=options.PROBES)
    cadence: str = setting("warm", "when β is measured (docs/method.md)", choices=options.FORENSIC_CADENCES)
    beta_init: str = setting("first", "forensic: initial β", choices=options.BETA_INITS)
    units: str = setting(
        "logits", "forensic: unit of S; per_lr leaves the learning rate out", choices=options.UNITS
    )
    radius: float | None = setting(
        None,
        "the longest step in weights, ‖c·ΔW‖, beside δ*; it follows √m(t) of schedule; empty: none",
        above=0,
        high=1e9,
        unnamed_at=None,
    )
    radius_unit: str = setting(
        "absolute", RADIUS_UNIT.format("radius"), choices=options.RADIUS_UNITS, unnamed_at="absolute"
    )
    ramp: int = setting(0, RAMP, "steps", low=0, high=STEPS, unnamed_at=0)
    until: float = setting(
        1.0,
        "EBC acts until then; from there on every update is applied in full",
        "× steps",
        above=0,
        high=1,
        unnamed_at=1.0,
    )
    exponent: str = setting(
        "square",
        "KL grows as c², or as a power of c measured at audits, as on a quantized model",
        choices=options.EXPONENTS,
        only=("shadow",),
        unnamed_at="square",
        **EVEN_UNREAD,
    )
    measure_every: int = setting(1, "steps between measurements", only=options.MEASURED, **LENGTH)
    measure: str = setting(
        "every",
        "one step in measure_every, or when_needed: where the prediction is not sure enough",
        choices=options.CADENCES_OF_KL,
        only=("tracked",),
        unnamed_at="every",
    )
    measure_above: float = setting(
        0.25,
        "the predicted standard deviation of ln KL above which it is measured",
        above=0,
        high=10,
        by="measure",
        only=("when_needed",),
    )
    stretch: float | None = setting(
        1.5,
        "the most that c may be of the scale at which the KL was measured; empty: anything",
        low=1,
        high=1e9,
        only=options.MEASURED,
        unnamed_at=None,
        before_it_existed=None,
    )
    sensitivity_every: int = setting(
        0,
        "steps between recordings of S; 0: never; the bounded budgets record it at every step",
        **LENGTH_OR_0,
    )

    place = 50
    columns = {  # only in runs with a radius
        "update_norm": ("", "‖ΔW‖ of the weights that c scales, before it does"),
        "radius_limit": ("", "r, the most that ‖c·ΔW‖ may be"),
        "ruled": ("", "what limited the step: 0 nothing, 1 the KL (or `stretch`), 2 the radius"),
    }
    figures = (
        Figure("kl_ruled", "0–1", "steps on which the KL was the bound that ruled, beside a radius"),
        Figure("radius_ruled", "0–1", "steps on which the radius was"),
        Figure("measured", "0–1", "steps at which a KL was measured to choose c, beside a radius"),
    )

    def measured_steps(self) -> str:
        """Return which steps measure a KL (one of CADENCES_OF_KL): the value of the setting `measure` where
        it has an effect, and `every` elsewhere."""
        return self.measure if self.name == "tracked" and self.measure_every == 1 else "every"

    def leaves_some_free(self) -> bool:
        """Return whether some trained parameters are outside the budget and move at the learning rate."""
        return self.grouping == "matrices"

    def unread(self) -> Iterator[str]:
        bounded = self.name in options.BOUNDED
        if not (bounded or self.sensitivity_every > 0):  # S is never computed
            yield from ("aggregate", "guard", "probe", "cadence", "beta_init", "units")
            if not self.leaves_some_free():
                yield from ("grouping", "clusters")
            return  # the identity of these runs has always included the settings below
        if bounded:
            yield "sensitivity_every"
        if self.radius is None:
            yield from ("radius_unit", "ramp")
        if self.measured_steps() != self.measure:  # a scale's file may set it for another budget
            yield from ("measure", "measure_above")

    def refuses(self, run: Run) -> Iterator[str]:
        usual = BudgetConfig()
        if self.radius is None and (self.radius_unit, self.ramp) != (usual.radius_unit, usual.ramp):
            yield "budget.radius_unit and budget.ramp are of a radius: set budget.radius, too."
        if self.radius is not None and self.name == options.LAGGED:
            yield "budget=lagged chooses c before the step is known: leave budget.radius empty."

    def unfit(self, mode: Mode) -> Iterator[str]:
        if mode is Mode.EXACT:
            values = {**asdict(self), "budget": self.name}
            for key, allowed in options.WITH_ARITHMETIC.items():
                name = key if key == "budget" else f"budget.{key}"
                if key in values and values[key] not in allowed:
                    instead = any_of([f"{name}={value}" for value in allowed])
                    yield f"{name}={values[key]}: choose {instead}"
        if mode is Mode.EBM and self.grouping == "matrices":
            why = "it knows a GPT's matrices by their names; block has a group for each expert"
            yield f"budget.grouping=matrices: {why}"
        if mode is not Mode.IN_BACKWARD:
            return
        if self.name != options.LAGGED:
            yield f"budget={self.name}: {NO_WHOLE_STEP}; choose budget=lagged"
        if self.probe_tokens != "train":
            yield "budget.probe_tokens: leave it at its default"
        usual = BudgetConfig()
        for key in ("sensitivity_every", "exponent"):
            if getattr(self, key) != getattr(usual, key):
                yield f"budget.{key}: budget=lagged sees no whole step; leave it at its default"
        if self.leaves_some_free():
            yield "budget.grouping=matrices: budget=lagged scales every weight; choose another grouping"

    def tail(self) -> Iterator[Tail]:
        yield SCHEDULES[self.schedule]
        if self.radius is not None:
            yield Tail(f"_r{number(self.radius)}", f"radius {self.radius:g}")
            yield from tail_of_radius(self.radius_unit, self.ramp)
