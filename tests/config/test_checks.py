"""Settings that nobody reads: refused where they are set, unless another run of the study reads them."""

import pytest
from support.named import run

from ebc_lab.config.checks import validate_run
from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import identity

IN_VAIN = [
    (["optimizer=sgd", "optimizer.beta1=0.8"], "beta1 goes with optimizer=adam, .*not optimizer=sgd"),
    (["launcher.partition=gpu"], "launcher.partition goes with launcher=slurm, not launcher=local"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(("overrides", "words"), IN_VAIN, ids=[given[-1] for given, _ in IN_VAIN])
def test_a_setting_that_nobody_reads_is_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["scale=smoke", *overrides], study=False)


EBC = {"stabilizer": {"name": "ebc"}}
EBM = {"workload": {"name": "ebm"}}
LOW_BIT = {"quantizer": {"name": "ternary"}}
ENDING = {"race": {"name": "bounds"}, "steps": 200, "eval_every": 1}
LARGE = {"model": {"width": 5000, "blocks": 10, "context": 476}}
LIMITS_OF_RUNS = [  # settings, and of a further one the last value that is taken and the first that is not
    ({"shock": {"name": "lr_spike"}, "steps": 60}, "shock.step", 59, 60, "beyond the run's 60 steps"),
    ({"shock": {"name": "label_noise"}}, "shock.size", 1.0, 1.001, "at most 1, not 1.001"),
    (ENDING, "race.above", {"199": 5.0}, {"200": 5.0}, "at step 200, .* below 200"),
    (ENDING | {"eval_every": 40}, "race.above", {"160": 5.0}, {"159": 5.0}, "multiple of eval_every=40"),
    (ENDING, "race.above", {"1": 5.0}, {"0": 5.0}, "'0' is no step"),
    (ENDING, "race.above", *({str(s): 5.0 for s in range(1, n)} for n in (101, 102)), "at most 100 entries"),
    (EBM, "decoder.active", 4, 5, "at most decoder.experts=4"),
    (EBM, "ebm.kappa_min", 49.99, 50.0, "must be below ebm.kappa_max=50"),
    (EBM | {"ebm": {"splats": 20}}, "ebm.neighbours", 20, 21, "of at most ebm.splats=20"),
    (EBM, "ebm.splats", 0, 15, "of at most ebm.splats=15"),
    (EBM, "ebm.levels", *([i / 100 for i in range(1, n)] for n in (17, 18)), "at most 16 items, not 17"),
    (EBM, "ebm.levels", [0.1, 0.101], [0.1, 0.1], "increasing, without repeats"),
    (EBM, "ebm.temperature", [1.0] * 3, [1.0] * 4, "at most 3 items"),
    (EBM, "sampler.step", 5e-324, 0.0, "> 0 and < 2, not 0.0"),
    (EBM, "sampler.step", 1.999, 2.0, "> 0 and < 2, not 2.0"),
    (EBM, "sampler.temperature", 0.0, -5e-324, ">= 0 and <= 1000"),
    (EBM, "sampler.temperature", 1000, 1000.001, ">= 0 and <= 1000"),
    (LOW_BIT, "quantizer.group", "1", "0", "a count of weights >= 1"),
    (LOW_BIT, "quantizer.scale", "1e300", "inf", "a step > 0"),
    (LOW_BIT, "quantizer.scale", "1e-9", "0", "a step > 0"),
    ({"optimizer": {"name": "galore"}}, "optimizer.rank", 1, 0, "galore needs optimizer.rank >= 1"),
    (EBC, "budget.probe_sequences", 15, 16, "leave rows of the batch for the audit: 1 to 15"),
    (EBC | {"accumulate": 4}, "budget.probe_sequences", 3, 4, "each part of the batch for the audit: 1 to 3"),
    (EBC, "budget.target_kl", 1e-6, 0.999e-6, "below 1e-06 nats"),
    (EBC | {"budget": {"schedule": "linear"}}, "budget.target_kl", 2e-5, 1.99e-5, "below 2e-05 nats"),
    (EBC | {"dtype": "bfloat16"}, "budget.target_kl", 1e-4, 0.999e-4, "below 0.0001 nats"),
    (EBC | {"param_dtype": "bfloat16"}, "budget.target_kl", 1e-4, 0.999e-4, "bfloat16 can show"),
    # what is of a radius needs one
    (EBC | {"controller": {"steers": "radius"}}, "budget.radius", 1.0, None, "set budget.radius, too"),
    (EBC | {"budget": {"radius_unit": "initial"}}, "budget.radius", 1.0, None, "are of a radius"),
    (EBC | {"budget": {"ramp": 5}}, "budget.radius", 1.0, None, "are of a radius"),
    # 1000 GB exactly, and 2^21 - 1 tokens
    (LARGE, "batch_size", 1000, 1001, "at least 1001 GB of memory, and 1000 GB is the most"),
    ({"determinism": {"name": "verity"}, "batch_size": 889}, "model.context", 2359, 2360, "2,098,040: make"),
]


@pytest.mark.parametrize(
    ("settings", "key", "taken", "refused", "words"),
    LIMITS_OF_RUNS,
    ids=[f"{key}-{str(refused)[:20]}" for _, key, _, refused, _ in LIMITS_OF_RUNS],
)
def test_a_limit_itself_is_on_its_side(settings, key, taken, refused, words):
    group, _, name = key.partition(".")
    asked = [run(settings, {group: {name: value} if name else value}) for value in (taken, refused)]
    validate_run(asked[0])
    with pytest.raises(UserError, match=words):
        validate_run(asked[1])


def test_limits_themselves_are_allowed_or_not():
    looks = ["seeds=[0,1]", "finals.max_seeds=42", "finals.seeds_per_look=2"]
    assert compose(["scale=smoke", *looks]).finals.max_seeds == 42  # 20 looks
    slurm = ["launcher=slurm", "launcher.slots=1", "device=cpu", "launcher.signal_delay_s=120"]
    assert compose(["scale=smoke", *slurm, "launcher.timeout_min=3"]).launcher.timeout_min == 3
    with pytest.raises(UserError, match="timeout_min must be longer than"):
        compose(["scale=smoke", *slurm, "launcher.timeout_min=2"])


SLURM = "launcher=slurm launcher.slots=1 launcher.processes_per_run=4 launcher.nodes_per_run=2 "
SLURM += "batch_size=12 budget.probe_sequences=4 audit_tokens=64 model.context=16 launcher.cpus_per_task=2 "
LIMITS_OF_STUDIES = [  # overrides, and of a further one the last value taken and the first that is refused
    ("seeds=[0,1]", "finals.max_seeds=", "3", "2", "finals.max_seeds=2 adds"),
    ("finals.max_seeds=3", "seeds=", "[0,1]", "[0]", "two at least"),
    ("", "seeds=", "[99,103]", "[99,100]", "must not contain 100 to 102"),
    ("", "seeds=", "[99,103]", "[102,103]", "must not contain 100 to 102"),
    ("profiles.target_seeds=4", "seeds=", "[103]", "[102]", "must not contain 100 to 102"),
    ("study=calibrated profiles.target_seeds=4", "seeds=", "[105]", "[104]", "must not contain 100 to 104"),
    ("", "seeds=", str([*range(100)]), str([*range(200, 301)]), "at most 100 items, not 101"),
    ("", "study.name=", "x" * 80, "x" * 81, "at most 80"),
    ("", "output_dir=", f"x/{'x' * 255}", f"x/{'x' * 256}", "more than 255 bytes"),
    ("", "output_dir=", f"'x{'ä' * 127}'", f"'{'ä' * 128}'", "more than 255 bytes"),
    ("", "output_dir=", "x/" * 500, "x/" * 500 + "x", "at most 1000 characters, not 1001"),
    ("", "study.band=", "[0.5,1]", "[0.5,0.5]", "two numbers 0 < low < high <= 1"),
    ("", "study.band=", "[0.5,1]", "[0.5]", "two"),
    ("", "finals.arms=", *(f"[baseline,control,ebc_x2,ebc_x{x}]" for x in (10000, 10001)), "up to 10000"),
    ("", "finals.arms=", *(f"[baseline,control,ebc_x2,ebc_x{x}]" for x in (0.0001, 0.00009)), "up to 10000"),
    ("study=ladder", "ladder.trials=", "3", "2", "three points at least"),
    ("study=ladder", "ladder.trials=", "0", "1", "three points at least"),
    ("study=stabilizers", "tune.trials=", "6", "5", "fewer than the points with which the grids begin"),
    (f"{SLURM} device=cuda", "launcher.gpus_per_node=", "2", "1", "needs launcher.gpus_per_node >= 2, not 1"),
    (f"{SLURM} device=cpu", "launcher.cpus_per_task=", "2", "1", "needs launcher.cpus_per_task >= 2, not 1"),
]


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("given", "key", "taken", "refused", "words"),
    LIMITS_OF_STUDIES,
    ids=[f"{key}{refused[:20]}" for _, key, _, refused, _ in LIMITS_OF_STUDIES],
)
def test_a_limit_of_a_study_is_on_its_side(given, key, taken, refused, words):
    asked = ["scale=smoke", *given.split()]
    compose([*asked, f"{key}{taken}"])
    with pytest.raises(UserError, match=words):
        compose([*asked, f"{key}{refused}"])


@pytest.mark.thorough
@pytest.mark.parametrize("scale", ["smoke", "laptop", "paper"])
def test_what_a_scale_or_the_file_of_a_choice_sets_was_not_asked_for(scale):
    for choices in (["optimizer=sgd"], ["model=custom", "model.target=json:loads"], ["workload=gpt"]):
        compose([f"scale={scale}", *choices], study=False)


def test_a_study_takes_what_one_of_its_runs_reads_and_no_more():
    assert compose(["scale=smoke", "study=partitions", "partition.clusters=4"]).partition.clusters == 4
    swept = compose(["scale=smoke", "lr_sweep.projections=[none,spectral]", "projection.bound=3"])
    assert swept.projection.bound == 3
    assert compose(["scale=smoke", "study=ebm", "ebm.splats=100"]).ebm.splats == 100
    for key in ("partition.clusters", "projection.bound", "ebm.splats"):
        with pytest.raises(UserError, match=f"{key} goes with"):
            compose(["scale=smoke", f"{key}=40"])


@pytest.mark.thorough
def test_an_arm_is_refused_for_what_itself_sets_in_vain():
    arm = "ablation.arms.mine={settings: {optimizer: {name: sgd, beta1: 0.5}}}"
    with pytest.raises(UserError, match=r"ablation.arms.mine: optimizer.beta1 goes with optimizer=adam"):
        compose(["scale=smoke", "study=partitions", "partition.clusters=4", arm])


def test_a_transformer_ebm_beside_a_model_of_ones_own_has_a_name():
    """It was a KeyError, which the check of another file kept from being seen."""
    own = {"name": "custom", "target": "my_part:make", "sha256": "1" * 64}
    usual = {"dtype": "float32", "device": "cpu", "compile": "off", "threads_per_run": 1}
    settings = {"workload": {"name": "ebm"}, "encoder": {"name": "transformer"}, "model": own}
    made = changed(run(usual), settings)
    assert identity(made)["model"].keys() == {"blocks", "width", "heads", "context", "dropout"}
