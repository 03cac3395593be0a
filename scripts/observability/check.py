"""Holds docs/observability and the coordinator's /metrics to one list of metrics, with Prometheus's own tools.

`scripts/test-prometheus.sh` builds these and calls it. Always: every name in the dashboard and in the alerts is in METRICS,
with labels that it has; the dashboard is JSON of the shape that Grafana wants. With `--tools`: promtool checks the
alerts, runs their unit tests, checks the scrape settings and parses every query of the dashboard. With `--bin`: a small
run of cpcr-launch is scraped by a real Prometheus, and one of its trainers is killed; its exposition must be clean, of the
names, types and labels of METRICS, steps must be seen to rise and the loss to be counted, every alert must evaluate, and the
dashboard's queries must find something. Then a run whose page is open to others: HTTPS, by the certificate and the password
that `cpcr` prints, and by nothing less. Linux, the standard library only.
"""

import argparse
import json
import os
import pathlib
import re
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

FOLDER = pathlib.Path(__file__).resolve().parent.parent.parent / "docs" / "observability"

RANK = ("node", "rank")
# What the coordinator says at /metrics: type and labels. By OTLP the same, with dots for the underscores between words.
METRICS = {
    "cpcr_run_info": ("gauge", ("run", "method", "version")),
    "cpcr_steps_done": ("gauge", ()),
    "cpcr_steps_wanted": ("gauge", ()),
    "cpcr_images_per_second": ("gauge", ()),
    "cpcr_loss": ("gauge", ("term",)),
    "cpcr_learning_rate": ("gauge", ()),
    "cpcr_consistency_weight": ("gauge", ()),
    "cpcr_validation_dice": ("gauge", ("class",)),
    "cpcr_validation_mean_dice": ("gauge", ()),
    "cpcr_validation_step": ("gauge", ()),
    "cpcr_workers": ("gauge", ()),
    "cpcr_workers_wanted": ("gauge", ()),
    "cpcr_generation": ("gauge", ()),
    "cpcr_heartbeat_age_seconds": ("gauge", ("node",)),
    "cpcr_step_seconds": ("gauge", RANK),
    "cpcr_step_own_seconds": ("gauge", RANK),
    "cpcr_step_own_seconds_median": ("gauge", ()),
    "cpcr_straggler": ("gauge", RANK),
    "cpcr_data_wait_ratio": ("gauge", RANK),
    "cpcr_trainer_steps_total": ("counter", RANK),
    "cpcr_phase_seconds_total": ("counter", (*RANK, "phase")),
    "cpcr_loader_queue_batches": ("gauge", RANK),
    "cpcr_read_requests_total": ("counter", RANK),
    "cpcr_read_bytes_total": ("counter", RANK),
    "cpcr_read_retries_total": ("counter", (*RANK, "kind")),
    "cpcr_cache_hits_total": ("counter", RANK),
    "cpcr_cache_misses_total": ("counter", RANK),
    "cpcr_checkpoint_step": ("gauge", ()),
    "cpcr_checkpoint_age_seconds": ("gauge", ()),
    "cpcr_checkpoint_hold_seconds": ("gauge", ()),
    "cpcr_checkpoint_upload_seconds": ("gauge", ()),
    "cpcr_checkpoint_bytes": ("gauge", ()),
    "cpcr_checkpoints_total": ("counter", ()),
    "cpcr_interruptions_total": ("counter", ("kind",)),
    "cpcr_last_outage_seconds": ("gauge", ()),
    "cpcr_time_seconds_total": ("counter", ("part",)),
    "cpcr_goodput_ratio": ("gauge", ()),
    "cpcr_process_memory_bytes": ("gauge", RANK),
    "cpcr_gpu_memory_bytes": ("gauge", RANK),
    "cpcr_page_faults_total": ("counter", RANK),
    "cpcr_finished": ("gauge", ()),
}
# What it says besides. Dashboard and alerts do without.
BESIDES = {
    "cpcr_eta_seconds": ("gauge", ()),
    "cpcr_start_time_seconds": ("gauge", ()),
    "cpcr_notes": ("gauge", ()),
    "cpcr_hints": ("gauge", ()),
    "cpcr_validation_best_dice": ("gauge", ()),
}
# A small run on CPUs need not have these: there is no GPU, and a disk seldom has to be asked again.
MAY_BE_ABSENT = {"cpcr_gpu_memory_bytes", "cpcr_read_retries_total"}
PHASES = {"data_wait", "copy_to_device", "forward", "loss", "backward", "all_reduce_wait", "optimiser", "checkpoint_hold"}
PARTS = {"waiting", "starting", "training", "rework", "validation", "saving", "recovery", "joining", "stopping"}
# What Prometheus itself puts on every series.
SCRAPE_LABELS = {"job", "instance", "run", "severity", "alertname", "namespace"}
NAME = re.compile(r"\bcpcr_[a-z_]+")
# Longest that the run and Prometheus may take to show something.
LIVE_S_MAX = 240
RESUMABLE = 75
# Small, and with checkpoints and validations on the way; it is stopped when enough was seen.
RUN = ["--backend", "gloo", "--set", "train.iterations=1000000", "--set", "patch_size=32", "--set", "batch.labelled=4",
       "--set", "batch.unlabelled=4", "--set", "checkpoint.every=20", "--set", "validate.every=20"]


class Wrong(Exception):
    """A check that failed."""


def wait_for(what, condition, seconds=LIVE_S_MAX):
    """What `condition` says, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.5)
    raise Wrong(f"{what}: not within {seconds} s")


# ---- The files ---------------------------------------------------------------------------------------------------

def labels_used(text):
    """Labels that a query or a template asks for."""
    found = set()
    for inside in re.findall(r"\b(?:by|on|group_left|ignoring|without)\s*\(([^)]*)\)", text):
        found |= {label.strip() for label in inside.split(",") if label.strip()}
    for inside in re.findall(r"\bcpcr_[a-z_]+\{([^}]*)\}", text):
        found |= set(re.findall(r"([a-z_]+)\s*[=!]", inside))
    found |= set(re.findall(r"\$labels\.([a-z_]+)", text))
    found |= set(re.findall(r"\{\{\s*([a-z_]+)\s*\}\}", text))
    return found


def names_and_labels(where, text):
    """Every metric in `text` is one of METRICS, and every label belongs to one that is in it."""
    names = set(NAME.findall(text))
    unknown = sorted(names - set(METRICS))
    if unknown:
        raise Wrong(f"{where}: no such metric: {', '.join(unknown)}")
    allowed = SCRAPE_LABELS.union(*(METRICS[name][1] for name in names)) if names else SCRAPE_LABELS
    strange = sorted(labels_used(text) - allowed)
    if strange:
        raise Wrong(f"{where}: no such label on {', '.join(sorted(names))}: {', '.join(strange)}")
    return names


def dashboard():
    """The dashboard's queries: (where, PromQL). Its shape is checked on the way."""
    told = json.loads((FOLDER / "dashboard.json").read_text())
    for key, kind in (("title", str), ("uid", str), ("schemaVersion", int), ("panels", list), ("templating", dict), ("time", dict)):
        if not isinstance(told.get(key), kind):
            raise Wrong(f"dashboard.json: {key} is missing or no {kind.__name__}")
    variables = {variable["name"]: variable for variable in told["templating"]["list"]}
    if variables.get("datasource", {}).get("type") != "datasource" or variables.get("run", {}).get("type") != "query":
        raise Wrong("dashboard.json: the variables datasource and run are wanted")
    queries = [("variable run", re.fullmatch(r"label_values\((.*), \w+\)", variables["run"]["query"]["query"])[1])]
    sources = [variables["run"]["datasource"]]
    for annotation in told["annotations"]["list"]:
        if "expr" in annotation:
            queries.append((f"annotation {annotation['name']}", annotation["expr"]))
            sources.append(annotation["datasource"])
    taken, ids, rows = set(), set(), []
    for panel in told["panels"]:
        where = f"panel '{panel['title']}'"
        if panel["id"] in ids:
            raise Wrong(f"dashboard.json: {where}: its id is another's")
        ids.add(panel["id"])
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        if place["x"] + place["w"] > 24 or cells & taken:
            raise Wrong(f"dashboard.json: {where} lies over another or over the edge")
        taken |= cells
        if panel["type"] == "row":
            rows.append(panel["title"])
            continue
        if not panel.get("description") or not panel["targets"]:
            raise Wrong(f"dashboard.json: {where} has no description or no query")
        sources.append(panel["datasource"])
        for target in panel["targets"]:
            names_and_labels(f"dashboard.json: {where}", target["expr"] + " " + target["legendFormat"])
            queries.append((where, target["expr"]))
            sources.append(target["datasource"])
    if any(source != {"type": "prometheus", "uid": "${datasource}"} for source in sources):
        raise Wrong("dashboard.json: a data source that is not the variable")
    for row in ("Training", "Throughput", "Workers", "Storage", "Reliability"):
        if row not in rows:
            raise Wrong(f"dashboard.json: no row {row}")
    for where, query in queries:
        names_and_labels(f"dashboard.json: {where}", query)
    return queries


def files():
    """Names in all files. Returns the dashboard's queries."""
    queries = dashboard()
    shown = set().union(*(NAME.findall(query) for _, query in queries))
    alerts = (FOLDER / "alerts.yaml").read_text()
    for rule in re.split(r"(?m)^\s*- alert: ", alerts)[1:]:
        name = rule.split(None, 1)[0]
        names_and_labels(f"alerts.yaml: {name}", rule)
        for part in ("expr:", "severity:", "summary:", "description:"):
            if part not in rule:
                raise Wrong(f"alerts.yaml: {name} has no {part}")
        if f"alertname: {name}" not in (FOLDER / "alerts_test.yaml").read_text():
            raise Wrong(f"alerts_test.yaml: no test of {name}")
    for name in ("alerts.yaml", "alerts_test.yaml", "prometheus.yaml"):
        unknown = sorted(set(NAME.findall((FOLDER / name).read_text())) - set(METRICS))
        if unknown:
            raise Wrong(f"{name}: no such metric: {', '.join(unknown)}")
    print(f"names: {len(queries)} queries of the dashboard show {len(shown)} of {len(METRICS)} metrics; all names and labels are known")
    if set(METRICS) - shown:
        print(f"names: not on the dashboard: {', '.join(sorted(set(METRICS) - shown))}")
    return queries


def tool(command, told=None):
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise Wrong(f"{pathlib.Path(command[0]).name} {' '.join(map(str, command[1:]))}: status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def plain(query, run="demo"):
    """A query of the dashboard as Grafana would send it."""
    return query.replace("$__rate_interval", "1m").replace("$run", run)


def with_promtool(promtool, folder, queries):
    tool([promtool, "check", "rules", "--lint=all", "--lint-fatal", FOLDER / "alerts.yaml"])
    tool([promtool, "test", "rules", FOLDER / "alerts_test.yaml"])
    # It wants to see the files that are named; those of a cluster are made up.
    settings = (FOLDER / "prometheus.yaml").read_text()
    for name in set(re.findall(r"/etc/prometheus/\S+", settings)):
        made_up = folder / pathlib.Path(name).name
        made_up.write_text("made up\n")
        settings = settings.replace(name, str(made_up))
    (folder / "prometheus.yaml").write_text(settings.replace("alerts.yaml]", f"{FOLDER}/alerts.yaml]"))
    tool([promtool, "check", "config", "--syntax-only", FOLDER / "prometheus.yaml"])
    tool([promtool, "check", "config", folder / "prometheus.yaml"])
    # As recording rules the dashboard's queries are parsed, too.
    rules = [{"record": f"dashboard:query{number}", "expr": plain(query)} for number, (_, query) in enumerate(queries)]
    (folder / "queries.yaml").write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))
    tool([promtool, "check", "rules", "--lint=none", folder / "queries.yaml"])
    tests = (FOLDER / "alerts_test.yaml").read_text()
    print(f"promtool: alerts are sound, {tests.count('- name:')} tests of them pass, scrape settings are sound, {len(queries)} queries parse")


# ---- A run -------------------------------------------------------------------------------------------------------

def fetch(url):
    with urllib.request.urlopen(url, timeout=10) as answer:
        return answer.read().decode()


class Launched:
    """A run of cpcr-launch in a folder of its own. Its dashboard's address is read from its stderr."""

    def __init__(self, binaries, folder, more, token=None):
        self.lines, self.dashboard = [], None
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("OTEL_", "CPCR_JOIN_TOKEN"))}
        if token:
            environment["CPCR_JOIN_TOKEN"] = token
        self.process = subprocess.Popen([binaries / "cpcr-launch", *RUN, *more], cwd=folder, env=environment, stderr=subprocess.PIPE,
                                        stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True, errors="replace")
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stderr:
            self.lines.append(line.rstrip())
            found = re.search(r"dashboard: (https?://\S+/)", line)
            if found:
                self.dashboard = found[1]

    def address(self):
        def there():
            if self.process.poll() is not None and not self.dashboard:
                raise Wrong(f"cpcr-launch ended with {self.process.returncode} and named no dashboard: {' / '.join(self.lines[-5:])}")
            return self.dashboard
        return wait_for("the dashboard's address on stderr", there)

    def trainers(self):
        """Processes below the launcher's that train."""
        parents, found = {}, []
        for entry in pathlib.Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                    words = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue  # it ended meanwhile
                if words[0].endswith(b"/cpcr-engine") and words[1:2] == [b"trainer"]:
                    found.append(int(entry.name))
        return sorted(pid for pid in found if parents.get(parents[pid]) == self.process.pid)

    def stop(self):
        """Ends it as Ctrl-C would; how it ended."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode


def parsed(text):
    """Types and (name, labels, value) of an exposition."""
    types, samples = {}, []
    for line in text.splitlines():
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            types[name] = kind
        elif line and not line.startswith("#"):
            match = re.fullmatch(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+\d+)?", line)
            if not match:
                raise Wrong(f"/metrics: a line that is none: {line}")
            labels = dict(re.findall(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\]|\\.)*)"', match[2] or ""))
            samples.append((match[1], labels, float(match[3])))
    return types, samples


def held_to_the_list(text):
    """The exposition has the names, types and labels of METRICS and BESIDES, and no others. Returns which of METRICS it lacks."""
    types, samples = parsed(text)
    for name, labels, _ in samples:
        if name not in METRICS | BESIDES:
            raise Wrong(f"/metrics: {name} is not in the list")
        kind, wanted = (METRICS | BESIDES)[name]
        if types.get(name) != kind:
            raise Wrong(f"/metrics: {name} is a {types.get(name)}, not a {kind}")
        if set(labels) != set(wanted):
            raise Wrong(f"/metrics: {name} has the labels {sorted(labels)}, not {sorted(wanted)}")
    for name, label, known in (("cpcr_phase_seconds_total", "phase", PHASES), ("cpcr_time_seconds_total", "part", PARTS)):
        strange = {labels[label] for told, labels, _ in samples if told == name} - known
        if strange:
            raise Wrong(f"/metrics: {name} has a {label} that is not in the list: {', '.join(sorted(strange))}")
    return set(METRICS) - {name for name, _, _ in samples}


class Prometheus:
    """Prometheus on loopback, with jobs of its own, which it asks every second."""

    def __init__(self, binary, folder, jobs):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
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
            raise Wrong(f"Prometheus: {arguments}: {refused.read().decode(errors='replace')}") from None
        except OSError:
            if self.process.poll() is not None:
                raise Wrong(f"Prometheus ended: {self.log.read_text()[-2000:]}") from None
            return None  # it starts
        return told["data"]

    def query(self, query):
        told = self.get("query", query=query)
        return told["result"] if told else []

    def value(self, query):
        result = self.query(query)
        return float(result[0]["value"][1]) if result else None

    def stop(self):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def is_newer(prometheus, query, than):
    value = prometheus.value(query)
    return value is not None and value > than


def live(tools, binaries, folder, queries):
    folder.mkdir()
    run, prometheus = Launched(binaries, folder, ["--nodes", "2"]), None
    try:
        address = run.address()
        page = wait_for("steps in /metrics", lambda: (text := fetch(address + "metrics")) and any(
            name == "cpcr_steps_done" and value > 0 for name, _, value in parsed(text)[1]) and text)
        tool([tools / "promtool", "check", "metrics"], page)
        target = urllib.parse.urlsplit(address).netloc
        prometheus = Prometheus(tools / "prometheus", folder, [{"job_name": "cpcr", "static_configs": [{"targets": [target]}]}])
        wait_for("up == 1", lambda: prometheus.value("up") == 1)
        first = wait_for("cpcr_steps_done", lambda: prometheus.value("cpcr_steps_done"))
        wait_for("cpcr_steps_done to rise", lambda: is_newer(prometheus, "cpcr_steps_done", first))
        victim = wait_for("two trainers", lambda: len(trainers := run.trainers()) == 2 and trainers[-1])
        os.kill(victim, signal.SIGKILL)
        wait_for("the loss in cpcr_interruptions_total",
                 lambda: prometheus.value('cpcr_interruptions_total{kind="trainer-killed"}') == 1)
        outage = wait_for("cpcr_last_outage_seconds", lambda: prometheus.value("cpcr_last_outage_seconds"))
        losses = sum(sample["value"][1] != "0" for sample in prometheus.query("cpcr_interruptions_total"))
        print(f"a trainer was killed: cpcr_interruptions_total says so, and nothing of another kind ({losses}); "
              f"cpcr_last_outage_seconds {outage:.3f}; cpcr_generation {prometheus.value('cpcr_generation'):g}")
        if losses != 1:
            raise Wrong(f"one trainer was killed, and {losses} kinds of interruption are counted")

        # Until a checkpoint and a validation were seen, and heartbeats have brought the workers' figures.
        def complete():
            told = fetch(address + "metrics")
            return told if not held_to_the_list(told) - MAY_BE_ABSENT else None
        try:
            page = wait_for("all metrics", complete)
        except Wrong:
            raise Wrong(f"/metrics has not: {', '.join(sorted(held_to_the_list(fetch(address + 'metrics')) - MAY_BE_ABSENT))}") from None
        absent = held_to_the_list(page)
        tool([tools / "promtool", "check", "metrics"], page)
        print(f"/metrics: clean by promtool; {len(METRICS) - len(absent)} of {len(METRICS)} metrics; "
              f"absent: {', '.join(sorted(absent)) or 'none'}; {len(page)} bytes, {len(parsed(page)[1])} series")
        names = [sample["metric"]["run"] for sample in prometheus.query("cpcr_run_info")]
        if len(names) != 1:
            raise Wrong(f"cpcr_run_info: {len(names)} runs, not one")

        # Rates want two scrapes of everything.
        def empty():
            return [f"{where}: {query}" for where, query in queries if not prometheus.query(plain(query, names[0]))
                    and not MAY_BE_ABSENT & set(NAME.findall(query))]
        try:
            wait_for("the dashboard's queries", lambda: not empty(), 60)
        except Wrong:
            raise Wrong("the dashboard's queries find nothing: " + "; ".join(empty())) from None
        nothing = [where for where, query in queries if not prometheus.query(plain(query, names[0]))]
        for query in ("up", "cpcr_run_info", "cpcr_steps_done", "cpcr_images_per_second", "cpcr_loss", "cpcr_workers", "cpcr_generation",
                      "cpcr_validation_mean_dice", "cpcr_checkpoint_step", "cpcr_data_wait_ratio", "cpcr_goodput_ratio",
                      "sum by (phase) (rate(cpcr_phase_seconds_total[30s]))", "sum by (part) (cpcr_time_seconds_total)"):
            for sample in prometheus.query(query):
                labels = ", ".join(f"{key}={value}" for key, value in sorted(sample["metric"].items())
                                   if key not in ("__name__", "job", "instance"))
                print(f"    {query}{'{' + labels + '}' if labels else ''} = {sample['value'][1]}")
        print(f"    cpcr_steps_done was {first:g} at first")
        print(f"dashboard: {len(queries) - len(nothing)} of {len(queries)} queries find something; "
              f"not these, whose metrics may be absent: {', '.join(nothing) or 'none'}")
        rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
        sick = [rule["name"] for rule in rules if rule["health"] != "ok"]
        if sick or not rules:
            raise Wrong(f"alerts that do not evaluate: {', '.join(sick)}")
        print(f"alerts: {len(rules)} evaluate; firing: {', '.join(r['name'] for r in rules if r['state'] == 'firing') or 'none'}")
        status = run.stop()
        if status != RESUMABLE:
            raise Wrong(f"cpcr-launch ended with {status}, not {RESUMABLE}: {' / '.join(run.lines[-5:])}")
        wait_for("up == 0", lambda: prometheus.value("up") == 0, 30)
        print("run: stopped, and Prometheus sees it gone")
    finally:
        run.stop()
        if prometheus is not None:
            prometheus.stop()


def open_to_others(tools, binaries, folder):
    """A page beyond loopback, scraped as the job for Kubernetes does: HTTPS by the run's own authority, with the page's password."""
    folder.mkdir()
    token = secrets.token_hex(32)

    def printed(command):
        return subprocess.run([binaries / "cpcr", command], env=os.environ | {"CPCR_JOIN_TOKEN": token}, check=False,
                              capture_output=True, text=True, timeout=60)
    for command, name in (("page-certificate", "ca.crt"), ("page-password", "token")):
        done = printed(command)
        if done.returncode != 0 or not done.stdout:
            raise Wrong(f"cpcr {command}: status {done.returncode}: {done.stderr.strip()}")
        (folder / name).write_text(done.stdout)
    (folder / "other").write_text(secrets.token_hex(16))
    run, prometheus = Launched(binaries, folder, ["--nodes", "1", "--dashboard", "0.0.0.0:0"], token), None
    try:
        address = urllib.parse.urlsplit(run.address())
        if address.scheme != "https":
            raise Wrong(f"beyond loopback the page is {address.scheme}, not https")

        def job(name, **more):
            return {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{address.port}"]}], **more}
        secure = {"scheme": "https", "tls_config": {"ca_file": str(folder / "ca.crt")}}

        def bearer(file):
            return {"authorization": {"type": "Bearer", "credentials_file": str(folder / file)}}
        prometheus = Prometheus(tools / "prometheus", folder, [
            job("right", **secure, **bearer("token")), job("another-password", **secure, **bearer("other")), job("no-password", **secure),
            job("no-certificate", scheme="https", **bearer("token")), job("plain", **bearer("token"))])
        wait_for("steps by HTTPS", lambda: is_newer(prometheus, "cpcr_steps_done", 0))

        def asked():
            targets = (prometheus.get("targets") or {"activeTargets": []})["activeTargets"]
            return {target["labels"]["job"]: target for target in targets} if all(target["health"] != "unknown" for target in targets) else None
        targets = wait_for("every job", asked)
        for name, target in sorted(targets.items()):
            print(f"    beyond loopback, {name}: {target['health']} {target['lastError']}".rstrip())
        let_in = [name for name, target in targets.items() if target["health"] == "up"]
        if let_in != ["right"]:
            raise Wrong(f"beyond loopback these jobs are let in: {', '.join(let_in)}")
        print("beyond loopback: HTTPS by `cpcr page-certificate` and `cpcr page-password`, and by nothing less")
    finally:
        run.stop()
        if prometheus is not None:
            prometheus.stop()


def main():
    parser = argparse.ArgumentParser(prog="scripts/test-prometheus.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--tools", type=pathlib.Path, help="the folder of prometheus and promtool")
    parser.add_argument("--without-tools", action="store_true", help="only what needs neither")
    parser.add_argument("--bin", type=pathlib.Path, help="the folder of cpcr-launch: also scrape a small run")
    arguments = parser.parse_args()
    if not arguments.tools and not arguments.without_tools:
        parser.error("--tools DIR, or --without-tools")
    try:
        queries = files()
        if arguments.tools:
            with tempfile.TemporaryDirectory(prefix="cpcr-prometheus-") as folder:
                with_promtool(arguments.tools.resolve() / "promtool", pathlib.Path(folder), queries)
                if arguments.bin:
                    live(arguments.tools.resolve(), arguments.bin.resolve(), pathlib.Path(folder) / "live", queries)
                    open_to_others(arguments.tools.resolve(), arguments.bin.resolve(), pathlib.Path(folder) / "open")
    except Wrong as wrong:
        print(f"FAILED: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
