"""A Prometheus on loopback that scrapes what it is told, for check.py.

What it is not: a judge of what was scraped. The standard library only.
"""

import json
import subprocess
import urllib.error
import urllib.parse
import urllib.request

from basics import Failed, free_port, stop
from shipped import FOLDER


def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


class Prometheus:
    """Prometheus on loopback, with jobs of its own, which it asks every second."""

    def __init__(self, binary, folder, jobs):
        self.port = free_port()
        settings = folder / "scrape.yaml"
        settings.write_text(json.dumps({
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"}, "rule_files": [str(FOLDER / "alerts.yaml")],
            "scrape_configs": jobs}))
        self.log = folder / "prometheus.log"
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [binary, f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address=127.0.0.1:{self.port}"],
                stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def get(self, path, **arguments):
        try:
            told = json.loads(fetch(f"http://127.0.0.1:{self.port}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"))
        except urllib.error.HTTPError as refused:
            if refused.code == 503:
                return None  # it listens before it is ready
            raise Failed(f"Prometheus: {arguments}: {refused.read().decode(errors='replace')}") from None
        except OSError:
            if self.process.poll() is not None:
                raise Failed(f"Prometheus ended: {self.log.read_text()[-2000:]}") from None
            return None  # it starts
        return told["data"]

    def query(self, query):
        told = self.get("query", query=query)
        return told["result"] if told else []

    def value(self, query):
        result = self.query(query)
        return float(result[0]["value"][1]) if result else None

    def is_newer(self, query, than):
        value = self.value(query)
        return value is not None and value > than

    def stop(self):
        stop(self.process, 20)
