"""Every arm that a study can make, each as overrides of one small run: what is tried on the emulated device.

The choices of conf/ are read from there, so that a new one is tried, or must say here why it cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator

from ebc_lab.config.choices import groups

SHAPE = [
    "threads_per_run=1",
    "compile=off",
    "batch_size=8",
    "model.context=16",
    "model.blocks=2",
    "model.width=32",
    "model.heads=2",
    "optimizer.lr=5e-3",
    "steps=44",
    "eval_every=22",
    "evaluate=[val]",
    "audit_every=7",
    "budget.probe_sequences=4",
]
EBC = ["stabilizer=ebc", "budget=tracked", "budget.target_kl=0.01"]
PLAIN = ["stabilizer=none"]
AXIOM = ["optimizer=axiom", "optimizer.lr=1e-2"]
EBM = [*EBC, "workload=ebm", "tokens=characters", "ebm=smoke", "ebm.splats=64"]
IMAGES = [
    "workload=images",
    "data=digits",
    "model=cnn",
    "model.context=1",
    "model.width=16",
    "model.blocks=1",
]
OWN = "support.emulated.own:"

# group of conf/ -> what each of its choices needs beside it; by default EBC on the small GPT
NEEDED: dict[str, dict[str, list[str]]] = {
    "model": {"cnn": IMAGES, "vit": [*IMAGES, "model=vit"]},
    "workload": {"ebm": EBM, "images": IMAGES},
    "optimizer": {
        "axiom": AXIOM,
        "sgd": ["optimizer.lr=0.1"],
        "lion": ["optimizer.lr=5e-4"],
        "adafactor": ["optimizer.lr=4e-2"],
        "adam_uncorrected": ["optimizer.lr=5e-4"],
        **{name: ["optimizer.lr=1"] for name in ("prodigy", "d_adaptation", "dog", "ldog", "mechanic")},
        **{name: ["optimizer.lr=1e-2"] for name in ("hyperball", "lionar", "scion")},
    },
    "budget": {"lagged": [*AXIOM, "memory=hooks"]},
    "controller": {"energy": ["controller.a=0.1"], "pi": ["budget=surrogate"]},
    "stabilizer": {},
    "projection": {"sphere": EBM},
    "lr_schedule": {},
    "quantizer": {},
    "memory": {name: [*AXIOM, *PLAIN] for name in ("hooks", "int4", "all")},
    "policy": {},
    "partition": {"clustered": ["partition.clusters=3"], "stratified": ["partition.clusters=3"]},
    "shock": {},
    "determinism": {"verity": ["dtype=float32", "budget=shadow"]},
    "target": {"loss": ["target.loss=2"]},
    "decoder": dict.fromkeys(("transformer", "moe"), EBM),
    "encoder": dict.fromkeys(("transformer", "window"), EBM),
    "sampler": dict.fromkeys(("original", "baoab", "adjusted"), EBM),
    "index": dict.fromkeys(("auto", "exact", "hnsw"), EBM),
}
# what is not tried, and why
NOT: dict[str, dict[str, str]] = {
    "model": {"custom": "as own parts, below", "gru": "its kernels are cuDNN's"},
    "optimizer": {"custom": "as own parts, below"},
    "stabilizer": {"custom": "as own parts, below"},
    "lr_schedule": {
        "custom": "as own parts, below",
        "replay": "needs another run; the rate is a number like any other",
    },
    "index": {"ivf": "needs faiss"},
}
# groups of conf/ that change nothing of what a step launches, or that all arms share
ELSEWHERE = {"scale", "study", "check", "launcher", "tracker", "data", "tokens", "init", "ebm", "adapter"}
ELSEWHERE |= {"race"}

# settings within a choice that change what a step launches
WITHIN: dict[str, list[str]] = {
    "tracked, bfloat16": [*EBC, "dtype=bfloat16"],
    "plain, bfloat16": [*PLAIN, "dtype=bfloat16"],
    "muon, bfloat16": [*EBC, "optimizer=muon", "optimizer.lr=8e-3", "dtype=bfloat16"],
    "surrogate, bfloat16": [*EBC, "budget=surrogate", "dtype=bfloat16"],
    "weights in bfloat16": [*EBC, "param_dtype=bfloat16", "dtype=bfloat16"],
    "plain muon": [*PLAIN, "optimizer=muon", "optimizer.lr=8e-3", "optimizer.weight_decay=0.1"],
    "tracked, matrices": [*EBC, "budget.grouping=matrices"],
    "tracked, every third step": [*EBC, "budget.measure_every=3"],
    "tracked, measured when it must": [*EBC, "budget.measure=when_needed"],
    "tracked beside a radius": [*EBC, "budget.radius=0.05", "budget.radius_unit=initial", "budget.ramp=20"],
    "calibrated, matrices": [*EBC, "budget=calibrated", "budget.grouping=matrices"],
    "surrogate, tensors": [*EBC, "budget=surrogate", "budget.grouping=tensor"],
    "surrogate, k-means": [*EBC, "budget=surrogate", "budget.grouping=kmeans"],
    "surrogate, finite differences": [*EBC, "budget=surrogate", "budget.probe=fd"],
    "surrogate, dense cadence": [*EBC, "budget=surrogate", "budget.cadence=dense"],
    "surrogate, published cadence": [*EBC, "budget=surrogate", "budget.cadence=published"],
    "surrogate, guard shrink_inflate": [*EBC, "budget=surrogate", "budget.guard=shrink_inflate"],
    "surrogate, guard shrink_published": [*EBC, "budget=surrogate", "budget.guard=shrink_published"],
    "surrogate, beta from zero": [*EBC, "budget=surrogate", "budget.beta_init=zero"],
    "surrogate, per learning rate": [*EBC, "budget=surrogate", "budget.units=per_lr"],
    "shadow, linear": [*EBC, "budget=shadow", "budget.schedule=linear"],
    "shadow, exponent fitted": [*EBC, "budget=shadow", "budget.exponent=auto"],
    "shadow, until half": [*EBC, "budget=shadow", "budget.until=0.5"],
    "shadow, sensitivities": [*EBC, "budget=shadow", "budget.sensitivity_every=10"],
    "shadow, held-back text": [*EBC, "budget=shadow", "budget.probe_tokens=held"],
    "δ* by the squared rate": [*EBC, "budget.schedule=lr_squared", "lr_schedule=warmup_linear"],
    "curve": [*EBC, "curve_every=8"],
    "two batches a step": [*EBC, "accumulate=2", "budget.probe_sequences=2"],
    "dropout": [*EBC, "model.dropout=0.1"],
    "plain, dropout": [*PLAIN, "model.dropout=0.1"],
    "overlapping windows at the end": [*EBC, "final_windows=40"],
    "adamw, decay": [*EBC, "optimizer=adamw", "optimizer.weight_decay=0.1"],
    "spectral, muon": [*EBC, "projection=spectral", "optimizer=muon", "optimizer.lr=8e-3"],
    "stiefel, muon": [*EBC, "projection=stiefel", "optimizer=muon", "optimizer.lr=8e-3"],
    "plain, spectral": [*PLAIN, "projection=spectral"],
    "ternary by rows": [*PLAIN, "quantizer=ternary", "quantizer.group=row"],
    "gradients in ternary": [
        *(*EBC, "quantizer.gradients=ternary", "quantizer.rounding=stochastic"),
        "quantizer.error_feedback=true",
    ],
    "gradients in five, nearest": [*EBC, "quantizer.gradients=five"],
    "state in int8": [*EBC, "quantizer.state=int8"],
    "state in ternary": [*EBC, "quantizer.state=ternary"],
    "state in five, adamw": [*EBC, "quantizer.state=five", "optimizer=adamw"],
    "radius by groups": ["stabilizer=trust_region", "stabilizer.per=group"],
    "radius of effective weights": [
        *("stabilizer=trust_region", "stabilizer.norm=effective", "quantizer=ternary")
    ],
    "int4 activations, adam": [*PLAIN, "memory=int4"],
    "int4 activations, tracked": [*EBC, *AXIOM, "memory=int4"],
    "verity, plain": [*PLAIN, "determinism=verity", "dtype=float32"],
    "energy-based, toppling": [*EBM, "ebm.soc=true"],
    "energy-based, plain": [*EBM, *PLAIN],
    "shards in order": [*EBC, "data=bin", "model=modern"],
    "shards at random, muon": [
        *(*EBC, "data=bin", "data.order=random", "model=modern", "optimizer=muon", "optimizer.lr=8e-3")
    ],
    "own model": [*EBC, "model=custom", f"model.target={OWN}model"],
    "own optimizer": [*EBC, "optimizer=custom", f"optimizer.target={OWN}optimizer", "optimizer.lr=0.1"],
    "own stabilizer": ["stabilizer=custom", f"stabilizer.target={OWN}HalfAfterTen"],
    "own schedule": [*EBC, "lr_schedule=custom", f"lr_schedule.target={OWN}schedule"],
}


def _of_conf() -> Iterator[tuple[str, list[str]]]:
    for group, beside in NEEDED.items():
        for name in groups()[group]:
            if name in NOT.get(group, {}):
                continue
            first = [] if group == "stabilizer" else EBC
            yield f"{group}={name}", [*first, f"{group}={name}", *beside.get(name, [])]


ARMS: dict[str, list[str]] = {**dict(_of_conf()), **WITHIN}
# each kind of captured step, and of what cannot be: tried for every change
QUICK = (
    "stabilizer=none",
    "budget=tracked",
    "budget=surrogate",
    "muon, bfloat16",
    "controller=energy",
    "tracked beside a radius",
    "dropout",
    "shards in order",
    "quantizer=ternary",
    "budget=lagged",
    "own stabilizer",
)
