"""Kills, freezes and starves real runs of `cpcr-launch`, and checks that nothing was lost.

`scripts/chaos.sh` builds and calls it. A campaign (`--runs N --seed S`) draws for each run its size, whether its
storage answers badly, whether its machine's clock is set or its disk is full now and then (`chaos_machine.py`), and up
to three disturbances at random moments; a run must end complete, pass `cpcr audit` and `cpcr checkpoints verify`, and
leave no process behind. `--figures N` repeats single disturbances N times each and prints how long recovery took, by
the clocks of trainers' own logs. Linux, the standard library only; not a benchmark of the machine's speed.
"""

import argparse
import datetime
import json
import os
import pathlib
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import chaos_machine

# A network and data of the demonstration's kind, small enough for a step of some milliseconds on a laptop.
SMALL = ["patch_size=32", "batch.labelled=4", "batch.unlabelled=4", "loss.warmup_epochs=0", "validate.every=100000"]
KEYS = {"AWS_ACCESS_KEY_ID": "cpcr-chaos", "AWS_SECRET_ACCESS_KEY": "cpcr-chaos-secret",
        "AWS_REGION": "us-east-1", "AWS_ALLOW_HTTP": "true"}
RESUMABLE = 75
# Longest that anything here may take.
RUN_S_MAX, EVENT_S_MAX = 300, 60
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class Violation(Exception):
    """A promise that was not kept."""


def processes(part):
    """Processes whose command line contains `part`."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue  # it ended meanwhile
            if part in line:
                found.append(int(entry.name))
    return sorted(found)


def send(pid, what):
    try:
        os.kill(pid, what)
        return True
    except ProcessLookupError:
        return False  # it was faster


def wait_for(what, condition, seconds=EVENT_S_MAX):
    """What `condition` says, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.02)
    raise Violation(f"{what}: not within {seconds} s")


class Run:
    """One run of the launcher in a folder of its own."""

    def __init__(self, place, nodes, sets, faults=None, spares=0, machine=None):
        self.machine = machine or chaos_machine.Machine()
        self.place, self.nodes, self.sets, self.spares = place, nodes, sets, spares
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-chaos-"))
        self.server, self.environment = None, dict(os.environ, RUST_LOG="info,cpcr::trainer=debug")
        self.room = self.machine.room(self.folder)
        self.url = str(self.room / "run")
        self.local = self.room / "run"
        if faults is not None:
            bucket = f"chaos-{os.getpid()}"  # processes are known by their command lines: no other campaign's
            (self.room / "s3" / bucket).mkdir(parents=True)
            self.environment |= KEYS
            command = [place.cpcr, "s3", "--dir", self.room / "s3", "--listen", "127.0.0.1:0",
                       "--faults", "0.02", "--faults-seed", str(faults)]
            self.server = subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True,
                                           stderr=subprocess.DEVNULL)
            self.environment["AWS_ENDPOINT"] = "http://" + self.server.stdout.readline().strip()
            self.url, self.local = f"s3://{bucket}/run", self.room / "s3" / bucket / "run"
        self.launcher, self.log, self.said = None, self.folder / "launcher.log", 0

    def start(self):
        command = [self.place.launch, "--config", "demo", "--data", self.place.data, "--run", self.url,
                   "--backend", "gloo", "--nodes", self.nodes, "--spares", str(self.spares)]
        for pair in [*SMALL, *self.sets]:
            command += ["--set", pair]
        with open(self.log, "a") as log:
            self.said = log.tell()
            self.launcher = subprocess.Popen(command, cwd=self.room, env=self.environment | self.machine.environment,
                                             stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def last_words(self, lines=5):
        """The end of what the launcher that was started last has said."""
        said = self.log.read_bytes()[self.said:].decode(errors="replace")
        return " / ".join(said.strip().splitlines()[-lines:])

    def ended(self, seconds=RUN_S_MAX):
        try:
            return self.launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            raise Violation(f"no end within {seconds} s") from None

    def trainers(self):
        return processes(f'"run":"{self.url}"')

    def agents(self):
        return [pid for pid in processes(f"--run={self.url}") if self.is_child(pid) and self.is_agent(pid)]

    def coordinators(self):
        return [pid for pid in processes(" coordinator --listen") if self.is_child(pid)]

    def is_child(self, pid):
        try:
            return f"PPid:\t{self.launcher.pid}\n" in pathlib.Path(f"/proc/{pid}/status").read_text()
        except OSError:
            return False

    @staticmethod
    def is_agent(pid):
        try:
            return b"\0worker\0" in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return False

    def logs(self):
        return [path for path in self.folder.rglob("trainer-*.jsonl")]

    def steps(self):
        """(when, step) of every step that any trainer has applied, in order of time."""
        found = []
        for path in self.logs():
            for line in path.read_text(errors="replace").splitlines():
                if '"stepped"' not in line:
                    continue
                try:
                    entry = json.loads(line)
                except json.JSONDecodeError:
                    continue  # it is being written, or was cut off by a full disk
                found.append((instant(entry["timestamp"]), entry["fields"]["step"]))
        return sorted(found)

    def step(self):
        return max((step for _, step in self.steps()), default=0)

    def interruptions(self):
        found = []
        for path in sorted((self.local / "interruptions").glob("*.json")):
            try:
                found.append(json.loads(path.read_text()) | {"file": path.name})
            except (OSError, json.JSONDecodeError):
                pass  # it is being written
        return found

    def close(self, keep=False):
        """Ends what is left; `False` where there was something that should not be there."""
        clean = True
        if self.launcher is not None and self.launcher.poll() is None:
            self.launcher.kill()
            self.launcher.wait()
            clean = False
        if self.server is not None:
            self.server.terminate()
            self.server.wait()
        left = processes(str(self.folder))
        for pid in left:
            send(pid, signal.SIGKILL)
        self.machine.close(keep)
        return clean and not left

    def audit(self):
        for arguments in (["audit", self.url, "--json"], ["checkpoints", "verify", self.url, "--json"]):
            done = subprocess.run([self.place.cpcr, *arguments], env=self.environment, cwd=self.folder,
                                  capture_output=True, text=True, timeout=RUN_S_MAX)
            if done.returncode != 0:
                raise Violation(f"cpcr {arguments[0]}: status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
            if arguments[0] == "audit":
                told = json.loads(done.stdout)
        return told


def instant(text):
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


# What happens to a run, by name: whom it hits. Each returns whether it found anyone.

def hit(pids, what, count=1):
    chosen = random.sample(pids, min(count, len(pids)))
    return sum(send(pid, what) for pid in chosen) > 0


def pause(pids):
    chosen = random.sample(pids, min(1, len(pids)))
    for pid in chosen:
        send(pid, signal.SIGSTOP)
    time.sleep(random.uniform(0.1, 12.0))
    for pid in chosen:
        send(pid, signal.SIGCONT)
    return bool(chosen)


def end_and_start_again(run, what):
    if run.launcher.poll() is not None:
        return False
    run.launcher.send_signal(what)
    status = run.ended()
    if what == signal.SIGTERM and status not in (0, RESUMABLE):
        raise Violation(f"SIGTERM: status {status}")
    wait_for("processes of the launcher gone", lambda: not run.trainers() and not run.agents(), 20)
    run.start()
    return True


DISTURBANCES = {
    "SIGKILL of a trainer": lambda run: hit(run.trainers(), signal.SIGKILL),
    "SIGKILL of two trainers": lambda run: hit(run.trainers(), signal.SIGKILL, 2),
    "SIGKILL of all trainers": lambda run: hit(run.trainers(), signal.SIGKILL, 9),
    "SIGKILL of an agent": lambda run: hit(run.agents(), signal.SIGKILL),
    "SIGKILL of the coordinator": lambda run: hit(run.coordinators(), signal.SIGKILL),
    "SIGSTOP of a trainer": lambda run: hit(run.trainers(), signal.SIGSTOP),
    "SIGSTOP of a trainer, then SIGCONT": lambda run: pause(run.trainers()),
    "SIGSTOP of an agent, then SIGCONT": lambda run: pause(run.agents()),
    "SIGSTOP of the coordinator, then SIGCONT": lambda run: pause(run.coordinators()),
    "SIGTERM of the launcher, the same command again": lambda run: end_and_start_again(run, signal.SIGTERM),
    "SIGKILL of the launcher, the same command again": lambda run: end_and_start_again(run, signal.SIGKILL),
}


def one_of_a_campaign(place, seed):
    """What happened in one run, in words, and how many steps and lineages its ledger has."""
    random.seed(seed)
    most = random.randint(1, 4)
    least = random.randint(1, most)
    steps = random.choice([200, 400, 800])
    faults = seed if random.random() < 0.4 else None
    sets = [f"train.iterations={steps}", f"checkpoint.every={random.choice([20, 50, 1000])}", "recovery.target_s=4"]
    spares = int(seed % 2 == 0)
    # Draws of their own: those above and below are as they were before there were any of the machine.
    draws = random.Random(f"machine {seed}")
    run = Run(place, f"{least}:{most}", sets, faults, spares, chaos_machine.drawn(draws, place))
    told = [f"{least}:{most} workers{', a spare' * spares}, {steps} steps", "storage that answers badly" if faults is not None else "local storage"]
    try:
        run.start()
        for _ in range(random.randint(1, 3)):
            time.sleep(random.uniform(0.0, 2.5))
            if run.launcher.poll() is None:
                told += run.machine.disturb(run)
            name = random.choice(list(DISTURBANCES))
            if DISTURBANCES[name](run):
                told.append(f"{name} at step {run.step()}")
        status = run.ended()
        if again := run.machine.again(run):
            told += again
            status = run.ended()
        if status != 0:
            raise Violation(f"status {status}: {run.last_words()}")
        audit = run.audit()
        if audit["steps"] != steps:
            raise Violation(f"{audit['steps']} of {steps} steps in the ledger")
        if not run.close():
            raise Violation("processes left behind")
        shutil.rmtree(run.folder)
        return told, None
    except Violation as violation:
        run.close(keep=True)
        return told, f"{violation} (kept: {run.folder})"
    finally:
        run.close()  # whatever ended it


def tail(path):
    return " / ".join(path.read_text(errors="replace").strip().splitlines()[-3:])


def campaign(place, runs, seed, one=one_of_a_campaign, disturbances=(*DISTURBANCES, *chaos_machine.NAMES)):
    violations = []
    started = time.monotonic()
    counts = dict.fromkeys(disturbances, 0)
    for number in range(seed, seed + runs):
        told, violation = one(place, number)
        for name in disturbances:
            counts[name] += sum(line == name or line.startswith((name + " at", name + ", ")) for line in told)
        print(f"run {number}: {'; '.join(told)}: {violation or 'nothing lost'}", file=sys.stderr, flush=True)
        if violation:
            violations.append((number, violation))
    print(f"{runs} runs, seeds {seed} to {seed + runs - 1}, {time.monotonic() - started:.0f} s, "
          f"{len(violations)} violations\n")
    print("| disturbance | how often |\n|---|---|")
    for name, count in counts.items():
        print(f"| {name} | {count} |")
    for number, violation in violations:
        print(f"\nseed {number}: {violation}")
    return 1 if violations else 0


class Figures:
    """One endless run of four workers that goes on with three, disturbed again and again."""

    def __init__(self, place, target_s):
        self.run = Run(place, "3:4", ["train.iterations=10000000", "checkpoint.every=2000", f"recovery.target_s={target_s}"])
        self.run.start()
        wait_for("the first steps", lambda: self.run.step() > 20)

    def settled(self):
        """Waits until all four train."""
        wait_for("four trainers", lambda: len(self.run.trainers()) == 4)
        time.sleep(random.uniform(1.0, 2.0))

    def loss(self, pids, what):
        """Seconds from a blow to the next step of the others, and to the first step with the one that came back."""
        self.settled()
        before = len(self.run.interruptions())
        pid = random.choice(pids())
        at = time.time()
        send(pid, what)
        def both():
            new = self.run.interruptions()[before:]
            # One whose generation took no step is followed by another.
            return new if new and new[-1]["cause"]["kind"] == "joined" and "step_s" in new[-1] else None
        new = wait_for("the loss and the return", both)
        gone = next(i for i in new if i["cause"]["kind"] != "joined")
        # A verdict is given when the coordinator hears of the next generation's first step.
        return {"loss": gone["at_unix_s"] - at, "join": new[-1]["at_unix_s"] - at,
                "regroup": new[-1]["detect_s"] + new[-1]["regroup_s"] + new[-1]["step_s"]}

    def coordinator(self):
        """Seconds from the coordinator's death to its successor's takeover, steps meanwhile, the longest step's wait."""
        self.settled()
        before = len(self.run.interruptions())
        log = self.run.folder / "run/logs/coordinator.log"
        log = log if log.exists() else next(self.run.folder.rglob("coordinator.log"))
        taken = log.read_text(errors="replace").count("took over")
        at = time.time()
        hit(self.run.coordinators(), signal.SIGKILL)
        wait_for("a takeover", lambda: log.read_text(errors="replace").count("took over") > taken)
        lines = [ANSI.sub("", l) for l in log.read_text(errors="replace").splitlines() if "took over" in l]
        over = instant(lines[-1].split()[0])
        time.sleep(0.5)
        if len(self.run.interruptions()) != before:
            raise Violation(f"a generation was lost with the coordinator: {self.run.interruptions()[before:]}")
        when = sorted({step: when for when, step in reversed(self.run.steps())}.values())
        gaps = [b - a for a, b in zip(when, when[1:]) if at - 1 < b and a < over + 0.4]
        usual = statistics.median(b - a for a, b in zip(when[-600:], when[-599:]))
        return {"reconnect": over - at, "steps": sum(at < w < over for w in when), "gap": max(gaps), "usual": usual}

    def end(self):
        self.run.launcher.terminate()
        status = self.run.ended()
        if status != RESUMABLE:
            raise Violation(f"SIGTERM: status {status}")
        audit = self.run.audit()
        clean = self.run.close()
        if not clean:
            raise Violation("processes left behind")
        shutil.rmtree(self.run.folder)
        return audit


def row(name, values, unit="s"):
    values = sorted(v for v in values if v is not None)
    p99 = values[min(len(values) - 1, int(0.99 * len(values)))]
    print(f"| {name} | {statistics.median(values):.2f} {unit} | {p99:.2f} {unit} | {len(values)} |", flush=True)


def figures(place, times):
    print("| what | median | worst | of |\n|---|---|---|---|")
    target_s = 4
    f = Figures(place, target_s)
    kinds = [("SIGKILL of a trainer", f.run.trainers, signal.SIGKILL), ("SIGKILL of an agent", f.run.agents, signal.SIGKILL),
             (f"SIGSTOP of a trainer (`recovery.target_s = {target_s}`)", f.run.trainers, signal.SIGSTOP)]
    for name, pids, what in kinds:
        seen = [f.loss(pids, what) for _ in range(times)]
        row(f"{name}, to the survivors' next step", [s["loss"] for s in seen])
        row(f"{name}, to the first step of the process that replaces it", [s["join"] for s in seen])
        row(f"{name}, pause of the others while that one joins", [s["regroup"] for s in seen])
    seen = [f.coordinator() for _ in range(times)]
    row("SIGKILL of the coordinator, to its successor's takeover", [s["reconnect"] for s in seen])
    row("SIGKILL of the coordinator, steps done meanwhile", [s["steps"] for s in seen], "steps")
    row("SIGKILL of the coordinator, longest wait for a step", [s["gap"] for s in seen])
    row("(a step, usually)", [s["usual"] for s in seen])
    audit = f.end()
    print(f"\n{audit['steps']} steps, {audit['lineages']} lineages: audit clean")
    return 0


class Place:
    """Where the binaries and the dataset are, and what is to happen always."""

    def __init__(self, folder, always=None):
        self.always, self.slow = always, False
        folder = pathlib.Path(folder).resolve()
        self.cpcr, self.launch = folder / "cpcr", folder / "cpcr-launch"
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-chaos-data-"))
        self.data, self.clock = self.folder / "data", chaos_machine.built(self.folder)
        subprocess.run([self.cpcr, "data", "synth", "--patients", "8", "--out", self.data], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def skipped(what, reason):
    """Says aloud what is not tried here."""
    if reason:
        print(f"skipped: {what}: {reason}", file=sys.stderr)
    return bool(reason)


def main():
    import chaos_net  # which imports this module

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=0, help="runs of a campaign")
    parser.add_argument("--seed", type=int, default=1, help="of its first run; the others follow")
    parser.add_argument("--figures", type=int, default=0, metavar="N", help="measure recovery, N times each")
    parser.add_argument("--partitions", type=int, default=0, metavar="N",
                        help="runs on hosts of their own whose packets are lost; wants root")
    parser.add_argument("--always", choices=["clock", "disk", "slow"],
                        help="what is to happen to every run: its clock is set, its disk full, a host's link slow")
    parser.add_argument("--bin", default="target/release", help="folder of the binaries")
    arguments = parser.parse_args()
    if arguments.runs == 0 and arguments.figures == 0 and arguments.partitions == 0:
        parser.error("--runs N, --partitions N or --figures N")
    if arguments.partitions and skipped("partitions", chaos_net.why_not()):
        arguments.partitions = 0
    # As on Ctrl-C: what is mounted does not stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    place = Place(arguments.bin, arguments.always)
    for machine in chaos_machine.KINDS.values() if arguments.runs else ():
        skipped(machine.name, machine.why_not(place))
    if arguments.partitions:
        place.slow = not skipped(chaos_net.SLOW, chaos_net.why_not_slow())
        skipped(chaos_net.CLOCKS, chaos_machine.Clock.why_not(place))
    try:
        status = campaign(place, arguments.runs, arguments.seed) if arguments.runs else 0
        if arguments.partitions:
            names = (*chaos_net.PARTITIONS, chaos_net.KILLED, chaos_net.SLOW, chaos_net.CLOCKS)
            status = campaign(place, arguments.partitions, arguments.seed, chaos_net.one, names) or status
        return status or (figures(place, arguments.figures) if arguments.figures else 0)
    except Violation as violation:
        print(f"violation: {violation}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(place.folder)


if __name__ == "__main__":
    sys.modules["chaos"] = sys.modules["__main__"]
    sys.exit(main())
