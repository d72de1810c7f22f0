"""Characters of the standard library: only its files, 32 classes, and windows that share nothing."""

import re
import sysconfig

import numpy as np
import pytest

from trimtab.errors import InputError
from trimtab.tasks import python_source as source
from trimtab.tasks.pools import Sizes
from trimtab.tasks.python_source import ALPHABET, MODULES, read_codes

SIZES = Sizes(600, 100, 130, 130)


def text_of(codes):
    return "".join(ALPHABET[int(code)] for code in codes)


def test_every_module_is_there():
    lengths = [len(read_codes(name)) for name in MODULES]
    assert min(lengths) > 3_500  # of Python 3.10 to 3.13
    assert 1_500_000 < sum(lengths) < 4_000_000
    assert len(ALPHABET) == len(set(ALPHABET)) == 32
    assert set(np.unique(np.concatenate([read_codes(name) for name in MODULES])).tolist()) == set(range(32))


def test_characters_are_reduced_to_their_classes(monkeypatch, tmp_path):
    (tmp_path / "csv.py").write_text("Def f_1(x):\n\n    \treturn  [x]**9  # \u00e9\n", encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert text_of(read_codes.__wrapped__("csv")) == "def f_0(x(.\nreturn (x(..0 . ."


def test_a_python_without_its_source_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    text = (
        f"the source of Python's module 'csv' is not in {tmp_path}, but the families on python-source read it; take a"
    )
    with pytest.raises(InputError, match=re.escape(text)):
        read_codes.__wrapped__("csv")


def test_windows_do_not_overlap(monkeypatch):
    text = np.random.default_rng(0).integers(32, size=30_000).astype(np.uint8)
    monkeypatch.setattr(source, "read_codes", lambda name: text)
    for seed in range(5):
        pool = source.python_source(np.random.default_rng(seed), SIZES)
        assert pool.inputs.shape == (SIZES.total, pool.drawn["context"])
        rows = np.column_stack([pool.inputs.astype(np.uint8), pool.targets.astype(np.uint8)])
        whole = text.tobytes()
        places = np.sort([whole.find(row.tobytes()) for row in rows])
        assert places[0] >= 0
        assert np.diff(places).min() >= pool.drawn["context"] + 1
        assert (np.diff(places) % (pool.drawn["context"] + 1) == 0).all()


def test_a_row_that_occurs_again_is_left_out_and_more_modules_are_read(monkeypatch):
    texts = {
        name: np.tile(np.random.default_rng(i).integers(32, size=25 * 17 * 9).astype(np.uint8), 3)
        for i, name in enumerate(MODULES)
    }
    monkeypatch.setattr(source, "read_codes", texts.__getitem__)
    pool = source.python_source(np.random.default_rng(1), SIZES, context=16)
    assert pool.drawn["n_modules"] == 5  # each has 225 windows, three times
    assert pool.inputs.shape == (SIZES.total, 16)
    assert len(np.unique(pool.inputs, axis=0)) == SIZES.total
