"""The manifests on a real control plane: kube-apiserver, its controllers and the scheduler, built from Go modules, and etcd.

What stands in is the kubelet: it starts a pod's processes by the pod's spec as scripts/pods.py does, in namespaces, asks its probes,
and says how they are; names resolve by the EndpointSlices that the controllers make. So Jobs, indices, host names,
back-off, policies, admission (the namespace enforces the `restricted` standard) and deletion are Kubernetes' own.

    kubectl apply -k k8s/overlays/trial; the pod of index 0 deleted, the coordinator's killed; completion; applied again.

What it is not: a container runtime, a test of the image, of GPUs or of a NetworkPolicy. Linux, root; `scripts/test-controlplane.sh` builds
the parts and calls it.
"""

import argparse
import base64
import json
import os
import pathlib
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

from chaos import Violation, tail, wait_for
from chaos_net import Network, address, why_not
from pods import FOLDER, Pod, TOOLS, binaries_and_libraries, kinds

RUN_S_MAX = 900
NAMESPACE, NODE = "trial", "node-a"
WORKER_0 = "batch.kubernetes.io/job-completion-index=0"
MERGE = "application/merge-patch+json"


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class ControlPlane:
    """etcd, kube-apiserver, kube-controller-manager and kube-scheduler, on loopback."""

    def __init__(self, parts, folder):
        self.folder, self.parts, self.processes = folder, parts, []
        self.token = secrets.token_hex(16)
        self.port = free_port()
        (folder / "tokens.csv").write_text(f'{self.token},admin,admin,"system:masters"\n')
        for command in (["genrsa", "-out", folder / "sa.key", "2048"], ["rsa", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub"]):
            subprocess.run(["openssl", *command], check=True, capture_output=True)
        self.kubeconfig = folder / "kubeconfig"
        self.kubeconfig.write_text(json.dumps({
            "apiVersion": "v1", "kind": "Config", "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"https://127.0.0.1:{self.port}", "insecure-skip-tls-verify": True}}],
            "users": [{"name": "admin", "user": {"token": self.token}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "admin", "namespace": NAMESPACE}}]}))

    def begin(self):
        folder, parts, etcd, peer = self.folder, self.parts, free_port(), free_port()
        self.start(parts / "server", "--data-dir", folder / "etcd", "--listen-client-urls", f"http://127.0.0.1:{etcd}",
                   "--advertise-client-urls", f"http://127.0.0.1:{etcd}", "--listen-peer-urls", f"http://127.0.0.1:{peer}",
                   "--unsafe-no-fsync", name="etcd")
        self.start(parts / "kube-apiserver", f"--etcd-servers=http://127.0.0.1:{etcd}", f"--secure-port={self.port}", "--bind-address=127.0.0.1",
                   f"--cert-dir={folder / 'certificates'}", f"--service-account-key-file={folder / 'sa.pub'}",
                   f"--service-account-signing-key-file={folder / 'sa.key'}", "--service-account-issuer=https://kubernetes.default.svc",
                   f"--token-auth-file={folder / 'tokens.csv'}", "--authorization-mode=RBAC", "--service-cluster-ip-range=10.96.0.0/24")
        self.context = ssl._create_unverified_context()
        wait_for("the API server", lambda: self.ready(), RUN_S_MAX)
        self.start(parts / "kube-controller-manager", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1",
                   f"--secure-port={free_port()}", f"--service-account-private-key-file={folder / 'sa.key'}")
        self.start(parts / "kube-scheduler", f"--kubeconfig={self.kubeconfig}", "--leader-elect=false", "--bind-address=127.0.0.1",
                   f"--secure-port={free_port()}")

    def start(self, program, *arguments, name=None):
        log = open(self.folder / f"{name or program.name}.log", "ab")
        self.processes.append(subprocess.Popen(list(map(str, [program, *arguments])), stdout=log, stderr=log, stdin=subprocess.DEVNULL))

    def request(self, method, path, body=None, kind="application/json"):
        """The API's answer; None where it says that there is no such thing, or that it is there already."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"https://127.0.0.1:{self.port}{path}", data, method=method, headers={
            "Authorization": f"Bearer {self.token}", "Content-Type": kind, "Accept": "application/json"})
        try:
            with urllib.request.urlopen(request, context=self.context, timeout=30) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            if error.code in (404, 409):
                return None
            raise Violation(f"{method} {path}: {error.code}: {error.read().decode()[:500]}") from None

    def ready(self):
        for process in self.processes:
            if process.poll() is not None:
                raise Violation(f"a part of the control plane ended: {process.args[0]}; its log is in {self.folder}")
        try:
            request = urllib.request.Request(f"https://127.0.0.1:{self.port}/readyz", headers={"Authorization": f"Bearer {self.token}"})
            return urllib.request.urlopen(request, context=self.context, timeout=5).read() == b"ok"
        except OSError:
            return False

    def kubectl(self, *arguments, text=None):
        done = subprocess.run(["kubectl", "--kubeconfig", self.kubeconfig, *map(str, arguments)], input=text, capture_output=True, text=True)
        if done.returncode != 0:
            raise Violation(f"kubectl {' '.join(map(str, arguments))}: {done.stderr.strip()}")
        return done.stdout

    def pods(self, selector=""):
        found = self.request("GET", f"/api/v1/namespaces/{NAMESPACE}/pods?labelSelector={selector.replace('=', '%3D')}")
        return [pod for pod in found["items"] if "deletionTimestamp" not in pod["metadata"]]

    def close(self):
        """Nothing of it is to be kept: an API server that is asked kindly waits for its etcd."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


class Kubelet:
    """Runs the pods that are bound to its node. What `Pod` asks of a cluster, it has."""

    def __init__(self, plane, binaries, folder):
        self.plane, self.root, self.folder = plane, None, folder
        self.image, self.network, self.ending = binaries_and_libraries(binaries), Network(0), False
        self.config_maps, self.secrets = {}, {}
        self.hosts = folder / "hosts"
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.running, self.failure = {}, None
        capacity = {"cpu": "16", "memory": "64Gi", "pods": "110", "ephemeral-storage": "100Gi"}
        plane.request("POST", "/api/v1/nodes", {"apiVersion": "v1", "kind": "Node", "metadata": {"name": NODE}})
        ready = {"type": "Ready", "status": "True", "reason": "KubeletReady", "message": "it stands in"}
        self.status = {"status": {"capacity": capacity, "allocatable": capacity, "conditions": [ready]}}
        self.threads = [threading.Thread(target=self.guarded, args=(loop,)) for loop in (self.heart, self.sync)]
        for thread in self.threads:
            thread.start()

    def guarded(self, loop):
        try:
            while not self.ending:
                loop()
        except Exception as error:  # told by whoever waits
            self.failure = f"the stand-in kubelet: {error!r}"

    def heart(self):
        self.status["status"]["conditions"][0]["lastHeartbeatTime"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.plane.request("PATCH", f"/api/v1/nodes/{NODE}/status", self.status, MERGE)
        time.sleep(5)

    def sync(self):
        found = self.plane.request("GET", f"/api/v1/pods?fieldSelector=spec.nodeName%3D{NODE}")
        for pod in found["items"]:
            uid = pod["metadata"]["uid"]
            if uid not in self.running:
                self.running[uid] = life = Life(self, pod)
                life.thread.start()
            if "deletionTimestamp" in pod["metadata"]:
                self.running[uid].delete(pod["metadata"].get("deletionGracePeriodSeconds", 30))
        self.names()
        time.sleep(0.2)

    def names(self):
        """The cluster's DNS, by its EndpointSlices."""
        slices = self.plane.request("GET", f"/apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices")
        lines = ["127.0.0.1 localhost"]
        for part in slices["items"]:
            service = part["metadata"]["labels"]["kubernetes.io/service-name"]
            for endpoint in part["endpoints"] or []:
                if not endpoint["conditions"].get("ready"):
                    continue
                host = [f"{endpoint['hostname']}.{service}"] if "hostname" in endpoint else []
                lines += [f"{endpoint['addresses'][0]} {name}" for name in [*host, service]]
        text = "\n".join(lines) + "\n"
        if text != self.hosts.read_text():
            self.hosts.write_text(text)

    def resolve(self, pod):
        """Nothing: the controllers do."""

    def values(self, kind, name):
        found = self.plane.request("GET", f"/api/v1/namespaces/{NAMESPACE}/{kind}/{name}")
        if found is None:
            raise Violation(f"a pod asks for {kind} {name}, which is not there")
        data = found.get("data", {})
        return data if kind == "configmaps" else {key: base64.b64decode(value).decode() for key, value in data.items()}

    def close(self):
        self.ending = True
        for thread in self.threads:
            thread.join()
        for life in self.running.values():
            if life.pod is not None:
                life.pod.kill()
        for life in self.running.values():
            life.thread.join()
        self.network.close()


class Life:
    """One pod of the API on the node."""

    def __init__(self, kubelet, document):
        self.kubelet, self.document, self.pod, self.deleting = kubelet, document, None, None
        self.path = f"/api/v1/namespaces/{NAMESPACE}/pods/{document['metadata']['name']}"
        self.thread = threading.Thread(target=self.run)

    def run(self):
        try:
            self.live()
        except Exception as error:
            self.kubelet.failure = f"{self.document['metadata']['name']}: {error!r}"

    def say(self, phase, state, ready=False):
        name = self.document["spec"]["containers"][0]["name"]
        flag = {"type": "Ready", "status": "True" if ready else "False"}
        status = {"phase": phase, "podIP": address(self.pod.host), "podIPs": [{"ip": address(self.pod.host)}],
                  "startTime": self.started, "conditions": [flag, flag | {"type": "ContainersReady"}],
                  "containerStatuses": [{"name": name, "ready": ready, "restartCount": 0, "image": "x", "imageID": "x", "state": state}]}
        self.kubelet.plane.request("PATCH", f"{self.path}/status", {"status": status}, MERGE)

    def live(self):
        kubelet, spec = self.kubelet, self.document["spec"]
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        for volume in spec.get("volumes", []):
            if "configMap" in volume:
                name = volume["configMap"]["name"]
                kubelet.config_maps[name] = kubelet.values("configmaps", name)
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for source in container.get("envFrom", []):
                name = source["secretRef"]["name"]
                kubelet.secrets[name] = kubelet.values("secrets", name)
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("configMapKeyRef")
                if reference:
                    kubelet.config_maps[reference["name"]] = kubelet.values("configmaps", reference["name"])
        self.pod = Pod(kubelet, self.document["metadata"]["name"], self.document)
        prober = threading.Thread(target=self.probe)
        prober.start()
        status = self.pod.run()
        prober.join()
        state = {"terminated": {"exitCode": status if status >= 0 else 128 - status, "finishedAt": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}}
        self.say("Succeeded" if status == 0 else "Failed", state)
        if self.deleting is not None:
            self.kubelet.plane.request("DELETE", self.path, {"gracePeriodSeconds": 0})

    def probe(self):
        """Says that it runs, and whether it is ready, until it ends."""
        wait_for("the container's start", lambda: self.pod.life is not None or not self.thread.is_alive())
        ready, state = None, {"running": {"startedAt": self.started}}
        while self.pod.life.poll() is None:
            kind = self.document["spec"]["containers"][0].get("readinessProbe", {})
            found = self.pod.probe("readinessProbe") if "exec" in kind else True
            if found != ready:
                ready = found
                self.say("Running", state, ready)
            time.sleep(0.5)

    def delete(self, grace_s):
        if self.deleting is not None:
            if time.monotonic() > self.deleting and self.pod is not None:
                self.pod.kill()
            return
        if self.pod is not None and self.pod.life is not None:
            self.deleting = time.monotonic() + grace_s
            self.pod.terminate()


def completed(plane):
    jobs = plane.request("GET", f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs")["items"]
    conditions = {job["metadata"]["name"]: {c["type"] for c in job["status"].get("conditions", []) if c["status"] == "True"} for job in jobs}
    failed = [name for name, found in conditions.items() if "Failed" in found]
    if failed:
        raise Violation(f"Jobs failed: {failed}")
    return [name for name, found in conditions.items() if "Complete" in found]


def one(pods):
    return pods[0] if len(pods) == 1 else None


def tested(plane, kubelet):
    def until(what, condition, seconds=120):
        def looked():
            if kubelet.failure:
                raise Violation(kubelet.failure)
            return condition()
        return wait_for(what, looked, seconds)

    plane.kubectl("create", "namespace", NAMESPACE)
    plane.kubectl("label", "namespace", NAMESPACE, "pod-security.kubernetes.io/enforce=restricted")
    secret = f"AWS_ACCESS_KEY_ID=trial\nAWS_SECRET_ACCESS_KEY={secrets.token_hex(16)}\nCPCR_JOIN_TOKEN={secrets.token_hex(32)}\n"
    plane.kubectl("create", "secret", "generic", "cpcr", "--from-env-file=/dev/stdin", text=secret)
    print(plane.kubectl("apply", "-k", FOLDER / "overlays" / "trial"), end="", file=sys.stderr)
    workers = until("two workers", lambda: len(plane.pods("app.kubernetes.io/component=worker")) == 2 and plane.pods("app.kubernetes.io/component=worker"))
    hosts = {(p["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"], p["spec"]["hostname"], p["spec"]["subdomain"]) for p in workers}
    if hosts != {("0", "cpcr-worker-0", "cpcr"), ("1", "cpcr-worker-1", "cpcr")}:
        raise Violation(f"other indices or host names: {hosts}")
    store = until("the store", lambda: next((l.pod for l in list(kubelet.running.values()) if l.pod and "cpcr-store" in l.pod.name), None))
    run = store.volumes["bucket"] / "cpcr" / "run"
    until("the first checkpoint", lambda: run.exists() and any((run / "checkpoints").rglob("manifest.json")), RUN_S_MAX)
    before = until("a pod of index 0", lambda: one(plane.pods(WORKER_0)))["metadata"]
    plane.kubectl("delete", "pod", before["name"], "--wait=false", "--grace-period=1")
    after = until("another pod of index 0", lambda: one([p for p in plane.pods(WORKER_0) if p["metadata"]["uid"] != before["uid"]]))
    print(f"deleted {before['name']}: {after['metadata']['name']} is in its place", file=sys.stderr)
    coordinator = until("the coordinator", lambda: one([p for p in plane.pods("app.kubernetes.io/component=coordinator") if p["status"]["phase"] == "Running"]))
    kubelet.running[coordinator["metadata"]["uid"]].pod.delete()
    until("another coordinator", lambda: one([p for p in plane.pods("app.kubernetes.io/component=coordinator")
                                               if p["status"]["phase"] == "Running" and p["metadata"]["uid"] != coordinator["metadata"]["uid"]]))
    print(f"killed {coordinator['metadata']['name']}: its Job has made another", file=sys.stderr)
    until("both Jobs complete", lambda: len(completed(plane)) == 2, RUN_S_MAX)
    print(f"both Jobs are complete; the run's records of interruptions: {', '.join(kinds(run))}", file=sys.stderr)
    if "given-back" not in kinds(run):
        raise Violation("the deleted pod was not given back alone")
    plane.kubectl("delete", "jobs", "--all")
    plane.kubectl("apply", "-k", FOLDER / "overlays" / "trial")
    # The coordinator's is removed before the workers' have lost their patience.
    done = set()
    until("both Jobs complete, applied again", lambda: done.update(completed(plane)) or len(done) == 2, RUN_S_MAX)
    print("applied again: both Jobs are complete, with nothing left to do", file=sys.stderr)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, required=True, help="folder of cpcr's binaries")
    parser.add_argument("--parts", type=pathlib.Path, required=True, help="folder of the control plane's binaries")
    arguments = parser.parse_args()
    missing = [tool for tool in (*TOOLS, "openssl") if shutil.which(tool) is None]
    if (reason := f"no {missing[0]} here" if missing else why_not()):
        print(f"skipped: control plane: {reason}", file=sys.stderr)
        return 0
    folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-plane-"))
    folder.chmod(0o755)
    plane, kubelet = ControlPlane(arguments.parts.resolve(), folder), None
    try:
        plane.begin()
        kubelet = Kubelet(plane, arguments.bin.resolve(), folder)
        tested(plane, kubelet)
    except Violation as violation:
        logs = [life.pod.log for life in kubelet.running.values() if life.pod] if kubelet else []
        print(f"FAILED: {violation} (kept: {folder})", *(f"{path.parent.name}: {tail(path)}" for path in logs if path.exists()), sep="\n", file=sys.stderr)
        return 1
    finally:
        for part in (kubelet, plane):
            if part is not None:
                part.close()
    shutil.rmtree(folder)
    print("control plane: the run was complete; a pod was replaced, the coordinator too; a second apply found nothing to do")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
