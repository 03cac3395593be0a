"""Shows the receiver requests made by hand, and every check of traces.py a trace that is wrong in its way.

`scripts/test-traces.py --self-test` calls it; it needs no binaries. What it is not: a look at a run. Of other packages only opentelemetry-proto.
"""

import contextlib
import gzip
import os
import socket
import urllib.error
import urllib.request

from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service

from metrics import METRICS
from receiver import Metric, Receiver, Silent, Span, newest_step
from runs import Life
from traces import RECOVERY, Trace, judged
from tree import tree


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


def receiver_takes(expect):
    """The receiver, by hand."""
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


# What is wrong with a trace, a part of the complaint, and what makes it so of (spans, lives, metrics).
BAD = (
    ("two trace ids", "2 trace ids", lambda s, l, m: setattr(s[-1], "trace", "u")),
    ("two roots", "roots are", lambda s, l, m: setattr(named(s, "agent"), "parent", "")),
    ("an unknown parent", "whose parent nobody sent", lambda s, l, m: setattr(named(s, "member"), "parent", "ab")),
    ("a parent of another kind", "`step` below `run`", lambda s, l, m: setattr(named(s, "step"), "parent", named(s, "run").id)),
    ("a span twice", "came twice", lambda s, l, m: s.append(s[-1])),
    ("a trainer that sends nothing", "no span of the trainer 99", lambda s, l, m: l.append(Life(99, "trainer", 1))),
    ("a wrong role", "calls itself", lambda s, l, m: l.append(Life(10, "trainer", 0))),
    ("a wrong node", "says that its node", lambda s, l, m: [x.resource.update({"cpcr.node": "9"}) for x in s if x.pid == 21]),
    ("no rank", "without cpcr.rank", lambda s, l, m: named(s, "member").attributes.pop("cpcr.rank")),
    ("a rank in words", "as text", lambda s, l, m: named(s, "step").attributes.update(rank="0")),
    ("no version", "lacks service.version", lambda s, l, m: s[0].resource.pop("service.version")),
    ("no recovery", "0 recoveries", lambda s, l, m: s.remove(named(s, "recovery"))),
    ("another cause", "not trainer-killed", lambda s, l, m: named(s, "recovery").attributes.update({"cpcr.cause": "agent-lost"})),
    ("a gap in the recovery", "begins +50.00 ms", lambda s, l, m: setattr(named(s, "regroup"), "start", named(s, "regroup").start + 0.05)),
    ("no fence", "its parts are", lambda s, l, m: s.remove(named(s, "fence"))),
    ("parts longer than the outage", "% off the outages in the median", lambda s, l, m: stretch(s, "regroup", 0.06)),
    ("another outage said", "cpcr.outage_s is", lambda s, l, m: named(s, "recovery").attributes.update({"cpcr.outage_s": 1.2})),
    ("no recovery that could be measured", "only 0 could be measured", no_step),
    ("a recovery that ends too early", "before anybody has stepped", hear_early),
    ("nobody steps again", "after the kill", lambda s, l, m: [s.remove(x) for x in list(s) if x.name == "optimiser" and x.start > 1004.5]),
    ("a case's name", "phantom0001", lambda s, l, m: named(s, "step").attributes.update(case="phantom0001_ed")),
    ("a case in a list", "phantom0001", lambda s, l, m: named(s, "step").events.append(("read", {"cases": ["phantom0001"]}))),
    ("a file's name beside a checkpoint's", "shard-1.parquet",
     lambda s, l, m: named(s, "step").attributes.update(what='"model.safetensors": "s3://b/shard-1.parquet"')),
    ("a file's name", "shard-1.parquet", lambda s, l, m: named(s, "step").attributes.update(what="s3://b/shard-1.parquet")),
    ("a case on a metric", "phantom0001", lambda s, l, m: m[0].attributes.append({"case": "phantom0001"})),
    ("a metric of another name", "not in the list", lambda s, l, m: m.append(Metric("cpcr.steps_done", "gauge", [], [], {}))),
    ("a metric of another kind", "not a counter", lambda s, l, m: m.append(Metric("cpcr.checkpoints", "gauge", [], [], {}))),
    ("a metric that never came", "never came: cpcr_loss", lambda s, l, m: m.remove(next(x for x in m if x.name == "cpcr.loss"))),
)


def checks_complain(expect):
    """A good trace, then everything that may be wrong with one."""
    spans, lives, metrics, names = made_up()
    print("\n".join(tree(Trace(spans))))
    good = judged(Trace(spans), lives, metrics, names)
    expect(f"a good trace: {good}", not good)
    for what, says, change in BAD:
        spans, lives, metrics, names = made_up()
        change(spans, lives, metrics)
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            complaints = judged(Trace(spans), lives, metrics, names)
        expect(f"{what}: {complaints}", any(says in complaint for complaint in complaints))


def silent_is_silent(expect):
    """A collector that never answers does accept."""
    silent = Silent()
    with socket.create_connection(silent.listener.getsockname(), timeout=5) as connection:
        connection.sendall(b"POST / HTTP/1.1\r\n\r\n")
        connection.settimeout(0.3)
        try:
            expect(f"silence: {connection.recv(1)}", False)
        except TimeoutError:
            expect("silence", True)
    silent.close()


def self_test():
    """What did not come out as it should."""
    wrong = []

    def expect(what, happened):
        if not happened:
            wrong.append(what)
    for part in (receiver_takes, checks_complain, silent_is_silent):
        part(expect)
    return wrong
