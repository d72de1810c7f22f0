"""Brains: saved and loaded the same; each broken, foreign or future file is one BrainError; nothing is executed."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from toy import Toy
from trimtab import brains
from trimtab.agents.base import Agent
from trimtab.agents.q_learning import QLearning
from trimtab.brain import Brain
from trimtab.controller import Controller
from trimtab.errors import BrainError, OutputError
from trimtab.spec import ControlSpec, make_agent


def learned() -> Brain:
    """A Q-table after two short runs."""
    agent = QLearning(every=4, epsilon=0.5, seed=2)
    spec = ControlSpec.for_agent(agent, reward="improvement")
    for _ in range(2):
        toy = Toy()
        controller = Controller(agent, optimizer=toy.optimizer, total_steps=40, spec=spec)
        for _ in range(40):
            controller.step(toy.step())
    assert agent.n_updates == 18
    return Brain(agent, spec, {"recipe": "two runs", "seeds": [0, 1], "cost": {1: (2, 3)}})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return learned().save(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "brain"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], *, is_signed: bool = True) -> None:
    """Change the description; signed, as somebody would who means it."""
    path = folder / "brain.json"
    data = json.loads(path.read_text())
    change(data)
    if is_signed and "checksum" in data:
        rest = {key: value for key, value in data.items() if key != "checksum"}
        data["checksum"] = hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(data))


def test_a_brain_comes_back_the_same(folder: Path) -> None:
    brain, again = learned(), Brain.load(folder)
    assert isinstance(again.agent, QLearning)
    assert isinstance(brain.agent, QLearning)
    assert again.spec == brain.spec
    assert np.array_equal(again.agent.table, brain.agent.table)
    assert np.array_equal(again.agent.visits, brain.agent.visits)
    assert again.agent.options == brain.agent.options
    assert again.provenance == {"recipe": "two runs", "seeds": [0, 1], "cost": {"1": [2, 3]}}
    observation = np.zeros((5, 4))
    draws = [agent.predict(observation)[0].tolist() for agent in (brain.agent, again.agent)]
    assert draws[0] == draws[1], "exploration does not go on where it was"
    assert repr(again) == f"Brain('q_learning', spec {brain.spec.fingerprint})"


def test_a_table_goes_on_learning_over_runs_and_files(folder: Path) -> None:
    brain = Brain.load(folder)
    toy = Toy()
    controller = Controller(brain, optimizer=toy.optimizer, total_steps=40)
    for _ in range(40):
        controller.step(toy.step())
    assert isinstance(brain.agent, QLearning)
    assert brain.agent.n_updates == 18 + 9
    brain.save(folder)
    again = Brain.load(folder).agent
    assert isinstance(again, QLearning)
    assert again.n_updates == 27


@pytest.mark.parametrize("name", ["uwhg", "cosine", "random", "plateau", "constant"])
def test_brains_of_other_agents(tmp_path: Path, name: str) -> None:
    agent = make_agent(name)
    Brain(agent, ControlSpec.for_agent(agent)).save(tmp_path)
    again = Brain.load(tmp_path)
    assert again.agent.name == name
    assert again.spec == ControlSpec.for_agent(agent)


def test_the_shipped_brains() -> None:
    default, free = Brain.load("default"), Brain.load("default-open")
    assert (default.agent.name, free.agent.name) == ("ppo", "uwhg")
    assert default.provenance["command"] == "trimtab learn default --seed 0"
    assert (default.spec.base.name, free.spec.base.name) == ("cosine", "constant")
    with pytest.raises(BrainError, match=r"no brain in defaults: .*or 'default'"):
        Brain.load("defaults")


@pytest.mark.parametrize("name", [name for name in brains.descriptions() if name != "pruning"])  # trimtab.prune's
def test_every_brain_on_the_list_loads_and_says_where_it_comes_from(name: str) -> None:
    brain = Brain.load(name)
    assert brain.provenance
    if brains.folder_of(name) is not None:
        assert sum(path.stat().st_size for path in brains.folder_of(name).iterdir()) < 1_000_000
        assert "trimtab learn" in brain.provenance["command"]


def test_a_brain_is_used_with_its_own_spec_alone() -> None:
    brain = learned()
    brain.check_spec(brain.spec)
    other = ControlSpec.for_agent(brain.agent, reward="negative_loss")
    with pytest.raises(
        BrainError, match=r"made for another spec \(reward: improvement here, negative_loss asked for\)"
    ):
        brain.check_spec(other)
    with pytest.raises(BrainError, match="made for another spec"):
        Controller(brain, optimizer=Toy().optimizer, spec=other)


# ---- what is broken -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["brain.json", "weights.safetensors"])
def test_every_truncation_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    for length in [*range(0, len(whole), max(1, len(whole) // 60)), len(whole) - 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(BrainError, match=r"copy it anew|is not a brain"):
            Brain.load(folder)
    path.write_bytes(whole + b"\n ")
    if name != "brain.json":
        with pytest.raises(BrainError, match="copy it anew"):
            Brain.load(folder)
    path.unlink()
    with pytest.raises(BrainError, match=r"is missing|copy it anew"):
        Brain.load(folder)


@pytest.mark.parametrize("name", ["brain.json", "weights.safetensors"])
def test_every_flipped_byte_is_found(folder: Path, name: str) -> None:
    path = folder / name
    whole = path.read_bytes()
    expected = learned().agent.state_dict()
    for place in range(0, len(whole), max(1, len(whole) // 150)):
        for bit in (1, 4):
            torn = bytearray(whole)
            torn[place] ^= bit
            path.write_bytes(bytes(torn))
            try:
                agent: Agent = Brain.load(folder).agent
            except BrainError:
                continue
            # White space between the JSON's values is the only thing that may differ.
            assert name == "brain.json"
            assert json.loads(torn) == json.loads(whole)
            assert torch.equal(agent.state_dict()["table"], expected["table"])


def _set(*path: Any) -> Callable[[dict[str, Any]], None]:
    *keys, last, value = path

    def change(data: dict[str, Any]) -> None:
        for key in keys:
            data = data[key]
        data[last] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (_set("version", 2), "has version 2, this trimtab reads version 1; upgrade trimtab"),
        (_set("version", "1"), "has version '1'"),
        (_set("format", "pickle"), "is not a brain: expected the format 'trimtab-brain'"),
        (_set("agents", "x"), "unknown key 'agents'; did you mean 'agent'"),
        (lambda data: data.pop("spec"), "lacks spec; it is torn"),
        (lambda data: data.pop("checksum"), "lacks checksum; it is torn"),
        (_set("agent", "q_learnin"), "unknown agent 'q_learnin'; did you mean 'q_learning'"),
        (_set("agent", "os:system"), "unknown agent 'os:system'"),
        (_set("agent", ["q_learning"]), "agent"),
        (_set("options", "nonsense", 1), "cannot be used: unknown option of agent 'q_learning' 'nonsense'"),
        (_set("options", None), "options is a NoneType, expected an object"),
        (_set("options", "gamma", "high"), "cannot be used: q_learning: gamma is 'high'"),
        (_set("options", "bins", {"progress": [0.5]}), r"cannot be used: q_learning: table is \(108, 3\)"),
        (_set("spec", "reward", "negative_loss"), "the file says .*; it was changed after it was saved"),
        (_set("spec", "rewards", "x"), "cannot be used: unknown key of a spec 'rewards'"),
        (_set("spec", 5), "spec is a int, expected an object"),
        (_set("state", "extra", 1), r"cannot be used: q_learning: the state has the keys \['extra', "),
        (_set("state", {}), "cannot be used: q_learning: the state has the keys"),
        (_set("state", "rng", {"bit_generator": "MT19937"}), "cannot be used: q_learning: rng is no state"),
        (_set("state", []), "state is a list, expected an object"),
        (_set("tensors", "table", "shape", [1, 324]), "holds .*, the description says"),
        (_set("tensors", "table", "dtype", "float16"), "has dtype 'float16' and shape"),
        (_set("tensors", "table", "shape", [-1, 3]), "expected one of"),
        (_set("tensors", "table", "shape", "108"), "expected one of"),
        (_set("tensors", {}), "holds .*, the description says {}"),
        (_set("tensors", 3), "tensors is a int, expected an object"),
        (_set("sha256", "0" * 64), r"is not what was saved \(checksum\)"),
    ],
)
def test_a_changed_description_is_one_brain_error(
    folder: Path, change: Callable[[dict[str, Any]], None], text: str
) -> None:
    edit(folder, change)
    with pytest.raises(BrainError, match=text):
        Brain.load(folder)


def test_an_unsigned_change_of_an_option_is_found(folder: Path) -> None:
    edit(folder, _set("options", "gamma", 0.8), is_signed=False)
    with pytest.raises(BrainError, match=r"brain\.json is not what was saved \(checksum\); copy it anew"):
        Brain.load(folder)


@pytest.mark.parametrize("content", ["[]", "5", '"x"', "null", "[" * 100_000, "1" * 10_000, "\x00", "{}"])
def test_json_that_is_no_brain(folder: Path, content: str) -> None:
    (folder / "brain.json").write_text(content)
    with pytest.raises(BrainError, match=r"is not a brain|cannot be read as JSON"):
        Brain.load(folder)


def test_a_huge_file_is_not_read(folder: Path) -> None:
    with (folder / "brain.json").open("r+b") as file:
        file.truncate(1 << 33)
    with pytest.raises(BrainError, match="is larger than"):
        Brain.load(folder)


def test_a_huge_shape_allocates_nothing(folder: Path) -> None:
    edit(folder, _set("tensors", "table", "shape", [2**31 - 1, 2**31 - 1]))
    tracemalloc.start()
    with pytest.raises(BrainError, match="where its tensors take"):
        Brain.load(folder)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_options_of_a_huge_table_allocate_nothing(folder: Path) -> None:
    edit(folder, _set("options", "bins", {f"s{n}": list(range(90)) for n in range(6)}))
    with pytest.raises(BrainError, match=r"a table of .* entries; at most"):
        Brain.load(folder)


class Bomb:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return (self.target.write_text, ("executed",))


def test_a_pickle_in_place_of_the_weights_is_not_executed(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "executed"
    weights = folder / "weights.safetensors"
    size = weights.stat().st_size
    for raw in (pickle.dumps(Bomb(target)), pickle.dumps(Bomb(target)).ljust(size, b"\0")):
        weights.write_bytes(raw)
        with pytest.raises(BrainError, match="copy it anew"):
            Brain.load(folder)
        edit(folder, _set("sha256", hashlib.sha256(raw).hexdigest()))
        with pytest.raises(BrainError):
            Brain.load(folder)
    torch.save(Bomb(target), weights)
    with pytest.raises(BrainError):
        Brain.load(folder)
    assert not target.exists()


def test_tensors_of_somebody_else(folder: Path) -> None:
    weights = folder / "weights.safetensors"
    save_file(
        {"table": torch.zeros(108, 3, dtype=torch.float64), "visit": torch.zeros(108, 3, dtype=torch.int64)}, weights
    )
    edit(folder, _set("sha256", hashlib.sha256(weights.read_bytes()).hexdigest()))
    with pytest.raises(BrainError, match=r"holds .*'visit'.*, the description says"):
        Brain.load(folder)


@pytest.mark.parametrize("where", ["a/file/inside", "nul\0byte", "brain.json"])
def test_a_path_that_is_none(folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    (folder / "a").write_text("no folder")
    with pytest.raises(BrainError):
        Brain.load(where)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(OutputError, match="cannot write"):
        learned().save(tmp_path / "taken")
