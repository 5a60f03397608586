"""Shards of tokens: what is refused of them, which batches they make, and that runs on them are as others."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.runs import resumed_after, untimed
from support.shards import END, VOCABULARY, documents, folder_of_shards, overrides_of, shard
from support.tapes import Tape

from ebc_lab.config.choices import changed
from ebc_lab.config.compose import compose
from ebc_lab.config.dicts import run_part
from ebc_lab.config.errors import UserError
from ebc_lab.config.identity import digest, identity
from ebc_lab.records.streams import read_columns
from ebc_lab.training.graphs import StepGraphs
from ebc_lab.training.outcome import run_and_record
from ebc_lab.training.run import Training
from ebc_lab.workloads import load
from ebc_lab.workloads import shards as library
from ebc_lab.workloads.shards.batches import MAPPED
from ebc_lab.workloads.starts import pinned
from ebc_lab.workloads.text import check_length_of, checked_text

SMALL = [
    *("scale=smoke", "model=modern", "model.blocks=1", "model.width=16", "model.context=16", "device=cpu"),
    *("batch_size=10", "budget.probe_sequences=2", "eval_every=10", "eval_windows=8", "steps=25"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return folder_of_shards(tmp_path_factory.mktemp("shards"))


def run_of(folder, *overrides):
    """A resolved run on the shards of a folder."""
    run = run_part(compose([*SMALL, *overrides_of(folder), *overrides], study=False))
    return pinned(run, *checked_text(run))


def workload_of(run):
    return load(run, torch.device("cpu"))


def ids_of(folder, split="train"):
    paths = sorted(folder.glob(f"*_{split}_*.bin"))
    return [np.frombuffer(path.read_bytes()[1024:], dtype="<u2").astype(np.int64) for path in paths]


def test_what_exists_is_found_before_it_is_taken_for_a_pattern(tmp_path):
    odd = tmp_path / "tokens [v2]" / "a*b?"
    odd.mkdir(parents=True)
    for name in ("x_train_1.bin", "x_train_2.bin", "[y]_1.bin", "y_1.bin"):
        library.write_shard(odd / name, list(range(100)))

    def found(pattern):
        return [one.path.name for one in library.found("data.files", [str(tmp_path / pattern)])]

    assert found("tokens [v2]/a*b?/x_train_1.bin") == ["x_train_1.bin"]
    assert found("tokens [v2]/a*b?/*_train_*.bin") == ["x_train_1.bin", "x_train_2.bin"]
    assert found("tok*/a*/x_train_[2-9].bin") == ["x_train_2.bin"]
    assert found("tokens [v2]/a*/[y]_1.bin") == ["[y]_1.bin"]
    assert found("tokens [v2]/a*/[y]_?.bin") == ["y_1.bin"]
    with pytest.raises(UserError, match="names no file"):
        found("tokens [v3]/*.bin")


def test_batches_in_order_are_the_tokens_one_after_the_other_and_none_spans_two_shards(folder):
    first, second = ids_of(folder)
    batches, held = workload_of(run_of(folder)).batches()
    assert held is None
    a_batch = 10 * 16
    whole = (len(first) - 2) // a_batch
    for step, (of, start) in {
        0: (first, 0),
        1: (first, a_batch),
        whole - 1: (first, (whole - 1) * a_batch),
        whole: (second, 0),
        whole + 3: (second, 3 * a_batch),
    }.items():
        inputs, targets = batches.at(step)
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.flatten().tolist() == of[start : start + a_batch].tolist()
        assert targets.flatten().tolist() == of[start + 1 : start + a_batch + 1].tolist()
    last = whole + (len(second) - 2) // a_batch - 1
    batches.at(last)
    with pytest.raises(UserError, match=f"hold {last + 1} batches of {a_batch} tokens"):
        batches.at(last + 1)


def test_random_windows_are_all_as_likely_and_lie_within_a_shard(folder, tmp_path):
    (tmp_path / "few").mkdir()
    counts = {"a_train_1": 19, "a_train_2": 16, "a_train_3": 18}  # 3 windows, none and 2, of 17 tokens
    for nth, (name, count) in enumerate(counts.items()):
        shard(tmp_path / "few" / f"{name}.bin", range(30 * nth, 30 * nth + count))
    shard(tmp_path / "few" / "a_val_0.bin", documents(2_400, 3))
    run = run_of(tmp_path / "few", "data.order=random")
    batches, _ = workload_of(run).batches()
    rows = torch.cat([batches.at(step)[0] for step in range(300)])
    targets = torch.cat([batches.at(step)[1] for step in range(300)])
    assert torch.equal(targets, rows + 1)  # no window spans two shards
    starts, seen = rows[:, 0].unique(return_counts=True)
    assert starts.tolist() == [0, 1, 2, 60, 61]
    assert seen.float().std() < 3 * (3000 * 0.2 * 0.8) ** 0.5
    other, _ = workload_of(replace(run, seed=1)).batches()
    assert not torch.equal(other.at(0)[0], batches.at(0)[0])


@pytest.mark.thorough
def test_a_text_and_a_shard_of_its_tokens_train_alike_bit_for_bit(tmp_path, text_file):
    plain = ["tokens=bytes", "data=path", f"data.file={text_file}", "stabilizer=ebc", "eval_windows=4"]
    of_text = run_part(compose([*SMALL, *plain], study=False))
    of_text = pinned(of_text, *checked_text(of_text))
    splits = workload_of(of_text).tokens
    held = min(len(splits["val"]), len(splits["test"])) - 1
    (tmp_path / "s").mkdir()
    shard(tmp_path / "s" / "x_train_0.bin", splits["train"].tolist())
    both = [*splits["val"][: held + 1].tolist(), *splits["test"][: held + 1].tolist()]
    shard(tmp_path / "s" / "x_val_0.bin", both)
    settings = ["data.vocabulary=256", f"data.val_tokens={held}", "data.order=random", "stabilizer=ebc"]
    of_shards = replace(run_of(tmp_path / "s", *settings, "eval_windows=4"), evaluate=["val"])
    one = run_and_record(replace(of_text, evaluate=["val"]), tmp_path / "text", "x")
    two = run_and_record(of_shards, tmp_path / "shards", "y")
    assert one["outcome"] == two["outcome"] == "completed"
    assert two["weights_checksum"] == one["weights_checksum"]
    assert (tmp_path / "shards" / "steps.csv").read_bytes() == (tmp_path / "text" / "steps.csv").read_bytes()
    assert two["test_bits_per_char"] is None  # of how many characters is not known
    if len(splits["val"]) == held + 1:
        assert two["val_loss"] == one["val_loss"]


@pytest.mark.thorough
def test_a_run_goes_on_from_its_checkpoint_and_a_graph_reads_the_batch_of_its_step(folder, tmp_path):
    for order in ("in_order", "random"):
        # without audits: on a CPU they compare the rotary tables, which reads values (on a GPU they do not)
        settings = ("optimizer=muon", "stabilizer=none", "accumulate=2", "audit_every=1000")
        run = run_of(folder, f"data.order={order}", *settings)
        whole = run_and_record(run, tmp_path / f"{order} whole", "x")
        assert untimed(resumed_after(run, tmp_path / f"{order} broken", [7, 18])) == untimed(whole)
        rows = {}
        for kind, graphs in (("eager", StepGraphs(None)), ("taped", StepGraphs(Tape))):
            directory = tmp_path / f"{order} {kind}"
            directory.mkdir()
            training = Training(run, directory)
            training.graphs = graphs
            training.run()
            rows[kind] = (directory / "steps.csv").read_bytes()
            assert kind == "eager" or graphs.graphs
        assert rows["taped"] == rows["eager"]
        losses = read_columns(tmp_path / f"{order} taped" / "steps.csv")["loss"]
        assert len(set(losses)) == len(losses)  # every step has a batch of its own


def test_validation_and_test_are_so_many_predictions_from_the_first_token_on(folder):
    [ids] = ids_of(folder, "val")
    workload = workload_of(run_of(folder))
    assert set(workload.tokens) == {"val", "test"}
    for split, start in (("val", 0), ("test", 1025)):
        [(inputs, targets)] = workload.held_out(split)
        assert inputs.flatten().tolist() == ids[start : start + 1024].tolist()
        assert targets.flatten().tolist() == ids[start + 1 : start + 1025].tolist()


def test_the_head_of_shards_goes_on_in_the_next_one_and_ends_where_it_is_asked_to(folder):
    paths = [*sorted(folder.glob("*_train_*.bin")), folder / "text_val_000000.bin"]
    whole = [*ids_of(folder), *ids_of(folder, "val")]
    every = np.concatenate(whole).tolist()
    shards = [
        library.Shard(path, len(ids), "", int(ids.max())) for path, ids in zip(paths, whole, strict=True)
    ]
    end = len(whole[0])
    for start, count in ((0, 5), (end - 3, 7), (end, 4), (end - 1, len(whole[1]) + 9), (len(every) - 2, 50)):
        assert library.head_of(shards, start, count).tolist() == every[start : start + count]
    assert library.head_of(shards, len(every), 3).tolist() == []


def whole_shards(path, **header):
    shard(path, documents(3_000), **header)
    return path


REFUSED = {
    "the magic number": (lambda p: whole_shards(p, magic=7), ["is no shard", "7, not 20240520"]),
    "the version": (lambda p: whole_shards(p, version=2), ["version 2", "version 1"]),
    "more than there is": (lambda p: whole_shards(p, count=3_001), ["says 3001 tokens, and 3000 follow"]),
    "less than there is": (lambda p: whole_shards(p, count=2_999), ["says 2999 tokens, and 3000 follow"]),
    "half a token": (lambda p: p.write_bytes(whole_shards(p).read_bytes() + b"x"), ["fetch it again"]),
    "a short file": (lambda p: p.write_bytes(b"short"), ["5 bytes", "1024"]),
    "a text": (lambda p: p.write_text("All the world’s a stage. " * 90), ["is no shard", "data=path"]),
    "an unknown token": (lambda p: shard(p, [*documents(3_000), VOCABULARY]), ["token 128", "ends at 127"]),
    "a folder": (lambda p: p.mkdir(), ["is not a file"]),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_whole_shard_is_refused_by_its_name(what, folder, tmp_path):
    make, words = REFUSED[what]
    path = tmp_path / "broken_train_7.bin"
    make(path)
    run = run_of(folder)
    broken = changed(run, {"data": {"files": [str(path)], "sha256": None}})
    with pytest.raises(UserError) as refusal:
        checked_text(broken)
    assert all(word in str(refusal.value) for word in [str(path), *words]), str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"files": ["{}/nothing_*.bin"]}, ["nothing_*.bin names no file"]),
        ({"files": ["{}/*_train_*.bin", "{}/text_train_000001.bin"]}, ["text_train_000001.bin twice"]),
        ({"val_tokens": 1_300}, ["data.val_files hold 2400 tokens", "takes 2602"]),
        ({"val_tokens": 20}, ["two windows", "model.context=16"]),
    ],
)
def test_shards_that_are_not_there_or_too_few_are_refused(settings, words, folder):
    if "files" in settings:
        settings = {"files": [name.format(folder) for name in settings["files"]]}
    with pytest.raises(UserError) as refusal:
        checked_text(changed(run_of(folder), {"data": {**settings, "sha256": None}}))
    assert all(word in str(refusal.value) for word in words), str(refusal.value)


def test_a_run_longer_than_its_shards_is_refused_unless_windows_are_drawn(folder):
    run = run_of(folder)
    corpus, _ = checked_text(run)
    there = (11_000 - 2) // 160 + (9_000 - 2) // 160
    check_length_of(run, corpus, there)
    with pytest.raises(UserError, match=f"{there + 1} steps are too many.*{there} batches"):
        check_length_of(run, corpus, there + 1)
    check_length_of(changed(run, {"data": {"order": "random"}}), corpus, 10**6)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["data=bin"], "data.files"),
        (["data=bin", "data.files=x.bin"], "data.val_files"),
        (["data.order=random"], "data.order goes with data=bin"),
        (["data=bin", "data.files=x", "data.val_files=y", "tokens=bytes"], "leave tokens at its default"),
        (["data=bin", "data.files=x", "data.val_files=y", "partition=clustered"], "leave partition at"),
        (["data=bin", "data.files=x", "data.val_files=y", "budget.probe_tokens=held"], "probe_tokens"),
        (["data=bin", "data.files=x", "data.val_files=y", "workload=ebm"], "workload=ebm"),
    ],
)
def test_settings_that_shards_cannot_serve_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        compose(["scale=smoke", *overrides], study=False)


def test_a_changed_shard_is_noticed_and_an_unchanged_one_is_read_once(folder, tmp_path, monkeypatch):
    here = folder_of_shards(tmp_path / "own")
    run = run_of(here)
    named = digest(identity(run))
    assert digest(identity(run_of(folder))) == named  # the same tokens elsewhere
    assert digest(identity(changed(run, {"data": {"order": "random"}}))) != named
    library._content.cache_clear()  # as in another process
    monkeypatch.setattr(library, "_read_through", None)  # nothing is read that is known
    assert checked_text(run)[0].sha256 == run.data.sha256
    monkeypatch.undo()
    path = here / "text_train_000002.bin"
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[5_000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as if nobody had written
    with pytest.raises(UserError, match="has changed"):
        checked_text(run)


def test_shards_written_by_the_library_are_read_as_they_were(tmp_path):
    library.write_shard(tmp_path / "a.bin", [END, 65_535, 0])
    assert (tmp_path / "a.bin").read_bytes() == shard(tmp_path / "b.bin", [END, 65_535, 0]).read_bytes()
    [found] = library.found("data.files", [str(tmp_path / "a.bin")])
    assert (found.tokens().tolist(), found.largest) == ([END, 65_535, 0], 65_535)
    with pytest.raises(UserError, match="0 to 65535"):
        library.write_shard(tmp_path / "c.bin", [65_536])


def test_the_corpus_is_told_in_tokens(folder):
    from ebc_lab.workloads.corpus import describe

    told = describe(run_of(folder).data)
    assert (told["shards"], told["vocabulary"]) == (3, VOCABULARY)
    assert told["splits"] == "train 20,000, val and test 2,400"
    assert json.dumps(told)


def test_a_benchmark_beside_a_plain_loop_is_refused(folder):
    from ebc_lab.bench.measure import refuse_own_sections

    with pytest.raises(UserError, match="choose another data"):
        refuse_own_sections(changed(run_of(folder), {"model": {"name": "gpt"}}))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="counts descriptors where Linux lists them")
def test_many_shards_hold_few_file_descriptors(tmp_path):
    for i in range(3 * MAPPED):
        shard(tmp_path / f"text_train_{i:06}.bin", documents(200, i))
    shard(tmp_path / "text_val_000000.bin", documents(2_400, 999))
    batches, _ = workload_of(run_of(tmp_path, "data.order=random")).batches()
    before = len(os.listdir("/proc/self/fd"))
    for step in range(30):
        batches.at(step)
    assert 0 < len(os.listdir("/proc/self/fd")) - before <= MAPPED
