"""The hub is asked once, for a limited time, and nothing half-written is left."""

import time
from pathlib import Path

import pytest

from trimtab.errors import MissingDataError
from trimtab.tasks import hub
from trimtab.tasks.data import Source

pytest.importorskip("huggingface_hub", reason="the extra [data] is not installed")

SOURCE = Source("things", "Ask for it.")
PATTERNS = {"train": "train-*.parquet", "test": "test-*.parquet"}
# Children that stand in for the download; they write what the hub's cache looks like.
WHOLE = """
import pathlib, sys
snapshot = pathlib.Path(sys.argv[2], "datasets--us--things", "snapshots", "abc")
snapshot.mkdir(parents=True)
for split in ("train", "test"):
    (snapshot / f"{split}-0.parquet").write_text(split)
"""
HANGING = WHOLE.replace('("train", "test")', '("train",)') + "import time\ntime.sleep(60)\n"
FAILING = WHOLE.replace('("train", "test")', '("train",)') + "sys.exit('no such host.')\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(hub.tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "cache"


def files_below(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def test_what_was_fetched_lies_in_the_cache_and_is_not_fetched_again(cache, monkeypatch):
    monkeypatch.setattr(hub, "_CHILD", WHOLE)
    found = hub.fetch(SOURCE, "us/things", PATTERNS)
    snapshot = cache / "datasets--us--things" / "snapshots" / "abc"
    assert found == {"train": [snapshot / "train-0.parquet"], "test": [snapshot / "test-0.parquet"]}
    monkeypatch.setattr(hub, "_CHILD", "raise SystemExit('asked twice')")
    assert hub.fetch(SOURCE, "us/things", PATTERNS) == found
    assert files_below(cache.parent) == [str(path[0].relative_to(cache.parent)) for path in sorted(found.values())]


def test_a_hub_that_hangs_is_left_alone_in_time_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(hub, "_CHILD", HANGING)
    monkeypatch.setattr(hub, "LIMIT_S", 1.0)
    start = time.monotonic()
    with pytest.raises(MissingDataError) as caught:
        hub.fetch(SOURCE, "us/things", PATTERNS)
    assert time.monotonic() - start < 30  # 60 if the child were waited for
    assert str(caught.value) == (
        f"no things data: no data directory was given (--data-dir), us/things is not in {cache}, "
        "and the hub was tried once: no answer within 1 s. Ask for it."
    )
    assert files_below(cache.parent) == []


def test_the_limit_is_five_seconds():
    assert hub.LIMIT_S == 5.0


def test_a_hub_that_fails_says_why_and_leaves_nothing(cache, monkeypatch):
    monkeypatch.setattr(hub, "_CHILD", FAILING)
    with pytest.raises(MissingDataError, match=r"the hub was tried once: no such host\. Ask for it\."):
        hub.fetch(SOURCE, "us/things", PATTERNS)
    assert files_below(cache.parent) == []


def test_an_unfinished_copy_in_the_cache_is_named_and_kept(cache, monkeypatch):
    place = cache / "datasets--us--things"
    place.mkdir(parents=True)
    (place / "half").touch()
    monkeypatch.setattr(hub, "_CHILD", WHOLE)
    with pytest.raises(MissingDataError, match="datasets--us--things is there but not whole; remove it or finish it"):
        hub.fetch(SOURCE, "us/things", PATTERNS)
    assert files_below(cache.parent) == ["cache/datasets--us--things/half"]


def test_the_real_child_is_valid_and_names_what_it_wants():
    compile(hub._CHILD, "child", "exec")
    assert "repo_type=sys.argv[3], allow_patterns=sys.argv[4:]" in hub._CHILD
