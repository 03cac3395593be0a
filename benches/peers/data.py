"""Other people's streaming loaders on the slices that `cpcr bench data` reads, with their defaults.

`write KIND` turns raw slices into the loader's own format; `read KIND` streams them from an S3
endpoint once, cold, in batches, and prints images, seconds and peak memory as one JSON line. Imports
are not timed. KIND is mds (MosaicML Streaming), wds (WebDataset) or lit (LitData).
"""
import argparse, io, json, os, resource, sys, tempfile, time

import numpy as np
import torch
from torch.utils.data import DataLoader

SHARD_BYTES = 64 << 20  # what all three recommend, about


def slices(path, height, width):
    """Little-endian float32 slices [H, W], one after the other in a file."""
    return np.memmap(path, dtype="<f4", mode="r").reshape(-1, height, width)


def write_mds(images, out):
    from streaming import MDSWriter

    with MDSWriter(out=out, columns={"image": f"ndarray:float32:{images.shape[1]},{images.shape[2]}"}, size_limit=SHARD_BYTES) as writer:
        for image in images:
            writer.write({"image": np.ascontiguousarray(image)})


def write_wds(images, out):
    import webdataset

    os.makedirs(out, exist_ok=True)
    with webdataset.ShardWriter(os.path.join(out, "%05d.tar"), maxsize=SHARD_BYTES, verbose=0) as writer:
        for number, image in enumerate(images):
            writer.write({"__key__": f"{number:09d}", "image.npy": np.ascontiguousarray(image)})


class Item:
    """Picklable: LitData writes with processes of its own."""

    def __init__(self, path, height, width):
        self.where = (path, height, width)

    def __call__(self, number):
        return {"image": torch.from_numpy(np.array(slices(*self.where)[number]))}


def write_lit(path, height, width, out):
    import litdata

    count = len(slices(path, height, width))
    litdata.optimize(fn=Item(path, height, width), inputs=list(range(count)), output_dir=out,
                     chunk_bytes=SHARD_BYTES, num_workers=1)


def tensor(image):
    return image if torch.is_tensor(image) else torch.from_numpy(np.asarray(image))


def stack(samples):
    return torch.stack([tensor(sample["image"]) for sample in samples])


def stack_tuples(samples):
    return torch.stack([tensor(sample[0]) for sample in samples])


def read_mds(a, cache):
    from streaming import StreamingDataset

    os.environ["S3_ENDPOINT_URL"] = a.endpoint
    data = StreamingDataset(remote=f"s3://{a.bucket}/{a.prefix}", local=cache, shuffle=True, batch_size=a.batch)
    return DataLoader(data, batch_size=a.batch, num_workers=a.workers, collate_fn=stack)


def read_wds(a, cache):
    import webdataset

    user = f"{os.environ['AWS_ACCESS_KEY_ID']}:{os.environ['AWS_SECRET_ACCESS_KEY']}"
    get = f"pipe:curl -s -f --retry 5 -H x-amz-content-sha256:UNSIGNED-PAYLOAD --aws-sigv4 aws:amz:us-east-1:s3 --user {user} {a.endpoint}/{a.bucket}/{a.prefix}"
    urls = [f"{get}/{number:05d}.tar" for number in range(a.shards)]
    data = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=1, empty_check=False)
    data = data.shuffle(1000).decode().to_tuple("image.npy")
    return DataLoader(data, batch_size=a.batch, num_workers=a.workers, collate_fn=stack_tuples)


def read_lit(a, cache):
    import litdata
    from litdata.streaming import downloader

    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True  # it would refuse an endpoint without TLS
    options = {"endpoint_url": a.endpoint, "region_name": "us-east-1",
               "aws_access_key_id": os.environ["AWS_ACCESS_KEY_ID"],
               "aws_secret_access_key": os.environ["AWS_SECRET_ACCESS_KEY"]}
    data = litdata.StreamingDataset(f"s3://{a.bucket}/{a.prefix}", cache_dir=cache, shuffle=True,
                                    storage_options=options)
    return litdata.StreamingDataLoader(data, batch_size=a.batch, num_workers=a.workers, collate_fn=stack)


def cpu_seconds():
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def read(a):
    __import__({"mds": "streaming", "wds": "webdataset", "lit": "litdata"}[a.kind])
    with tempfile.TemporaryDirectory(dir=a.cache) as cache:
        began, cpu_began = time.perf_counter(), cpu_seconds()
        loader = {"mds": read_mds, "wds": read_wds, "lit": read_lit}[a.kind](a, cache)
        images, first, total = 0, None, 0.0
        for batch in loader:
            first = first or time.perf_counter() - began
            images += len(batch)
            total += float(batch[:, 0, 0].sum())  # the batch has really come
        del loader, batch  # workers end, and count
        seconds = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(json.dumps({
        "images": images, "seconds": seconds, "cpu_s": cpu_seconds() - cpu_began, "first_batch_s": first or 0.0,
        "peak_rss_mib": max(u.ru_maxrss for u in used) / 1024, "checksum": total,
    }), flush=True)


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("write", "read"):
        command = commands.add_parser(name)
        command.add_argument("kind", choices=["mds", "wds", "lit"])
        if name == "write":
            command.add_argument("--raw", required=True)
            command.add_argument("--height", type=int, required=True)
            command.add_argument("--width", type=int, required=True)
            command.add_argument("--out", required=True)
        else:
            command.add_argument("--endpoint", required=True)
            command.add_argument("--bucket", required=True)
            command.add_argument("--prefix", required=True)
            command.add_argument("--shards", type=int, default=0, help="wds: how many")
            command.add_argument("--batch", type=int, required=True)
            command.add_argument("--workers", type=int, required=True)
            command.add_argument("--cache", required=True)
    a = parser.parse_args()
    if a.command == "read":
        return read(a)
    if a.kind == "lit":
        return write_lit(a.raw, a.height, a.width, a.out)
    {"mds": write_mds, "wds": write_wds}[a.kind](slices(a.raw, a.height, a.width), a.out)


if __name__ == "__main__":
    sys.exit(main())
