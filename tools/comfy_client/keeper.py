"""Runs a command until it ends or this process's standard input closes, then ends its whole process group.

The parent holds the other end of that pipe, so however the parent ends, nothing that the command started survives.
"""

import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

POSIX = os.name == "posix"
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if POSIX else ()


def keep(command: list[str]) -> int:
    """Runs a command as this module describes; returns its exit code."""

    def handle_signals(how: signal.Handlers) -> None:
        for number in SIGNALS:
            signal.signal(number, how)

    handle_signals(signal.SIG_IGN)
    restore = (lambda: handle_signals(signal.SIG_DFL)) if POSIX else None
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=restore)

    def watch() -> None:
        sys.stdin.buffer.read()
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(5)
        if POSIX:
            os.killpg(os.getpgrp(), signal.SIGKILL)  # whatever the server started, and this process
        child.kill()

    threading.Thread(target=watch, daemon=True).start()
    return child.wait()


if __name__ == "__main__":
    sys.exit(keep(sys.argv[1:]))
