"""Finding and reading files, and the stratified cut."""

import zipfile

import numpy as np
import pytest

from trimtab.errors import InputError, MissingDataError, MissingExtraError
from trimtab.tasks import data
from trimtab.tasks.data import Source, find, read_bytes, stratified_cuts, train_and_held_out

SOURCE = Source("things", "Ask for it.")


def test_the_first_pattern_wins_and_shards_are_sorted(tmp_path):
    folder = tmp_path / "things"
    folder.mkdir()
    for name in ("train-00001.parquet", "train-00000.parquet"):
        (folder / name).touch()
    assert [path.name for path in find(SOURCE, tmp_path, "train.parquet", "train-*.parquet")] == [
        "train-00000.parquet",
        "train-00001.parquet",
    ]
    (folder / "train.parquet").touch()
    assert find(SOURCE, tmp_path, "train.parquet", "train-*.parquet") == [folder / "train.parquet"]


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(MissingDataError) as caught:
        find(SOURCE, tmp_path, "a.txt", "b.zip")
    assert str(caught.value) == (f"no things data: looked for things/a.txt or things/b.zip in {tmp_path}. Ask for it.")
    with pytest.raises(MissingDataError, match=r"in .*nowhere \(which is not a folder\)\. Ask for it\."):
        find(SOURCE, tmp_path / "nowhere", "a.txt")
    with pytest.raises(
        MissingDataError, match=r"no data directory was given \(--data-dir\), which would hold things/a"
    ):
        find(SOURCE, None, "a.txt")


def test_a_folder_is_not_taken_for_a_file(tmp_path):
    (tmp_path / "things" / "a.txt").mkdir(parents=True)
    with pytest.raises(MissingDataError):
        find(SOURCE, tmp_path, "a.txt")


def test_bytes_come_from_a_file_or_the_only_file_of_an_archive(tmp_path):
    plain, packed = tmp_path / "text", tmp_path / "text.zip"
    plain.write_bytes(b"abc")
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("text", b"abcd")
    assert (read_bytes(plain), read_bytes(packed)) == (b"abc", b"abcd")
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("other", b"")
    with pytest.raises(InputError, match="holds 2 files; expected exactly one"):
        read_bytes(packed)
    packed.write_bytes(b"PK torn")
    with pytest.raises(InputError, match=r"cannot read .*text\.zip: File is not a zip file"):
        read_bytes(packed)


def test_a_missing_extra_is_one_error_that_names_it(monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(data.importlib, "import_module", absent)
    with pytest.raises(MissingExtraError) as caught:
        data.extra("PIL.Image", "mnist")
    assert str(caught.value) == ('mnist needs the package pillow, which is not installed; pip install "trimtab[data]"')


def test_cuts_are_disjoint_have_their_sizes_and_every_class_its_share():
    labels = np.repeat([0, 1, 2], [500, 300, 100])
    cuts = stratified_cuts(labels, (540, 180, 180), "a")
    assert [len(cut) for cut in cuts] == [540, 180, 180]
    assert sorted(np.concatenate(cuts)) == list(range(900))
    for cut, share in zip(cuts, (0.6, 0.2, 0.2), strict=True):
        assert np.abs(np.bincount(labels[cut]) - share * np.array([500, 300, 100])).max() <= 1


def test_cuts_repeat_and_differ_by_name():
    labels = np.arange(200) % 4
    first, again, other = (stratified_cuts(labels, (50, 50), name)[0] for name in ("a", "a", "b"))
    assert (first == again).all()
    assert not (first == other).all()


def test_more_rows_than_there_are_is_refused():
    with pytest.raises(InputError, match="a: 10 rows cannot be cut into parts of 8, 3"):
        stratified_cuts(np.zeros(10), (8, 3), "a")


def test_a_smaller_scale_takes_its_parts_from_the_same_sides():
    labels = np.array([0] * 60 + [1] * 40)
    train, val = train_and_held_out(labels, 10, (1000, 1000), "set")
    assert sorted([*train, *val]) == list(range(100))
    assert (len(train), len(val), labels[val].sum()) == (90, 10, 4)
    few_train, few_val = train_and_held_out(labels, 10, (30, 5), "set")
    assert (len(few_train), len(few_val), labels[few_train].sum(), labels[few_val].sum()) == (30, 5, 12, 2)
    assert set(few_train) <= set(train)
    assert set(few_val) <= set(val)
