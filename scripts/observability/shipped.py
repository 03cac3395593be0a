"""Dashboard, alerts and scrape settings of docs/observability held to the list of metrics, by themselves and by promtool.

Every name in them is in METRICS, with labels that it has; the dashboard is JSON of the shape that Grafana wants. promtool checks
the alerts, runs their unit tests, checks the scrape settings and parses every query of the dashboard. What it is not: a look at a
run; that is check.py. The standard library only.
"""

import json
import pathlib
import re
import subprocess

from basics import Failed
from metrics import METRICS

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "docs" / "observability"
# What Prometheus itself puts on every series.
SCRAPE_LABELS = {"job", "instance", "run", "severity", "alertname", "namespace"}
NAME = re.compile(r"\bcpcr_[a-z_]+")


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
        raise Failed(f"{where}: no such metric: {', '.join(unknown)}")
    allowed = SCRAPE_LABELS.union(*(METRICS[name][1] for name in names)) if names else SCRAPE_LABELS
    strange = sorted(labels_used(text) - allowed)
    if strange:
        raise Failed(f"{where}: no such label on {', '.join(sorted(names))}: {', '.join(strange)}")
    return names


def dashboard():
    """The dashboard's queries: (where, PromQL). Its shape is checked on the way."""
    told = json.loads((FOLDER / "dashboard.json").read_text())
    for key, kind in (("title", str), ("uid", str), ("schemaVersion", int), ("panels", list), ("templating", dict), ("time", dict)):
        if not isinstance(told.get(key), kind):
            raise Failed(f"dashboard.json: {key} is missing or no {kind.__name__}")
    variables = {variable["name"]: variable for variable in told["templating"]["list"]}
    if variables.get("datasource", {}).get("type") != "datasource" or variables.get("run", {}).get("type") != "query":
        raise Failed("dashboard.json: the variables datasource and run are wanted")
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
            raise Failed(f"dashboard.json: {where}: its id is another's")
        ids.add(panel["id"])
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        if place["x"] + place["w"] > 24 or cells & taken:
            raise Failed(f"dashboard.json: {where} lies over another or over the edge")
        taken |= cells
        if panel["type"] == "row":
            rows.append(panel["title"])
            continue
        if not panel.get("description") or not panel["targets"]:
            raise Failed(f"dashboard.json: {where} has no description or no query")
        sources.append(panel["datasource"])
        for target in panel["targets"]:
            names_and_labels(f"dashboard.json: {where}", target["expr"] + " " + target["legendFormat"])
            queries.append((where, target["expr"]))
            sources.append(target["datasource"])
    if any(source != {"type": "prometheus", "uid": "${datasource}"} for source in sources):
        raise Failed("dashboard.json: a data source that is not the variable")
    for row in ("Training", "Throughput", "Workers", "Storage", "Reliability"):
        if row not in rows:
            raise Failed(f"dashboard.json: no row {row}")
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
                raise Failed(f"alerts.yaml: {name} has no {part}")
        if f"alertname: {name}" not in (FOLDER / "alerts_test.yaml").read_text():
            raise Failed(f"alerts_test.yaml: no test of {name}")
    for name in ("alerts.yaml", "alerts_test.yaml", "prometheus.yaml"):
        unknown = sorted(set(NAME.findall((FOLDER / name).read_text())) - set(METRICS))
        if unknown:
            raise Failed(f"{name}: no such metric: {', '.join(unknown)}")
    print(f"names: {len(queries)} queries of the dashboard show {len(shown)} of {len(METRICS)} metrics; all names and labels are known")
    if set(METRICS) - shown:
        print(f"names: not on the dashboard: {', '.join(sorted(set(METRICS) - shown))}")
    return queries


def tool(command, told=None):
    done = subprocess.run(command, input=told, capture_output=True, text=True, timeout=120)
    if done.returncode != 0:
        raise Failed(f"{pathlib.Path(command[0]).name} {' '.join(map(str, command[1:]))}: status {done.returncode}:\n{done.stdout}{done.stderr}")
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
