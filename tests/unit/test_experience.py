"""What is stored comes back to the bit and in order, what is torn or foreign does not; writers do not collide."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from trimtab.errors import InputError, OutputError
from trimtab.experience import ExperienceStore, Header, Transitions, read_file, read_header
from trimtab.experience import files as files_module

SPEC = {"knobs": ["lr", "dropout"], "signals": ["progress", "loss", "lr_unit"], "reward": "log_improvement"}
MARK = "0123456789abcdef"


def make(n: int, *, seed: int = 0, dtype: Any = np.float64, **extra: Any) -> Transitions:
    draw = np.random.default_rng([n, seed])
    return Transitions(
        observations=draw.normal(size=(n, 3)).astype(dtype),
        actions=draw.integers(0, 9, (n, 2)),
        rewards=draw.normal(size=n),
        next_observations=draw.normal(size=(n, 3)).astype(dtype),
        terminated=np.arange(n) == n - 1,
        extra=extra,
    )


def numbered(first: int, n: int = 4) -> Transitions:
    """Transitions whose rewards are first, first + 1, ..."""
    return dataclasses.replace(make(n), rewards=np.arange(first, first + n, dtype=np.float64))


def assert_same(found: Transitions, expected: Transitions) -> None:
    assert found.columns.keys() == expected.columns.keys()
    for name, column in expected.columns.items():
        other = found.columns[name]
        assert (other.dtype, other.shape) == (column.dtype, column.shape), name
        assert other.tobytes() == column.tobytes(), name


@pytest.fixture
def store(tmp_path: Path) -> ExperienceStore:
    return ExperienceStore(tmp_path / "experience")


def put(store: ExperienceStore, transitions: Transitions, run_id: str | None = None, **changes: Any) -> Path:
    return store.append(transitions, **{"spec": SPEC, "fingerprint": MARK, "run_id": run_id, **changes})


# ---- transitions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "column", "text"),
    [
        ("observations", [[0.0] * 3] * 4, "column 'observations' is a list; expected a NumPy array"),
        ("observations", np.zeros((4, 3), np.float16), "'observations' is float16; expected float32 or float64"),
        ("observations", np.zeros(4), "column 'observations' has the shape (4,); expected (T, S)"),
        ("actions", np.zeros((4, 1, 1)), "column 'actions' has the shape (4, 1, 1); expected (T, K)"),
        ("actions", np.zeros((4, 1), "O"), "column 'actions' is object; expected float32 or float64 or int64"),
        ("rewards", np.zeros((4, 1)), "column 'rewards' has the shape (4, 1); expected (T,)"),
        ("rewards", np.zeros(4, int), "column 'rewards' is int64; expected float32 or float64"),
        (
            "rewards",
            np.zeros(3),
            "column 'rewards' has 3 rows, 'observations' has 4; every column has one for each transition",
        ),
        (
            "rewards",
            np.array([0, 1, math.nan, math.inf]),
            "column 'rewards' is not finite in row 2; leave such transitions out",
        ),
        ("next_observations", np.full((4, 3), -np.inf), "column 'next_observations' is not finite in row 0; leave"),
        (
            "next_observations",
            np.zeros((4, 3), np.float32),
            "'next_observations' are float32 of 3 numbers a row, 'observations' are float64 of 3; both hold the same",
        ),
        (
            "next_observations",
            np.zeros((4, 2)),
            "'next_observations' are float64 of 2 numbers a row, 'observations' are float64 of 3; both hold the same",
        ),
        ("terminated", np.zeros(4), "column 'terminated' is float64; expected bool"),
        ("extra", {"value": np.float64(1.0)}, "column 'value' is a float64; expected a NumPy array"),
        ("extra", {"value": np.array(1.0)}, "column 'value' has the shape (); expected (T, ...)"),
        ("extra", {"value": np.zeros(5)}, "column 'value' has 5 rows, 'observations' has 4"),
        ("extra", {"log_prob": np.full((4, 2), -np.inf)}, "column 'log_prob' is not finite in row 0"),
        ("extra", {"rewards": np.zeros(4)}, "extra column 'rewards'; expected a name of its own of small letters"),
        ("extra", {"__metadata__": np.zeros(4)}, "extra column '__metadata__'; expected a name of its own"),
        ("extra", {3: np.zeros(4)}, "extra column 3; expected a name of its own"),
    ],
)
def test_what_is_no_transition_is_refused_by_name(name: str, column: Any, text: str) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        dataclasses.replace(make(4), **{name: column})


def test_the_newest_transitions_are_the_last_of_every_column() -> None:
    whole = make(5, value=np.arange(10.0).reshape(5, 2))
    last = whole.newest(2)
    assert len(last) == 2
    assert last.rewards.tolist() == whole.rewards.tolist()[3:]
    assert last.extra["value"].tolist() == [[6.0, 7.0], [8.0, 9.0]]
    assert_same(whole.newest(99), whole)
    assert len(whole.newest(0)) == 0
    with pytest.raises(InputError, match="count is -1; expected a whole number of at least 0"):
        whole.newest(-1)


def test_joining_keeps_the_order_and_refuses_what_differs() -> None:
    first, second = make(2, value=np.zeros(2)), make(3, value=np.ones(3))
    both = Transitions.concatenate([first, second])
    assert_same(both.newest(3), second)
    assert both.extra["value"].tolist() == [0, 0, 1, 1, 1]
    assert both.terminated.tolist() == [False, True, False, False, True]
    mixed = Transitions.concatenate([make(2, dtype=np.float32), make(3)])
    assert mixed.observations.dtype == np.float64
    assert (mixed.observations[:2] == make(2, dtype=np.float32).observations).all()
    with pytest.raises(InputError, match="there are no transitions to join; give one or more"):
        Transitions.concatenate([])
    text = (
        "part 1 has rows of observations 3, actions 2, rewards, next_observations 3, terminated, part 0 of "
        "observations 3, actions 2, rewards, next_observations 3, terminated, value; join what has the same columns"
    )
    with pytest.raises(InputError, match=f"^{re.escape(text)}$"):
        Transitions.concatenate([first, make(2)])


def test_arrays_of_the_other_byte_order_and_not_contiguous_are_taken(store: ExperienceStore) -> None:
    plain = make(4)
    turned = dataclasses.replace(
        plain, observations=np.asfortranarray(plain.observations), rewards=plain.rewards.astype(">f8")
    )
    assert_same(turned, plain)
    assert_same(read_file(put(store, turned))[1], plain)


# ---- one file -------------------------------------------------------------------------------------------------------


def test_a_run_comes_back_to_the_bit(store: ExperienceStore) -> None:
    extra = {
        "intervened": np.array([True, False, True]),
        "log_prob": np.array([-0.0, 5e-324, -1.5]),
        "q_values": np.arange(12, dtype=np.float32).reshape(3, 2, 2),
        "chosen": np.array([2**62, -1, 0]),
    }
    stored = make(3, dtype=np.float32, **extra)
    run = {"task": "digits-mlp", "seed": 3, "note": "ü\n", "more": (1, None, True)}
    path = put(store, stored, "demo-digits-3", run=run)
    assert re.fullmatch(
        rf"{MARK}/00000001-demo-digits-3-[0-9a-f]{{12}}\.safetensors", str(path.relative_to(store.root))
    )
    header, found = read_file(path)
    assert_same(found, stored)
    assert_same(store.read(MARK, columns=list(extra)), stored)
    assert header == read_header(path)
    assert header == Header(
        path=path,
        fingerprint=MARK,
        run_id="demo-digits-3",
        spec=SPEC,
        run={**run, "more": [1, None, True]},
        transitions=3,
        reward_sum=math.fsum(stored.rewards),
        columns={name: (column.dtype.name, column.shape) for name, column in stored.columns.items()},
        sha256=header.sha256,
    )


def test_a_run_without_transitions_is_a_run(store: ExperienceStore) -> None:
    path = put(store, make(0))
    assert_same(read_file(path)[1], make(0))
    assert (read_header(path).transitions, read_header(path).reward_sum) == (0, 0.0)
    assert read_header(path).run == {}


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fingerprint": "../up"}, "fingerprint '../up'; expected 1 to 64 letters, digits or _ -"),
        ({"fingerprint": ""}, "fingerprint ''; expected 1 to 64 letters"),
        ({"run_id": "a/b"}, "run_id 'a/b'; expected 1 to 150 letters, digits or . _ : = + -, the first a letter or"),
        ({"run_id": ".hidden"}, "run_id '.hidden'; expected 1 to 150"),
        ({"run_id": "x" * 151}, "expected 1 to 150 letters"),
        ({"run_id": ""}, "run_id ''; expected 1 to 150 letters"),
        ({"replace": True}, "replace=True needs the run_id of the run to replace"),
        ({"run": {"lr": math.nan}}, "run cannot be written as JSON (Out of range float values"),
        ({"run": {"task": {1, 2}}}, "run cannot be written as JSON (Object of type set is not JSON serializable)"),
        ({"run": "digits"}, "run cannot be written as JSON"),
        ({"run": {"note": "x" * (1 << 20)}}, "bytes as JSON, at most 1048576; tell less"),
        ({"spec": None}, "spec cannot be written as JSON"),
        ({"spec": {"signals": ["a"]}}, "knobs of the spec is None, expected a list of names"),
        ({"spec": {**SPEC, "knobs": "lr"}}, "knobs of the spec is 'lr', expected a list of names"),
        ({"spec": {**SPEC, "signals": ["a", "b"]}}, "the spec names 2 signals, observations have 3 columns"),
    ],
)
def test_what_cannot_be_stored_is_refused_and_leaves_nothing(
    store: ExperienceStore, changes: dict[str, Any], text: str
) -> None:
    with pytest.raises(InputError, match=re.escape(text)):
        put(store, make(2), **changes)
    assert not store.root.exists()


def test_rewards_without_a_sum_and_other_things_are_refused(store: ExperienceStore) -> None:
    huge = dataclasses.replace(make(2), rewards=np.array([1e308, 1e308]))
    with pytest.raises(InputError, match="the sum of the rewards is larger than any float; scale them"):
        put(store, huge)
    with pytest.raises(InputError, match=r"transitions is a dict; expected trimtab\.experience\.Transitions"):
        put(store, {})  # type: ignore[arg-type]
    store.root.write_text("taken")
    with pytest.raises(InputError, match=r"cannot read the experience in .*experience.*: Not a directory"):
        put(store, make(2))


def test_a_folder_that_cannot_be_written(store: ExperienceStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trimtab.storage.os.fsync", no_space)
    with pytest.raises(OutputError, match="No space left on device"):
        put(store, make(2))
    assert os.listdir(store.root / MARK) == []


def test_every_cut_file_is_refused(store: ExperienceStore) -> None:
    path = put(store, make(2))
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 7), len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"cannot read the experience in .*; copy it anew, or remove it"):
            read_header(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(InputError, match="bytes where its columns take"):
        read_header(path)


def test_every_changed_byte_is_noticed_or_changes_nothing(store: ExperienceStore) -> None:
    stored = make(3, value=np.arange(3.0))
    path = put(store, stored, run={"task": "a"})
    whole, before = path.read_bytes(), read_header(path)
    begin = 8 + int.from_bytes(whole[:8], "little")
    harmless = []
    for place in range(len(whole)):
        changed = bytearray(whole)
        changed[place] ^= (1, 0x20, 0x80)[place % 3]
        path.write_bytes(changed)
        try:
            header, found = read_file(path)
        except InputError as error:
            assert str(path) in str(error)  # noqa: PT017 (either is right: refused by name, or the same)
            continue
        harmless.append(place)
        assert_same(found, stored)
        assert header == before
    assert all(place < begin for place in harmless)  # no byte of a column goes unnoticed
    assert len(harmless) < 10  # a digit of an escape, white space


def test_a_changed_number_is_named_when_its_file_is_asked_for(store: ExperienceStore) -> None:
    path = put(store, make(3))
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    text = (
        f"cannot read the experience in {path}: its columns are not what was stored (checksum); copy it anew, or remove"
    )
    with pytest.raises(InputError, match=re.escape(text)):
        read_file(path)


def rewrite(path: Path, edit: Any) -> None:
    """Write a file anew as somebody else might, with checksums that are right.

    Args:
        path: The file.
        edit: Gets columns, the header and the metadata, and changes them.
    """
    raw = path.read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    columns, metadata = dict(load(raw)), table["__metadata__"]
    header = json.loads(metadata["header"])
    metadata["header"] = None
    edit(columns, header, metadata)
    if header.get("sha256") == "anew":
        header["sha256"] = files_module._digest(columns)
    if metadata["header"] is None:
        metadata["header"] = json.dumps(header)
        metadata["sha256"] = hashlib.sha256(metadata["header"].encode()).hexdigest()
    path.write_bytes(save(columns, metadata=metadata))


EDITS = {
    "has version 2 of the format, this trimtab reads version 1; upgrade trimtab": lambda c, h, m: m.update(version="2"),
    "is no experience: expected a safetensors file of the format 'trimtab-experience'": lambda c, h, m: m.update(
        format="pt"
    ),
    "its metadata have the keys ['format', 'header', 'more', 'sha256', 'version'], expected": lambda c, h, m: m.update(
        more="x"
    ),
    "its header is not what was stored (checksum)": lambda c, h, m: m.update(header="{}"),
    "its header has the keys ['fingerprint', 'more', 'reward_sum', 'run', 'run_id', 'sha256', 'spec', 'transitions'], "
    "expected": lambda c, h, m: h.update(more=1),
    "transitions in its header is a str, expected a int": lambda c, h, m: h.update(transitions="3"),
    "reward_sum in its header is a NoneType, expected a float": lambda c, h, m: h.update(reward_sum=None),
    "column 'actions' has the shape (3, 2), its header says 4 transitions": lambda c, h, m: h.update(transitions=4),
    "it has no column 'rewards'": lambda c, h, m: c.pop("rewards"),
    "column 'terminated' is float64 of shape (3,)": lambda c, h, m: c.update(terminated=np.zeros(3)),
    "column 'rewards' is float64 of shape (3, 1)": lambda c, h, m: c.update(rewards=np.zeros((3, 1))),
    "column 'value' has dtype 'F16' and shape [3]": lambda c, h, m: c.update(value=np.zeros(3, np.float16)),
    "column 'value' has the shape (2,), its header says 3 transitions": lambda c, h, m: c.update(value=np.zeros(2)),
    "column 'Value' has no name of an extra column": lambda c, h, m: c.update(Value=np.zeros(3)),
    "'observations' and 'next_observations' differ": lambda c, h, m: c.update(next_observations=np.zeros((3, 2))),
    "the spec names 1 signals, observations have 3 columns": lambda c, h, m: h["spec"].update(signals=["a"]),
    "knobs of the spec is [1], expected a list of names": lambda c, h, m: h["spec"].update(knobs=[1]),
}


@pytest.mark.parametrize("text", EDITS)
def test_a_foreign_header_is_refused_with_its_reason(store: ExperienceStore, text: str) -> None:
    path = put(store, make(3))
    rewrite(path, EDITS[text])
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}.*{re.escape(text)}"):
        read_header(path)


@pytest.mark.parametrize(
    ("text", "edit"),
    [
        ("its columns are not what was stored (checksum)", lambda c, h, m: c.update(more=np.zeros(3))),
        (
            "column 'rewards' is not finite in row 0",
            lambda c, h, m: (c.update(rewards=np.full(3, math.nan)), h.update(sha256="anew")),
        ),
    ],
)
def test_foreign_columns_are_refused_when_they_are_read(store: ExperienceStore, text: str, edit: Any) -> None:
    path = put(store, make(3))
    rewrite(path, edit)
    read_header(path)
    with pytest.raises(InputError, match=rf"{re.escape(str(path))}: {re.escape(text)}"):
        read_file(path)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "its 0 bytes hold no header of safetensors"),
        (b"PK\x03\x04" * 9, "its 36 bytes hold no header of safetensors"),
        ((2**63).to_bytes(8, "little") + b"{}", "its 10 bytes hold no header of safetensors"),
        ((4).to_bytes(8, "little") + b"\xff{}\x00", "its header is no JSON"),
        ((2).to_bytes(8, "little") + b"[]", "is no experience"),
        ((4000).to_bytes(8, "little") + b"[" * 4000, "its header is no JSON"),
        ((200_000).to_bytes(8, "little") + b"[" * 200_000, "its header is no JSON"),
    ],
)
def test_bytes_that_are_no_file_of_ours(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=re.escape(text)):
        read_file(path)


def test_a_huge_shape_is_refused_before_anything_is_allocated(store: ExperienceStore) -> None:
    path = put(store, make(3))
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    table["rewards"]["shape"] = [2_000_000_000]
    head = json.dumps(table).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + raw[8 + length :])
    with pytest.raises(InputError, match=r"it has 219 bytes where its columns take 16000000195; copy it anew"):
        read_file(path)


def test_what_is_missing_or_no_file(tmp_path: Path) -> None:
    for name in ("missing", "folder", "pipe"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        if name == "pipe":
            os.mkfifo(tmp_path / name)  # to open it would be to wait
        with pytest.raises(InputError, match=f"cannot read the experience in .*{name}: there is no such file; copy it"):
            read_file(tmp_path / name)


# ---- the store ------------------------------------------------------------------------------------------------------


def test_runs_are_read_in_the_order_in_which_they_were_stored(store: ExperienceStore) -> None:
    paths = [put(store, numbered(4 * index), run_id) for index, run_id in enumerate(["z", "a", None, "m"])]
    for path in paths:  # times of files do not count
        os.utime(path, (0, 1000 - paths.index(path)))
    assert store.files() == store.files(MARK) == paths
    assert [path.name[:9] for path in paths] == ["00000001-", "00000002-", "00000003-", "00000004-"]
    assert store.read(MARK).rewards.tolist() == list(range(16))
    assert [header.run_id for header in store.headers()][::3] == ["z", "m"]
    paths[3].unlink()
    paths[0].unlink()
    assert put(store, numbered(16), "new").name.startswith("00000004-new-")  # after all that is there
    assert store.read(MARK).rewards.tolist() == [*range(4, 12), *range(16, 20)]


def test_the_newest_come_from_the_newest_runs(store: ExperienceStore) -> None:
    for index in range(3):
        put(store, numbered(4 * index))
    for newest in range(1, 15):
        assert store.read(MARK, newest=newest).rewards.tolist() == list(range(max(12 - newest, 0), 12))
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(InputError, match=rf"newest is {wrong!r}; expected a whole number of at least 1"):
            store.read(MARK, newest=wrong)  # type: ignore[arg-type]


def test_older_files_are_not_opened_when_enough_is_read(store: ExperienceStore) -> None:
    old = put(store, numbered(0))
    put(store, numbered(4))
    old.write_bytes(b"torn")
    assert store.read(MARK, newest=4).rewards.tolist() == [4, 5, 6, 7]  # a warning would be an error


def test_specs_are_kept_apart(store: ExperienceStore) -> None:
    put(store, numbered(0))
    other = {"knobs": ["lr"], "signals": []}
    narrow = dataclasses.replace(make(2), observations=np.zeros((2, 0)), next_observations=np.zeros((2, 0)))
    put(store, narrow, fingerprint="other", spec=other)
    assert store.fingerprints() == [MARK, "other"]
    assert len(store.read(MARK)) == 4
    assert_same(store.read("other"), narrow)
    assert [header.spec for header in store.headers("other")] == [other]
    assert len(store.headers()) == 2


def test_runs_can_be_left_out_by_their_id(store: ExperienceStore) -> None:
    for index, run_id in enumerate(["a", "b", "a", "c"]):
        put(store, numbered(4 * index), run_id, run={"task": f"t{index % 2}"})
    assert store.read(MARK, but=["a", "never stored"]).rewards.tolist() == [4, 5, 6, 7, 12, 13, 14, 15]
    held_out = [header.run_id for header in store.headers(MARK) if header.run["task"] == "t1"]
    assert store.read(MARK, but=held_out, newest=6).rewards.tolist() == [2, 3, 8, 9, 10, 11]
    for name in ("but", "columns"):
        with pytest.raises(
            InputError, match=rf"{name} is the text 'a'; expected a collection of names, such as \['a'\]"
        ):
            store.read(MARK, **{name: "a"})  # type: ignore[arg-type]


def test_nothing_stored_is_nothing_read(store: ExperienceStore) -> None:
    found = store.read(MARK, columns=["value"])
    assert len(found) == 0
    assert list(found.extra) == ["value"]
    assert (store.files(), store.headers(), store.summary(), store.fingerprints()) == ([], [], [], [])
    assert not store.root.exists()


def test_the_same_id_twice_is_two_runs_unless_replaced(store: ExperienceStore) -> None:
    first, second = put(store, numbered(0), "run"), put(store, numbered(4), "run")
    assert first != second
    third = put(store, numbered(8), "run-1")
    assert store.read(MARK).rewards.tolist() == list(range(12))
    replaced = put(store, numbered(20), "run", replace=True)
    assert replaced == second
    assert store.files() == [second, third]  # in its old place; "run-1" is another run
    assert store.read(MARK).rewards.tolist() == [20, 21, 22, 23, 8, 9, 10, 11]
    assert put(store, numbered(30), "new", replace=True).name.startswith("00000004-new-")  # nothing was there
    assert len(store.read(MARK)) == 12


def test_writers_of_the_same_id_that_see_the_same_folder_do_not_collide(
    store: ExperienceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExperienceStore, "files", lambda self, fingerprint=None: [])  # as both listed it before
    paths = {put(store, numbered(4 * index), "run") for index in range(2)}
    monkeypatch.undo()
    assert [path.name[:13] for path in store.files()] == ["00000001-run-"] * 2
    assert store.files() == sorted(paths)
    assert sorted(store.read(MARK).rewards.tolist()) == list(range(8))


def test_extra_columns_are_read_when_asked_for(store: ExperienceStore) -> None:
    put(store, make(2, value=np.zeros(2)))
    without = put(store, make(3))
    assert not store.read(MARK).extra
    assert len(store.read(MARK)) == 5
    with pytest.warns(RuntimeWarning) as caught:
        found = store.read(MARK, columns=["value"])
    assert [str(warning.message) for warning in caught] == [
        f"left out: {without}: there is no column 'value'; there are observations, actions, rewards, "
        "next_observations, terminated"
    ]
    assert len(found) == 2
    assert found.extra["value"].tolist() == [0, 0]


def test_what_cannot_be_read_is_left_out_and_named_once(store: ExperienceStore) -> None:
    good = put(store, numbered(0))
    torn, future, damaged, moved, thin = (put(store, numbered(4 * index)) for index in range(1, 6))
    torn.write_bytes(torn.read_bytes()[:-1])
    rewrite(future, lambda c, h, m: m.update(version="7"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x07")
    rewrite(moved, lambda c, h, m: h.update(fingerprint="feed"))
    rewrite(thin, lambda c, h, m: (c.update(actions=np.zeros((4, 1))), h.update(sha256="anew")))
    (store.root / MARK / "notes.txt").write_text("no business of ours")
    foreign = store.root / MARK / "weights.safetensors"
    foreign.write_bytes(save({"a": np.zeros(2)}))
    last = put(store, numbered(40))
    newer = "observations 3, actions 2, rewards, next_observations 3, terminated"
    expected = {
        torn: f"left out: cannot read the experience in {torn}: it has 291 bytes where its columns take 292; ",
        future: f"left out: {future} has version 7 of the format, this trimtab reads version 1; upgrade trimtab",
        moved: f"left out: {moved} is of the spec feed, its folder is for {MARK}; move it",
        foreign: f"left out: {foreign} is no experience: expected a safetensors file of the format",
        damaged: f"left out: cannot read the experience in {damaged}: its columns are not what was stored (checksum)",
        thin: f"left out: {thin}: it has rows of observations 3, actions 1, rewards, next_observations 3, terminated, "
        f"newer runs of {newer}; specs that differ need fingerprints that differ",
    }
    for action, paths in ((lambda: store.read(MARK), list(expected)), (store.headers, list(expected)[:4])):
        with pytest.warns(RuntimeWarning) as caught:
            result = action()
        texts = [str(warning.message) for warning in caught]
        assert len(texts) == len(paths)
        for path in paths:
            assert [text.startswith(expected[path]) for text in texts if str(path) in text] == [True], path
        if isinstance(result, Transitions):
            assert result.rewards.tolist() == [0, 1, 2, 3, 40, 41, 42, 43]
        else:
            assert [header.path for header in result] == [good, damaged, thin, last]  # data are not looked at


def test_a_whole_file_of_another_name_is_the_oldest(store: ExperienceStore) -> None:
    put(store, numbered(4))
    put(store, numbered(0)).rename(store.root / MARK / "renamed.safetensors")
    assert store.read(MARK).rewards.tolist() == list(range(8))


def test_a_file_that_is_removed_meanwhile_was_never_there(
    store: ExperienceStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [put(store, numbered(4 * index)) for index in range(2)]
    paths[0].unlink()
    monkeypatch.setattr(ExperienceStore, "files", lambda self, fingerprint=None: paths)  # as it was listed before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert store.read(MARK).rewards.tolist() == [4, 5, 6, 7]
        assert [header.path for header in store.headers()] == [paths[1]]


def test_a_summary_counts_runs_of_each_spec(store: ExperienceStore) -> None:
    put(store, numbered(0), run={"task": "b", "seed": 1})
    put(store, numbered(1), run={"task": "a"})
    put(store, numbered(2, n=1), run={"task": "b"})
    put(store, numbered(7, n=1), fingerprint="Other-1", run={"agent": "dqn"})
    first, second = store.summary()
    assert dataclasses.asdict(first) == {
        "fingerprint": MARK,
        "runs": 3,
        "transitions": 9,
        "knobs": ("lr", "dropout"),
        "signals": ("progress", "loss", "lr_unit"),
        "tasks": ("a", "b"),
        "mean_reward_sum": (6 + 10 + 2) / 3,
    }
    assert (second.fingerprint, second.runs, second.tasks, second.mean_reward_sum) == ("Other-1", 1, (), 7.0)


# ---- processes ------------------------------------------------------------------------------------------------------

N_WRITERS, N_RUNS, KILLED = 20, 3, 7
WRITER = """
import os, sys
import numpy as np
from trimtab.experience import ExperienceStore, Transitions

root, index, killed = sys.argv[1], int(sys.argv[2]), sys.argv[2] == sys.argv[3]
draw = np.random.default_rng(index)
runs = []
for _ in range(3):
    n = int(draw.integers(1, 400))
    columns = [draw.normal(size=(n, 3)), draw.integers(0, 9, (n, 2)), draw.normal(size=n), draw.normal(size=(n, 3))]
    runs.append(Transitions(*columns, np.arange(n) == n - 1, {"writer": np.full(n, index)}))
assert "torch" not in sys.modules

def half_written(handle):
    os.ftruncate(handle, os.fstat(handle).st_size // 2)
    print("half written", flush=True)
    sys.stdin.readline()  # until it is killed

print("ready", flush=True)
sys.stdin.readline()
for number, run in enumerate(runs):
    if killed and number == 1:
        os.fsync = half_written
    spec = {"knobs": ["lr", "dropout"], "signals": ["progress", "loss", "lr_unit"]}
    ExperienceStore(root).append(run, spec=spec, fingerprint="mark", run_id=f"writer-{index}")
"""


def test_twenty_processes_append_at_once_and_one_is_killed_in_mid_write(store: ExperienceStore) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    arguments = [sys.executable, "-c", WRITER, str(store.root)]
    writers: list[Any] = []
    try:
        for index in range(N_WRITERS):
            writers.append(subprocess.Popen([*arguments, str(index), str(KILLED)], **pipes))
        for writer in writers:
            assert writer.stdout.readline() == "ready\n"
        for writer in writers:
            writer.stdin.write("go\n")
            writer.stdin.flush()
        assert writers[KILLED].stdout.readline() == "half written\n"
        writers[KILLED].kill()
        assert [writer.wait(60) for writer in writers] == [-9 if index == KILLED else 0 for index in range(N_WRITERS)]
    finally:
        for writer in writers:
            with contextlib.suppress(ProcessLookupError):
                writer.kill()
            writer.communicate()

    (left,) = [name for name in os.listdir(store.root / "mark") if name.startswith(".")]
    assert re.fullmatch(rf"\.\d{{8}}-writer-{KILLED}-[0-9a-f]{{12}}\.safetensors\..+", left)
    files = store.files("mark")
    assert len(files) == (N_WRITERS - 1) * N_RUNS + 1  # its first run was whole, and is kept
    by_writer: dict[str, list[Transitions]] = {}
    for path in files:
        header, found = read_file(path)
        by_writer.setdefault(header.run_id, []).append(found)
    for index in range(N_WRITERS):
        draw = np.random.default_rng(index)
        found_runs = by_writer[f"writer-{index}"]
        assert len(found_runs) == (1 if index == KILLED else N_RUNS)
        for found in found_runs:  # each writer's own order is the stored one
            n = int(draw.integers(1, 400))
            columns = [draw.normal(size=(n, 3)), draw.integers(0, 9, (n, 2)), draw.normal(size=n)]
            columns.append(draw.normal(size=(n, 3)))
            assert_same(found, Transitions(*columns, np.arange(n) == n - 1, {"writer": np.full(n, index)}))
    together = store.read("mark", columns=["writer"])  # a warning would be an error
    assert_same(together, Transitions.concatenate([read_file(path)[1] for path in files]))
    assert put(store, make(1), fingerprint="mark").exists()  # and what is left stands in nobody's way


@pytest.mark.parametrize(
    ("code", "heavy"),
    [
        ("import trimtab.experience as e; e.ExperienceStore(root).summary()[0].runs == 1 or sys.exit(1)", ("numpy",)),
        ("import trimtab.experience as e; len(e.ExperienceStore(root).read('mark')) == 2 or sys.exit(1)", ()),
    ],
)
def test_no_torch_is_needed_and_no_numpy_for_lists(store: ExperienceStore, code: str, heavy: tuple[str, ...]) -> None:
    put(store, make(2), fingerprint="mark")
    check = f"found = {{'torch', 'scipy', 'gymnasium', *{heavy!r}}} & set(sys.modules)\nassert not found, found"
    script = f"import sys\nroot = {str(store.root)!r}\n{code}\n{check}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
