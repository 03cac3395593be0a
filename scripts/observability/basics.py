"""What every test in here is made of: one exception that ends it, checks that are counted, waits with a bound,
free ports, ends of processes.

What it is not: knowledge of cpcr, which begins in runs.py. The standard library only.
"""

import socket
import subprocess
import sys
import time

# Longest that what should be there soon may take.
SOON_S_MAX = 10
# What `check` has seen: names of checks.
passed, failures = [], []


class Failed(Exception):
    """The test cannot go on."""


def check(what, holds, found=""):
    """Counts a check; what does not hold is told at once, and the test goes on."""
    (passed if holds else failures).append(what)
    if not holds:
        print(f"FAILED: {what}{f': {found}' if found != '' else ''}", file=sys.stderr, flush=True)


def wait_for(what, condition, seconds=SOON_S_MAX, every_s=0.05):
    """What `condition` says, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(every_s)
    raise Failed(f"{what}: not within {seconds} s")


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


def stop(process, seconds):
    """Ends a child by SIGTERM, as Ctrl-C would, and by SIGKILL if that does not do. How it ended."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode
