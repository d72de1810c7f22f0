"""Titanic: 18 features whose statistics come from the train split alone."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import InputError, MissingDataError
from trimtab.tasks.data import stratified_cuts
from trimtab.tasks.tabular import titanic_fcnn

REAL = os.environ.get("TRIMTAB_DATA")
TITLES = ("Mr", "Mr", "Mr", "Miss", "Mrs", "Master", "Dr")
COLUMNS = ["PassengerId", "Survived", "Pclass", "Name", "Sex", "Age"]
COLUMNS += ["SibSp", "Parch", "Ticket", "Fare", "Cabin", "Embarked"]


def passenger(i):
    return {
        "PassengerId": i,
        "Survived": i % 2,
        "Pclass": 1 + i % 3,
        "Name": f"N{i}, {TITLES[i % 7]}. X",
        "Sex": ("male", "female")[i % 2],
        "Age": None if i % 10 == 0 else float(20 + i % 30),
        "SibSp": i % 4,
        "Parch": i % 3,
        "Ticket": "T",
        "Fare": float(i),
        "Cabin": "C1" if i % 5 == 0 else None,
        "Embarked": None if i == 17 else "CQS"[i % 3],
    }


def passengers(count=100):
    return [passenger(i) for i in range(count)]


def write_csv(folder: Path, rows) -> Path:
    (folder / "titanic").mkdir(parents=True, exist_ok=True)
    path = folder / "titanic" / "train.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def held_out(rows, part):
    labels = np.array([row["Survived"] for row in rows])
    held = len(rows) // 5
    return stratified_cuts(labels, (len(rows) - 2 * held, held, held), "titanic")[part]


def test_features_are_eighteen_and_standardised_over_train(tmp_path):
    data = titanic_fcnn().load(write_csv(tmp_path, passengers()))
    assert [tuple(part.inputs.shape) for part in (data.train, data.val, data.test)] == [
        (60, 18),
        (20, 18),
        (20, 18),
    ]
    assert [part.targets.sum().item() for part in (data.train, data.val, data.test)] == [30, 10, 10]
    numbers = data.train.inputs[:, :4].double()
    assert numbers.mean(0).abs().max() < 1e-6
    assert torch.allclose(numbers.std(0, unbiased=False), torch.ones(4, dtype=torch.float64), atol=1e-6)
    flags = data.train.inputs[:, 4:]
    assert set(flags.unique().tolist()) == {0.0, 1.0}
    for columns in (slice(3, 6), slice(6, 9), slice(9, 14)):  # class, port, title: exactly one each
        assert flags[:, columns].sum(1).unique().tolist() == [1.0]


def test_flags_say_what_the_row_says(tmp_path):
    rows = passengers()
    data = titanic_fcnn().load(write_csv(tmp_path, rows))
    for inputs, row in zip(data.val.inputs, held_out(rows, 1), strict=True):
        given = rows[row]
        assert inputs[4:7].tolist() == [
            given["Age"] is None,
            given["Cabin"] is not None,
            given["Sex"] == "female",
        ]
        assert inputs[7:10].tolist() == [given["Pclass"] == value for value in (1, 2, 3)]


@pytest.mark.parametrize("part", [1, 2])
def test_nothing_of_val_and_test_reaches_the_train_features(tmp_path, part):
    rows = passengers()
    before = titanic_fcnn().load(write_csv(tmp_path / "a", rows))
    for row in held_out(rows, part):
        rows[row] |= {
            "Age": 900.0,
            "Fare": 1e6,
            "SibSp": 50,
            "Name": "N, Sultan. X",
            "Embarked": "Z",
            "Pclass": 9,
        }
    after = titanic_fcnn().load(write_csv(tmp_path / "b", rows))
    assert torch.equal(before.train.inputs, after.train.inputs)
    changed = (before.val, after.val) if part == 1 else (before.test, after.test)
    assert not torch.equal(changed[0].inputs, changed[1].inputs)
    assert changed[1].inputs[:, 7:13].sum() == 0  # a class and a port that train lacks: all zeros
    assert changed[1].inputs[:, 17].sum() == 20  # title "other"


def test_a_parquet_file_gives_what_the_csv_gives(tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="the extra [data] is not installed")
    import pyarrow.parquet as parquet

    rows = passengers()
    (tmp_path / "p" / "titanic").mkdir(parents=True)
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "p" / "titanic" / "train.parquet")
    from_csv = titanic_fcnn().load(write_csv(tmp_path / "c", rows))
    from_parquet = titanic_fcnn().load(tmp_path / "p")
    assert torch.equal(from_csv.test.inputs, from_parquet.test.inputs)
    assert torch.equal(from_csv.train.targets, from_parquet.train.targets)


def test_wrong_files_are_refused(tmp_path):
    rows = passengers()
    rows[3]["Survived"] = None
    with pytest.raises(InputError, match="Survived is None in a row; expected 0 or 1 in every row"):
        titanic_fcnn().load(write_csv(tmp_path, rows))
    rows = passengers()
    rows[3]["Age"] = "old"
    with pytest.raises(InputError, match="titanic: column Age holds something that is no number"):
        titanic_fcnn().load(write_csv(tmp_path, rows))
    with pytest.raises(InputError, match="has 4 rows; expected at least 5"):
        titanic_fcnn().load(write_csv(tmp_path, passengers(4)))
    (tmp_path / "titanic" / "train.csv").write_text("Survived,Age\n1,2\n")
    with pytest.raises(InputError, match="has no column SibSp, Parch, Fare, Pclass, Name, Sex, Cabin, Embarked"):
        titanic_fcnn().load(tmp_path)


def test_without_a_data_directory_the_error_says_how_to_get_it():
    with pytest.raises(MissingDataError, match=r"titanic/train\.parquet or titanic/train\.csv\. Kaggle gives it after"):
        titanic_fcnn().load(None)


@pytest.mark.skipif(REAL is None, reason="TRIMTAB_DATA names no folder with the real sets")
def test_real_titanic():
    data = titanic_fcnn().load(Path(REAL))
    assert [tuple(part.inputs.shape) for part in (data.train, data.val, data.test)] == [
        (535, 18), (178, 18), (178, 18)]  # fmt: skip
    assert sum(part.targets.sum().item() for part in (data.train, data.val, data.test)) == 342
    assert titanic_fcnn().make_model(data)(data.val.inputs).shape == (178, 2)
