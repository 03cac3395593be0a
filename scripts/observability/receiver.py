"""Collectors on loopback: one that keeps the spans and metrics that it gets by OTLP/HTTP, and one that never answers.

What it is not: a judge of what comes; that is traces.py. Of other packages only opentelemetry-proto (scripts/locks/peers.txt).
"""

import collections
import dataclasses
import gzip
import http.server
import socket
import threading
import time

from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2 as metrics_service
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as trace_service

from basics import Failed
from runs import RUN_S_MAX


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

    def wait_for(self, condition, run, what):
        """What `condition` says of the spans so far, once that is something."""
        deadline = time.monotonic() + RUN_S_MAX
        with self.lock:
            while not (value := condition(self.spans)):
                if run.process.poll() is not None or time.monotonic() > deadline:
                    raise Failed(f"{what}: not before the run's end or {RUN_S_MAX} s; step {newest_step(self.spans)} came")
                self.lock.wait(1.0)
            return value

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def newest_step(spans):
    """The newest step that a span tells of."""
    return max((int(span.attributes.get("step", 0)) for span in spans if span.name == "step"), default=0)


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

    def close(self):
        self.listener.close()

    @staticmethod
    def swallow(connection):
        with connection:
            try:
                while connection.recv(65536):
                    pass
            except OSError:
                pass
