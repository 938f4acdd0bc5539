"""Locks between processes: one holder at a time, and a killed one's are free."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from subject_dla.common import bootstrap, locks
from subject_dla.common.locks import holder, lock

PROGRAM = """
import sys, time
sys.path.insert(0, {root!r})
from common.locks import lock
with lock(__import__("pathlib").Path({path!r})) as held:
    print(held, flush=True)
    sys.stdin.readline()
"""


def start(path):
    program = PROGRAM.format(root=str(bootstrap.ROOT), path=str(path))
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", program], **pipes)


def test_one_process_holds_it_and_the_file_says_which(tmp_path):
    path = tmp_path / "run.lock"
    first = start(path)
    assert first.stdout.readline() == "True\n"
    with lock(path) as held:
        assert not held
    assert f"process {first.pid} on " in holder(path) and path.exists()
    first.communicate("\n")
    assert not path.exists() and holder(path) == "another process"
    with lock(path) as held, lock(path) as again:
        assert held and not again
    assert not path.exists()


@pytest.mark.skipif(os.name != "posix", reason="needs SIGKILL")
def test_a_killed_holders_lock_is_free(tmp_path):
    path = tmp_path / "run.lock"
    first = start(path)
    assert first.stdout.readline() == "True\n"
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert path.exists()
    with lock(path) as held:
        assert held and f"process {os.getpid()} on " in holder(path)
    assert not path.exists()


def test_an_error_inside_gives_it_up(tmp_path):
    with pytest.raises(KeyboardInterrupt), lock(tmp_path / "a"):
        raise KeyboardInterrupt
    with lock(tmp_path / "a") as held:
        assert held


def test_never_two_holders_though_the_file_comes_and_goes(tmp_path):
    inside, most = [], []

    def run(number):
        held_by_it = 0
        while held_by_it < 200:
            with lock(tmp_path / "a") as held:
                if held:
                    inside.append(number)
                    most.append(len(inside))
                    inside.remove(number)
                    held_by_it += 1
        return held_by_it

    with ThreadPoolExecutor(4) as pool:
        count = sum(pool.map(run, range(4)))
    assert count == 800 and max(most) == 1


@pytest.mark.skipif(os.name != "posix", reason="fcntl")
def test_without_locks_in_the_file_system_it_says_so(tmp_path, monkeypatch, caplog):
    def none(*_):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with lock(tmp_path / "a") as held, lock(tmp_path / "a") as again:
        assert held and again
    assert "has no locks" in caplog.text


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="has no such links")
def test_a_lock_writes_through_no_link(tmp_path):
    """Of a run's folder from elsewhere: what it leads to would be emptied."""
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "run.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="It is a link, expected a file of its own. Remove it: .*run.lock"):
        with lock(tmp_path / "run.lock"):
            pass
    assert (tmp_path / "precious").read_text() == "precious"
    os.mkfifo(tmp_path / "pipe.lock")
    with pytest.raises(OSError, match="It is a pipe, socket or device, expected a file. Remove it: .*pipe.lock"):
        with lock(tmp_path / "pipe.lock"):
            pass
    (tmp_path / "long.lock").write_text("x" * 10**6)
    assert len(holder(tmp_path / "long.lock")) == 200
