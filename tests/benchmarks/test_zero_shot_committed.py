"""The committed zero-shot table is of the brain that is shipped, and is what its committed runs come to."""

import json
import tarfile
from pathlib import Path

import pytest
import zero_shot
from zero_shot_suite.arms import identity
from zero_shot_suite.parts import PARTS
from zero_shot_suite.store import load_all
from zero_shot_suite.summary import summarize
from zero_shot_suite.table import render

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results" / "zero-shot"


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with tarfile.open(RESULTS / "runs.tar.xz") as archive:
        for member in archive.getmembers():
            (folder / member.name).write_bytes(archive.extractfile(member).read())
    return load_all(folder)


def near(value):
    """Nested JSON with room for the last digits of another machine."""
    if isinstance(value, dict):
        return {key: near(item) for key, item in value.items()}
    if isinstance(value, list):
        return [near(item) for item in value]
    return pytest.approx(value, rel=1e-9) if isinstance(value, float) else value


def test_every_part_is_there_and_whole(kept):
    assert [(part.part.name, part.is_complete) for part in kept] == [(name, True) for name in PARTS]


@pytest.mark.parametrize("arm", ["default", "default-open", "uwhg"])
def test_its_controllers_are_those_that_are_shipped(kept, arm):
    assert {part.arms[arm] for part in kept} == {identity(arm, {})}


def test_its_five_brains_are_the_networks_of_the_default(kept, tmp_path):
    folders = {
        f"member-{index}": alone.save(tmp_path / str(index)) for index, alone in enumerate(zero_shot.default_members())
    }
    now = {f"brain:{name}": identity(f"brain:{name}", folders) for name in folders}
    assert len(now) == 5
    for part in kept:
        assert {arm: name for arm, name in part.arms.items() if arm.startswith("brain:")} == now


@pytest.mark.slow
def test_it_is_what_the_runs_come_to(kept):
    summary = summarize(kept)
    committed = json.loads((ROOT / "benchmarks" / "results" / "zero_shot.json").read_text())
    assert committed == near(json.loads(json.dumps(summary)))
    assert (RESULTS / "table.md").read_text() == render(summary)
