"""Runs the manifests without a cluster: every container of k8s/overlays/trial as a process with the manifest's own command,
environment, volumes and user, in namespaces of its own, as a container runtime would start it.

The root is read-only, the user is not root and has no capabilities; each pod has a network address, its process is number 1, and names resolve
as the cluster's DNS would. What ends is treated as the Jobs' controller would: started again, under another address, or
not, by the manifest's policies. While the run goes, worker 0 and then the coordinator are killed. It must complete, pass
its audit, and a second apply must find nothing to do.

What it is not: a control plane (no scheduler, no kubelet), nor a test of the NetworkPolicy. Linux,
root, `ip`, `kubectl` (for kustomize), PyYAML; `scripts/test-pods.sh` calls it.
"""

import argparse
import json
import os
import pathlib
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import yaml

from chaos import Violation, tail, wait_for
from chaos_net import Network, address, why_not

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "k8s"
# Longest that all of it may take.
RUN_S_MAX = 600
# A Job's controller waits 10 s before it replaces a failed pod; so long are these tests not.
BACK_OFF_S = 1
# Where a pod has the binaries of a folder.
BINARIES = "/opt/cpcr/bin"
TOOLS = ("ip", "kubectl", "unshare", "nsenter", "setpriv", "chroot", "mount")

# Makes a root like an image's and enters it. $1: the root, $2: its volumes, a line of SOURCE TARGET each, then the command.
ENTER = r"""
set -e
root=$1 binds=$2 user=$3 name=$4 image=$5; shift 5
mount --make-rprivate /
hostname "$name"
mount -t tmpfs tmpfs "$root"
for part in usr bin sbin lib lib64; do
    if [ -n "$image" ]; then from=$image/$part; else from=/$part; fi
    [ -e "$from" ] || [ -L "$from" ] || continue
    if [ -L "$from" ]; then ln -s "$(readlink "$from")" "$root/$part"; continue; fi
    mkdir "$root/$part"; mount --bind "$from" "$root/$part"; mount -o remount,bind,ro "$root/$part"
done
mkdir -p "$root/proc" "$root/dev" "$root/etc/ssl"
mount -t proc proc "$root/proc"
for part in null zero random urandom; do touch "$root/dev/$part"; mount --bind "/dev/$part" "$root/dev/$part"; done
[ ! -d "$image/etc/ssl" ] || mount --bind "$image/etc/ssl" "$root/etc/ssl"
echo "hosts: files" > "$root/etc/nsswitch.conf"
while read -r source target; do
    if [ -d "$source" ]; then mkdir -p "$root$target"; else mkdir -p "$(dirname "$root$target")"; touch "$root$target"; fi
    mount --bind "$source" "$root$target"
done < "$binds"
mount -o remount,ro "$root"
# A change of user would undo --kill-child; killed are containers by their process 1, and this is for an abrupt end of all.
PATH=$PATH:/usr/sbin:/sbin
exec chroot "$root" /usr/bin/setpriv --pdeathsig keep --reuid="$user" --regid="$user" --clear-groups --no-new-privs --bounding-set=-all --inh-caps=-all -- "$@"
"""


def binaries_and_libraries(folder):
    """What an image would hold besides the system: where it is."""
    done = subprocess.run(["ldd", folder / "cpcr-engine"], capture_output=True, text=True, check=True)
    paths = re.findall(r"=> (/\S+)", done.stdout)
    own = {str(pathlib.Path(path).parent) for path in paths if not path.startswith(("/usr/", "/lib"))}
    # Wherever they are out here: a volume may cover that place.
    return [f"{folder} {BINARIES}", *(f"{path} {path}" for path in sorted(own - {str(folder)}))]


class Pod:
    """One pod of a template, under an address of its own."""

    def __init__(self, cluster, name, template, index=None):
        self.cluster, self.name, self.template, self.index = cluster, name, template, index
        self.spec, self.labels = template["spec"], template["metadata"]["labels"]
        self.host = cluster.network.add()
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{name}-", dir=cluster.folder))
        self.volumes = {volume["name"]: self.volume(volume) for volume in self.spec.get("volumes", [])}
        self.life, self.deleted, self.started = None, False, []

    @property
    def dns(self):
        hostname = self.spec.get("hostname") or (f"{self.name}-{self.index}" if self.index is not None else self.name)
        return f"{hostname}.{self.spec['subdomain']}" if "subdomain" in self.spec else hostname

    def volume(self, volume):
        folder = self.folder / "volumes" / volume["name"]
        folder.mkdir(parents=True)
        if "configMap" in volume:
            for item in volume["configMap"]["items"]:
                text = self.cluster.config_maps[volume["configMap"]["name"]][item["key"]]
                (folder / item["path"]).write_text(text)
        group = self.spec["securityContext"]["fsGroup"]
        os.chown(folder, 0, group)
        folder.chmod(0o2775)
        return folder

    def environment(self, container):
        values = {"PATH": f"{BINARIES}:/usr/local/bin:/usr/bin:/bin", "HOME": "/", "HOSTNAME": self.dns.split(".")[0]}
        if self.index is not None:
            values["JOB_COMPLETION_INDEX"] = str(self.index)
        for source in container.get("envFrom", []):
            values |= self.cluster.secrets[source["secretRef"]["name"]]
        for variable in container.get("env", []):
            values[variable["name"]] = self.value(variable)
        return values

    def value(self, variable):
        source = variable.get("valueFrom", {})
        if reference := source.get("configMapKeyRef"):
            return self.cluster.config_maps[reference["name"]][reference["key"]]
        if source.get("fieldRef", {}).get("fieldPath") == "metadata.name":
            return self.name
        if reference := source.get("fieldRef"):
            # metadata.labels['NAME'], as the Job controller asks for its index.
            kind, name = re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", reference["fieldPath"]).groups()
            return self.template["metadata"][kind][name]
        return variable.get("value", "")

    def start(self, container):
        environment = self.environment(container)
        expand = lambda text: re.sub(r"\$\((\w+)\)", lambda m: environment.get(m[1], m[0]), text)
        binds = [*self.cluster.image] + [f"{self.cluster.hosts} /etc/hosts"]
        binds += [f"{self.volumes[mount['name']]} {mount['mountPath']}" for mount in container.get("volumeMounts", [])]
        (self.folder / "binds").write_text("".join(line + "\n" for line in binds))
        root = self.folder / "root"
        root.mkdir(exist_ok=True)
        user = self.spec["securityContext"]["runAsUser"]
        # The image's entry point is `cpcr`.
        command = ["ip", "netns", "exec", self.cluster.network.host(self.host), "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork",
                   "--kill-child", "sh", "-c", ENTER, "sh", root, self.folder / "binds", user, self.dns.split(".")[0],
                   self.cluster.root or "", *container.get("command", ["cpcr"]), *map(expand, container["args"])]
        log = open(self.log, "ab")
        process = subprocess.Popen(list(map(str, command)), env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.started.append(process)
        return process

    @property
    def log(self):
        return self.folder / "log"

    def run(self):
        """Its init containers, then its container, to the end; the exit status."""
        for container in self.spec.get("initContainers", []):
            if (status := self.start(container).wait()) != 0 or self.cluster.ending:
                return status or 1
        self.life = self.start(self.spec["containers"][0])
        self.cluster.resolve(self)
        return self.life.wait()

    def delete(self):
        """As when its node is gone: no signal to answer."""
        self.deleted = True
        self.kill()

    def kill(self):
        """All of it, whichever container runs."""
        for process in self.started:
            if first := self.first(process):
                try:
                    os.kill(int(first), signal.SIGKILL)
                except ProcessLookupError:
                    pass  # it was faster
            process.kill()

    @staticmethod
    def first(process):
        """A container's process 1, by its number out here; none before it has begun, or after its end."""
        try:
            (first,) = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            return first
        except (OSError, ValueError):
            return None

    def terminate(self):
        """As when it is evicted: SIGTERM, and some time."""
        self.deleted = True
        if first := self.first(self.life):
            try:
                os.kill(int(first), signal.SIGTERM)
            except ProcessLookupError:
                pass  # it was faster

    def probe(self, kind):
        """Whether the probe says yes, asked as a kubelet would."""
        if self.life is None or (first := self.first(self.life)) is None:
            return False
        user = str(self.spec["securityContext"]["runAsUser"])
        container = self.spec["containers"][0]
        command = ["nsenter", "-t", first, "-a", "-r", "-w", "-S", user, "-G", user, *container[kind]["exec"]["command"]]
        return subprocess.run(command, env=self.environment(container), capture_output=True).returncode == 0


class Cluster:
    """What applies manifests."""

    def __init__(self, documents, binaries, root, secret):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-pods-"))
        self.folder.chmod(0o755)
        self.documents, self.secrets = documents, {"cpcr": secret}
        # A root with an image's files, or none: then this machine's, and the binaries of a folder.
        self.root = root
        self.config_maps = {d["metadata"]["name"]: d["data"] for d in documents if d["kind"] == "ConfigMap"}
        self.image = binaries_and_libraries(binaries) if binaries else []
        self.network, self.lock, self.ending = Network(0), threading.Lock(), False
        # One file for all pods, written in place.
        self.hosts, self.names = self.folder / "hosts", {}
        self.hosts.write_text("127.0.0.1 localhost\n")
        self.pods, self.statuses, self.ends, self.threads = {}, {}, [], []

    def resolve(self, pod):
        """Its name, and those of Services that select it, are its address now."""
        with self.lock:
            self.names[pod.dns] = address(pod.host)
            for service in (d for d in self.documents if d["kind"] == "Service"):
                if service["spec"]["selector"].items() <= pod.labels.items():
                    self.names[service["metadata"]["name"]] = address(pod.host)
            lines = ["127.0.0.1 localhost", *(f"{where} {name}" for name, where in self.names.items())]
            self.hosts.write_text("\n".join(lines) + "\n")

    def keep(self, key, document, index):
        """One pod of a Job or a Deployment and what replaces it, as their controllers would have it."""
        spec, failures = document["spec"], 0
        while not self.ending:
            pod = Pod(self, document["metadata"]["name"], spec["template"], index)
            self.pods[key] = pod
            status = pod.run()
            self.ends.append((key, status, pod.deleted))
            if document["kind"] == "Job":
                if status == 0:
                    break
                ignored = pod.deleted and "podFailurePolicy" in spec
                for rule in spec.get("podFailurePolicy", {}).get("rules", []):
                    if status in rule.get("onExitCodes", {}).get("values", []) and not ignored:
                        if rule["action"] == "FailJob":
                            self.statuses[key] = status
                            return
                        ignored = True
                failures += not ignored
                if failures > spec.get("backoffLimitPerIndex", spec.get("backoffLimit", 0)):
                    self.statuses[key] = status
                    return
            time.sleep(BACK_OFF_S)
        self.statuses[key] = 0

    def apply(self, kinds):
        for document in self.documents:
            if document["kind"] not in kinds:
                continue
            indices = range(document["spec"]["completions"]) if document["spec"].get("completionMode") == "Indexed" else [None]
            for index in indices:
                name = document["metadata"]["name"]
                key = name if index is None else f"{name}-{index}"
                self.statuses.pop(key, None)
                thread = threading.Thread(target=self.keep, args=(key, document, index))
                thread.start()
                self.threads.append((key, thread))

    def jobs(self):
        return [key for key, _ in self.threads if key.startswith(("cpcr-coordinator", "cpcr-worker"))]

    def completed(self):
        """Waits until every Job is done, and done well."""
        wait_for("the end of all Jobs", lambda: all(key in self.statuses for key in self.jobs()), RUN_S_MAX)
        failed = {key: self.statuses[key] for key in self.jobs() if self.statuses[key] != 0}
        if failed:
            raise Violation(f"{failed}: " + "; ".join(f"{key}: {tail(self.pods[key].log)}" for key in failed))

    def close(self):
        self.ending = True
        for pod in list(self.pods.values()):
            pod.kill()
        for _, thread in self.threads:
            thread.join()
        self.network.close()


def rendered():
    done = subprocess.run(["kubectl", "kustomize", FOLDER / "overlays" / "trial"], capture_output=True, text=True, check=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def audited(cluster):
    """`cpcr audit`, in a pod like a worker's."""
    worker = next(d for d in cluster.documents if d["metadata"]["name"] == "cpcr-worker" and d["kind"] == "Job")
    template = yaml.safe_load(yaml.safe_dump(worker["spec"]["template"]))
    template["spec"]["containers"][0]["args"] = ["audit", "$(CPCR_RUN_URL)"]
    pod = Pod(cluster, "audit", template)
    if (status := pod.run()) != 0:
        raise Violation(f"cpcr audit: status {status}: {pod.log.read_text()}")
    return pod.log.read_text()


LOSSES = {"agent-lost", "agent-replaced", "agent-silent"}


def kinds(run):
    """What the run has on record of what ended its generations."""
    found = []
    for path in (run / "interruptions").glob("*.json"):
        try:
            found.append(json.loads(path.read_text())["cause"]["kind"])
        except (OSError, ValueError):
            pass  # it is being written
    return found


def tested(cluster):
    """What is to be seen."""
    cluster.apply({"Deployment"})
    store = wait_for("the store", lambda: cluster.pods.get("cpcr-store"))
    run = store.volumes["bucket"] / "cpcr" / "run"
    wait_for("the store serves", lambda: store.log.exists() and ":9000" in store.log.read_text())
    cluster.apply({"Job"})
    wait_for("the first checkpoint", lambda: any((run / "checkpoints").rglob("manifest.json")) if run.exists() else False, RUN_S_MAX)
    for key in cluster.jobs():
        for kind in ("livenessProbe", "readinessProbe"):
            wait_for(f"{key}: {kind}", lambda: cluster.pods[key].probe(kind))
    for key in ("cpcr-worker-0", "cpcr-coordinator"):
        if cluster.statuses:
            raise Violation(f"the run had ended before {key} was killed")
        before = cluster.pods[key]
        before.delete()
        after = wait_for(f"another pod for {key}", lambda: cluster.pods[key] if cluster.pods[key] is not before else None)
        wait_for(f"{key} is ready again", lambda: after.probe("readinessProbe"))
        if key == "cpcr-worker-0":
            # Its record is to be there before the coordinator dies that writes it.
            wait_for("the record of a worker's loss", lambda: LOSSES & set(kinds(run)))
        print(f"killed {key} at {address(before.host)}: its successor is ready, at {address(after.host)}", file=sys.stderr)
    cluster.completed()
    print(f"complete; {audited(cluster).strip().splitlines()[-1]}", file=sys.stderr)
    began = time.monotonic()
    cluster.apply({"Job"})
    cluster.completed()
    print(f"applied again: nothing to do, after {time.monotonic() - began:.1f} s", file=sys.stderr)
    wrong = [end for end in cluster.ends if end[1] != 0 and not end[2]]
    if wrong:
        raise Violation(f"pods that failed by themselves: {wrong}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--bin", type=pathlib.Path, help="folder of the binaries")
    what.add_argument("--image", type=pathlib.Path, help="the root of an image")
    arguments = parser.parse_args()
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if (reason := f"no {missing[0]} here" if missing else why_not()):
        print(f"skipped: pods: {reason}", file=sys.stderr)
        return 0
    secret = {"AWS_ACCESS_KEY_ID": "trial", "AWS_SECRET_ACCESS_KEY": secrets.token_hex(16), "CPCR_JOIN_TOKEN": secrets.token_hex(32)}
    absolute = lambda path: path and path.resolve()
    cluster = Cluster(rendered(), absolute(arguments.bin), absolute(arguments.image), secret)
    try:
        tested(cluster)
    except Violation as violation:
        cluster.close()
        print(f"FAILED: {violation} (kept: {cluster.folder})", file=sys.stderr)
        return 1
    except BaseException:
        cluster.close()
        raise
    cluster.close()
    shutil.rmtree(cluster.folder)
    print("pods: the run was complete, its audit clean")
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(main())
