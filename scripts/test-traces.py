"""A run's traces and metrics, as a collector receives them: an OTLP/HTTP receiver on loopback and a run that loses trainers.

    python=$(scripts/setup.sh --peers)
    $python scripts/test-traces.py --bin target/debug           one trace for the whole run, with what happened in it
    $python scripts/test-traces.py --bin target/debug --dead    a collector that is not there, or never answers, costs a run nothing
    $python scripts/test-traces.py --self-test                  the receiver and the checks, on requests made by hand; needs no binaries

The run is elastic (`--nodes 2:3`); the trainer of its last node is killed in mid-training, three times. Then: one trace id; spans of the
coordinator, of every agent and of every trainer; every parent known, but for children of the killed processes, whose own open spans died with
them; a `recovery` for each kill, whose parts follow each other and add up to the outage; no recovery that ends before anybody has stepped again;
no name of a case or a file in any attribute; the metrics of scripts/observability/check.py by their OTLP names.

The outage is measured on the survivors' own spans: from the end of the last `step` that one completed in the old generation to the end of the
first that it completed in a later one; their mean. A step is complete if the optimiser ran in it: one that was cut short has a span, too, and does
not count. The coordinator counts from when it hears of a step. On a machine that is busy with other things a message may wait a tenth of a second,
so that the median over the kills is held to 5 %, and each is told. A kill whose next generation took no step, because a trainer was ready again
before, is not counted: no `recovery` tells of it. Prints the trace as a tree. Linux; of other packages only opentelemetry-proto
(scripts/locks/peers.txt).
"""

import argparse
import collections
import dataclasses
import gzip
import http.server
import json
import os
import pathlib
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

sys.dont_write_bytecode = True  # check.py is beside the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "observability"))
try:
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service
except ImportError as missing:
    sys.exit(f"test-traces: error: {missing}: run it with the python that `scripts/setup.sh --peers` prints")
from check import BESIDES, MAY_BE_ABSENT, METRICS  # noqa: E402

# Small enough for a step of some milliseconds on a laptop.
SMALL = ["patch_size=32", "batch.labelled=4", "batch.unlabelled=4", "loss.warmup_epochs=0", "validate.every=200", "checkpoint.every=100"]
# Every step is traced, and what is known is sent soon: little of it dies with the trainer.
EXPORT = {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_METRIC_EXPORT_INTERVAL": "1000"}
ALL_STEPS = ["telemetry.step_spans_s=0"]
RUN_S_MAX = 300
PHASES = ("data_wait", "copy_to_device", "forward", "loss", "backward", "all_reduce_wait", "optimiser", "checkpoint_hold")
RECOVERY = ("detect", "fence", "regroup", "restore", "first_step")
# Whose child a span is, by names.
PARENTS = {
    "run": {"launch"}, "generation": {"run"}, "recovery": {"run"}, "agent": {"run"}, "trainer": {"agent"},
    "member": {"generation"}, "epoch": {"member"}, "step": {"epoch"}, "validation": {"member", "epoch"},
    "checkpoint": {"member", "epoch", "step"}, "checkpoint_upload": {"checkpoint"},
    **{name: {"recovery"} for name in RECOVERY}, **{name: {"step"} for name in PHASES},
}
WANTED = {
    "generation": {"cpcr.generation", "cpcr.world"}, "member": {"cpcr.generation", "cpcr.rank", "cpcr.world"}, "agent": {"cpcr.node"},
    "recovery": {"cpcr.generation", "cpcr.cause", "cpcr.node", "cpcr.rank", "cpcr.outage_s"}, "step": {"step", "rank"},
}
NUMBERS = {"cpcr.generation", "cpcr.world", "cpcr.rank", "cpcr.node", "cpcr.outage_s", "step", "rank"}
RESOURCE = {"service.name", "service.version", "service.instance.id", "cpcr.role", "cpcr.run", "host.name", "process.pid"}
# The process's role as its resource says it, and the argument that tells it in a list of processes.
ROLES = {"coordinator": ("cpcr", "coordinator"), "worker": ("cpcr", "worker"), "trainer": ("cpcr-engine", "trainer")}
# What looks like a file of data in a value; but not the objects of a checkpoint, whose names are always these.
FILE_NAME = re.compile(r"[\w-]\.(?:parquet|h5|nii(?:\.gz)?|png|jsonl?|safetensors)\b")
CHECKPOINT = re.compile(r"(?<![\w.-])(?:(?:model|optimizer)\.safetensors|state\.json)\b")
# Clocks of one machine; spans are timed in nanoseconds, some parts were seconds in floating point before.
TOUCH_S = 0.001
OUTAGE_OFF_MAX = 0.05
# Before this, the coordinator cannot have heard of a step.
EARLY_S_MAX = 0.05
# With a collector that is not there: what a run's steps may take longer, and its end. There the trainers, the agents, the coordinator and the launcher
# go one after the other, and each gives its last spans 0.6 s, the coordinator its last metrics as long again: five times 0.6 s.
STEPS_MORE = (1.1, 1.0)
END_MORE_S = 3.0


class Failed(Exception):
    """The test cannot go on."""


# ---- The receiver ------------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Span:
    """A span as it was received. Times in seconds."""
    trace: str
    id: str
    parent: str
    name: str
    start: float
    end: float
    attributes: dict
    events: list
    status: str
    resource: dict

    @property
    def pid(self):
        return self.resource.get("process.pid")

    @property
    def seconds(self):
        return self.end - self.start


@dataclasses.dataclass
class Metric:
    """A metric as it was received once."""
    name: str
    kind: str
    attributes: list
    values: list
    resource: dict


def plain(value):
    """An AnyValue as Python has it."""
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [plain(each) for each in value.array_value.values]
    if kind == "kvlist_value":
        return pairs(value.kvlist_value.values)
    return getattr(value, kind) if kind else None


def pairs(attributes):
    return {pair.key: plain(pair.value) for pair in attributes}


def spans_of(request):
    for group in request.resource_spans:
        resource = pairs(group.resource.attributes)
        for scope in group.scope_spans:
            for s in scope.spans:
                yield Span(s.trace_id.hex(), s.span_id.hex(), s.parent_span_id.hex(), s.name, s.start_time_unix_nano / 1e9,
                           s.end_time_unix_nano / 1e9, pairs(s.attributes), [(e.name, pairs(e.attributes)) for e in s.events],
                           s.status.message, resource)


def metrics_of(request):
    for group in request.resource_metrics:
        resource = pairs(group.resource.attributes)
        for scope in group.scope_metrics:
            for m in scope.metrics:
                kind = m.WhichOneof("data")
                points = list(getattr(m, kind).data_points) if kind else []
                if kind == "sum" and m.sum.is_monotonic:
                    kind = "counter"
                values = [point.as_double if point.WhichOneof("value") == "as_double" else point.as_int
                          for point in points] if kind in ("gauge", "sum", "counter") else []
                yield Metric(m.name, kind, [pairs(point.attributes) for point in points], values, resource)


class Receiver:
    """An OTLP/HTTP collector on loopback that keeps what it gets."""

    def __init__(self):
        self.lock = threading.Condition()
        self.spans, self.metrics, self.refused = [], [], []
        self.requests = collections.Counter()
        receiver = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60

            def do_POST(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                status, answer = receiver.take(self.path, self.headers, body)
                self.send_response(status)
                self.send_header("Content-Type", "application/x-protobuf")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = False  # closing waits for what was sent to be read
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path, headers, body):
        """Keeps what a request holds; the status and the body of the answer."""
        kinds = {"/v1/traces": (trace_service.ExportTraceServiceRequest, trace_service.ExportTraceServiceResponse),
                 "/v1/metrics": (metrics_service.ExportMetricsServiceRequest, metrics_service.ExportMetricsServiceResponse)}
        status = 200
        encoding = headers.get("Content-Encoding", "identity")
        if path not in kinds:
            status = 404
        elif headers.get("Content-Type") != "application/x-protobuf" or encoding not in ("identity", "gzip"):
            status = 415
        else:
            request = kinds[path][0]()
            try:
                request.ParseFromString(gzip.decompress(body) if encoding == "gzip" else body)
            except (DecodeError, OSError, EOFError):
                status = 400
        with self.lock:
            self.requests[f"{path}, {encoding}"] += 1
            if status != 200:
                self.refused.append(f"{path}: {status}, {headers.get('Content-Type')}, {encoding}, {len(body)} bytes")
                return status, b""
            if path == "/v1/traces":
                self.spans.extend(spans_of(request))
                self.lock.notify_all()
            else:
                self.metrics.extend(metrics_of(request))
        return status, kinds[path][1]().SerializeToString()

    def wait_for(self, condition, launcher, what):
        """What `condition` says of the spans so far, once that is something."""
        deadline = time.monotonic() + RUN_S_MAX
        with self.lock:
            while not (value := condition(self.spans)):
                if launcher.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{what}: not before the run's end or {RUN_S_MAX} s; step {newest_step(self.spans)} came")
                self.lock.wait(1.0)
            return value

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def newest_step(spans):
    """The newest step that a span tells of."""
    return max((int(span.attributes.get("step", 0)) for span in spans if span.name == "step"), default=0)


# ---- What is asked of a trace -------------------------------------------------------------------------------------

class Trace:
    """All spans of a run, and who is whose child."""

    def __init__(self, spans):
        self.spans = spans
        self.by_id = {span.id: span for span in spans}
        self.children = collections.defaultdict(list)
        for span in spans:
            self.children[span.parent].append(span)
        for family in self.children.values():
            family.sort(key=lambda span: span.start)

    def named(self, name):
        return [span for span in self.spans if span.name == name]

    def above(self, span, name):
        """The nearest span of that name above; `None` if that is not known."""
        while span is not None and span.name != name:
            span = self.by_id.get(span.parent)
        return span


@dataclasses.dataclass
class Life:
    """A process that was seen while the run went."""
    pid: int
    role: str
    node: int | None
    killed_at: float | None = None
    gone_at: float | None = None


def of_one_trace(trace, lives):
    """Complaints about identities: trace ids, roots, parents, processes. And what to tell."""
    wrong, told = [], []
    ids = sorted({span.trace for span in trace.spans})
    if len(ids) != 1:
        wrong.append(f"{len(ids)} trace ids, not one: " + ", ".join(
            f"{each} ({', '.join(sorted({s.resource.get('cpcr.role', '?') for s in trace.spans if s.trace == each}))})" for each in ids))
    if len(trace.by_id) != len(trace.spans):
        wrong.append(f"{len(trace.spans) - len(trace.by_id)} spans came twice")
    roots = [span for span in trace.spans if not span.parent]
    if [span.name for span in roots] not in (["run"], ["launch"]):
        wrong.append(f"roots are {[span.name for span in roots]}, not one `run` (or the launcher's `launch` above it)")
    if not trace.named("run"):
        wrong.append("no span `run`")
    killed = {life.pid for life in lives if life.killed_at is not None}
    orphans = collections.Counter()
    for span in trace.spans:
        if span.parent and span.parent not in trace.by_id:
            orphans[(span.pid in killed, span.name)] += 1
    for (expected, name), count in sorted(orphans.items()):
        if not expected:
            wrong.append(f"{count} spans `{name}` whose parent nobody sent")
    told.append(f"children of the killed processes whose parents died with them: {sum(n for (of_killed, _), n in orphans.items() if of_killed)}"
                + "".join(f", {name} {n}" for (of_killed, name), n in sorted(orphans.items()) if of_killed))
    for life in lives:
        own = [span for span in trace.spans if span.pid == life.pid]
        where = f"{life.role} {life.pid}" + (f" of node {life.node}" if life.node is not None else "") + (" (killed)" if life.killed_at else "")
        if not own:
            wrong.append(f"no span of the {where}")
        elif {span.resource.get("cpcr.role") for span in own} != {life.role}:
            wrong.append(f"the {where} calls itself {sorted({str(span.resource.get('cpcr.role')) for span in own})}")
        elif life.node is not None and {str(span.resource.get("cpcr.node")) for span in own} != {str(life.node)}:
            wrong.append(f"the {where} says that its node is {sorted({str(span.resource.get('cpcr.node')) for span in own})}")
        told.append(f"{where}: {len(own)} spans")
    return wrong, told


def of_shape(trace):
    """Complaints about names, parents, attributes and resources; unknown names are told."""
    wrong, unknown = collections.Counter(), collections.Counter()
    for span in trace.spans:
        parent = trace.by_id.get(span.parent)
        if span.name not in PARENTS and span.name != "launch":
            unknown[span.name] += 1
        elif parent is not None and parent.name not in PARENTS.get(span.name, ()):
            wrong[f"`{span.name}` below `{parent.name}`"] += 1
        lacks = WANTED.get(span.name, set()) - set(span.attributes)
        if lacks and not (span.name == "recovery" and span.attributes.get("cpcr.cause") in ("joined", "given-back")):
            wrong[f"`{span.name}` without {', '.join(sorted(lacks))}"] += 1
        texts = sorted(name for name in NUMBERS & set(span.attributes) if not isinstance(span.attributes[name], (int, float)))
        if texts:
            wrong[f"`{span.name}` has {', '.join(texts)} as text, not as a number"] += 1
        if span.end < span.start:
            wrong[f"`{span.name}` ends before it begins"] += 1
        role = span.resource.get("cpcr.role")
        lacks = RESOURCE - set(span.resource) - ({"cpcr.run"} if role == "launcher" else set())
        if role in ("worker", "trainer") and "cpcr.node" not in span.resource:
            lacks.add("cpcr.node")
        if lacks:
            wrong[f"the resource of a {role} lacks {', '.join(sorted(lacks))}"] += 1
    return [f"{what}: {count} spans" for what, count in sorted(wrong.items())], [f"other spans: {name} {n}" for name, n in sorted(unknown.items())]


class Steps:
    """The steps that were completed: (end, generation, pid), in order."""

    def __init__(self, trace):
        ran = {span.parent for span in trace.spans if span.name == "optimiser"}
        self.ends = []
        for span in trace.named("step"):
            member = trace.above(span, "member")
            if span.id in ran and member is not None:
                self.ends.append((span.end, int(member.attributes["cpcr.generation"]), span.pid))
        self.ends.sort()

    def outage(self, lives, killed):
        """(mean seconds between a survivor's steps, the last before the kill, the first after, generation before, how many survivors)"""
        gone = {life.pid for life in lives if life.killed_at is not None and life.killed_at <= killed.killed_at}
        ends = [end for end in self.ends if end[2] not in gone]
        before = [end for end in ends if end[0] <= killed.killed_at]
        if not before:
            raise Failed("no completed step of a survivor before the kill")
        old = before[-1][1]
        last = {pid: end for end, generation, pid in ends if generation == old}
        first = {}
        for end, generation, pid in ends:
            if generation > old and pid in last:
                first.setdefault(pid, end)
        if not first:
            raise Failed("no completed step of a survivor after the kill")
        gaps = [first[pid] - last[pid] for pid in first]
        return statistics.fmean(gaps), max(last[pid] for pid in first), min(first.values()), old, len(first)


def of_recoveries(trace, lives):
    """Complaints about the recoveries from the kills and others, and their figures."""
    wrong, told, off = [], [], []
    steps = Steps(trace)
    kills = sorted((life for life in lives if life.killed_at is not None), key=lambda life: life.killed_at)
    for killed in kills:
        complaints, figures, deviation = of_recovery(trace, lives, steps, killed)
        wrong += complaints
        told += figures
        off += [deviation] if deviation is not None else []
    if len(off) * 2 <= len(kills):
        wrong.append(f"recoveries: of {len(kills)} kills only {len(off)} could be measured")
    if off:
        middle = statistics.median(abs(each) for each in off)
        told.append(f"recoveries: {', '.join(f'{each * 100:+.1f}' for each in off)} % off the outages, {middle * 100:.1f} % in the median")
        if middle > OUTAGE_OFF_MAX:
            wrong.append(f"recoveries: their parts are {middle * 100:.1f} % off the outages in the median, more than {OUTAGE_OFF_MAX * 100:.0f} %")
    for recovery in trace.named("recovery"):
        generation = recovery.attributes.get("cpcr.generation", 0)
        first = next((end for end, of, _ in steps.ends if of > generation), None)
        if first is not None and recovery.end < first - EARLY_S_MAX:
            wrong.append(f"recovery: that of generation {generation} ({recovery.attributes.get('cpcr.cause')}) ends {(first - recovery.end) * 1e3:.1f} ms before "
                         "anybody has stepped in a later one")
    return wrong, told


def of_recovery(trace, lives, steps, killed):
    """Complaints about the recovery from one kill, its figures, and how far its parts are off the outage."""
    wrong, told = [], []
    outage, last, first, old, survivors = steps.outage(lives, killed)
    told.append(f"generation {old}: outage {outage * 1e3:.1f} ms in the mean of {survivors} survivors, from their last completed step "
                f"({(last - killed.killed_at) * 1e3:+.1f} ms from the kill) to the first of a later one ({(first - killed.killed_at) * 1e3:+.1f} ms)")
    losses = [span for span in trace.named("recovery") if span.attributes.get("cpcr.generation") == old
              and span.attributes.get("cpcr.cause") not in ("joined", "given-back")]
    if not losses and not any(generation == old + 1 for _, generation, _ in steps.ends):
        # Its next generation is known to the trace, and took no step: a member joined before. Then the run has no outage of its own to tell.
        return wrong, told + [f"  generation {old + 1}, which followed, took no step: not counted"], None
    if len(losses) != 1:
        return wrong + [f"{len(losses)} recoveries from a loss of generation {old}, in which a trainer was killed, not one"], told, None
    recovery = losses[0]
    said = recovery.attributes
    if said.get("cpcr.cause") != "trainer-killed" or said.get("cpcr.node") != killed.node:
        wrong.append(f"recovery: cause {said.get('cpcr.cause')} on node {said.get('cpcr.node')}, not trainer-killed on node {killed.node}")
    parts = trace.children[recovery.id]
    if [part.name for part in parts] != list(RECOVERY):
        # Empty parts begin together: their order is then not told by their times.
        parts = sorted(parts, key=lambda part: (part.start, part.end, RECOVERY.index(part.name) if part.name in RECOVERY else 9))
    if [part.name for part in parts] != list(RECOVERY):
        return wrong + [f"recovery: its parts are {[part.name for part in parts]}, not {list(RECOVERY)}"], told, None
    edges = [recovery.start, *(part.end for part in parts)]
    for edge, part in zip(edges, parts):
        if abs(part.start - edge) > TOUCH_S:
            wrong.append(f"recovery: `{part.name}` begins {(part.start - edge) * 1e3:+.2f} ms from the end of what is before it")
    if abs(parts[-1].end - recovery.end) > TOUCH_S:
        wrong.append(f"recovery: its parts end {(parts[-1].end - recovery.end) * 1e3:+.2f} ms from its own end")
    total = sum(part.seconds for part in parts)
    deviation = total / outage - 1
    told.append("  recovery: " + " + ".join(f"{part.name} {part.seconds * 1e3:.1f}" for part in parts) + f" = {total * 1e3:.1f} ms, "
                f"{deviation * 100:+.1f} % of the outage; it begins {(recovery.start - last) * 1e3:+.1f} ms and ends {(recovery.end - first) * 1e3:+.1f} ms "
                f"after those steps; it says {said.get('cpcr.outage_s', float('nan')) * 1e3:.1f} ms")
    if abs(said.get("cpcr.outage_s", 0.0) - total) > OUTAGE_OFF_MAX * total:
        wrong.append(f"recovery: cpcr.outage_s is {said.get('cpcr.outage_s')}, its parts are {total:.4f} s together")
    return wrong, told, deviation


def values(thing):
    """Every string in an attribute's value."""
    if isinstance(thing, dict):
        for key, value in thing.items():
            yield str(key)
            yield from values(value)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from values(value)
    elif isinstance(thing, bytes):
        yield thing.decode(errors="replace")
    elif isinstance(thing, str):
        yield thing


def of_privacy(spans, metrics, names):
    """Complaints about values that tell of cases or files."""
    wrong = collections.Counter()
    # Long ones first: the shortest that is found would do, the longest says more.
    forbidden = re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)))
    known, seen = {}, 0
    things = [(f"span `{s.name}`", [s.name, s.attributes, s.events, s.status, s.resource]) for s in spans]
    things += [(f"metric {m.name}", [m.attributes, m.resource]) for m in metrics]
    for where, thing in things:
        for text in values(thing):
            seen += 1
            if text not in known:
                known[text] = forbidden.search(text) or FILE_NAME.search(CHECKPOINT.sub("", text))
            if known[text]:
                wrong[f"{where} says '{text if len(text) < 200 else text[:200] + '...'}' ({known[text][0]})"] += 1
    told = f"{seen} strings, {len(known)} different ones, looked through for {len(names)} names of cases and files"
    return [f"{what}: {count} times" for what, count in wrong.most_common(10)], [told]


def of_metrics(metrics):
    """Complaints about the metrics' names, kinds and labels."""
    wrong, seen = [], set()
    for name in sorted({metric.name for metric in metrics}):
        own = [metric for metric in metrics if metric.name == name]
        plain_name = name.replace(".", "_")
        known = next((each for each in (plain_name, plain_name + "_total") if each in METRICS | BESIDES), None)
        if known is None or "_" in name or not name.startswith("cpcr."):
            wrong.append(f"metric {name}: not in the list, with dots")
            continue
        seen.add(known)
        kind, labels = (METRICS | BESIDES)[known]
        if {metric.kind for metric in own} != {kind}:
            wrong.append(f"metric {name}: a {sorted({metric.kind for metric in own})}, not a {kind}")
        if any(set(attributes) != set(labels) for metric in own for attributes in metric.attributes):
            wrong.append(f"metric {name}: attributes other than {labels}")
    lacks = set(METRICS) - seen - MAY_BE_ABSENT
    if lacks:
        wrong.append("metrics that never came: " + ", ".join(sorted(lacks)))
    last = next((metric.values[-1] for metric in reversed(metrics) if metric.name == "cpcr.steps.done" and metric.values), None)
    return wrong, [f"{len(seen & set(METRICS))} of {len(METRICS)} metrics came; cpcr.steps.done was {last} at last"]


# ---- The tree -----------------------------------------------------------------------------------------------------

FEW = 3
# Each of these is told, however many there are.
ALWAYS = ("generation", "recovery")


def tree(trace):
    """The trace as indented lines. More than a few siblings of one name are told together."""
    begin = min(span.start for span in trace.spans)
    lines = []

    def line(depth, text, when):
        lines.append(f"{when:>26}  {'  ' * depth}{text}")

    def attributes(span):
        said = {**({"node": span.resource["cpcr.node"]} if span.name in ("trainer",) and "cpcr.node" in span.resource else {}),
                **span.attributes}
        told = ", ".join(f"{key.removeprefix('cpcr.')} {value:.4g}" if isinstance(value, float) else f"{key.removeprefix('cpcr.')} {value}"
                         for key, value in said.items() if isinstance(value, (str, int, float)) and key != "target")
        return f" ({told})" if told else ""

    def walk(spans, depth):
        kinds = {}
        for span in spans:
            kinds.setdefault(span.name, []).append(span)
        for name, own in sorted(kinds.items(), key=lambda kind: kind[1][0].start):
            if (len(own) > FEW and name not in ALWAYS) or (depth and name in PHASES):
                times = sorted(span.seconds * 1e3 for span in own)
                line(depth, f"{name} x{len(own)}", f"median {statistics.median(times):.1f}, max {times[-1]:.1f} ms")
                walk(sorted((child for span in own for child in trace.children[span.id]), key=lambda span: span.start), depth + 1)
            else:
                for span in own:
                    line(depth, f"{name}{attributes(span)}", f"+{span.start - begin:.3f} s, {span.seconds * 1e3:.1f} ms")
                    walk(trace.children[span.id], depth + 1)

    walk(trace.children[""], 0)
    lost = sorted((span for span in trace.spans if span.parent and span.parent not in trace.by_id), key=lambda span: span.start)
    if lost:
        line(0, f"below what died with pid {', '.join(map(str, sorted({span.pid for span in lost})))}:", "")
        walk(lost, 1)
    return lines


# ---- Runs ---------------------------------------------------------------------------------------------------------

def is_alive(pid):
    """Whether a process is there, and no zombie."""
    try:
        return (pathlib.Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


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
        parents, commands = {}, {}
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
                    status = (entry / "stat").read_text()
                except OSError:
                    continue  # it ended meanwhile
                parents[int(entry.name)] = int(status.rpartition(")")[2].split()[1])
                commands[int(entry.name)] = words
        for pid, words in commands.items():
            role = next((role for role, (program, argument) in ROLES.items()
                         if pathlib.Path(words[0]).name == program and words[1:2] == [argument]), None)
            if role and pid not in self.lives and self.below_launcher(pid, parents):
                of_agent = commands.get(parents[pid], []) if role == "trainer" else words
                node = next((int(word[7:]) for word in of_agent if re.fullmatch(r"--node=\d+", word)), None)
                self.lives[pid] = Life(pid, role, node)

    def below_launcher(self, pid, parents):
        while pid > 1:
            if pid == self.launcher:
                return True
            pid = parents.get(pid, 0)
        return False

    def all(self):
        return sorted(self.lives.values(), key=lambda life: (list(ROLES).index(life.role), life.node or 0, life.pid))

    def close(self):
        self.done.set()
        self.thread.join()


def environment(more):
    """This process's, without what it says to exporters itself."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("OTEL_", "TRACEPARENT"))} | more


class Launcher:
    """A run of cpcr-launch in a folder of its own, and when it said which line."""

    def __init__(self, binaries, data, folder, nodes, iterations, more):
        command = [binaries / "cpcr-launch", "--config", "demo", "--data", data, "--run", folder / "run", "--backend", "gloo", "--nodes", nodes]
        for pair in [*SMALL, *ALL_STEPS, f"train.iterations={iterations}"]:
            command += ["--set", pair]
        self.lines, self.ended_at = [], None
        self.process = subprocess.Popen(command, cwd=folder, env=environment(more), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                        stdin=subprocess.DEVNULL, text=True, errors="replace")
        self.thread = threading.Thread(target=self.read, daemon=True)
        self.thread.start()

    def read(self):
        for line in self.process.stdout:
            self.lines.append((time.time(), line.rstrip()))

    def poll(self):
        return self.process.poll()

    def ended(self):
        """Waits for the end of the run, which must be a good one."""
        try:
            status = self.process.wait(RUN_S_MAX)
        except subprocess.TimeoutExpired:
            raise Failed(f"the run has not ended within {RUN_S_MAX} s") from None
        self.ended_at = time.time()
        self.thread.join(5)
        if status != 0:
            raise Failed(f"the run ended with {status}: {' / '.join(line for _, line in self.lines[-4:])}")

    def end(self):
        if self.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def synthesise(binaries, folder):
    """A dataset, and the names in it that nobody else should hear."""
    data = folder / "data"
    subprocess.run([binaries / "cpcr", "data", "synth", "--patients", "8", "--out", data], check=True, capture_output=True)
    manifest = json.loads((data / "manifest.json").read_text())
    names = {volume[key] for volume in manifest["volumes"] for key in ("name", "patient")}
    return data, names | {path.name for path in data.rglob("*") if path.is_file()}


def traced(binaries, iterations, kill_at):
    receiver = Receiver()
    with tempfile.TemporaryDirectory(prefix="cpcr-traces-") as folder:
        folder = pathlib.Path(folder)
        data, names = synthesise(binaries, folder)
        launcher = Launcher(binaries, data, folder, "2:3", iterations, EXPORT | {"OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint})
        processes = Processes(launcher.process.pid)

        def victim(spans):
            """The trainer of the last node, once it is known to step. That node is never rank 0, which writes checkpoints."""
            stepping = {span.pid for span in spans if span.name == "optimiser"}
            last = max((life.node for life in processes.all() if life.role == "worker"), default=0)
            return next((life for life in processes.all() if life.role == "trainer" and life.node == last and life.killed_at is None
                         and life.gone_at is None and life.pid in stepping), None)
        try:
            for at in kill_at:
                receiver.wait_for(lambda spans, at=at: newest_step(spans) >= at, launcher, f"step {at}")
                life = receiver.wait_for(victim, launcher, "a trainer that steps on the last node")
                life.killed_at = time.time()
                os.kill(life.pid, signal.SIGKILL)
                print(f"killed the trainer of node {life.node} at step {newest_step(receiver.spans)}", flush=True)
            launcher.ended()
        finally:
            launcher.end()
            processes.close()
        receiver.close()
        lives = processes.all()
    trace = Trace(receiver.spans)
    if not trace.spans:
        raise Failed("no span came")
    print("\n".join(tree(trace)))
    print(f"\n{len(trace.spans)} spans in {sum(receiver.requests.values())} requests ("
          + ", ".join(f"{count} of {kind}" for kind, count in sorted(receiver.requests.items())) + f"); trace {trace.spans[0].trace}")
    return judged(trace, lives, receiver.metrics, names, receiver.refused)


def judged(trace, lives, metrics, names, refused=()):
    """Every complaint, after what there is to tell was printed."""
    wrong = [f"the receiver refused {line}" for line in refused]
    for check, arguments in ((of_one_trace, (trace, lives)), (of_shape, (trace,)), (of_recoveries, (trace, lives)),
                             (of_privacy, (trace.spans, metrics, names)), (of_metrics, (metrics,))):
        try:
            complaints, told = check(*arguments)
        except Failed as failed:
            complaints, told = [str(failed)], []
        wrong += complaints
        for text in told:
            print(f"  {text}")
    return wrong


class Silent:
    """Accepts connections, reads what comes, and never answers."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=256)
        self.endpoint = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.accepted = 0
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(target=self.swallow, args=(connection,), daemon=True).start()

    @staticmethod
    def swallow(connection):
        with connection:
            try:
                while connection.recv(65536):
                    pass
            except OSError:
                pass


def dead(binaries, iterations, times):
    # Bound and not listened on: nobody else gets the port meanwhile, and connections are refused.
    nobody = socket.socket()
    nobody.bind(("127.0.0.1", 0))
    silent = Silent()
    kinds = {"no collector": {}, "nobody listens": {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{nobody.getsockname()[1]}"},
             "never answers": {"OTEL_EXPORTER_OTLP_ENDPOINT": silent.endpoint}}
    steps, ends, exits = ({kind: [] for kind in kinds} for _ in range(3))
    with tempfile.TemporaryDirectory(prefix="cpcr-traces-") as folder:
        data, _ = synthesise(binaries, pathlib.Path(folder))
        # In turn: what else the machine does hits all alike.
        for number in range(times):
            for kind, more in kinds.items():
                own = pathlib.Path(folder) / f"{number}-{kind.replace(' ', '-')}"
                own.mkdir()
                began = time.time()
                launcher = Launcher(binaries, data, own, "2", iterations, (EXPORT | more) if more else {})
                processes = Processes(launcher.process.pid)
                try:
                    launcher.ended()
                finally:
                    launcher.end()
                    processes.close()
                done = next((when for when, line in launcher.lines if f"step {iterations}/{iterations} " in line), None)
                if done is None:
                    raise Failed(f"{kind}: the launcher did not say that step {iterations} was done")
                steps[kind].append(done - began)
                ends[kind].append(launcher.ended_at - done)
                last = {}
                for life in processes.all():
                    if life.gone_at is not None:
                        last[life.role] = max(last.get(life.role, 0.0), life.gone_at - done)
                last["launcher"] = launcher.ended_at - done
                exits[kind].append(last)
                print(f"{kind}: all steps done after {steps[kind][-1]:.2f} s, ended with 0 {ends[kind][-1]:.2f} s later", flush=True)
    nobody.close()
    silent.listener.close()
    wrong = []
    # What else the machine does only ever makes it longer: the shortest tells the most.
    without, end_without = min(steps["no collector"]), statistics.median(ends["no collector"])
    for kind in kinds:
        shortest, end = min(steps[kind]), statistics.median(ends[kind])
        roles = {role: statistics.median(gone[role] for gone in exits[kind] if role in gone) for role in exits[kind][0]}
        print(f"  {kind}: shortest of {times} to the last step {shortest:.2f} s; from there to the end {end:.2f} s in the median: "
              + ", ".join(f"{role} {seconds:.2f}" for role, seconds in sorted(roles.items(), key=lambda each: each[1])))
        if shortest > without * STEPS_MORE[0] + STEPS_MORE[1]:
            wrong.append(f"{kind}: {iterations} steps take {shortest:.2f} s, {without:.2f} s without")
        if end > end_without + END_MORE_S:
            wrong.append(f"{kind}: after the last step a run takes {end:.2f} s, {end_without:.2f} s without; {END_MORE_S} s more are allowed")
    if not silent.accepted:
        wrong.append("never answers: nobody connected to it, so nothing was tested")
    print(f"  never answers: {silent.accepted} connections")
    return wrong


# ---- Tests of the test --------------------------------------------------------------------------------------------

def made_up():
    """A trace as it should be, as (spans, lives, metrics, names)."""
    number = iter(range(1, 10**6))
    spans, t0 = [], 1000.0
    metrics = [Metric(name.removesuffix("_total").replace("_", "."), kind, [dict.fromkeys(labels, "1")], [1.0], {})
               for name, (kind, labels) in METRICS.items()]

    def add(name, parent, start, end, pid, role, node=None, **attributes):
        resource = {"service.name": "cpcr", "service.version": "0", "service.instance.id": str(pid), "cpcr.role": role, "cpcr.run": "/r",
                    "host.name": "h", "process.pid": pid, **({"cpcr.node": str(node)} if node is not None else {})}
        span = Span("t", f"{next(number):016x}", parent.id if parent else "", name, t0 + start, t0 + end,
                    {key.replace("__", "."): value for key, value in attributes.items()}, [], "", resource)
        spans.append(span)
        return span

    run = add("run", None, 0, 10, 1, "coordinator")
    lives = [Life(1, "coordinator", None), *(Life(10 + n, "worker", n) for n in range(3)), *(Life(20 + n, "trainer", n) for n in range(3)),
             Life(30, "trainer", 2)]
    lives[6].killed_at = t0 + 4.02
    generations = [add("generation", run, 0.5, 4.02, 1, "coordinator", cpcr__generation=1, cpcr__world=3),
                   add("generation", run, 4.5, 6, 1, "coordinator", cpcr__generation=2, cpcr__world=2),
                   add("generation", run, 6, 10, 1, "coordinator", cpcr__generation=3, cpcr__world=3)]
    agents = [add("agent", run, 0.2, 9.9, 10 + n, "worker", n, cpcr__node=n) for n in range(3)]
    spans_of_life = {(20, 0): [(0, 1, 4.0), (1, 5, 6), (2, 6, 9.5)], (21, 1): [(0, 1, 4.0), (1, 5, 6), (2, 6, 9.5)], (22, 2): [(0, 1, 4.0)],
                     (30, 2): [(2, 6, 9.5)]}
    for (pid, node), times in spans_of_life.items():
        trainer = add("trainer", agents[node], times[0][1] - 0.3, 9.8, pid, "trainer", node)
        gone = [trainer]
        for which, begins, ends in times:
            world = generations[which].attributes["cpcr.world"]
            member = add("member", generations[which], begins, ends + 0.02, pid, "trainer", node, cpcr__generation=which + 1, cpcr__rank=node,
                         cpcr__world=world)
            epoch = add("epoch", member, begins, ends + 0.01, pid, "trainer", node)
            gone += [member, epoch]
            at = begins
            while at + 0.1 <= ends + 1e-9:
                step = add("step", epoch, at, at + 0.1, pid, "trainer", node, step=int(at * 10), rank=node)
                add("forward", step, at, at + 0.05, pid, "trainer", node)
                add("optimiser", step, at + 0.05, at + 0.1, pid, "trainer", node)
                at += 0.1
            if which == 0:  # the step that the loss cut short
                step = add("step", epoch, ends, ends + 0.02, pid, "trainer", node, step=40, rank=node)
                add("forward", step, ends, ends + 0.01, pid, "trainer", node)
        if pid == 22:
            for span in gone:
                spans.remove(span)
    recovery = add("recovery", run, 4.0, 5.1, 1, "coordinator", cpcr__generation=1, cpcr__cause="trainer-killed", cpcr__node=2, cpcr__rank=2,
                   cpcr__outage_s=1.1)
    at = 4.0
    for name, seconds in zip(RECOVERY, (0.1, 0.0, 0.4, 0.1, 0.5)):
        add(name, recovery, at, at + seconds, 1, "coordinator")
        at += seconds
    return spans, lives, metrics, {"phantom0001", "train-00000.parquet"}


def self_test():
    wrong = []

    def expect(what, happened):
        if not happened:
            wrong.append(what)

    # The receiver, by hand.
    receiver = Receiver()
    request = trace_service.ExportTraceServiceRequest()
    group = request.resource_spans.add()
    pid = group.resource.attributes.add(key="process.pid")
    pid.value.int_value = 7
    one = group.scope_spans.add().spans.add(name="step", trace_id=b"t" * 16, span_id=b"s" * 8, start_time_unix_nano=10**9,
                                            end_time_unix_nano=2 * 10**9)
    one.attributes.add(key="step").value.int_value = 5
    one.attributes.add(key="list").value.array_value.values.add(string_value="x")
    numbers = metrics_service.ExportMetricsServiceRequest()
    metric = numbers.resource_metrics.add().scope_metrics.add().metrics.add(name="cpcr.steps.done")
    metric.gauge.data_points.add(as_double=3.0)
    counter = numbers.resource_metrics[0].scope_metrics[0].metrics.add(name="cpcr.checkpoints")
    counter.sum.is_monotonic = True
    counter.sum.data_points.add(as_int=2)

    def post(path, body, **headers):
        asked = urllib.request.Request(receiver.endpoint + path, body, {"Content-Type": "application/x-protobuf"}
                                       | {name.replace("_", "-"): value for name, value in headers.items()})
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return answer.status
        except urllib.error.HTTPError as refused:
            return refused.code
    expect("plain", post("/v1/traces", request.SerializeToString()) == 200)
    expect("gzip", post("/v1/traces", gzip.compress(request.SerializeToString()), Content_Encoding="gzip") == 200)
    expect("metrics", post("/v1/metrics", numbers.SerializeToString()) == 200)
    expect("another path", post("/v1/logs", b"") == 404)
    expect("JSON", post("/v1/traces", b"{}", Content_Type="application/json") == 415)
    expect("another encoding", post("/v1/traces", b"", Content_Encoding="br") == 415)
    expect("no protobuf", post("/v1/traces", b"\xff\xff\xff") == 400)
    expect("no gzip", post("/v1/traces", b"xx", Content_Encoding="gzip") == 400)
    expect("two spans", len(receiver.spans) == 2 and receiver.spans[0].attributes == {"step": 5, "list": ["x"]} and receiver.spans[0].pid == 7
           and receiver.spans[0].seconds == 1.0 and newest_step(receiver.spans) == 5 and receiver.spans[0].parent == "")
    expect("two metrics", [(m.name, m.kind, m.values) for m in receiver.metrics]
           == [("cpcr.steps.done", "gauge", [3.0]), ("cpcr.checkpoints", "counter", [2])])
    expect("five refused", len(receiver.refused) == 5)
    receiver.close()

    # The checks: a good trace, then everything that may be wrong with one.
    spans, lives, metrics, names = made_up()
    print("\n".join(tree(Trace(spans))))
    good = judged(Trace(spans), lives, metrics, names)
    expect(f"a good trace: {good}", not good)

    def bad(what, says, change):
        spans, lives, metrics, names = made_up()
        change(spans, lives, metrics)
        with open(os.devnull, "w") as nowhere:
            stdout, sys.stdout = sys.stdout, nowhere
            try:
                complaints = judged(Trace(spans), lives, metrics, names)
            finally:
                sys.stdout = stdout
        expect(f"{what}: {complaints}", any(says in complaint for complaint in complaints))

    def named(spans, name, at=0):
        return [span for span in spans if span.name == name][at]

    def stretch(spans, name, seconds):
        """Makes a part of the recovery longer, and what follows it later."""
        at = RECOVERY.index(name)
        for part in RECOVERY[at:]:
            span = named(spans, part)
            span.start += seconds if part != name else 0
            span.end += seconds
        named(spans, "recovery").end += seconds
        named(spans, "recovery").attributes["cpcr.outage_s"] += seconds
    bad("two trace ids", "2 trace ids", lambda s, l, m: setattr(s[-1], "trace", "u"))
    bad("two roots", "roots are", lambda s, l, m: setattr(named(s, "agent"), "parent", ""))
    bad("an unknown parent", "whose parent nobody sent", lambda s, l, m: setattr(named(s, "member"), "parent", "ab"))
    bad("a parent of another kind", "`step` below `run`", lambda s, l, m: setattr(named(s, "step"), "parent", named(s, "run").id))
    bad("a span twice", "came twice", lambda s, l, m: s.append(s[-1]))
    bad("a trainer that sends nothing", "no span of the trainer 99", lambda s, l, m: l.append(Life(99, "trainer", 1)))
    bad("a wrong role", "calls itself", lambda s, l, m: l.append(Life(10, "trainer", 0)))
    bad("a wrong node", "says that its node", lambda s, l, m: [x.resource.update({"cpcr.node": "9"}) for x in s if x.pid == 21])
    bad("no rank", "without cpcr.rank", lambda s, l, m: named(s, "member").attributes.pop("cpcr.rank"))
    bad("a rank in words", "as text", lambda s, l, m: named(s, "step").attributes.update(rank="0"))
    bad("no version", "lacks service.version", lambda s, l, m: s[0].resource.pop("service.version"))
    bad("no recovery", "0 recoveries", lambda s, l, m: s.remove(named(s, "recovery")))
    bad("another cause", "not trainer-killed", lambda s, l, m: named(s, "recovery").attributes.update({"cpcr.cause": "agent-lost"}))
    bad("a gap in the recovery", "begins +50.00 ms", lambda s, l, m: setattr(named(s, "regroup"), "start", named(s, "regroup").start + 0.05))
    bad("no fence", "its parts are", lambda s, l, m: s.remove(named(s, "fence")))
    bad("parts longer than the outage", "% off the outages in the median", lambda s, l, m: stretch(s, "regroup", 0.06))
    bad("another outage said", "cpcr.outage_s is", lambda s, l, m: named(s, "recovery").attributes.update({"cpcr.outage_s": 1.2}))
    def hear_early(spans, *_):
        """As if a step of the generation before were taken for the first of the next."""
        for span in spans:
            if span.name == "recovery" or span.name == "first_step":
                span.end -= 0.1

    def no_step(spans, *_):
        """As if a trainer had been ready again before the next generation took a step."""
        for span in [span for span in spans if span.name == "recovery" or span.name in RECOVERY
                     or (span.name == "optimiser" and 1004.5 < span.start < 1006)]:
            spans.remove(span)
    bad("no recovery that could be measured", "only 0 could be measured", no_step)
    bad("a recovery that ends too early", "before anybody has stepped", hear_early)
    bad("nobody steps again", "after the kill", lambda s, l, m: [s.remove(x) for x in list(s) if x.name == "optimiser" and x.start > 1004.5])
    bad("a case's name", "phantom0001", lambda s, l, m: named(s, "step").attributes.update(case="phantom0001_ed"))
    bad("a case in a list", "phantom0001", lambda s, l, m: named(s, "step").events.append(("read", {"cases": ["phantom0001"]})))
    bad("a file's name beside a checkpoint's", "shard-1.parquet",
        lambda s, l, m: named(s, "step").attributes.update(what='"model.safetensors": "s3://b/shard-1.parquet"'))
    bad("a file's name", "shard-1.parquet", lambda s, l, m: named(s, "step").attributes.update(what="s3://b/shard-1.parquet"))
    bad("a case on a metric", "phantom0001", lambda s, l, m: m[0].attributes.append({"case": "phantom0001"}))
    bad("a metric of another name", "not in the list", lambda s, l, m: m.append(Metric("cpcr.steps_done", "gauge", [], [], {})))
    bad("a metric of another kind", "not a counter", lambda s, l, m: m.append(Metric("cpcr.checkpoints", "gauge", [], [], {})))
    bad("a metric that never came", "never came: cpcr_loss", lambda s, l, m: m.remove(next(x for x in m if x.name == "cpcr.loss")))

    # A collector that never answers does accept.
    silent = Silent()
    with socket.create_connection(silent.listener.getsockname(), timeout=5) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n\r\n")
        connection.settimeout(0.3)
        try:
            expect("silence", connection.recv(1) != b"")
        except TimeoutError:
            pass
    silent.listener.close()
    return wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, help="the folder of cpcr, cpcr-launch and cpcr-engine")
    parser.add_argument("--dead", action="store_true", help="only: what a dead collector costs")
    parser.add_argument("--self-test", action="store_true", help="only: the receiver and the checks")
    parser.add_argument("--iterations", type=int, help="steps of a run; default 700, with --dead 150")
    # Between validations, which come every 200 steps and after which an outage would begin with no step.
    parser.add_argument("--kill-at", type=int, nargs="+", default=[110, 310, 510], help="the steps at which a trainer is killed")
    parser.add_argument("--times", type=int, default=5, help="with --dead: runs of each kind")
    arguments = parser.parse_args()
    if not arguments.self_test and not arguments.bin:
        parser.error("--bin DIR, or --self-test")
    try:
        if arguments.self_test:
            wrong = self_test()
        elif arguments.dead:
            wrong = dead(arguments.bin.resolve(), arguments.iterations or 150, arguments.times)
        else:
            wrong = traced(arguments.bin.resolve(), arguments.iterations or 700, arguments.kill_at)
    except Failed as failed:
        wrong = [str(failed)]
    for complaint in wrong:
        print(f"FAILED: {complaint}", file=sys.stderr)
    print(f"test-traces: {'failed, ' + str(len(wrong)) + ' complaints' if wrong else 'passed'}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
