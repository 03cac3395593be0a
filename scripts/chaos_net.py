"""Partitions between real processes in network namespaces: the part of `scripts/chaos.sh` that wants root.

Every process of a run has a host of its own, a network namespace behind one router: the store, the coordinator, the
workers. What is started on them is what a cluster starts, with the same commands, and what ends is started again as a
cluster would do it. Packets are lost on the router, by rules with a direction, so that a partition may be one of a kind
where A hears B and B does not hear A. A host's link may be slow for a while, and its wall clock not that of the others.
Linux, `ip` and `tc`, the standard library only.
"""

import os
import pathlib
import random
import secrets
import shutil
import signal
import subprocess
import tempfile
import threading
import time

import chaos_machine
from chaos import KEYS, RESUMABLE, RUN_S_MAX, SMALL, Violation, processes, send, tail, wait_for

# 10.77.N.0/30 is host N's link: .1 is the router, .2 the host.
STORE, COORDINATOR, WORKERS = 0, 1, 2
PORT = 7077
# A queue of so many milliseconds before a slow link; what it cannot hold is lost, as on a real one.
QUEUE_MS = 400
RATES_KBIT = [256, 1000, 4000]


def ip(*arguments, check=True):
    done = subprocess.run(["ip", *map(str, arguments)], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise Violation(f"ip {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.returncode == 0


def tc(*arguments, check=True):
    done = subprocess.run(["tc", *map(str, arguments)], capture_output=True, text=True)
    if check and done.returncode != 0:
        raise Violation(f"tc {' '.join(map(str, arguments))}: {done.stderr.strip()}")
    return done.returncode == 0


def rate(device, kbit):
    return ["dev", device, "root", "tbf", "rate", f"{kbit}kbit", "burst", "16kb", "latency", f"{QUEUE_MS}ms"]


def why_not_slow():
    """Why no link can be slow here, if so."""
    if shutil.which("tc") is None:
        return "no `tc` here (iproute2)"
    name = f"cpcr{os.getpid()}p"
    ip("netns", "add", name)
    slow = tc("-n", name, "qdisc", "add", *rate("lo", RATES_KBIT[0]), check=False)
    ip("netns", "del", name, check=False)
    return None if slow else "this kernel has no token bucket (tbf)"


def why_not():
    """Why no namespaces can be had here, if so."""
    if shutil.which("ip") is None:
        return "no `ip` here (iproute2)"
    name = f"cpcr{os.getpid()}p"
    if not ip("netns", "add", name, check=False):
        return "no network namespaces without root"
    rules = ip("-n", name, "rule", "add", "from", "10.77.0.2", "to", "10.77.1.2", "blackhole", check=False)
    ip("netns", "del", name, check=False)
    return None if rules else "this kernel's `ip rule` has no blackhole"


class Network:
    """Hosts around a router."""

    def __init__(self, count):
        self.prefix, self.count, self.cuts, self.lock = f"cpcr{os.getpid()}", 0, set(), threading.Lock()
        self.router = f"{self.prefix}r"
        ip("netns", "add", self.router)
        subprocess.run(["ip", "netns", "exec", self.router, "sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward"], check=True)
        for _ in range(count):
            self.add()

    def add(self):
        """One more host; its number."""
        with self.lock:
            n, self.count = self.count, self.count + 1
        ip("netns", "add", self.host(n))
        ip("link", "add", f"v{n}", "netns", self.router, "type", "veth", "peer", "name", "eth0", "netns", self.host(n))
        ip("-n", self.router, "addr", "add", f"10.77.{n}.1/30", "dev", f"v{n}")
        ip("-n", self.router, "link", "set", f"v{n}", "up")
        ip("-n", self.host(n), "addr", "add", f"{address(n)}/30", "dev", "eth0")
        ip("-n", self.host(n), "link", "set", "eth0", "up")
        ip("-n", self.host(n), "link", "set", "lo", "up")
        ip("-n", self.host(n), "route", "add", "default", "via", f"10.77.{n}.1")
        return n

    def host(self, n):
        return f"{self.prefix}h{n}"

    def cut(self, *ways):
        """What host a sends to host b is lost, for each (a, b)."""
        for a, b in ways:
            ip("-n", self.router, "rule", "add", "from", address(a), "to", address(b), "blackhole")
            self.cuts.add((a, b))

    def slow(self, n, kbit):
        """Host n's link carries so much, both ways."""
        tc("-n", self.router, "qdisc", "add", *rate(f"v{n}", kbit))
        tc("-n", self.host(n), "qdisc", "add", *rate("eth0", kbit))

    def quicken(self, n):
        tc("-n", self.router, "qdisc", "del", "dev", f"v{n}", "root")
        tc("-n", self.host(n), "qdisc", "del", "dev", "eth0", "root")

    def heal(self):
        for a, b in self.cuts:
            ip("-n", self.router, "rule", "del", "from", address(a), "to", address(b), "blackhole")
        self.cuts.clear()

    def close(self):
        for n in range(self.count):
            ip("netns", "del", self.host(n), check=False)
        ip("netns", "del", self.router, check=False)


def address(n):
    return f"10.77.{n}.2"


class Cluster:
    """A run whose processes are started on hosts, and again when they end, but for the reasons that a cluster accepts."""

    def __init__(self, place, workers, sets, draws):
        self.place, self.sets, self.workers = place, sets, range(WORKERS, WORKERS + workers)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-chaos-net-"))
        bucket = f"chaos-{os.getpid()}"  # processes are known by their command lines: no other campaign's
        self.url, self.data, self.local = f"s3://{bucket}/run", f"s3://{bucket}/data", self.folder / "s3" / bucket / "run"
        shutil.copytree(place.data, self.folder / "s3" / bucket / "data")
        self.environment = dict(os.environ, AWS_ENDPOINT=f"https://{address(STORE)}:9000", CPCR_JOIN_TOKEN=secrets.token_hex(32), CPCR_OWN_S3="1",
                                **KEYS)
        self.network = Network(WORKERS + workers)
        self.clocks = clocks(place, draws, self.folder, range(COORDINATOR, WORKERS + workers))
        self.ending, self.statuses, self.lives = False, {}, {}
        self.server = self.spawn(STORE, [place.cpcr, "s3", "--dir", self.folder / "s3", "--listen", f"{address(STORE)}:9000"])
        wait_for("the store", lambda: processes(f"--dir {self.folder / 's3'} --listen"))
        self.threads = [threading.Thread(target=self.keep, args=(COORDINATOR, self.coordinator))]
        self.threads += [threading.Thread(target=self.keep, args=(n, self.worker)) for n in self.workers]

    def spawn(self, n, command):
        log = open(self.folder / f"host-{n}.log", "a")
        clock = self.clocks[n].environment if n in self.clocks else {}
        return subprocess.Popen(["ip", "netns", "exec", self.network.host(n), *map(str, command)], cwd=self.folder, stdout=log,
                                env=self.environment | clock, stderr=log, stdin=subprocess.DEVNULL)

    def coordinator(self):
        command = [self.place.cpcr, "coordinator", "--listen", f"{address(COORDINATOR)}:{PORT}", "--run", self.url,
                   "--nodes", f"{max(1, len(self.workers) - 1)}:{len(self.workers)}", "--config", "demo", "--backend", "gloo",
                   "--data", self.data]
        for pair in [*SMALL, *self.sets]:
            command += ["--set", pair]
        return self.spawn(COORDINATOR, command)

    def worker(self, n):
        command = [self.place.cpcr, "worker", "--coordinator", f"{address(COORDINATOR)}:{PORT}", "--node", n - WORKERS,
                   "--run", self.url, "--logs", self.folder / f"logs-{n}", "--threads", 1, "--patience-s", 120]
        return self.spawn(n, command)

    def keep(self, n, start):
        """One host's process, started again whenever it ends with what a cluster would not accept."""
        while not self.ending:
            self.lives[n] = start() if n == COORDINATOR else start(n)
            status = self.lives[n].wait()
            if status in (0, 2) or self.ending:
                self.statuses[n] = status
                return
            time.sleep(0.2)

    def start(self):
        for thread in self.threads:
            thread.start()

    def finish(self):
        """Waits for the good end of all."""
        wait_for("the end of the coordinator", lambda: COORDINATOR in self.statuses, RUN_S_MAX)
        wait_for("the end of the workers", lambda: len(self.statuses) == len(self.threads), 60)
        if any(self.statuses.values()):
            logs = "; ".join(f"host {n}: {tail(self.folder / f'host-{n}.log')}" for n, s in self.statuses.items() if s)
            raise Violation(f"statuses {self.statuses}: {logs}")

    def close(self):
        self.ending = True
        self.network.heal()
        left = [pid for pid in processes(self.url) if pid != os.getpid()]
        for life in self.lives.values():
            life.kill()
        for pid in left:
            send(pid, signal.SIGKILL)
        self.server.kill()
        for thread in self.threads:
            if thread.ident:
                thread.join()
        self.network.close()
        return not left

    def audit(self, steps):
        for arguments in (["audit", self.url, "--json"], ["checkpoints", "verify", self.url]):
            command = ["ip", "netns", "exec", self.network.host(COORDINATOR), self.place.cpcr, *arguments]
            done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=RUN_S_MAX)
            if done.returncode != 0:
                raise Violation(f"cpcr {arguments[0]}: status {done.returncode}: {done.stderr.strip()}")
            if arguments[0] == "audit" and f'"steps":{steps}' not in done.stdout.replace(" ", ""):
                raise Violation(f"not {steps} steps in the ledger: {done.stdout.strip()}")


def both(a, b):
    return [(a, b), (b, a)]


def from_all(cluster, n):
    return [way for other in (STORE, COORDINATOR, *cluster.workers) if other != n for way in both(n, other)]


# Which packets are lost, by name; drawn hosts are filled in.
PARTITIONS = {
    "a worker and the coordinator": lambda c: both(random.choice(c.workers), COORDINATOR),
    "what a worker says to the coordinator": lambda c: [(random.choice(c.workers), COORDINATOR)],
    "what the coordinator says to a worker": lambda c: [(COORDINATOR, random.choice(c.workers))],
    "two workers": lambda c: both(*random.sample(c.workers, 2)),
    "what a worker says to another": lambda c: [tuple(random.sample(c.workers, 2))],
    "a worker and the store": lambda c: both(random.choice(c.workers), STORE),
    "what the store says to a worker": lambda c: [(STORE, random.choice(c.workers))],
    "the coordinator and the store": lambda c: both(COORDINATOR, STORE),
    "the coordinator and all workers": lambda c: [way for n in c.workers for way in both(n, COORDINATOR)],
    "a worker and all others": lambda c: from_all(c, random.choice(c.workers)),
}
KILLED = "SIGKILL of the coordinator"
SLOW = "a host's link is slow"
CLOCKS = "hosts' clocks differ"


def clocks(place, draws, folder, hosts):
    """The clocks of hosts in a run where they differ: by less than the store, which has another, would refuse."""
    differ = draws.random() < 0.3
    offsets = {n: draws.randint(-chaos_machine.OFFSET_S3_S_MAX, chaos_machine.OFFSET_S3_S_MAX) for n in hosts}
    if chaos_machine.Clock.why_not(place) or not (differ or place.always == "clock"):
        return {}
    found = {n: chaos_machine.Clock(place, draws) for n in hosts}
    for n, clock in found.items():
        (folder / f"host-{n}").mkdir()
        clock.room(folder / f"host-{n}")
        clock.set(offsets[n])
    return found


def slow(cluster, draws):
    """A host's link is slow for a while; which, in words."""
    host, kbit, seconds = draws.randrange(cluster.network.count), draws.choice(RATES_KBIT), draws.uniform(1.0, 20.0)
    cluster.network.slow(host, kbit)
    time.sleep(seconds)
    cluster.network.quicken(host)
    who = {STORE: "the store", COORDINATOR: "the coordinator"}.get(host, "a worker")
    return f"{SLOW}, {who}'s, {kbit} kbit/s, {seconds:.1f} s"


def one(place, seed):
    """What happened in one run, in words, and what was wrong with it."""
    random.seed(seed)
    steps = random.choice([300, 600])
    sets = [f"train.iterations={steps}", f"checkpoint.every={random.choice([50, 1000])}", "recovery.target_s=4"]
    # Draws of their own: those above and below are as they were before there were any of these.
    draws = random.Random(f"slow {seed}")
    cluster = Cluster(place, random.randint(2, 3), sets, draws)
    told = [f"{len(cluster.workers)} workers, {steps} steps"]
    if cluster.clocks:
        told.append(f"{CLOCKS}, " + " ".join(f"{clock.offset_s:+d}" for clock in cluster.clocks.values()) + " s")
    try:
        cluster.start()
        wait_for("a checkpoint's folder", lambda: (cluster.local / "ledger").exists())
        time.sleep(random.uniform(0.0, 4.0))
        for _ in range(random.randint(1, 3)):
            if COORDINATOR in cluster.statuses:
                break
            if (draws.random() < 0.3 or place.always == "slow") and place.slow:
                told.append(slow(cluster, draws))
            name = random.choice([*PARTITIONS, KILLED])
            if name == KILLED:
                for pid in processes(f"--listen {address(COORDINATOR)}:{PORT} --run {cluster.url}"):
                    send(pid, signal.SIGKILL)
                told.append(name)
                continue
            seconds = random.uniform(0.5, 15.0)
            cluster.network.cut(*PARTITIONS[name](cluster))
            time.sleep(seconds)
            cluster.network.heal()
            told.append(f"{name}, {seconds:.1f} s")
            time.sleep(random.uniform(0.0, 2.0))
        cluster.finish()
        cluster.audit(steps)
        if not cluster.close():
            raise Violation("processes left behind")
        shutil.rmtree(cluster.folder)
        return told, None
    except Violation as violation:
        cluster.close()
        return told, f"{violation} (kept: {cluster.folder})"
