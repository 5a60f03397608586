"""CSV files as W&B's site exports them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from support.runs_of_others import written

from ebc_lab.config.errors import UserError
from ebc_lab.judging.asked import Asked
from ebc_lab.judging.judgement import judge
from ebc_lab.judging.readers import wandb_csv

CHART = (
    '"Step","adam-s0 - val/loss","adam-s0 - val/loss__MIN","adam-s0 - val/loss__MAX",'
    '"muon - x-s1 - val/loss","muon - x-s1 - val/loss__MIN","muon - x-s1 - val/loss__MAX"\n'
    '"10","3.5","3.5","3.5","","",""\n'
    '"20","3","3","3","NaN","NaN","NaN"\n'
    '"30","","","","2","1.5","2.5"\n'
)


def test_a_chart_is_a_row_an_evaluation_with_arm_and_seed(tmp_path: Path) -> None:
    path = written(tmp_path / "wandb_export.csv", CHART)
    assert wandb_csv.claims(path)
    source = wandb_csv.read(path, Asked())
    assert source.frame.to_dict("list") == {
        "Step": [10, 20, 20, 30],
        "val/loss": [3.5, 3, math.inf, 2],
        "run": ["adam-s0", "adam-s0", "muon - x-s1", "muon - x-s1"],
        "arm": ["adam", "adam", "muon - x", "muon - x"],
        "seed": ["0", "0", "1", "1"],
    }
    assert source.roles == {"run": "run", "arm": "arm", "step": "Step", "seed": "seed", "loss": "val/loss"}
    assert "1 points are means of several values" in source.notes[0]


def test_a_judgement_says_which_columns_the_format_has(tmp_path: Path) -> None:
    found = judge(written(tmp_path / "wandb_export.csv", CHART)).record
    assert [(one["role"], one["sentence"]) for one in found["taken"]] == [
        ("step", "step: column Step, by the format"),
        ("loss", "loss: column val/loss, by the format"),
        ("better", "better: lower val/loss is better, by its name"),
        ("seed", "seed: column seed, by the format"),
        ("run", "run: column run, by the format"),
        ("arm", "arm: column arm, by the format"),
        ("reference", "reference: adam, by its name"),
    ]


def test_a_chart_over_another_axis_keeps_the_step(tmp_path: Path) -> None:
    path = written(
        tmp_path / "wandb_export.csv",
        '"epoch","adam - _step","adam - _step__MIN","adam - acc","adam - acc__MIN"\n1,100,100,0.5,0.5\n',
    )
    source = wandb_csv.read(path, Asked())
    assert list(source.frame["_step"]) == [100]
    assert source.roles["loss"] == "acc"
    with pytest.raises(UserError, match="is a chart of acc"):
        wandb_csv.read(path, Asked(loss="val_loss"))


def test_the_table_of_runs_is_a_row_a_run(tmp_path: Path) -> None:
    path = written(
        tmp_path / "wandb_export.csv",
        '"Name","State","Notes","User","Tags","Created","Runtime","Sweep","optimizer","seed","val_loss"\n'
        '"adam","finished","-","me","","2024-05-01T10:00:00.000Z","60","","adam","0","2.5"\n'
        '"adam","crashed","-","me","","2024-05-01T11:00:00.000Z","60","","adam","1",""\n',
    )
    assert wandb_csv.claims(path)
    source = wandb_csv.read(path, Asked())
    assert list(source.frame.Name) == ["adam", "adam (2)"]
    assert source.roles == {"run": "Name", "started": "Created"}
    assert any("crashed" in note for note in source.notes)


def test_arm_and_seed_of_a_table_are_taken_from_names_where_it_has_no_columns_for_them(
    tmp_path: Path,
) -> None:
    head = '"Name","State","Created"'
    for columns, roles in (
        ("val_loss", {"run": "Name", "started": "Created", "seed": "seed", "arm": "arm"}),
        ("optimizer", {"run": "Name", "started": "Created", "seed": "seed"}),
        ("seed", {"run": "Name", "started": "Created"}),
    ):
        rows = "".join(f'"{name}","finished","","1"\n' for name in ("adam-s0", "muon-s3"))
        source = wandb_csv.read(
            written(tmp_path / "wandb_export.csv", f'{head},"{columns}"\n{rows}'), Asked()
        )
        assert source.roles == roles
        assert list(source.frame.get("arm", [])) == (["adam", "muon"] if "arm" in roles else [])
        if "seed" in roles:
            assert list(source.frame.seed) == ["0", "3"]


def test_other_tables_are_not_claimed(tmp_path: Path) -> None:
    path = written(tmp_path / "runs.csv", "Name,step,loss\nadam,1,2\n")
    assert not wandb_csv.claims(path)
    path.write_text("")
    assert not wandb_csv.claims(path)


def test_a_run_whose_name_holds_a_line_break_keeps_its_spread(tmp_path: Path) -> None:
    path = tmp_path / "chart.csv"
    names = ",".join(f'"a\nb, {s} - val/loss{end}"' for s in (0, 1) for end in ("", "__MIN", "__MAX"))
    path.write_text(f"Step,{names}\n1,2,2,2,3,3,3\n")
    frame = wandb_csv.read(path, Asked()).frame
    assert list(frame["val/loss"]) == [2, 3]
    assert "val/loss__MIN" not in frame
