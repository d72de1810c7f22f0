"""Reviews: IMDb, whether a film review is positive.

Called by `trimtab.tasks.tuning`, `pruning`, `recurrent` and `bert`. The published train set is cut into train and val
with a fixed seed, stratified (the file has all negative reviews first, so it is never read in its order); the
published test set is the test split. A review that the train file has more than once is taken once, so that no text
of val is a text of train too. The published test set is left as it is: 123 of its 25,000 reviews are in the train
file, word for word.

| scale | train / val / test | words | tokens of a review |
|---|---|---|---|
| full | 22,414 / 2,490 / 25,000 | 10,000 | 200 |
| small | 6,000 / 400 / 1,000 | 2,000 | 64 |
| smoke | 640 / 200 / 200 | 500 | 64 |

A token is a word in lower case, with its apostrophes, or one punctuation mark; the page's line breaks (`<br />`) go.
The vocabulary is made as that of SST-2, from the first tokens of the reviews of the train split of the scale alone:
what a network reads of a review is its beginning.
"""

from __future__ import annotations

import re
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trimtab.tasks import hub
from trimtab.tasks.base import Data, pick
from trimtab.tasks.data import Source, find, stratified_cuts, train_and_held_out
from trimtab.tasks.sentences import as_data, read_texts

__all__ = ["imdb_texts", "load_imdb", "split_words"]

_SOURCE = Source(
    "imdb",
    "Get it with `hf download stanfordnlp/imdb --repo-type dataset --local-dir DIR/imdb` and give --data-dir DIR; see "
    "docs/data.md",
)
_REPO_ID = "stanfordnlp/imdb"
_FOLDER = "plain_text"  # of the Parquet files, in the repository
_EXPECTED = "IMDb's train and test sets, with 0 for negative and 1 for positive"
_HELD_SHARE = 10  # one train review in ten is held out for validation
_PRESETS = {
    "smoke": ((640, 200, 200), 500, 64),
    "small": ((6_000, 400, 1_000), 2_000, 64),
    "full": ((25_000, 25_000, 25_000), 10_000, 200),  # all that there are
}
Labels = npt.NDArray[np.int64]

_WORD = re.compile(r"\w+(?:'\w+)*|[^\w\s]")


def split_words(text: str, n_words: int | None = None) -> str:
    """The words of a text in lower case, punctuation apart, with one blank between.

    Args:
        text: Of a review.
        n_words: How many at most, from the beginning; None for all.

    >>> split_words("It's GOOD,<br /><br />isn't it?")
    "it's good , isn't it ?"
    """
    found = _WORD.finditer(text.lower().replace("<br />", " "))
    return " ".join(match.group() for match in islice(found, n_words))


def load_imdb(data_dir: Path | None, *, scale: str, sizes: tuple[int, int, int] | None = None) -> Data:
    """Read IMDb: inputs (B, L), tokens of the beginnings of reviews.

    Args:
        data_dir: Folder with the folder `imdb`; None for the hub.
        scale: "smoke", "small" or "full".
        sizes: Reviews of train, val and test instead of the scale's; more than there are give all.

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
        UnknownNameError: There is no such scale.
    """
    _, n_words, length = pick(scale, _PRESETS)
    parts = imdb_texts(data_dir, scale=scale, sizes=sizes)
    return as_data(
        [([split_words(text, length) for text in texts], labels) for texts, labels in parts], n_words, length
    )


def imdb_texts(
    data_dir: Path | None, *, scale: str, sizes: tuple[int, int, int] | None = None
) -> list[tuple[list[str], Labels]]:
    """Reviews of train, val and test as they were written, and their labels, (B,).

    Args:
        data_dir: As for `load_imdb`.
        scale: As for `load_imdb`.
        sizes: As for `load_imdb`.

    Raises:
        MissingDataError: It is not there.
        InputError: A file is broken, or not what it should be.
        UnknownNameError: There is no such scale.
    """
    sizes = sizes or pick(scale, _PRESETS)[0]
    if data_dir is None:
        paths = hub.fetch(_SOURCE, _REPO_ID, {split: f"{_FOLDER}/{split}-*.parquet" for split in ("train", "test")})
    else:
        # A repository downloaded as it is has its files in a folder of their own.
        paths = {
            split: find(_SOURCE, data_dir, f"{split}.parquet", f"{split}-*.parquet", f"{_FOLDER}/{split}-*.parquet")
            for split in ("train", "test")
        }
    (texts, labels), (test_texts, test_labels) = (
        read_texts(paths[split], "imdb", "text", _EXPECTED) for split in ("train", "test")
    )
    texts, labels = _without_repetitions(texts, labels)
    train, val = train_and_held_out(labels, _HELD_SHARE, sizes[:2], "imdb")
    test = stratified_cuts(test_labels, (min(sizes[2], len(test_labels)),), "imdb test")[0]
    parts = [([texts[row] for row in rows], labels[rows]) for rows in (train, val)]
    return [*parts, ([test_texts[row] for row in test], test_labels[test])]


def _without_repetitions(texts: list[str], labels: Labels) -> tuple[list[str], Labels]:
    """The first row of each text, in the order of the file."""
    seen: dict[str, int] = {}
    for row, text in enumerate(texts):
        seen.setdefault(text, row)
    return list(seen), labels[list(seen.values())]
