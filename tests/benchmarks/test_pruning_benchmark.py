"""The benchmark of a pruning step: it comes to its end, and says what it can draw."""

from __future__ import annotations

import pruning
import pytest
import torch

from trimtab.storage import read_json


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["pruning.py", *arguments])
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):  # a script: it seeds what it likes
            return pruning.main()
    finally:
        torch.set_num_threads(threads)


def test_every_round_has_a_configuration_of_its_own(monkeypatch, capsys, tmp_path):
    with pytest.raises(SystemExit):
        run(monkeypatch, "--rounds", "100000")
    assert "--rounds is 100000; expected 1 to 395, all the configurations there are" in capsys.readouterr().err
    out = tmp_path / "out.json"
    assert run(monkeypatch, "--rounds", "2", "--out", str(out)) == 0
    found = read_json(out)
    assert found["cpu_seconds"]["episode of the environment"]["over_an_episode"] == 1.0
    assert all(row["median_s"] > 0 for row in found["cpu_seconds"].values())
