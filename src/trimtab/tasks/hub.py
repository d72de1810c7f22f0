"""One short look at the Hugging Face hub, in a child process that is killed when its time is up.

Called by task modules for sets that the hub has, and only if the user named no data directory. The hub's
cache is read first (no network). What the child fetches goes to a temporary folder, which is moved into the
cache when it is whole and removed otherwise, so that nothing half-written is left behind.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Literal

from trimtab.errors import MissingDataError
from trimtab.tasks.data import Source, extra

__all__ = ["fetch"]

Kind = Literal["dataset", "model"]
LIMIT_S = 5.0  # DESIGN, rules at the edges: the hub is tried once, at most five seconds
_CHILD = """
import sys
from huggingface_hub import snapshot_download
snapshot_download(sys.argv[1], cache_dir=sys.argv[2], repo_type=sys.argv[3], allow_patterns=sys.argv[4:])
"""


def fetch(source: Source, repo_id: str, patterns: dict[str, str], *, kind: Kind = "dataset") -> dict[str, list[Path]]:
    """Files of a data set (or of a network) on the hub, from its cache or fetched now.

    Args:
        source: The data set, for messages.
        repo_id: Its id on the hub, for example "ylecun/mnist".
        patterns: Split -> glob of its files in the repository.
        kind: Of the repository.

    Returns:
        Split -> its files.

    Raises:
        MissingExtraError: huggingface_hub is not installed.
        MissingDataError: The hub did not give it within five seconds; nothing is left behind.
    """
    cache = Path(extra("huggingface_hub.constants", source.dataset).HF_HUB_CACHE)
    folder = cache / f"{kind}s--{repo_id.replace('/', '--')}"
    found = _in_cache(folder, patterns)
    if found is not None:
        return found
    why = _download(folder, repo_id, kind, list(patterns.values()))
    found = _in_cache(folder, patterns)
    if found is None:
        raise MissingDataError(
            f"no {source.dataset} data: no data directory was given (--data-dir), {repo_id} is not in "
            f"{cache}, and the hub was tried once: {why or 'it does not hold the files'}. {source.how}"
        )
    return found


def _in_cache(folder: Path, patterns: dict[str, str]) -> dict[str, list[Path]] | None:
    """Files of the newest snapshot that has all splits."""
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    for snapshot in sorted(snapshots, key=lambda path: path.stat().st_mtime, reverse=True):
        found = {split: sorted(snapshot.glob(pattern)) for split, pattern in patterns.items()}
        if all(found.values()):
            return found
    return None


def _download(folder: Path, repo_id: str, kind: Kind, patterns: list[str]) -> str | None:
    """Fetch into the cache; returns why it was not done, None when it was."""
    with tempfile.TemporaryDirectory(prefix="trimtab-hub-") as temporary:
        command = [sys.executable, "-c", _CHILD, repo_id, temporary, kind, *patterns]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        except subprocess.TimeoutExpired:
            return f"no answer within {LIMIT_S:g} s"
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            return lines[-1][:300].rstrip(".") if lines else f"exit code {done.returncode}"
        return _move(Path(temporary) / folder.name, folder)


def _move(fetched: Path, place: Path) -> str | None:
    """Put a whole folder at its place by one rename; a place that is taken is left as it is."""
    if place.exists():
        return f"{place} is there but not whole; remove it or finish it with `hf download`"
    beside = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        shutil.copytree(fetched, beside, symlinks=True)  # the cache's links are relative, so they stay right
        os.rename(beside, place)
    except OSError as error:
        return f"cannot write the hub's cache: {error}"
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return None
