"""Runs a command until it ends or this process's standard input closes, then ends its whole process group.

The parent holds the other end of that pipe, so however the parent ends, nothing that the command started stays behind.
"""

import os
import signal
import subprocess
import sys
import threading

POSIX = os.name == "posix"


def keep(command: list[str]) -> int:
    """Runs `command` until it ends or standard input closes, which happens however our parent ends; then ends the
    whole group."""
    if POSIX:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    restore = (
        (lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)])
        if POSIX
        else None
    )
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=restore)

    def watch() -> None:
        sys.stdin.buffer.read()
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            pass
        if POSIX:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # whatever the server started, and this process
        child.kill()

    threading.Thread(target=watch, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
