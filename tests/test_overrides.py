import pytest

from ebc_lab.choices import groups
from ebc_lab.config import UserError
from ebc_lab.overrides import compose


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["scal=smoke"], ["scal", "did you mean scale"]),
        (["scale=smok"], ["did you mean smoke", "laptop, paper or smoke"]),
        (["+extra=1"], ["extra is not a setting"]),
        (["++model.widht=3"], ["did you mean model.width"]),
        (["~seeds"], ["cannot be deleted"]),
        (["optimizer=adan"], ["did you mean adam"]),
        (["steps"], ["KEY=VALUE"]),
        (["model.width=abc"], ["model.width", "abc"]),
        (["optimizer.lr=-1"], ["optimizer.lr", "> 0", "-1"]),
        (["optimizer.lr=inf"], ["optimizer.lr", "finite"]),
        (["optimizer.lr=nan"], ["optimizer.lr", "finite"]),
        (["model.heads=3"], ["multiple of model.heads"]),
        (["budget.probe_sequences=24"], ["probe_sequences", "1 to 23"]),
        (["study.name=../x"], ["study.name", "plain folder name"]),
        (["study.name='a b'"], ["study.name"]),
        (["study.name=.."], ["study.name"]),
        (["seeds=[]"], ["seeds"]),
        (["seeds=[1,1]"], ["twice"]),
        (["data=path"], ["data.file"]),
        (["data.file=x"], ["data=path"]),
        (["lr_sweep.grids.adam=[2e-3,1e-3]"], ["increasing"]),
        (["study.band=[0.7,0.5]"], ["study.band"]),
        (["lr_sweep.optimizers=[lyon]"], ["lyon", "did you mean lion?"]),
        (["optimizer=adam,sgd"], ["needs -m"]),
        (["controller.kp=0.1"], ["controller=pi or log_pi"]),
        (["controller=pi", "controller.kp=nan"], ["controller.kp", "finite"]),
        (["budget.target_kl=1e-9"], ["target_kl", "1e-06"]),
        (["device=cuda"], ["no GPU"]),
        (["output_dir=''"], ["output_dir"]),
        (["lr_sweep.control_warmup=-5"], ["control_warmup"]),
    ],
)
def test_a_mistake_is_refused_in_one_sentence_that_names_it(overrides, words):
    with pytest.raises(UserError) as caught:
        compose(["scale=smoke", *overrides] if "scal" not in overrides[0] else overrides, study=False)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("override", ["optimizer.lr=1e-3", "seed=3", "steps=10", "budget.target_kl=0.1", "stabilizer=none"])
def test_a_study_refuses_settings_that_it_decides_itself(override):
    with pytest.raises(UserError):
        compose(["scale=smoke", override])
    compose(["scale=smoke", override], study=False)


def test_groups_narrow_what_a_study_covers():
    config = compose(["scale=laptop", "optimizer=muon", "projection=spectral", "budget=surrogate"])
    assert config.lr_sweep.optimizers == ["muon"]
    assert config.lr_sweep.projections == ["spectral"]
    assert config.calibrate.budgets == ["surrogate"]


def test_scales_hold_what_their_table_says():
    laptop, paper = compose(["scale=laptop"]), compose(["scale=paper"])
    assert (laptop.batch_size, laptop.model.context, laptop.lr_sweep.steps, laptop.finals.steps) == (16, 64, 200, 600)
    assert laptop.lr_sweep.grids["adam"] == [1e-3, 2e-3, 4e-3, 8e-3]
    assert (paper.batch_size, paper.model.context, paper.finals.steps, len(paper.seeds)) == (64, 256, 2000, 5)
    assert paper.lr_sweep.projections == ["none", "spectral"]
    assert compose([]).scale == "laptop"  # no GPU in tests


def test_every_choice_of_every_group_composes():
    for group, choices in groups().items():
        for choice in choices:
            extra = {"path": ["data.file=README.md"], "replay": ["lr_schedule.source=x"]}.get(choice, [])
            compose(["scale=smoke", f"{group}={choice}", *extra] if group != "scale" else [f"scale={choice}"], study=False)
