"""Holds docs/observability and the coordinator's /metrics to one list of metrics, with Prometheus's own tools.

`scripts/test-prometheus.sh` builds these and calls it. Always, and with `--tools`: what shipped.py says. With `--bin`: a small
run of cpcr-launch is scraped by a real Prometheus, and one of its trainers is killed; its exposition must be clean, of the
names, types and labels of METRICS, steps must be seen to rise and the loss to be counted, every alert must evaluate, and the
dashboard's queries must find something. Then a run whose page is open to others: HTTPS, by the certificate and the password
that `cpcr` prints, and by nothing less. What it is not: a test of Grafana. Linux, the standard library only.
"""

import argparse
import os
import pathlib
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.parse

sys.dont_write_bytecode = True  # the modules are beside the sources
import basics  # noqa: E402
from basics import Failed  # noqa: E402
from metrics import MAY_BE_ABSENT, METRICS, held_to_the_list, parsed  # noqa: E402
from prometheus import Prometheus, fetch  # noqa: E402
from runs import Launched  # noqa: E402
from shipped import NAME, files, plain, tool, with_promtool  # noqa: E402

# Longest that the run and Prometheus may take to show something.
LIVE_S_MAX = 240
RESUMABLE = 75
# With checkpoints and validations on the way; it is stopped when enough was seen.
SETS = ["train.iterations=1000000", "checkpoint.every=20", "validate.every=20"]
# What is shown of a run by the way.
SHOWN = ("up", "cpcr_run_info", "cpcr_steps_done", "cpcr_images_per_second", "cpcr_loss", "cpcr_workers", "cpcr_generation",
         "cpcr_validation_mean_dice", "cpcr_checkpoint_step", "cpcr_data_wait_ratio", "cpcr_goodput_ratio",
         "sum by (phase) (rate(cpcr_phase_seconds_total[30s]))", "sum by (part) (cpcr_time_seconds_total)")


def wait_for(what, condition, seconds=LIVE_S_MAX):
    """What `condition` says, once that is true. Prometheus looks once a second: there is no use in asking it much more often."""
    return basics.wait_for(what, condition, seconds, every_s=0.5)


def lose_a_trainer(run, prometheus):
    """Kills one: that is counted, once and as nothing else."""
    victim = wait_for("two trainers", lambda: len(trainers := run.processes("trainer")) == 2 and trainers[-1])
    os.kill(victim, signal.SIGKILL)
    wait_for("the loss in cpcr_interruptions_total",
             lambda: prometheus.value('cpcr_interruptions_total{kind="trainer-killed"}') == 1)
    outage = wait_for("cpcr_last_outage_seconds", lambda: prometheus.value("cpcr_last_outage_seconds"))
    losses = sum(sample["value"][1] != "0" for sample in prometheus.query("cpcr_interruptions_total"))
    print(f"a trainer was killed: cpcr_interruptions_total says so, and nothing of another kind ({losses}); "
          f"cpcr_last_outage_seconds {outage:.3f}; cpcr_generation {prometheus.value('cpcr_generation'):g}")
    if losses != 1:
        raise Failed(f"one trainer was killed, and {losses} kinds of interruption are counted")


def says_everything(promtool, address):
    """/metrics has all metrics after a while: a checkpoint and a validation were seen, and heartbeats have brought the workers' figures."""
    def complete():
        told = fetch(address + "metrics")
        return told if not held_to_the_list(told) - MAY_BE_ABSENT else None
    try:
        page = wait_for("all metrics", complete)
    except Failed:
        raise Failed(f"/metrics has not: {', '.join(sorted(held_to_the_list(fetch(address + 'metrics')) - MAY_BE_ABSENT))}") from None
    absent = held_to_the_list(page)
    tool([promtool, "check", "metrics"], page)
    print(f"/metrics: clean by promtool; {len(METRICS) - len(absent)} of {len(METRICS)} metrics; "
          f"absent: {', '.join(sorted(absent)) or 'none'}; {len(page)} bytes, {len(parsed(page)[1])} series")


def queries_find(prometheus, queries, first):
    """The dashboard's queries find something, and some are shown. `first` is the step that was seen first."""
    names = [sample["metric"]["run"] for sample in prometheus.query("cpcr_run_info")]
    if len(names) != 1:
        raise Failed(f"cpcr_run_info: {len(names)} runs, not one")

    # Rates want two scrapes of everything.
    def empty():
        return [f"{where}: {query}" for where, query in queries if not prometheus.query(plain(query, names[0]))
                and not MAY_BE_ABSENT & set(NAME.findall(query))]
    try:
        wait_for("the dashboard's queries", lambda: not empty(), 60)
    except Failed:
        raise Failed("the dashboard's queries find nothing: " + "; ".join(empty())) from None
    nothing = [where for where, query in queries if not prometheus.query(plain(query, names[0]))]
    for query in SHOWN:
        for sample in prometheus.query(query):
            labels = ", ".join(f"{key}={value}" for key, value in sorted(sample["metric"].items())
                               if key not in ("__name__", "job", "instance"))
            print(f"    {query}{'{' + labels + '}' if labels else ''} = {sample['value'][1]}")
    print(f"    cpcr_steps_done was {first:g} at first")
    print(f"dashboard: {len(queries) - len(nothing)} of {len(queries)} queries find something; "
          f"not these, whose metrics may be absent: {', '.join(nothing) or 'none'}")


def alerts_evaluate(prometheus):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    sick = [rule["name"] for rule in rules if rule["health"] != "ok"]
    if sick or not rules:
        raise Failed(f"alerts that do not evaluate: {', '.join(sick)}")
    print(f"alerts: {len(rules)} evaluate; firing: {', '.join(r['name'] for r in rules if r['state'] == 'firing') or 'none'}")


def live(tools, binaries, folder, queries):
    """A run on loopback, from its first step to its end."""
    folder.mkdir()
    run, prometheus = Launched(binaries, folder, ["--nodes", "2"], SETS), None
    try:
        address = run.address(LIVE_S_MAX)
        page = wait_for("steps in /metrics", lambda: (text := fetch(address + "metrics")) and any(
            name == "cpcr_steps_done" and value > 0 for name, _, value in parsed(text)[1]) and text)
        tool([tools / "promtool", "check", "metrics"], page)
        target = urllib.parse.urlsplit(address).netloc
        prometheus = Prometheus(tools / "prometheus", folder, [{"job_name": "cpcr", "static_configs": [{"targets": [target]}]}])
        wait_for("up == 1", lambda: prometheus.value("up") == 1)
        first = wait_for("cpcr_steps_done", lambda: prometheus.value("cpcr_steps_done"))
        wait_for("cpcr_steps_done to rise", lambda: prometheus.is_newer("cpcr_steps_done", first))
        lose_a_trainer(run, prometheus)
        says_everything(tools / "promtool", address)
        queries_find(prometheus, queries, first)
        alerts_evaluate(prometheus)
        status = run.stop()
        if status != RESUMABLE:
            raise Failed(f"cpcr-launch ended with {status}, not {RESUMABLE}: {run.tail()}")
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
            raise Failed(f"cpcr {command}: status {done.returncode}: {done.stderr.strip()}")
        (folder / name).write_text(done.stdout)
    (folder / "other").write_text(secrets.token_hex(16))
    run = Launched(binaries, folder, ["--nodes", "1", "--dashboard", "0.0.0.0:0"], SETS, {"CPCR_JOIN_TOKEN": token})
    prometheus = None
    try:
        address = urllib.parse.urlsplit(run.address(LIVE_S_MAX))
        if address.scheme != "https":
            raise Failed(f"beyond loopback the page is {address.scheme}, not https")

        def job(name, **more):
            return {"job_name": name, "static_configs": [{"targets": [f"127.0.0.1:{address.port}"]}], **more}
        secure = {"scheme": "https", "tls_config": {"ca_file": str(folder / "ca.crt")}}

        def bearer(file):
            return {"authorization": {"type": "Bearer", "credentials_file": str(folder / file)}}
        prometheus = Prometheus(tools / "prometheus", folder, [
            job("right", **secure, **bearer("token")), job("another-password", **secure, **bearer("other")), job("no-password", **secure),
            job("no-certificate", scheme="https", **bearer("token")), job("plain", **bearer("token"))])
        wait_for("steps by HTTPS", lambda: prometheus.is_newer("cpcr_steps_done", 0))

        def asked():
            targets = (prometheus.get("targets") or {"activeTargets": []})["activeTargets"]
            return {target["labels"]["job"]: target for target in targets} if all(target["health"] != "unknown" for target in targets) else None
        targets = wait_for("every job", asked)
        for name, target in sorted(targets.items()):
            print(f"    beyond loopback, {name}: {target['health']} {target['lastError']}".rstrip())
        let_in = [name for name, target in targets.items() if target["health"] == "up"]
        if let_in != ["right"]:
            raise Failed(f"beyond loopback these jobs are let in: {', '.join(let_in)}")
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
    except Failed as wrong:
        print(f"FAILED: {wrong}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
