"""Files are whole or not there; states come back the same; a torn line takes nothing else with it."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from trimtab.errors import InputError, OutputError
from trimtab.storage import (
    RunDirectory,
    append_lines,
    atomic_write,
    load_state,
    read_json,
    read_lines,
    remove_temporary,
    save_state,
    temporary_folder,
    write_json,
)


def files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_atomic_write_makes_folders_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.txt"
    atomic_write(path, "one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert files(tmp_path) == ["a", "a/b", "a/b/file.txt"]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # others may read what a report writes


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    path = tmp_path / "file.txt"
    atomic_write(path, "old")

    def no_space(*_arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(f"trimtab.storage.os.{call}", no_space)
    with pytest.raises(OutputError, match=r"cannot write .*file\.txt: No space left on device; give a folder"):
        atomic_write(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert files(tmp_path) == ["file.txt"]


def test_a_file_where_a_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match=r"cannot write .*taken/file"):
        atomic_write(tmp_path / "taken" / "file", "new")
    assert files(tmp_path) == ["taken"]


def test_what_a_killed_writer_left_is_removed_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        """No OSError: as after kill -9, nobody tidies up."""

    def killed(*_arguments: Any) -> None:
        raise KilledError

    work, elsewhere = tmp_path / "work", tmp_path / "elsewhere"
    for name in ("file.txt", "a/b/.hidden", "a/notes.tmp", "a/.mine.tmp", "a/.mine.with-dash.tmp"):
        atomic_write(work / name, "kept")
    atomic_write(temporary_folder(work / "a", "saving") / "weights", "half of it")
    monkeypatch.setattr("trimtab.storage.os.replace", killed)
    for path in (work / "file.txt", work / "a/b/.hidden", elsewhere / "file.txt"):
        with pytest.raises(KilledError):
            atomic_write(path, "new")
    (work / "link").symlink_to(elsewhere)
    others = [name for name in files(tmp_path) if not name.startswith("work/")]
    kept = ["a", "a/.mine.tmp", "a/.mine.with-dash.tmp", "a/b", "a/b/.hidden", "a/notes.tmp", "file.txt", "link"]
    assert len(files(work)) == len(kept) + 4  # two files, and a folder with one in it
    assert len(others) == 3  # the two folders, and in the second a file that is nobody's business
    remove_temporary(work)
    assert files(work) == kept
    assert [name for name in files(tmp_path) if not name.startswith("work/")] == others
    remove_temporary(tmp_path / "missing")


def test_json_has_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    write_json(path, {"a": math.nan, "b": [math.inf, -math.inf, 1.5, np.float64("nan")], 3: (1, None, "NaN", True)})
    assert "NaN" not in path.read_text().replace('"NaN"', "")
    assert read_json(path) == {"a": None, "b": [None, None, 1.5, None], "3": [1, None, "NaN", True]}


@pytest.mark.parametrize("content", [None, "", "{", "[1, 2", "\x00\x01", b"\xff\xfe\xff"])
def test_a_broken_json_file_is_an_input_error(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "data.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=r"cannot read .*data\.json.*expected a JSON file"):
        read_json(path)


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_lines(path, [])
    assert not path.exists()
    append_lines(path, [{"a": 1}, {"a": math.nan}])
    append_lines(path, [{"a": "line\nbreak \u2028"}])
    assert read_lines(path) == [{"a": 1}, {"a": None}, {"a": "line\nbreak \u2028"}]


def test_a_torn_last_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    append_lines(path, [{"number": 1}, {"number": 2}, {"number": 3}])
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        expected = sum(end <= length for end in ends)
        assert read_lines(path) == [{"number": n + 1} for n in range(expected)], length


def test_nothing_behind_a_broken_line_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    assert read_lines(path) == [{"a": 1}]
    assert read_lines(tmp_path / "missing.jsonl") == []


def test_appending_where_nothing_can_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is the disk full"):
        append_lines(tmp_path / "missing" / "rows.jsonl", [1])


# ---- states ---------------------------------------------------------------------------------------------------------


def equal(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        same_kind = isinstance(second, torch.Tensor) and first.dtype == second.dtype and first.shape == second.shape
        return same_kind and torch.equal(first.nan_to_num(7e7), second.nan_to_num(7e7))
    if isinstance(first, dict):
        return (
            isinstance(second, dict) and list(first) == list(second) and all(equal(first[k], second[k]) for k in first)
        )
    if isinstance(first, (list, tuple)):
        return type(first) is type(second) and len(first) == len(second) and all(map(equal, first, second))
    return type(first) is type(second) and (first == second or (first != first and second != second))


STATE = {
    "tensors": [torch.arange(6).reshape(2, 3).t(), torch.tensor(1.5, dtype=torch.bfloat16), torch.zeros(0, 3)],
    "odd": (torch.tensor([True, False]), torch.tensor([math.nan, math.inf]), torch.tensor(3, dtype=torch.uint8)),
    3: {"int keys": {0: "a", 1: (1, (2, ()), [])}},
    "$tensor": "a key that looks like ours",
    "nested": {
        "$items": [1],
        "none": None,
        "flag": True,
        "nan": math.nan,
        "inf": -math.inf,
        "big": 2**70,
        "text": "ü\n",
    },
    "empty": {},
}


def test_a_state_comes_back_the_same(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_state(path, STATE)
    assert equal(load_state(path), STATE)
    for bare in (5, None, [], {}, torch.ones(2), (1, 2)):
        save_state(path, bare)
        assert equal(load_state(path), bare)


def test_an_optimizers_state_comes_back_the_same(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], betas=(0.9, 0.99))
    weight.grad = torch.ones(3)
    optimizer.step()
    save_state(tmp_path / "s", optimizer.state_dict())
    assert equal(load_state(tmp_path / "s"), optimizer.state_dict())


@settings(max_examples=60, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(width=64) | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3)
        ),
        max_leaves=10,
    )
)
def test_any_nest_comes_back_the_same(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    path = tmp_path_factory.mktemp("state") / "s"
    save_state(path, state)
    assert equal(load_state(path), state)


def test_what_was_loaded_does_not_hang_on_the_file(tmp_path: Path) -> None:
    """A file that is shortened in place took its readers with it: a bus error, which no Python code can catch."""
    path = tmp_path / "state.safetensors"
    save_state(path, {"x": torch.arange(100_000)})
    loaded = load_state(path)
    path.write_bytes(b"")
    assert loaded["x"].sum() == 100_000 * 99_999 // 2


def test_what_is_no_state_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a state holds tensors and JSON scalars, not set"):
        save_state(tmp_path / "s", {"a": {1}})
    assert files(tmp_path) == []


def test_a_torn_or_foreign_state_is_an_input_error(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_state(path, STATE)
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="the file is missing, torn or foreign"):
            load_state(path)
    with pytest.raises(InputError, match="the file is missing, torn or foreign"):
        load_state(tmp_path / "missing")
    save_file({"a": torch.ones(1)}, path)
    with pytest.raises(InputError, match="holds no trimtab state"):
        load_state(path)
    for header in ("5", '{"$tensor": "t99"}', '{"$items": 3}', '{"$tuple": 3}', '{"$items": [[[1], 2]]}', "{"):
        save_file({}, path, metadata={"trimtab_state": header})
        if header != "5":
            with pytest.raises(InputError, match="the file is missing, torn or foreign"):
                load_state(path)


def test_a_pickle_is_not_executed(tmp_path: Path) -> None:
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path(tmp_path / "executed").write_text, ("x",))

    path = tmp_path / "s"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(InputError):
        load_state(path)
    torch.save({"a": Bomb()}, path)
    with pytest.raises(InputError):
        load_state(path)
    assert files(tmp_path) == ["s"]


# ---- run directories ------------------------------------------------------------------------------------------------


def run(path: Path, rows: int) -> RunDirectory:
    directory = RunDirectory(path)
    directory.start({"arm": "x"})
    for number in range(rows):
        append_lines(directory.series, [{"step": number}])
        append_lines(directory.decisions, [{"index": number}])
    return directory


def test_a_run_resumes_where_its_checkpoint_was(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", 3)
    assert directory.resume() is None
    directory.checkpoint({"t": 3})
    append_lines(directory.series, [{"step": 99}])
    with directory.decisions.open("a") as file:
        file.write('{"index": 99')  # killed in the middle of a line
    again = RunDirectory(tmp_path / "run")
    assert again.resume() == {"t": 3}
    assert read_lines(again.series) == [{"step": 0}, {"step": 1}, {"step": 2}]
    assert read_lines(again.decisions) == [{"index": 0}, {"index": 1}, {"index": 2}]
    append_lines(again.decisions, [{"index": 3}])
    assert read_lines(again.decisions)[-1] == {"index": 3}
    assert again.header() == {"arm": "x"}


def test_a_run_without_what_its_checkpoint_counts_on_begins_again(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", 3)
    directory.checkpoint({"t": 3})
    directory.series.write_text('{"step": 0}\n')
    assert directory.resume() is None
    directory = run(tmp_path / "run", 2)
    directory.checkpoint({"t": 2})
    state = tmp_path / "run" / "checkpoint" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-5])
    assert directory.resume() is None
    (tmp_path / "run" / "run.json").unlink()
    assert directory.resume() is None


def test_a_result_ends_a_run(tmp_path: Path) -> None:
    directory = run(tmp_path / "run", 1)
    directory.checkpoint({"t": 1})
    assert not directory.is_done()
    directory.finish({"loss": math.nan})
    assert directory.is_done()
    assert json.loads(directory.result.read_text()) == {"loss": None}
    assert files(tmp_path / "run") == ["decisions.jsonl", "result.json", "run.json", "series.jsonl"]
    directory.start({"arm": "y"})
    assert files(tmp_path / "run") == ["run.json"]
