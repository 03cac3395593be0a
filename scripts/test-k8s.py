"""Checks k8s/*.yaml without a cluster: it parses, and the promises that other files make about it hold.

Run by scripts/test.sh with the peers' Python (it needs PyYAML). What it is not: a schema check.
"""

import pathlib
import sys

import yaml

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "k8s"
passed, failures = 0, []


def check(what, holds):
    global passed
    if holds:
        passed += 1
    else:
        failures.append(what)


def check_job(name, job, service):
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    check(f"{name}: a podFailurePolicy wants restartPolicy Never", pod["restartPolicy"] == "Never")
    rules = {rule["action"]: [] for rule in spec["podFailurePolicy"]["rules"]}
    for rule in spec["podFailurePolicy"]["rules"]:
        rules[rule["action"]].append(rule)
        codes = rule.get("onExitCodes")
        if codes:
            names = [container["name"] for container in pod["containers"]]
            check(f"{name}: the policy's container exists", codes["containerName"] in names)
    codes_of = lambda action: [c for rule in rules.get(action, []) for c in rule.get("onExitCodes", {}).get("values", [])]
    check(f"{name}: exit 2 fails the job", codes_of("FailJob") == [2])
    check(f"{name}: exit 75 is tried again without counting", codes_of("Ignore") == [75])
    check(f"{name}: an eviction does not count", any(
        condition["type"] == "DisruptionTarget" for rule in rules["Ignore"] for condition in rule.get("onPodConditions", [])))
    check(f"{name}: the subdomain is the Service", pod["subdomain"] == service["metadata"]["name"])
    # The restricted pod security standard.
    security = pod["securityContext"]
    check(f"{name}: not root", security["runAsNonRoot"] is True and security["runAsUser"] > 0)
    check(f"{name}: seccomp", security["seccompProfile"]["type"] == "RuntimeDefault")
    check(f"{name}: no host namespaces", not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")))
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    check(f"{name}: no host paths", not any("hostPath" in volume for volume in pod.get("volumes", [])))
    for container in pod["containers"]:
        security = container["securityContext"]
        check(f"{name}: no privilege escalation", security["allowPrivilegeEscalation"] is False)
        check(f"{name}: no capabilities", security["capabilities"]["drop"] == ["ALL"])
        check(f"{name}: a memory limit", "memory" in container["resources"]["limits"])
        check(f"{name}: mounts are of its volumes", {m["name"] for m in container.get("volumeMounts", [])} <= volumes)
        check(f"{name}: arguments are strings", all(isinstance(arg, str) for arg in container["args"]))


def check_file(path):
    documents = [document for document in yaml.safe_load_all(path.read_text()) if document]
    by_kind = {}
    for document in documents:
        by_kind.setdefault(document["kind"], {})[document["metadata"]["name"]] = document
    service = by_kind["Service"]["cpcr"]
    check("the Service is headless", service["spec"]["clusterIP"] == "None")
    check("the Service publishes pods before they are ready", service["spec"]["publishNotReadyAddresses"] is True)
    coordinator, worker = by_kind["Job"]["cpcr-coordinator"], by_kind["Job"]["cpcr-worker"]
    for name, job in by_kind["Job"].items():
        check_job(name, job, service)
    labels = coordinator["spec"]["template"]["metadata"]["labels"]
    check("the Service selects the coordinator", service["spec"]["selector"].items() <= labels.items())
    labels = worker["spec"]["template"]["metadata"]["labels"]
    check("the Service does not select workers", not service["spec"]["selector"].items() <= labels.items())
    check("the workers' Job is indexed and elastic", worker["spec"]["completionMode"] == "Indexed"
          and worker["spec"]["completions"] == worker["spec"]["parallelism"])
    pod = coordinator["spec"]["template"]["spec"]
    port = service["spec"]["ports"][0]["port"]
    address = f"--coordinator={pod['hostname']}.{pod['subdomain']}:{port}"
    check("the workers ask where the coordinator is", address in worker["spec"]["template"]["spec"]["containers"][0]["args"])
    check("the workers have shared memory", any(
        volume.get("emptyDir", {}).get("medium") == "Memory" for volume in worker["spec"]["template"]["spec"]["volumes"]))
    maps = by_kind["ConfigMap"]["cpcr"]["data"]
    keys = [env["valueFrom"]["configMapKeyRef"]["key"] for env in pod["containers"][0]["env"]]
    check("the ConfigMap has the keys that are asked for", set(keys) <= set(maps) and "config.toml" in maps)


for manifest in sorted(FOLDER.glob("*.yaml")):
    check_file(manifest)
for failure in failures:
    print("FAILED", failure, file=sys.stderr)
print(f"k8s: {passed} passed, {len(failures)} failed")
sys.exit(bool(failures))
