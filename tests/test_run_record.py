"""Stages that are resumed, keys that tell content apart, and run.json."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from limner.run_record import (
    RunRecord,
    Store,
    content_key,
    differing_settings,
    hash_inputs,
    read_record,
    stored,
    write_atomically,
    write_record,
)


@dataclass(frozen=True)
class Two:
    a: int
    b: float


@dataclass(frozen=True)
class Other:
    a: int
    b: float


DISTINCT = [
    (1,),
    ("1",),
    (1.0,),
    (True,),
    (None,),
    ("None",),
    (b"1",),
    ((1,),),
    ("ab", "c"),
    ("a", "bc"),
    (("a",), "bc"),
    (np.zeros(4),),
    (np.zeros((2, 2)),),
    (np.zeros(4, dtype=np.float32),),
    (np.array([0, 0, 0, 1.0]),),
    ({"a": 1},),
    ({"a": 2},),
    ({1: "a"},),
    (Two(1, 2.0),),
    (Two(1, 3.0),),
    (Other(1, 2.0),),
    (),
]


def test_different_content_has_different_keys() -> None:
    keys = [content_key(*parts) for parts in DISTINCT]
    assert len(set(keys)) == len(keys)
    assert all(len(k) == 64 and set(k) <= set("0123456789abcdef") for k in keys)


def test_key_ignores_layout_byte_order_and_order_of_mappings() -> None:
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert content_key(array) == content_key(np.asfortranarray(array))
    assert content_key(array) == content_key(array.astype(">i4"))
    assert content_key(array) == content_key(np.repeat(array, 2, axis=1)[:, ::2])
    assert content_key({"a": 1, 2: "b"}) == content_key({2: "b", "a": 1})
    assert content_key(np.float64(0.5), np.int16(3)) == content_key(0.5, 3)
    assert content_key((1, 2)) == content_key([1, 2])


def test_key_is_the_same_in_another_process() -> None:
    code = (
        "import numpy as n; from limner.run_record import content_key as k; print(k({'b': 1, 'a': {2, 'x'}}, n.eye(3)))"
    )
    keys = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert keys == {content_key({"a": {2, "x"}, "b": 1}, np.eye(3))}


def test_key_refuses_what_it_cannot_read() -> None:
    with pytest.raises(ValueError, match=r"content_key\(\): object has no content"):
        content_key(object())
    with pytest.raises(ValueError, match="Python objects"):
        content_key(np.array([object()]))


def test_store_returns_what_was_saved_and_only_under_its_key(tmp_path: Path) -> None:
    store = Store(tmp_path / "new" / "resume")
    assert store.load("network", "k") is None
    assert store.stages() == ()
    arrays = {"file": np.arange(5, dtype=np.uint8), "key": np.array(3), "a/b": np.zeros((0, 2), dtype=np.float16)}
    store.save("network", "k", arrays)
    loaded = store.load("network", "k")
    assert loaded is not None
    assert set(loaded) == set(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert loaded[name].dtype == array.dtype
    assert store.load("network", "other") is None
    store.save("network", "other", {"x": np.ones(1)})
    assert store.load("network", "k") is None
    assert store.stages() == ("network",)


@pytest.mark.parametrize("keep", [0, 10, 200, -30])
def test_damaged_stage_counts_as_absent(tmp_path: Path, keep: int) -> None:
    store = Store(tmp_path)
    store.save("section-0003", "k", {"x": np.random.default_rng(0).random(500)})
    path = tmp_path / "section-0003.npz"
    path.write_bytes(path.read_bytes()[:keep])
    assert store.load("section-0003", "k") is None


def test_stage_with_a_flipped_byte_counts_as_absent(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save("network", "k", {"x": np.random.default_rng(0).random(500)})
    damaged = bytearray((tmp_path / "network.npz").read_bytes())
    damaged[800] ^= 0xFF
    (tmp_path / "network.npz").write_bytes(bytes(damaged))
    assert store.load("network", "k") is None


@pytest.mark.parametrize("stage", ["", "../x", "a/b", ".hidden"])
def test_stage_names_stay_inside_the_folder(tmp_path: Path, stage: str) -> None:
    with pytest.raises(ValueError, match="no stage name"):
        Store(tmp_path).save(stage, "k", {})


def test_stages_are_saved_from_many_threads(tmp_path: Path) -> None:
    store = Store(tmp_path / "resume")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.save(f"section-{i:04}", str(i), {"i": np.full(100, i)}), range(40)))
    assert len(store.stages()) == 40
    for i in range(40):
        loaded = store.load(f"section-{i:04}", str(i))
        assert loaded is not None
        assert loaded["i"][0] == i
    assert not list((tmp_path / "resume").glob(".*"))


def test_failed_write_leaves_the_old_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "labels.tif"
    path.write_bytes(b"old")

    def fail(_: object) -> None:
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def record() -> RunRecord:
    return RunRecord(
        command=("limner", "stack", "complete"),
        settings={"method": "gem", "spacing": (0.05, 0.04, 0.04), "positions": None},
        inputs={"images": {"a.png": "00"}},
        device="cpu",
        seed=0,
    )


def test_record_round_trip(tmp_path: Path) -> None:
    running = record()
    done = running.completed(
        seconds={"registration": np.float32(1.5)},
        sections={"1": {"objective": [1.0, float("nan")], "iterations": np.int64(2)}},
        notes=("one note",),
    )
    write_record(tmp_path / "run.json", running)
    write_record(tmp_path / "run.json", done)
    read = read_record(tmp_path / "run.json")
    assert read.status == "complete"
    assert read.started == running.started
    assert read.ended.endswith("+00:00")
    assert read.command == running.command
    assert read.notes == ("one note",)
    assert read.seconds == {"registration": 1.5}
    assert read.sections == {"1": {"objective": [1.0, None], "iterations": 2}}
    assert {"limner", "python", "torch", "numpy", "scipy", "SimpleITK", "scikit-image"} == set(read.versions)
    assert read.machine["cpus"] >= 1
    assert differing_settings(read, running) == []
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"status": "running"}', '{"command": 3}'])
def test_broken_record_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match=r"run\.json is no record of a run"):
        read_record(tmp_path / "run.json")


def test_record_of_a_later_version_is_read(tmp_path: Path) -> None:
    write_record(tmp_path / "run.json", record())
    values = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps({**values, "unheard_of": 1}))
    assert read_record(tmp_path / "run.json").device == "cpu"


def test_differing_settings_names_every_difference() -> None:
    other = {"method": "fusion", "spacing": [0.05, 0.04, 0.04], "rho": 21.0}
    assert differing_settings(record(), other) == ["method", "positions", "rho"]


def test_input_hashes(tmp_path: Path) -> None:
    (tmp_path / "b.png").write_bytes(b"abc")
    (tmp_path / "a.png").write_bytes(b"")
    (tmp_path / ".DS_Store").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"  # SHA-256 of nothing
    hashes = hash_inputs(tmp_path)
    assert list(hashes) == ["a.png", "b.png"]
    assert hashes["a.png"] == empty
    assert hashes["b.png"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, "abc"
    assert hash_inputs(tmp_path / "a.png") == {"a.png": empty}
    assert list(hash_inputs(tmp_path, ["b.png"])) == ["b.png"]
    assert list(hash_inputs(tmp_path / "b.png", ["b.png", "a.png"])) == ["a.png", "b.png"]


def test_stored_makes_once_and_again_when_the_key_changes(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"n": np.array(len(made))}

    store = Store(tmp_path)
    assert [int(stored(store, "stage", key, make)["n"]) for key in ("a", "a", "b")] == [1, 1, 2]
    assert int(stored(None, "stage", "b", make)["n"]) == 3
