"""Runs of cpcr-launch to look at from outside: started in a folder, heard line by line, their processes found, ended in any case.

What it is not: a judge of runs; each test knows what it wants of one. Linux (/proc), the standard library only.
"""

import dataclasses
import json
import os
import pathlib
import re
import subprocess
import threading
import time

from basics import Failed, stop, wait_for

# Small enough for a step of some milliseconds on a laptop.
SMALL = ["patch_size=32", "batch.labelled=4", "batch.unlabelled=4"]
# Longest that a run may take, and its end after a signal.
RUN_S_MAX, END_S_MAX = 300, 60
# What this process's environment says to exporters or to another run is not for the runs in here.
NOT_HANDED_ON = ("OTEL_", "TRACEPARENT", "CPCR_JOIN_TOKEN")
# The process's role as its resource says it, and the argument that tells it in a list of processes.
ROLES = {"coordinator": ("cpcr", "coordinator"), "worker": ("cpcr", "worker"), "trainer": ("cpcr-engine", "trainer")}


def synthesise(binaries, folder):
    """A dataset, and the names in it that nobody else should hear."""
    data = folder / "data"
    subprocess.run([binaries / "cpcr", "data", "synth", "--patients", "8", "--out", data], check=True, capture_output=True)
    return data, names_in(data) | {path.name for path in data.rglob("*") if path.is_file()}


def names_in(data):
    """What a dataset calls volumes and patients."""
    volumes = json.loads((data / "manifest.json").read_text())["volumes"]
    return {volume[key] for volume in volumes for key in ("name", "patient")}


def below(root):
    """A process and all below it: each one's parent, and the words of its command line."""
    seen = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            # After the name, which may hold anything, come the state and the parent.
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue  # it ended meanwhile
        seen[int(entry.name)] = parent, words
    ours = {root}
    while more := {pid for pid, (parent, _) in seen.items() if parent in ours} - ours:
        ours |= more
    return {pid: seen[pid] for pid in ours if pid in seen}


def role_of(words):
    """The role of the process with that command line, if it has one of ours."""
    return next((role for role, (program, argument) in ROLES.items()
                 if pathlib.Path(words[0]).name == program and words[1:2] == [argument]), None)


def is_alive(pid):
    """Whether a process is there, and no zombie."""
    try:
        return (pathlib.Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Launched:
    """A run of cpcr-launch in a folder that is its own, and when it said which line on stderr."""

    def __init__(self, binaries, folder, arguments, sets, environment=None):
        command = [binaries / "cpcr-launch", "--backend", "gloo", *arguments]
        for pair in [*SMALL, *sets]:
            command += ["--set", pair]
        own = {name: value for name, value in os.environ.items() if not name.startswith(NOT_HANDED_ON)}
        self.lines, self.ended_at = [], None
        self.process = subprocess.Popen(command, cwd=folder, env=own | (environment or {}), stdin=subprocess.DEVNULL,
                                        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stderr:
            self.lines.append((time.time(), line.rstrip()))

    def said(self, pattern):
        """What the pattern's group is in the first line that begins with it, if there is one by now."""
        found = (re.match(pattern, line) for _, line in self.lines)
        return next((match[1] for match in found if match), None)

    def tail(self):
        return " / ".join(line for _, line in self.lines[-5:])

    def address(self, seconds):
        """Where the dashboard is, once that was said."""
        def there():
            address = self.said(r"dashboard: (https?://\S+/)")
            if not address and self.process.poll() is not None:
                raise Failed(f"cpcr-launch ended with {self.process.returncode} and named no dashboard: {self.tail()}")
            return address
        return wait_for("the dashboard's address on stderr", there, seconds)

    def processes(self, role):
        """Its processes of that role, the newest last."""
        return sorted(pid for pid, (_, words) in below(self.process.pid).items() if role_of(words) == role)

    def ended(self):
        """Waits for the end of the run, which must be a good one."""
        try:
            status = self.process.wait(RUN_S_MAX)
        except subprocess.TimeoutExpired:
            raise Failed(f"the run has not ended within {RUN_S_MAX} s") from None
        self.ended_at = time.time()
        self.reader.join(5)
        if status != 0:
            raise Failed(f"the run ended with {status}: {self.tail()}")

    def stop(self):
        """Ends it as Ctrl-C would, if it has not ended; how it ended."""
        return stop(self.process, END_S_MAX)


@dataclasses.dataclass
class Life:
    """A process that was seen while the run went."""
    pid: int
    role: str
    node: int | None
    killed_at: float | None = None
    gone_at: float | None = None


class Processes:
    """Every process of a run that was ever seen below its launcher."""

    def __init__(self, launcher):
        self.launcher, self.lives, self.done = launcher, {}, threading.Event()
        self.thread = threading.Thread(target=self.look_often, daemon=True)
        self.thread.start()

    def look_often(self):
        count = 0
        while not self.done.wait(0.02):
            if count % 5 == 0:
                self.look()
            count += 1
            for life in list(self.lives.values()):
                if life.gone_at is None and not is_alive(life.pid):
                    life.gone_at = time.time()

    def look(self):
        found = below(self.launcher)
        for pid, (parent, words) in found.items():
            role = role_of(words)
            if role and pid not in self.lives:
                # A trainer's own arguments do not name its node: its agent's do.
                of_agent = found.get(parent, (0, []))[1] if role == "trainer" else words
                node = next((int(word[7:]) for word in of_agent if re.fullmatch(r"--node=\d+", word)), None)
                self.lives[pid] = Life(pid, role, node)

    def all(self):
        return sorted(self.lives.values(), key=lambda life: (list(ROLES).index(life.role), life.node or 0, life.pid))

    def close(self):
        self.done.set()
        self.thread.join()
