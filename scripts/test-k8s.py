"""Checks the manifests in k8s/ without a cluster, as they are and as `kubectl kustomize` renders the overlays.

Each is valid, strictly, by the API schemas of every Kubernetes from 1.29 on that kubernetes-validate carries, and the
promises that other files make about them hold. Run by scripts/test.sh with the peers' Python; with arguments, for what
`cpcr-launch --on k8s` printed into those files. Where there is no kubectl the overlays are not rendered, which is said. What it is not: a cluster.
"""

import pathlib
import shutil
import subprocess
import sys

import kubernetes_validate
import yaml

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "k8s"
OLDEST = (1, 29)
passed, failures = 0, []


def check(what, holds):
    global passed
    if holds:
        passed += 1
    else:
        failures.append(what)


def versions():
    """All minor versions with a strict schema, from OLDEST on."""
    folder = pathlib.Path(kubernetes_validate.__file__).parent / "kubernetes-json-schema"
    found = {tuple(map(int, path.name[1:].split("-")[0].split(".")[:2])) for path in folder.glob("v*-local-strict")}
    return [f"{major}.{minor}" for major, minor in sorted(found) if (major, minor) >= OLDEST]


def check_schema(name, document):
    what = f"{name}: {document['kind']} {document['metadata']['name']}"
    for version in versions():
        try:
            kubernetes_validate.validate(document, version, strict=True)
            check(what, True)
        except kubernetes_validate.ValidationError as error:
            check(f"{what}, Kubernetes {version}: {'.'.join(map(str, error.path))}: {error.message}", False)


def check_policy(name, spec):
    """What a worker's end means to its Job; the first rule that matches counts."""
    codes, actions = {}, [rule["action"] for rule in spec["podFailurePolicy"]["rules"]]
    for rule in spec["podFailurePolicy"]["rules"]:
        for code in rule.get("onExitCodes", {}).get("values", []):
            codes[code] = rule["action"]
    check(f"{name}: exit 2 fails the job, 75 does not count", codes == {2: "FailJob", 75: "Ignore"})
    first = spec["podFailurePolicy"]["rules"][0]
    check(f"{name}: an eviction does not count, whatever the exit status", actions[0] == "Ignore"
          and first["onPodConditions"][0]["type"] == "DisruptionTarget")
    check(f"{name}: every index has its own tries", spec.get("backoffLimitPerIndex", 0) > 0)


def check_pod(name, pod):
    """The restricted pod security standard, and what a pod here wants."""
    security = pod["securityContext"]
    check(f"{name}: not root", security["runAsNonRoot"] is True and security["runAsUser"] > 0)
    check(f"{name}: seccomp", security["seccompProfile"]["type"] == "RuntimeDefault")
    check(f"{name}: no host namespaces", not any(pod.get(key) for key in ("hostNetwork", "hostPID", "hostIPC")))
    check(f"{name}: no service account, no service links",
          pod["automountServiceAccountToken"] is False and pod["enableServiceLinks"] is False)
    volumes = {volume["name"] for volume in pod.get("volumes", [])}
    check(f"{name}: no host paths", not any("hostPath" in volume for volume in pod.get("volumes", [])))
    for container in [*pod.get("initContainers", []), *pod["containers"]]:
        security = container["securityContext"]
        check(f"{name}: no privilege escalation", security["allowPrivilegeEscalation"] is False)
        check(f"{name}: a read-only root", security["readOnlyRootFilesystem"] is True)
        check(f"{name}: no capabilities", security["capabilities"]["drop"] == ["ALL"])
        check(f"{name}: a memory limit", "memory" in container["resources"]["limits"])
        check(f"{name}: mounts are of its volumes", {m["name"] for m in container.get("volumeMounts", [])} <= volumes)
        check(f"{name}: something to write to", any(m["mountPath"] == "/tmp" for m in container["volumeMounts"]))


def check_secrets(name, documents):
    """They come from the one Secret that is made by hand; no manifest holds any."""
    check(f"{name}: no Secret among the manifests", all(document["kind"] != "Secret" for document in documents))
    pods = [d["spec"]["template"]["spec"] for d in documents if d["kind"] in ("Job", "Deployment")]
    for container in (container for pod in pods for container in pod["containers"]):
        check(f"{name}: the Secret `cpcr` is asked for, so that a pod without a join token says so",
              container["envFrom"] == [{"secretRef": {"name": "cpcr"}}])
        named = [env["name"] for env in container.get("env", [])] + container["args"]
        check(f"{name}: no secret in a manifest",
              not any(word in text.upper() for text in named for word in ("TOKEN", "SECRET", "ACCESS_KEY", "PASSWORD")))


def check_job(name, job, service):
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    check_pod(name, pod)
    check(f"{name}: a pod that ends is replaced by another", pod["restartPolicy"] == "Never")
    check(f"{name}: it is removed when it has finished, so that the same apply resumes", spec["ttlSecondsAfterFinished"] > 0)
    check(f"{name}: the subdomain is the Service", pod["subdomain"] == service["metadata"]["name"])
    waits = {t["key"].split("/")[1]: t["tolerationSeconds"] for t in pod["tolerations"] if t["effect"] == "NoExecute"}
    check(f"{name}: nodes that are gone are given up soon", waits == {"not-ready": 20, "unreachable": 20})
    check(f"{name}: SIGTERM leaves time for a checkpoint", pod["terminationGracePeriodSeconds"] >= 60)
    container = pod["containers"][0]
    state = next((a for a in container["args"] if a.startswith("--state=")), None)
    for probe, what in (("livenessProbe", "alive"), ("readinessProbe", "ready")):
        check(f"{name}: {probe}", container[probe]["exec"]["command"] == ["cpcr", "probe", what, state])


def check_all(name, documents):
    by_kind = {}
    for document in documents:
        check_schema(name, document)
        by_kind.setdefault(document["kind"], {})[document["metadata"]["name"]] = document
    check_secrets(name, documents)
    service = by_kind["Service"]["cpcr"]
    check(f"{name}: the Service is headless", service["spec"]["clusterIP"] == "None")
    check(f"{name}: the Service publishes pods before they are ready", service["spec"]["publishNotReadyAddresses"] is True)
    coordinator, worker = by_kind["Job"]["cpcr-coordinator"], by_kind["Job"]["cpcr-worker"]
    for kind, job in by_kind["Job"].items():
        check_job(f"{name}: {kind}", job, service)
    check(f"{name}: a coordinator on a node that is gone is replaced at once", "podFailurePolicy" not in coordinator["spec"])
    check_policy(name, worker["spec"])
    templates = [job["spec"]["template"] for job in by_kind["Job"].values()]
    for deployment in by_kind.get("Deployment", {}).values():
        check_pod(f"{name}: {deployment['metadata']['name']}", deployment["spec"]["template"]["spec"])
        templates.append(deployment["spec"]["template"])
    labels = [template["metadata"]["labels"] for template in templates]
    chosen = by_kind["NetworkPolicy"]["cpcr"]["spec"]
    (own,) = chosen["ingress"][0]["from"]
    for selector in (chosen["podSelector"], own["podSelector"]):
        check(f"{name}: the NetworkPolicy is about all pods and lets them in only",
              all(selector["matchLabels"].items() <= l.items() for l in labels) and len(chosen["ingress"]) == 1)
    selector = service["spec"]["selector"].items()
    check(f"{name}: the Service selects the coordinator and nobody else",
          [selector <= l.items() for l in labels] == [t is coordinator["spec"]["template"] for t in templates])
    check(f"{name}: the workers' Job is indexed and elastic", worker["spec"]["completionMode"] == "Indexed"
          and worker["spec"]["completions"] == worker["spec"]["parallelism"])
    pod = coordinator["spec"]["template"]["spec"]
    flags = dict(a.split("=", 1) for a in pod["containers"][0]["args"] if "=" in a)
    taken = int(flags["--nodes"].split(":")[-1]) + int(flags.get("--spares", 0))
    check(f"{name}: as many workers as the coordinator takes", taken == worker["spec"]["completions"])
    port = service["spec"]["ports"][0]["port"]
    address = f"--coordinator={pod['hostname']}.{pod['subdomain']}:{port}"
    check(f"{name}: the workers ask where the coordinator is", address in worker["spec"]["template"]["spec"]["containers"][0]["args"])
    check(f"{name}: the workers have shared memory", any(
        volume.get("emptyDir", {}).get("medium") == "Memory" for volume in worker["spec"]["template"]["spec"]["volumes"]))
    maps = by_kind["ConfigMap"]["cpcr"]["data"]
    sources = [env["valueFrom"] for env in pod["containers"][0]["env"] if "valueFrom" in env]
    keys = [source["configMapKeyRef"]["key"] for source in sources if "configMapKeyRef" in source]
    check(f"{name}: the ConfigMap has the keys that are asked for", set(keys) <= set(maps) and "config.toml" in maps)
    gpus = worker["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"].get("nvidia.com/gpu")
    images = {c["image"].rsplit("-", 1)[1] for t in templates for c in t["spec"]["containers"]}
    check(f"{name}: images and GPUs go together", images == ({"cuda"} if gpus else {"cpu"}))
    tolerated = any(t["key"] == "nvidia.com/gpu" for t in worker["spec"]["template"]["spec"]["tolerations"])
    check(f"{name}: and nodes with GPUs", tolerated == bool(gpus))
    check(f"{name}: so do collectives and GPUs", flags["--backend"] in (("nccl", "auto") if gpus else ("gloo",)))
    check(f"{name}: images have time to be pulled", flags["--set"].startswith("recovery.wait_s="))


def jobs_of(jobset):
    """The Jobs that a JobSet's controller makes of it, named as the base names them."""
    check("jobset: Kueue's label", "kueue.x-k8s.io/queue-name" in jobset["metadata"]["labels"])
    check("jobset: removed when it has finished", jobset["spec"]["ttlSecondsAfterFinished"] > 0)
    for replicated in jobset["spec"]["replicatedJobs"]:
        check(f"jobset: one {replicated['name']} Job", replicated["replicas"] == 1)
        component = {"app.kubernetes.io/name": "cpcr", "app.kubernetes.io/component": replicated["name"]}
        yield {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": f"cpcr-{replicated['name']}", "labels": component},
               "spec": {**replicated["template"]["spec"], "ttlSecondsAfterFinished": jobset["spec"]["ttlSecondsAfterFinished"]}}


def check_jobset(documents):
    """There is no schema of it here: what it makes is checked, and is what the base is."""
    (jobset,) = [d for d in documents if d["kind"] == "JobSet"]
    check("jobset: instead of the Jobs", all(d["kind"] != "Job" for d in documents))
    documents = [d for d in documents if d["kind"] != "JobSet"] + list(jobs_of(jobset))
    check_all("overlays/jobset", documents)
    by_name = lambda documents: sorted(documents, key=lambda d: (d["kind"], d["metadata"]["name"]))
    check("jobset: its pods are the base's, to the letter", by_name(documents) == by_name(documents_of((FOLDER / "job.yaml").read_text())))


def documents_of(text):
    return [document for document in yaml.safe_load_all(text) if document]


check("there are schemas", len(versions()) >= 5)
files = [pathlib.Path(path) for path in sys.argv[1:]]
for path in files or [FOLDER / "job.yaml"]:
    check_all(path.name, documents_of(path.read_text()))
if files:
    pass  # those alone
elif shutil.which("kubectl"):
    for folder in ("base", "overlays/cpu", "overlays/trial"):
        done = subprocess.run(["kubectl", "kustomize", FOLDER / folder], capture_output=True, text=True)
        check(f"{folder}: {done.stderr.strip()}", done.returncode == 0)
        if done.returncode == 0:
            check_all(folder, documents_of(done.stdout))
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "overlays/jobset"], capture_output=True, text=True)
    check(f"overlays/jobset: {done.stderr.strip()}", done.returncode == 0)
    check_jobset(documents_of(done.stdout))
else:
    print("skipped: k8s overlays: no kubectl here to render them", file=sys.stderr)
for failure in failures:
    print("FAILED", failure, file=sys.stderr)
print(f"k8s: {passed} passed, {len(failures)} failed; schemas of Kubernetes {', '.join(versions())}")
sys.exit(bool(failures))
