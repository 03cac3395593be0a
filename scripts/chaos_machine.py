"""What befalls the machine of a run rather than its processes: its wall clock is set, its disk is full.

For the campaigns of `scripts/chaos.sh`. A step of the clock is that of `chaos_clock.c`, preloaded into the processes of the
run; the disk is a tmpfs on which all lies that they write. Neither touches the real machine. Linux, a C compiler, the
standard library only.
"""

import atexit
import errno
import os
import pathlib
import re
import shutil
import struct
import subprocess
import time

# The clock is set by up to an hour. A server of S3 has a clock of its own and refuses what is 15 minutes off.
OFFSET_S_MAX, OFFSET_S3_S_MAX = 1800, 600
# A run of a campaign takes a tenth.
DISK_MIB, FULL_S_MAX = 64, 8.0
# As long as a run takes to start on a small machine: not all happens before its first step.
WAIT_S_MAX = 5.0
NO_SPACE = re.compile(r"no space|ENOSPC|StorageFull", re.IGNORECASE)


class Machine:
    """One to which nothing happens."""

    environment = {}

    def room(self, folder):
        """Where its run may write."""
        return folder

    def disturb(self, run):
        """What happened, in words."""
        return []

    def again(self, run):
        """Gives a run's command once more where its end is to be excused; that, in words."""
        return []

    def close(self, keep=False):
        """Leaves nothing of it; but what it wrote, if that is to be kept."""


def built(folder):
    """The library with a wall clock that can be set, where one can be had."""
    library, source = folder / "clock.so", pathlib.Path(__file__).with_name("chaos_clock.c")
    try:
        done = subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", library, source], capture_output=True)
    except FileNotFoundError:
        return None
    return library if done.returncode == 0 else None


class Clock(Machine):
    """One whose wall clock is set forth and back."""

    name = "the wall clock is set"

    def __init__(self, place, draws):
        self.library, self.draws, self.offset_s = place.clock, draws, 0

    @staticmethod
    def why_not(place):
        return None if place.clock else "no `cc` here, or none with glibc 2.30 and its headers"

    def room(self, folder):
        self.file = folder / "clock"
        self.set(0)
        self.environment = {"LD_PRELOAD": str(self.library), "CPCR_CHAOS_CLOCK": str(self.file)}
        return folder

    def set(self, offset_s):
        file = os.open(self.file, os.O_WRONLY | os.O_CREAT)
        os.pwrite(file, struct.pack("=q", offset_s), 0)  # in one piece, into what all have mapped
        os.close(file)
        self.offset_s = offset_s

    def disturb(self, run):
        time.sleep(self.draws.uniform(0.0, WAIT_S_MAX))
        most, before = OFFSET_S3_S_MAX if run.server else OFFSET_S_MAX, self.offset_s
        self.set(self.draws.randint(-most, most))
        return [f"{self.name}, by {self.offset_s - before:+d} s at step {run.step()}"]


class Disk(Machine):
    """One whose disk is full for a while."""

    name = "the disk is full"

    def __init__(self, _, draws):
        self.draws, self.mounted = draws, None

    @staticmethod
    def why_not(_):
        # In a namespace that ends with the command: nothing to undo.
        command = ["unshare", "--mount", "mount", "-t", "tmpfs", "cpcr-chaos", "/mnt"]
        try:
            done = subprocess.run(command, capture_output=True)
        except FileNotFoundError:
            return "no `unshare` here (util-linux)"
        return None if done.returncode == 0 else "no tmpfs can be mounted without root"

    def room(self, folder):
        self.mounted = folder / "disk"
        self.mounted.mkdir()
        atexit.register(self.close)  # whatever ends the campaign
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "cpcr-chaos", self.mounted], check=True)
        return self.mounted

    def fill(self, file):
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def disturb(self, run):
        time.sleep(self.draws.uniform(0.0, WAIT_S_MAX))
        at, seconds = run.step(), self.draws.uniform(0.2, FULL_S_MAX)
        until = time.monotonic() + seconds
        filler = self.mounted / "filler"
        with open(filler, "wb", buffering=0) as file:
            while time.monotonic() < until:
                self.fill(file)  # again and again: what the run removes makes room
                time.sleep(0.02)
        filler.unlink()
        return [f"{self.name}, {seconds:.1f} s, at step {at} to {run.step()}", *self.again(run)]

    def again(self, run):
        status = run.launcher.poll()
        if status in (None, 0) or not NO_SPACE.search(run.last_words(1)):
            return []
        run.start()
        # Not a signal before the launcher can have asked for it.
        time.sleep(self.draws.uniform(1.0, 3.0))
        return [f"status {status} for want of room, the same command again"]

    def close(self, keep=False):
        if self.mounted is None or not self.mounted.is_mount():
            return
        if keep:
            shutil.copytree(self.mounted, self.mounted.with_name("disk-kept"), ignore=shutil.ignore_patterns("filler"))
        # Lazily: a process that was just killed may not be gone yet.
        subprocess.run(["umount", "--lazy", self.mounted], check=True)


KINDS = {"clock": Clock, "disk": Disk}
NAMES = [machine.name for machine in KINDS.values()]


def drawn(draws, place):
    """The machine of a run. Draws are the same whatever is to be had here."""
    share = draws.random()
    found = KINDS.get(place.always or ("clock" if share < 0.15 else "disk" if share < 0.3 else None))
    return Machine() if found is None or found.why_not(place) else found(place, draws)
