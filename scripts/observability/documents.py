"""Made-up documents of a run and pictures, for the page without one: a good run, a loss, hostile texts, a report.

What it is not: the list of what a document may hold; that is src/coordinator/board. The standard library only.
"""

import base64
import math
import random
import struct
import time
import zlib

HOSTILE = "<img src=x onerror=\"window.owned=1\"></script><script>window.owned=1</script>"


def picture(seed, side=96):
    """A PNG like an overlay: a ring in a disc and a crescent beside it, twice."""
    place = random.Random(seed)
    x0, y0, radius = place.uniform(35, 55), place.uniform(35, 55), place.uniform(14, 22)

    def pixel(u, v):
        grey = int(60 + 50 * math.sin(u / 9) * math.cos(v / 11))
        r = math.hypot(u - x0, v - y0)
        inside = (((0, 158, 115), r < 0.6 * radius), ((86, 180, 233), r < radius),
                  ((230, 159, 0), math.hypot(u - x0 + 18, v - y0) < radius))
        colour = next((colour for colour, holds in inside if holds), (grey,) * 3)
        return bytes((grey + c) // 2 for c in colour)

    rows = bytearray()
    for y in range(side):
        truth = b"".join(pixel(x, y) for x in range(side))
        prediction = b"".join(pixel(x + place.uniform(-0.6, 0.6), y) for x in range(side))
        rows += b"\0" + truth + bytes((128,)) * 24 + prediction
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", 2 * side + 8, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", zlib.compress(bytes(rows))) + part(b"IEND", b"")


PICTURES = {volume: "data:image/png;base64," + base64.b64encode(picture(volume)).decode() for volume in (1, 2, 3)}
CLASSES = ["RV", "MYO", "LV"]
STEP_S = 0.4


def made_up_curves(step, steps):
    dice = random.Random(1)
    seen = list(range(1, step + 1))
    falling = lambda a, b: [b + a * math.exp(-s / 60) * (1 + 0.15 * dice.uniform(-1, 1)) for s in seen]
    rising = lambda s, top: top * (1 - math.exp(-s / 50)) + dice.uniform(-0.01, 0.01)
    losses = {"distill": falling(0.3, 0.002), "entropy": [None] * min(10, step) + falling(0.5, 0.02)[10:],
              "supervised": falling(1.2, 0.2), "total": falling(1.6, 0.25)}
    validations = []
    for s in range(20, step + 1, 20):
        classes = {name: rising(s, top) for name, top in zip(CLASSES, (0.78, 0.7, 0.9))}
        validations.append({"step": s, "mean_dice": sum(classes.values()) / 3, "classes": classes})
    return {"steps": seen, "losses": losses, "lr": [0.01 * (1 - s / steps) ** 0.9 for s in seen],
            "consistency": [0.1 * min(1, s / 200) for s in seen],
            "images_per_s": [0.0 if 14 <= s < 16 else 38 + dice.uniform(-3, 3) for s in seen], "validations": validations}


def interruption(at, kind, text, **more):
    phases = {"detect_s": 0.11, "fence_s": 0.04, "regroup_s": 0.05, "restore_s": 0.02, "step_s": 0.12, "outage_s": 0.34}
    return {"at": at, "kind": kind, "loss": True, "generation": 1, "step": 14, "node": 2, "rank": 2, "text": text,
            "open": False} | phases | more


def made_up(step, steps=300):
    """A document of a run that goes well: three workers, one of them slow, one loss behind them."""
    now = time.time()
    begun = now - STEP_S * step - 4
    wall = now - begun
    curves = made_up_curves(step, steps)
    last = curves["validations"][-1]
    killed = "the trainer of node 2 (rank 2) was killed by signal 9"
    worker = {"host": "127.0.0.1", "state": "training", "step": step, "step_s": 0.41, "own_s": 0.18, "straggler": False,
              "heard": now - 0.3, "data_wait": 0.02, "memory": 312 << 20, "gpu_memory": None, "queue": 3}
    shares = {"training": 0.93, "starting": 0.03, "validation": 0.015, "saving": 0.004, "recovery": 0.012, "joining": 0.009}
    overlays = [(s, volume) for s in (last["step"] - 20, last["step"]) for volume in PICTURES]
    return {
        "format": 1, "live": True, "now": now,
        "run": {"name": "demo", "url": "s3://cpcr-demo/runs/demo", "data": "s3://cpcr-demo/data", "method": "cpcr",
                "classes": CLASSES, "steps": steps, "version": "0.1.0"},
        "state": {"phase": "training", "step": step, "generation": 3, "workers": 3, "wanted": 3, "images_per_s": 38.4,
                  "eta_s": 0.41 * (steps - step), "mean_dice": last["mean_dice"],
                  "best": {"step": last["step"], "mean_dice": last["mean_dice"]},
                  "loss": {"total": 0.4321, "supervised": 0.31}, "data_wait": 0.021, "status": None, "reason": ""},
        "curves": curves,
        "workers": [worker | {"node": 0, "rank": 0}, worker | {"node": 1, "rank": 1},
                    worker | {"node": 2, "rank": 2, "own_s": 0.39, "straggler": True, "data_wait": 0.44}],
        "generations": [{"generation": 1, "world": 3, "from": begun + 3, "to": begun + 9.6, "end": killed},
                        {"generation": 2, "world": 2, "from": begun + 9.9, "to": begun + 11.6, "end": "node 2 joins"},
                        {"generation": 3, "world": 3, "from": begun + 11.9, "to": None, "end": None}],
        "interruptions": [
            interruption(begun + 9.5, "trainer-killed", f"2 workers train again as generation 2 ({killed})"),
            interruption(begun + 11.5, "joined", "3 workers train again as generation 3 (node 2 joins)", loss=False,
                         generation=2, step=18, fence_s=None, outage_s=0.3)],
        "checkpoints": [{"step": s, "at": begun + STEP_S * s + 4, "bytes": 4_700_000, "verified": s + 50 <= step,
                         "hold_s": 0.004, "upload_s": 0.31} for s in range(50, step + 1, 50)],
        "goodput": {"wall_s": wall, "goodput": 0.93, "parts_s": {name: share * wall for name, share in shares.items()},
                    "losses": 1, "joins": 1},
        "overlays": [{"step": s, "caption": f"volume {volume}, slice 4",
                      "src": "overlays/a.png" if volume == 1 else PICTURES[volume]} for s, volume in overlays],
        "hints": ["data wait is 44 % of the step time of node 2: raise loader.threads there"],
        "notes": [{"at": begun, "text": "the run begins"}, {"at": begun + 10, "text": "node 2 was started again"}],
        "report": None,
    }


def with_a_loss(document):
    """The same, a moment after a worker died."""
    now, step = document["now"], document["state"]["step"]
    document["workers"][1] |= {"state": "lost", "rank": None, "step_s": None, "own_s": None, "heard": now - 1.2}
    document["generations"][-1] |= {"to": now - 0.1, "end": "node 1 was lost"}
    unknown = dict.fromkeys(("fence_s", "regroup_s", "restore_s", "step_s", "outage_s"))
    document["interruptions"].append(interruption(now - 0.1, "agent-lost", "node 1 was lost: its connection closed",
                                                  generation=3, step=step, node=1, rank=1, open=True, **unknown))
    document["state"] |= {"phase": "recovering", "workers": 2}
    return document


def hostile(document):
    """The same, with markup wherever a text comes from outside, and pictures from elsewhere."""
    texts = dict.fromkeys(("name", "url", "data", "method", "version"), HOSTILE)
    document["run"] |= texts | {"classes": [HOSTILE, "MYO", "LV"]}
    document["state"] |= {"reason": HOSTILE, "loss": {HOSTILE: 1.0}}
    document["curves"]["losses"][HOSTILE] = document["curves"]["losses"]["total"]
    document["workers"][0] |= {"host": HOSTILE, "state": HOSTILE}
    document["interruptions"][0] |= {"text": HOSTILE, "kind": HOSTILE}
    document["generations"][0] |= {"end": HOSTILE}
    document["goodput"]["parts_s"][HOSTILE] = 5.0
    elsewhere = ("javascript:window.owned=1", "https://203.0.113.1/x.png", "//203.0.113.1/x.png", "../x.png", HOSTILE)
    document["overlays"] += [{"step": 999, "caption": HOSTILE, "src": src} for src in elsewhere]
    document["hints"] = [HOSTILE]
    document["notes"] = [{"at": document["now"], "text": HOSTILE}]
    return document


def as_report(document):
    """The same as the run's report."""
    def score(name, dice, **more):
        return {"name": name, "dice": dice, "jaccard": dice / (2 - dice), "hd95": 4.2, "asd": 1.2, "assd": 1.3, "empty": 0} | more

    classes = [score(name, dice) for name, dice in zip(CLASSES, (0.7712, 0.7034, 0.9011))]
    shown = [it | {"caption": f"patient{10 + i}, slice 4: Dice {0.9 - 0.07 * i:.2f}", "src": PICTURES[i % 3 + 1]}
             for i, it in enumerate(document["overlays"])]
    url, data = document["run"]["url"], document["run"]["data"]
    document |= {"live": False, "overlays": shown}
    document["state"] |= {"phase": "finished", "status": 0, "eta_s": None}
    document["generations"][-1]["to"] = document["now"]
    document["report"] = {
        "config": "name = \"demo\"\nmethod = \"cpcr\"\n\n[train]\niterations = 300\n",
        "environment": [["workers", "3"], ["backend", "gloo"], ["libtorch", "2.11.0"]],
        "commands": [["Resume it", f"cpcr-launch --run {url} --data {data} --resume auto"],
                     ["See its checkpoints", f"cpcr checkpoints ls {url}"]],
        "scores": {"unit": "voxel", "policy": "an empty mask scores 0 in all five", "volumes": 4, "classes": classes,
                   "mean": score("", 0.7919, hd95=None, empty=1)},
        "cases": [{"case": f"patient{i:02}", "mean": 0.8, "dice": {"RV": 0.78, "MYO": None, "LV": 0.9}} for i in range(4)],
        "best": shown[:2], "worst": shown[4:], "damaged_lines": 2,
    }
    return document
