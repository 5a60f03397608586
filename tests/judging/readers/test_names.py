"""Names of runs, files and folders are taken apart as people mean them."""

from __future__ import annotations

import pytest

from ebc_lab.judging.readers.names import columns_of_places, split_name, split_names


@pytest.mark.parametrize(
    ("name", "arm", "settings"),
    [
        ("optimizer=adam_w,lr=0.1,+seed=2", "", {"optimizer": "adam_w", "lr": "0.1", "seed": "2"}),
        ("adam_seed0", "adam", {"seed": "0"}),
        ("muon-lr=0.02-s3", "muon", {"lr": "0.02", "seed": "3"}),
        ("adamw8bit", "adamw8bit", {}),
        ("sgd2", "sgd2", {}),
        ("muon_0.95", "muon_0.95", {}),
        ("adam_lr1e-3_seed_4", "adam", {"lr": "1e-3", "seed": "4"}),
        ("seed=4", "", {"seed": "4"}),
        ("run-3", "", {"run": "3"}),
        ("adam-run3", "adam", {"run": "3"}),
        ("gpt2_muon_lr_0.01_wd0.1", "gpt2_muon", {"lr": "0.01", "wd": "0.1"}),
        ("optimizer=adam_w-seed=3", "", {"optimizer": "adam_w", "seed": "3"}),
        ("muon_weight_decay=0.1", "muon", {"weight_decay": "0.1"}),
        ("soap_f1_auxb2_clean", "soap_f1_auxb2_clean", {}),
        ("tuned_baseline_3250", "tuned_baseline_3250", {}),
        ("rs4_sgd", "rs4_sgd", {}),
        ("lr3e-4", "", {"lr": "3e-4"}),
        ("lars", "lars", {}),
        ("exp/adam/seed0", "exp/adam", {"seed": "0"}),
        ("lr_scheduler", "lr_scheduler", {}),
        ("muon, seed=3", "muon", {"seed": "3"}),
        ("UNet_lr3e_4_wd_1e_5", "UNet", {"lr": "3e-4", "wd": "1e-5"}),
        ("bert/checkpoint-798", "bert", {"run": "798"}),
        ("gpt_lr_1e_x", "gpt_lr_1e_x", {}),
    ],
)
def test_a_name_is_split_into_arm_and_settings(name: str, arm: str, settings: dict[str, str]) -> None:
    assert split_name(name) == (arm, settings)


def test_numbers_that_count_are_replicates_and_others_are_not() -> None:
    assert split_names(["adam_0", "adam_1", "muon_0", "muon_1"])[3] == ("muon", {"run": "1"})
    assert split_names(["adam_1024", "adam_2048"]) == [("adam_1024", {}), ("adam_2048", {})]
    assert split_names(["v1", "v2"]) == [("v1", {}), ("v2", {})]
    assert split_names(["sgd", "sgd2"]) == [("sgd", {}), ("sgd2", {})]
    assert split_names(["muon_0.95", "muon_0.96"]) == [("muon_0.95", {}), ("muon_0.96", {})]


def test_folders_that_differ_are_columns() -> None:
    places = ["r/exp/adam/lr_0.1/seed1/metrics.csv", "r/exp/muon/lr_0.1/seed1/metrics.csv"]
    frame = columns_of_places(places, "r")
    assert list(frame) == ["run", "folder2", "seed"]
    assert list(frame.folder2) == ["adam", "muon"]
    assert list(frame.seed) == ["1", "1"]
    assert list(frame.run) == ["adam", "muon"]


def test_files_of_a_flat_folder_are_runs() -> None:
    frame = columns_of_places(
        ["r/adam_0.csv.gz", "r/adam_1.csv.gz", "r/muon_0.csv.gz", "r/muon_1.csv.gz"], "r"
    )
    assert frame.to_dict("list") == {
        "run": ["adam_0", "adam_1", "muon_0", "muon_1"],
        "file": ["adam", "adam", "muon", "muon"],
    }
