"""Executors: results come back, one crash fails one piece of work, and nothing outlives its parent."""

import os
import signal
import subprocess
import sys
import time

import pytest

from trimtab.errors import InputError, RunFailedError, UnknownNameError
from trimtab.executors import Event, make_executor

HERE = __name__


def double(number, progress):
    progress({"half": number})
    return {"twice": 2 * number, "pid": os.getpid()}


def misbehave(how, progress):
    if how == "exit":
        os._exit(7)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "error":
        raise ValueError("a fault")
    if how == "input":
        raise InputError("a rate of 0")
    if how == "no json":
        return {"value": object()}
    return {"how": how}


def write_and_wait(path, progress):
    with open(path, "a") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(60)
    return {}


def threads(_, progress):
    import torch

    return {"threads": torch.get_num_threads(), "ignores": signal.getsignal(signal.SIGINT) == signal.SIG_IGN}


def run(executor, work):
    events: list[Event] = []
    with executor:
        for key, argument in work.items():
            executor.submit(key, argument)
        executor.drain(events.append)
    return events


def final(events):
    return {event.key: event for event in events if event.kind in ("done", "failed")}


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_every_result_comes_back_once_and_after_its_start(workers):
    events = run(make_executor("local", f"{HERE}:double", workers=workers), {f"k{i}": i for i in range(6)})
    assert {key: event.data["twice"] for key, event in final(events).items()} == {f"k{i}": 2 * i for i in range(6)}
    for key in final(events):
        kinds = [event.kind for event in events if event.key == key]
        assert kinds[0] == "started"
        assert kinds[-1] == "done"
        assert kinds.count("done") == 1


def test_processes_are_used_again_and_are_not_this_one():
    events = run(make_executor("local", f"{HERE}:double", workers=2), {f"k{i}": i for i in range(8)})
    pids = {event.data["pid"] for event in final(events).values()}
    assert 1 <= len(pids) <= 2
    assert os.getpid() not in pids


def test_progress_is_handed_on():
    events = run(make_executor("local", f"{HERE}:double", workers=1), {"a": 3})
    assert Event("progress", "a", {"half": 3}) in events


@pytest.mark.parametrize(
    ("how", "text"),
    [
        ("exit", "its worker process ended with exit code 7"),
        ("kill", "its worker process was killed by SIGKILL (out of memory?)"),
        ("error", "ValueError: a fault"),
        ("input", "a rate of 0"),
        ("no json", "TypeError: Object of type object is not JSON serializable"),
    ],
)
def test_a_failure_fails_its_own_work_by_name_and_no_other(how, text):
    work = {"before": "fine", "bad": how, "after": "fine", "later": "fine"}
    found = final(run(make_executor("local", f"{HERE}:misbehave", workers=2), work))
    assert found["bad"].kind == "failed"
    assert found["bad"].data["error"] == text
    assert [found[key].kind for key in ("before", "after", "later")] == ["done"] * 3


def test_our_errors_come_without_a_traceback_and_others_with():
    found = final(run(make_executor("local", f"{HERE}:misbehave", workers=1), {"ours": "input", "theirs": "error"}))
    assert found["ours"].data["traceback"] is None
    assert found["theirs"].data["traceback"].startswith("Traceback")


def test_work_can_be_submitted_while_events_come():
    executor = make_executor("local", f"{HERE}:double", workers=1)
    seen = []

    def on_event(event):
        if event.kind == "done":
            seen.append(event.key)
            if event.key == "first":
                executor.submit("second", 2)

    with executor:
        executor.submit("first", 1)
        executor.drain(on_event)
    assert seen == ["first", "second"]


def test_threads_are_set_in_workers_and_lent_in_this_process():
    import torch

    before = torch.get_num_threads()
    for workers in (0, 1):
        found = final(run(make_executor("local", f"{HERE}:threads", workers=workers, threads=1), {"a": None}))
        assert found["a"].data["threads"] == 1
        assert found["a"].data["ignores"] is (workers == 1)  # Ctrl-C is the parent's to answer
    assert torch.get_num_threads() == before


def test_workers_that_cannot_start_are_one_error():
    executor = make_executor("local", "no_such_module_at_all:f", workers=1)
    with pytest.raises(RunFailedError, match="a worker process cannot start: ModuleNotFoundError: No module named"):
        run(executor, {"a": 1})


def test_closing_ends_work_under_way(tmp_path):
    executor = make_executor("local", f"{HERE}:write_and_wait", workers=1)

    def interrupt(event):
        if event.kind == "started":
            wait_for(lambda: (tmp_path / "pids").exists())
            raise KeyboardInterrupt

    executor.submit("a", str(tmp_path / "pids"))
    with pytest.raises(KeyboardInterrupt), executor:
        executor.drain(interrupt)
    pid = int((tmp_path / "pids").read_text())
    wait_for(lambda: not is_alive(pid))


def test_workers_die_with_a_killed_parent(tmp_path):
    script = (
        "from trimtab.executors import make_executor\n"
        f"executor = make_executor('local', {HERE + ':write_and_wait'!r}, workers=2)\n"
        "if __name__ == '__main__':\n"
        f"    for key in 'ab': executor.submit(key, {str(tmp_path / 'pids')!r})\n"
        "    executor.drain(lambda event: None)\n"
    )
    (tmp_path / "script.py").write_text(script)
    path = os.pathsep.join(part for part in sys.path if part)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env={**os.environ, "PYTHONPATH": path})
    try:
        wait_for(lambda: (tmp_path / "pids").exists() and len((tmp_path / "pids").read_text().split()) == 2)
    finally:
        parent.kill()
        parent.wait()
    for pid in (tmp_path / "pids").read_text().split():
        wait_for(lambda pid=int(pid): not is_alive(pid))


def test_wrong_names_and_numbers_are_refused():
    with pytest.raises(InputError, match="executor 'ray' is not available in this version; use 'local'"):
        make_executor("ray", "m:f", workers=1)
    with pytest.raises(UnknownNameError, match="unknown executor 'locl'; did you mean 'local'"):
        make_executor("locl", "m:f", workers=1)
    with pytest.raises(InputError, match="workers: got -1, expected a whole number of at least 1"):
        make_executor("local", "m:f", workers=-1)


def wait_for(condition, timeout_s=60.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.02)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False
