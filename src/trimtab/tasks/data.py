"""Finding and reading data files: where a user said they are, or one error that says how to get them.

Called by the task modules from `task.load`. The layout of a data directory is stated in docs/data.md.
pyarrow, pillow and huggingface_hub (the extra `[data]`) are imported where they are used.
"""

from __future__ import annotations

import importlib
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trimtab.errors import InputError, MissingDataError, MissingExtraError
from trimtab.seeding import numpy_generator

__all__ = [
    "Source",
    "decode_images",
    "extra",
    "find",
    "read_bytes",
    "read_parquet",
    "stratified_cuts",
    "train_and_held_out",
]

Rows = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """Where a data set may lie in a data directory, and how to come by it.

    Attributes:
        dataset: Folder under the data directory.
        how: What a user can do to get it, as a sentence.
    """

    dataset: str
    how: str


def extra(module: str, dataset: str) -> Any:
    """Import a module of the extra `[data]`.

    Raises:
        MissingExtraError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
        raise MissingExtraError(
            f'{dataset} needs the package {package}, which is not installed; pip install "trimtab[data]"'
        ) from error


def find(source: Source, data_dir: Path | None, *patterns: str) -> list[Path]:
    """Files of a data set under a data directory; the first pattern that matches anything wins.

    Args:
        source: The data set.
        data_dir: The folder that holds one folder a data set; None if the user named none.
        *patterns: File names or globs below the data set's folder, best first.

    Raises:
        MissingDataError: There is no such file; says where it was looked for.
    """
    wanted = " or ".join(f"{source.dataset}/{pattern}" for pattern in patterns)
    if data_dir is None:
        raise MissingDataError(
            f"no {source.dataset} data: no data directory was given (--data-dir), which would hold "
            f"{wanted}. {source.how}"
        )
    for pattern in patterns:
        found = sorted(path for path in (data_dir / source.dataset).glob(pattern) if path.is_file())
        if found:
            return found
    state = "" if data_dir.is_dir() else " (which is not a folder)"
    raise MissingDataError(f"no {source.dataset} data: looked for {wanted} in {data_dir}{state}. {source.how}")


def read_parquet(paths: Sequence[Path], dataset: str, columns: Sequence[str]) -> Any:
    """Read columns of one or more Parquet files as one pyarrow table.

    Raises:
        MissingExtraError: pyarrow is not installed.
        InputError: A file is broken or lacks a column.
    """
    parquet = extra("pyarrow.parquet", dataset)
    arrow = extra("pyarrow", dataset)
    tables = []
    for path in paths:
        try:
            missing = [name for name in columns if name not in parquet.read_schema(path).names]
            if missing:
                raise InputError(f"{path} has no column {', '.join(missing)}; expected: {', '.join(columns)}")
            # partitioning=None: the folder's name is no column.
            tables.append(parquet.read_table(path, columns=list(columns), partitioning=None))
        except (OSError, arrow.ArrowException) as error:
            raise InputError(f"cannot read {path}: {error}; expected a Parquet file of {dataset}") from error
    return arrow.concat_tables(tables)


def decode_images(
    cells: Sequence[Any], dataset: str, size: tuple[int, int], *, is_colour: bool = False
) -> npt.NDArray[np.uint8]:
    """Decode cells of the hub's `Image` feature.

    Args:
        cells: Dicts with the file's content under "bytes".
        dataset: Name for messages.
        size: Height and width that every image must have.
        is_colour: Red, green and blue; else one grey value a pixel.

    Returns:
        (B, height, width), in colour (B, height, width, 3).

    Raises:
        MissingExtraError: pillow is not installed.
        InputError: A cell is no image, or has another size.
    """
    image = extra("PIL.Image", dataset)
    out = np.empty((len(cells), *size, *((3,) if is_colour else ())), dtype=np.uint8)
    for index, cell in enumerate(cells):
        try:
            with image.open(io.BytesIO(cell["bytes"])) as picture:
                out[index] = np.asarray(picture.convert("RGB" if is_colour else "L"))
        except (OSError, TypeError, KeyError, ValueError) as error:
            raise InputError(f"{dataset}: row {index} is no image of {size[0]} x {size[1]}: {error}") from error
    return out


def read_bytes(path: Path) -> bytes:
    """Content of a file, or of the single file in a .zip.

    Raises:
        InputError: It cannot be read, or the archive holds not exactly one file.
    """
    try:
        if path.suffix != ".zip":
            return path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.namelist() if not member.endswith("/")]
            if len(members) != 1:
                raise InputError(f"{path} holds {len(members)} files; expected exactly one")
            return archive.read(members[0])
    except (OSError, zipfile.BadZipFile) as error:
        raise InputError(f"cannot read {path}: {error}") from error


def stratified_cuts(labels: npt.NDArray[Any], sizes: Sequence[int], name: str) -> list[Rows]:
    """Cut rows into disjoint parts in which every class has its share, to within one row a cut.

    The rows of each class are shuffled and spread evenly over [0, 1); sorting all rows by that place mixes
    the classes in proportion, so that any stretch of the order is stratified. What is drawn depends on the
    labels and the name alone, never on a run's seed: every run sees the same split.

    Args:
        labels: (B,) class of each row.
        sizes: Rows of each part; their sum is at most B, the rest is left out.
        name: What the split is for; other names give other splits.

    Returns:
        Row numbers of each part.

    Raises:
        InputError: There are fewer rows than asked for.
    """
    if sum(sizes) > len(labels):
        raise InputError(f"{name}: {len(labels)} rows cannot be cut into parts of {', '.join(map(str, sizes))}")
    generator = numpy_generator(0, "split", name)
    place = np.empty(len(labels))
    for value in np.unique(labels):
        rows = np.flatnonzero(labels == value)
        place[generator.permutation(rows)] = (np.arange(len(rows)) + generator.random()) / len(rows)
    order = np.argsort(place, kind="stable").astype(np.int64)
    return np.split(order, np.cumsum(sizes))[: len(sizes)]


def train_and_held_out(
    labels: npt.NDArray[Any], held_share: int, sizes: tuple[int, int], name: str
) -> tuple[Rows, Rows]:
    """Cut train and val out of a published train set, stratified.

    The cut into a pool and held-out rows comes first, so that a smaller scale takes its parts from the same sides.

    Args:
        labels: (B,) class of each row.
        held_share: One row in this many is held out.
        sizes: Rows of train and of val; more than there are give all.
        name: What the split is for; other names give other splits.

    Returns:
        Row numbers of train and of val, disjoint.
    """
    held = len(labels) // held_share
    pool, held_out = stratified_cuts(labels, (len(labels) - held, held), name)
    train = pool[stratified_cuts(labels[pool], (sizes[0],), f"{name} train")[0]] if sizes[0] < len(pool) else pool
    val = held_out[stratified_cuts(labels[held_out], (sizes[1],), f"{name} val")[0]] if sizes[1] < held else held_out
    return train, val
