"""Settings that nobody reads: refused where they are set, unless another run of the study reads them."""

import pytest
from support.named import run

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


def test_limits_themselves_are_allowed_or_not():
    looks = ["seeds=[0,1]", "finals.max_seeds=42", "finals.seeds_per_look=2"]
    assert compose(["scale=smoke", *looks]).finals.max_seeds == 42  # 20 looks
    slurm = ["launcher=slurm", "launcher.slots=1", "device=cpu", "launcher.signal_delay_s=120"]
    with pytest.raises(UserError, match="timeout_min must be longer than"):
        compose(["scale=smoke", *slurm, "launcher.timeout_min=2"])


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
