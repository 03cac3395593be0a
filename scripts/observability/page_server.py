"""The page of src/page as the product makes it, and a server for it that can be stopped and started again.

What it is not: the product's server, nor the documents (documents.py). The standard library only.
"""

import http.server
import json
import pathlib
import threading

from basics import free_port
from documents import picture

PAGE = pathlib.Path(__file__).resolve().parents[2] / "src/page"
# As the product's server sets it.
CSP = ("default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
       "connect-src 'self'")


def joined(document=None):
    """The page as the product makes it."""
    read = lambda name: (PAGE / name).read_text()
    page = read("index.html").replace("/*CSS*/", read("page.css"), 1)
    page = page.replace("/*JS*/", read("charts.js") + "\n" + read("page.js"), 1)
    if document is not None:
        data = json.dumps(document).replace("<", "\\u003c")
        page = page.replace('application/json">null<', f'application/json">{data}<', 1)
    return page


class Server:
    """Serves the page, and its documents as events; can be stopped and started again at its port."""

    def __init__(self):
        self.port, self.document, self.version = free_port(), None, 0
        self.changed, self.http = threading.Condition(), None

    def start(self):
        owner = self
        self.stopping = False

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                owner.answer(self)

        class Http(http.server.ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

            def handle_error(self, *_):
                pass  # the browser went away

        self.http = Http(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request):
        kinds = {"/": ("text/html; charset=utf-8", lambda: joined().encode()),
                 "/overlays/a.png": ("image/png", lambda: picture(3))}
        if request.path == "/events":
            return self.events(request)
        if request.path not in kinds:
            return request.send_error(404)
        kind, make = kinds[request.path]
        body = make()
        request.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", CSP)):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def events(self, request):
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        sent = 0
        while not self.stopping:
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.version > sent)
                sent, document = self.version, self.document
            if not self.stopping:
                request.wfile.write(f"event: run\ndata: {json.dumps(document)}\n\n".encode())

    def send(self, document):
        with self.changed:
            self.document, self.version = document, self.version + 1
            self.changed.notify_all()
