"""Writes a root file system as an OCI image layout: one layer, the entry point and user of the Dockerfile. The standard library only."""

import argparse
import gzip
import hashlib
import json
import pathlib
import shutil
import subprocess


def blob(folder, data):
    """Stores bytes by their hash; their descriptor."""
    digest = hashlib.sha256(data).hexdigest()
    (folder / "blobs" / "sha256" / digest).write_bytes(data)
    return {"digest": f"sha256:{digest}", "size": len(data)}


def layer(root, folder):
    """The root as a compressed layer: its descriptor, and the hash of what is in it."""
    path = folder / "layer"
    plain, packed = hashlib.sha256(), hashlib.sha256()
    # Sorted, without times: the same root makes the same layer.
    command = ["tar", "--sort=name", "--mtime=@0", "--numeric-owner", "--one-file-system", "-C", root, "-c", "."]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as tar, open(path, "wb") as file:
        with gzip.GzipFile(fileobj=file, mode="wb", compresslevel=1, mtime=0) as zipped:
            while part := tar.stdout.read(1 << 20):
                plain.update(part)
                zipped.write(part)
    if tar.returncode != 0:
        raise SystemExit(f"tar ended with {tar.returncode}")
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            packed.update(part)
    size = path.stat().st_size
    path.rename(folder / "blobs" / "sha256" / packed.hexdigest())
    return {"digest": f"sha256:{packed.hexdigest()}", "size": size}, f"sha256:{plain.hexdigest()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=pathlib.Path)
    parser.add_argument("layout", type=pathlib.Path)
    parser.add_argument("--user", required=True)
    a = parser.parse_args()
    shutil.rmtree(a.layout, ignore_errors=True)
    (a.layout / "blobs" / "sha256").mkdir(parents=True)
    packed, plain = layer(a.root, a.layout)
    config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": [plain]}, "config": {
        "User": f"{a.user}:{a.user}", "Entrypoint": ["cpcr"], "WorkingDir": "/tmp", "StopSignal": "SIGTERM",
        "Env": ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]}}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": blob(a.layout, json.dumps(config).encode()) | {"mediaType": "application/vnd.oci.image.config.v1+json"},
                "layers": [packed | {"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip"}]}
    entry = blob(a.layout, json.dumps(manifest).encode()) | {
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "annotations": {"org.opencontainers.image.ref.name": "cpu"}}
    (a.layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (a.layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    print(f"image: {packed['size'] / 1e6:.0f} MB compressed, {entry['digest']}")


main()
