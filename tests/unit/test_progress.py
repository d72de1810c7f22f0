"""What a person sees of long work: how far each piece is, and no guess at the time where pieces differ."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from trimtab.progress import Live, News, Plain


def test_news_in_words():
    assert str(News("step")) == ""
    assert str(News("step", 3, 5, "train loss 1.25")) == "step 3/5, train loss 1.25"
    assert str(News("iteration", 3, None, "", 61.4)) == "iteration 3, about 61 s to go"


def lines_of(tmp_path: Path, **begin: object) -> list[str]:
    with (tmp_path / "log").open("w") as log:
        display = Plain(Console(file=log, width=80), every_s=0)
        display.begin(3, 1, "pieces of work", **begin)
        display.started("a", "piece a")
        display.over("a")
    return (tmp_path / "log").read_text().splitlines()


def test_the_time_left_is_told_by_pieces_that_are_alike_alone(tmp_path):
    assert lines_of(tmp_path) == [
        "3 pieces of work, 1 of them done before",
        "1 of 3 pieces of work done, 2 left; running: piece a",
        "2 of 3 pieces of work done, 1 left, about 0 s to go; running: none",
    ]
    assert lines_of(tmp_path, alike=False)[-1] == "2 of 3 pieces of work done, 1 left; running: none"


def test_so_it_is_with_bars(tmp_path):
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=True, width=120)
        for alike in (True, False):
            display = Live(console)
            with display:
                display.begin(9, 1, alike=alike)
                for key in "abc":
                    display.started(key, key)
                    display.over(key)
                (task,) = display._progress.tasks
                assert task.completed == 4
                assert (task.time_remaining is None) == (not alike)
