#!/usr/bin/env python3
"""The page of a run in a real browser: headless Chromium, driven through chromedriver's WebDriver protocol.

    scripts/test-dashboard.py page              the page alone, fed by a server in here with made-up documents
    scripts/test-dashboard.py run --bin DIR     a real run of DIR/cpcr-launch: a trainer is killed, then the coordinator

`--screenshots DIR` keeps pictures of what was seen. Without chromium and chromedriver it says that it was skipped,
and that is a failure only with `--strict`. The standard library only. What it is not: a test of other browsers.
"""

import argparse
import base64
import http.server
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import zlib

PAGE = pathlib.Path(__file__).resolve().parent.parent / "src/page"
SKIPPED = ("SKIPPED: the dashboard in a browser: chromium and chromedriver are not installed "
           "(apt-get install chromium chromium-driver)")
# As the product's server sets it.
CSP = ("default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
       "connect-src 'self'")
PHONE, DESKTOP = 360, 1280
# Longest wait for the page, and for a run.
PAGE_S_MAX, RUN_S_MAX = 10, 300
# A loss must be seen on the page after so long.
SEEN_S_MAX = 2.0
HOSTILE = "<img src=x onerror=\"window.owned=1\"></script><script>window.owned=1</script>"
TAB, LEFT = "\ue004", "\ue012"

passed, failures = 0, []


def check(what, holds, found=""):
    global passed
    if holds:
        passed += 1
        return
    failures.append(what)
    print(f"FAILED: {what}{f': {found}' if found != '' else ''}", file=sys.stderr, flush=True)


class Gone(Exception):
    """Something did not come in time."""


def wait_for(what, condition, seconds=PAGE_S_MAX):
    """What `condition` says, once that is true."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        time.sleep(0.05)
    raise Gone(f"{what}: not within {seconds} s")


def free_port():
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return it.getsockname()[1]


# --- The browser.

class Browser:
    """A session of headless Chromium with a profile of its own."""

    def __init__(self, chromium, driver):
        self.profile = tempfile.mkdtemp(prefix="cpcr-browser-")
        port = free_port()
        self.base, self.session = f"http://127.0.0.1:{port}", None
        # chromedriver's own home, so that nothing is left behind.
        environment = dict(os.environ, HOME=self.profile)
        self.driver = subprocess.Popen([driver, f"--port={port}"], env=environment, stdin=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        flags = ["--headless", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
                 "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars",
                 f"--user-data-dir={self.profile}/profile"]
        if os.geteuid() == 0:
            flags.append("--no-sandbox")
        wait_for("chromedriver", self.ready, 30)
        wanted = {"browserName": "chrome", "goog:chromeOptions": {"binary": chromium, "args": flags},
                  "goog:loggingPrefs": {"browser": "ALL"}}
        self.session = self.call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]

    def ready(self):
        try:
            return self.call("GET", "/status")["ready"]
        except OSError:
            return False

    def call(self, method, path, body=None):
        if self.session:
            path = f"/session/{self.session}{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            raise Gone(f"{path}: {json.load(error)['value']['message'].splitlines()[0]}") from None

    def cdp(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def js(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def value(self, expression):
        return self.js(f"return {expression}")

    def wait(self, what, expression, seconds=PAGE_S_MAX):
        return wait_for(what, lambda: self.value(expression), seconds)

    def text(self, selector):
        return self.js("return document.querySelector(arguments[0])?.innerText ?? ''", selector)

    def count(self, selector):
        return self.js("return document.querySelectorAll(arguments[0]).length", selector)

    def stands(self, key):
        """What the page says of itself: link, phase, step, generation."""
        return self.js("return document.body.dataset[arguments[0]]", key)

    def pictures_are_drawn(self):
        return self.value("document.images.length > 0 && [...document.images].every((it) => it.naturalWidth > 0)")

    def sticks_out(self, width):
        """Whether something is wider than the screen."""
        return max(self.value("[document.documentElement.scrollWidth, innerWidth]")) > width

    def press(self, key):
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def console(self):
        """Errors and warnings since the last call."""
        found = self.call("POST", "/se/log", {"type": "browser"})
        return [entry for entry in found if entry["level"] in ("SEVERE", "WARNING")]

    def look(self, width, dark=False, still=False, paper=False):
        """Emulates a screen and a reader's preferences."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=780 if width < 600 else 900,
                 deviceScaleFactor=2 if width < 600 else 1, mobile=width < 600)
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"},
                    {"name": "prefers-reduced-motion", "value": "reduce" if still else "no-preference"}]
        self.cdp("Emulation.setEmulatedMedia", media="print" if paper else "", features=features)
        time.sleep(0.3)  # charts are drawn anew for the width

    def screenshot(self, folder, name):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            size = self.cdp("Page.getLayoutMetrics")["cssContentSize"]
            clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
            picture = self.cdp("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
            (folder / f"{name}.png").write_bytes(base64.b64decode(picture))

    def close(self):
        try:
            if self.session:
                self.call("DELETE", "")
        except (OSError, Gone):
            pass
        self.driver.terminate()
        self.driver.wait()
        shutil.rmtree(self.profile, ignore_errors=True)


# Of every visible text: the contrast to what is behind it; the worst ones.
CONTRAST = """
const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
const srgb = (text) => text.startsWith("color(srgb") ? channels(text).map((v, i) => i < 3 ? v * 255 : v) : channels(text);
const light = (rgb) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
  const v = rgb[i] / 255;
  return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
}, 0);
const behind = (element) => {
  for (let it = element; it; it = it.parentElement) {
    const found = channels(getComputedStyle(it).backgroundColor);
    if (found.length === 3 || found[3] > 0.99) return found;
  }
  return [255, 255, 255];
};
const found = [];
for (const element of document.querySelectorAll("body *")) {
  const own = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data).join("").trim();
  const elsewhere = "script, style, noscript, title, .unseen, .skip, .bar-label";
  if (!own || element.matches(elsewhere) || !element.getClientRects().length) continue;
  const style = getComputedStyle(element);
  const [a, b] = [light(srgb(element.closest("svg") ? style.fill : style.color)), light(behind(element))];
  found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), own.slice(0, 30)]);
}
return found.sort((a, b) => a[0] - b[0]).slice(0, 3);
"""


def check_looks(browser, what, screenshots=None):
    """Narrow and wide, light and dark: nothing sticks out, and everything can be read."""
    backgrounds = set()
    for width in (PHONE, DESKTOP):
        for dark in (False, True):
            how = f"{what}, {width} px, {'dark' if dark else 'light'}"
            browser.look(width, dark)
            check(f"{how}: no horizontal overflow", not browser.sticks_out(width))
            worst = browser.js(CONTRAST)
            check(f"{how}: texts have a contrast of 4.5", worst and worst[0][0] >= 4.5, worst)
            backgrounds.add(browser.value("getComputedStyle(document.body).backgroundColor"))
            browser.screenshot(screenshots, how.replace(", ", "-").replace(" ", "-"))
    check(f"{what}: dark differs from light", len(backgrounds) == 2, backgrounds)
    browser.look(DESKTOP)


# --- A page without a run.

def joined(document=None):
    """The page as the product makes it."""
    read = lambda name: (PAGE / name).read_text()
    page = read("index.html").replace("/*CSS*/", read("page.css"), 1)
    page = page.replace("/*JS*/", read("charts.js") + "\n" + read("page.js"), 1)
    if document is not None:
        data = json.dumps(document).replace("<", "\\u003c")
        page = page.replace('application/json">null<', f'application/json">{data}<', 1)
    return page


class Server:
    """Serves the page, and its documents as events; can be stopped and started again at its port."""

    def __init__(self):
        self.port, self.document, self.version = free_port(), None, 0
        self.changed, self.http = threading.Condition(), None

    def start(self):
        owner = self
        self.stopping = False

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                owner.answer(self)

        class Http(http.server.ThreadingHTTPServer):
            allow_reuse_address, daemon_threads, block_on_close = True, True, False

            def handle_error(self, *_):
                pass  # the browser went away

        self.http = Http(("127.0.0.1", self.port), Handler)
        threading.Thread(target=self.http.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self):
        with self.changed:
            self.stopping = True
            self.changed.notify_all()
        self.http.shutdown()
        self.http.server_close()

    def answer(self, request):
        kinds = {"/": ("text/html; charset=utf-8", lambda: joined().encode()),
                 "/overlays/a.png": ("image/png", lambda: picture(3))}
        if request.path == "/events":
            return self.events(request)
        if request.path not in kinds:
            return request.send_error(404)
        kind, make = kinds[request.path]
        body = make()
        request.send_response(200)
        for name, value in (("Content-Type", kind), ("Content-Length", str(len(body))), ("Content-Security-Policy", CSP)):
            request.send_header(name, value)
        request.end_headers()
        request.wfile.write(body)

    def events(self, request):
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        sent = 0
        while not self.stopping:
            with self.changed:
                self.changed.wait_for(lambda: self.stopping or self.version > sent)
                sent, document = self.version, self.document
            if not self.stopping:
                request.wfile.write(f"event: run\ndata: {json.dumps(document)}\n\n".encode())

    def send(self, document):
        with self.changed:
            self.document, self.version = document, self.version + 1
            self.changed.notify_all()


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


def check_updates(browser, server):
    """What comes is shown, without a reload, and what the reader does survives it."""
    text = browser.text
    rows = "#numbers-losses tbody tr"
    browser.js("window.same = 1; document.getElementById('numbers-losses').open = true;"
               "document.querySelector('#chart-losses .scrub').focus(); scrollTo(0, 500);"
               "document.querySelector('#workers .body').style.width = '300px';"
               "document.querySelector('#workers .wide').scrollLeft = 90;"
               "getSelection().selectAllChildren(document.querySelector('#workers tbody th'))")
    wait_for("rows of numbers", lambda: browser.count(rows) == 120)
    browser.press(LEFT)
    browser.press(LEFT)
    read_out = text("#chart-losses figcaption")
    check("the arrow keys read a chart out", "step 118" in read_out, read_out)
    spoken = browser.value("document.activeElement.getAttribute('aria-valuetext')")
    check("and it is said what is there", spoken.startswith("step 118: total ") and "supervised" in spoken, spoken)
    before = browser.value("scrollY")
    server.send(made_up(121))
    wait_for("the next step", lambda: browser.stands("step") == "121")
    check("without a reload", browser.value("window.same") == 1)
    check("the header counts", "121 of 300 steps, 40 %" in text("#progress"), text("#progress"))
    kept = browser.value("[document.getElementById('numbers-losses').open, document.activeElement.className, scrollY,"
                         "document.querySelector('#workers .wide').scrollLeft, getSelection().toString()]")
    check("open details, focus, scroll positions and a selection survive", kept == [True, "scrub", before, 90, "0"], kept)
    check("open numbers are kept up", browser.count(rows) == 121)
    check("a chart is still read out where it was", "step 118" in text("#chart-losses figcaption"))
    browser.js("document.activeElement.blur(); document.getElementById('numbers-losses').open = false;"
               "document.querySelector('#workers .body').style.width = ''; getSelection().removeAllRanges()")
    left, top, width = browser.js("const it = document.querySelector('#plot-dice').getBoundingClientRect();"
                                  "return [it.left, it.top, it.width]")
    move = {"type": "pointerMove", "x": round(left + width / 2), "y": round(top + 100)}
    browser.call("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": [move]}]})
    pointed = text("#chart-dice figcaption")
    check("a pointer reads a chart out", re.search(r"step (60|80)$", pointed) is not None, pointed)
    age = text("[data-since]")
    wait_for("the age of a heartbeat", lambda: text("[data-since]") != age, 3)
    marked = [node for node in range(3) if "straggler" in text(f"[data-node='{node}']")]
    check("the straggler is marked in words", marked == [2], marked)
    check("and told in a sentence", "node 2 is a straggler" in text("#workers"), text("#workers .body"))


def check_loss(browser, server, screenshots):
    text = browser.text
    announced = lambda: browser.value("document.getElementById('announce').textContent")
    check("nothing was announced for steps", announced() == "", announced())
    server.send(with_a_loss(made_up(130)))
    wait_for("the lost worker", lambda: browser.count("[data-node='1'][data-state='lost']") == 1)
    check("it is shown as lost, in words", "lost" in text("[data-node='1']"), text("[data-node='1']"))
    check("the phase is told, and why", all(part in text("#progress") for part in ("Recovering", "node 1 was lost")),
          text("#progress"))
    first = text("#timeline li")
    check("the interruption comes first in the list", "node 1 was lost" in first and "still lasts" in first, first)
    check("and is announced", "node 1 was lost" in announced() and "Recovering" in announced(), announced())
    browser.screenshot(screenshots, "page-recovering")
    server.send(made_up(140))
    wait_for("training again", lambda: text("#progress .phase") == "Training")


def check_connection(browser, server):
    """Silence, loss and return of the server, and the end of the run."""
    def wait(state, seconds=PAGE_S_MAX):
        wait_for(f"the connection {state}", lambda: browser.stands("link") == state, seconds)

    wait("stale")
    check("silence is told", "no news for" in browser.text("#link"), browser.text("#link"))
    server.send(made_up(142))
    wait("live")
    check("news without a step are told", "no step for" in browser.text("#progress"), browser.text("#progress"))
    check("the console is clean", (told := browser.console()) == [], told)
    server.stop()
    wait("lost")
    check("a lost connection is told", "connection lost, retrying" in browser.text("#link"), browser.text("#link"))
    server.document = made_up(150)
    server.start()
    wait("live", 30)
    wait_for("the step of then", lambda: browser.stands("step") == "150")
    check("it came back by itself", browser.value("window.same") == 1)
    ended = made_up(300)
    ended["state"] |= {"phase": "finished", "status": 0}
    server.send(ended)
    wait("ended")
    server.stop()
    time.sleep(1)
    check("the last state stays", browser.text("#progress").startswith("Complete") and browser.stands("link") == "ended")
    others = [entry for entry in browser.console() if entry["source"] != "network"]
    check("nothing but the lost connection is on the console", others == [], others)


def check_report(browser, folder, screenshots):
    text = browser.text
    report = folder / "index.html"
    report.write_text(joined(as_report(made_up(300))))
    browser.open(report.as_uri())
    wait_for("the report", lambda: browser.stands("step") == "300")
    check("its title", browser.value("document.title") == "demo - cpcr report")
    check("it is no live page", text("#brand") == "cpcr · run report" and text("#link") == "")
    scores = ("77.12", "voxel", "Empty predictions", "an empty mask scores 0")
    check("scores", all(part in text("#scores") for part in scores), text("#scores"))
    check("cases", all(part in text("#cases") for part in ("Best", "Worst")) and browser.count("#cases img") == 4)
    check("commands, configuration, environment", "cpcr-launch --run" in text("#commands") and "libtorch" in text("#setup"))
    check("what it cannot know is not shown", "Heard" not in text("#workers"))
    check("the disclaimer", "Research software: not a medical device." in text("footer"))
    check("pictures are drawn", browser.pictures_are_drawn())
    fetched = browser.value("performance.getEntriesByType('resource').map((it) => it.name)")
    fetched = [name for name in fetched if not name.startswith("data:")]
    check("nothing is fetched", fetched == [], fetched)
    check_looks(browser, "report", screenshots)
    browser.look(DESKTOP, dark=True, paper=True)
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    check("on paper it is light", paper == "rgb(255, 255, 255)", paper)
    check("it can be printed", len(browser.cdp("Page.printToPDF", printBackground=True)["data"]) > 20_000)
    browser.look(DESKTOP)
    check("the report's console is clean", (told := browser.console()) == [], told)
    report.write_text(joined(hostile(as_report(made_up(60)))))
    browser.open(report.as_uri())
    wait_for("the hostile report", lambda: browser.stands("step") == "60")
    check_hostile(browser, "report")


def check_hostile(browser, where):
    check(f"{where}: hostile texts run nothing", browser.value("window.owned ?? null") is None)
    check(f"{where}: nor are they elements", browser.count("[onerror]") == 0)
    check(f"{where}: nor is the title", browser.value("document.title").startswith(HOSTILE))
    seen = browser.text("body").count("<img src=x onerror=")
    check(f"{where}: they are shown as they are", seen >= 8, seen)
    sources = browser.value("[...document.images].map((it) => it.getAttribute('src'))")
    others = [source for source in sources if not source.startswith(("data:image/png", "overlays/"))]
    check(f"{where}: no picture from elsewhere", others == [], others)
    check(f"{where}: the console is clean", (told := browser.console()) == [], told)


def test_page(browser, options):
    check("who has no script is told what to read", "<noscript>" in joined())
    server = Server()
    server.document, server.version = made_up(120), 1
    server.start()
    browser.look(DESKTOP)
    browser.open(f"http://127.0.0.1:{server.port}/")
    wait_for("the first document", lambda: browser.stands("step") == "120")
    check("its title", browser.value("document.title") == "demo - cpcr")
    check("it is live", browser.text("#link") == "live" and browser.text("#brand") == "cpcr · dashboard")
    hidden = browser.value("[...document.querySelectorAll('main section')].filter((it) => it.hidden).map((it) => it.id)")
    check("what is empty is hidden", hidden == ["scores", "cases", "commands", "setup"], hidden)
    unnamed = browser.count("main svg:not([role='img'][aria-label])")
    check("charts are summed up in words", unnamed == 0 and browser.count("main svg") == 4, unnamed)
    browser.press(TAB)
    check("the first key leads past the header", browser.value("document.activeElement.className") == "skip")
    check_updates(browser, server)
    check_looks(browser, "page", options.screenshots)
    browser.look(DESKTOP, still=True)
    moving = browser.value("getComputedStyle(document.querySelector('.pulse')).animationName")
    check("reduced motion is respected", moving == "none", moving)
    browser.look(DESKTOP)
    check_loss(browser, server, options.screenshots)
    server.send(hostile(made_up(141)))
    wait_for("hostile texts", lambda: browser.stands("step") == "141")
    check_hostile(browser, "page")
    browser.look(PHONE)
    check("nor do they stick out on a phone", not browser.sticks_out(PHONE))
    browser.look(DESKTOP)
    server.send(made_up(142))
    check_connection(browser, server)
    with tempfile.TemporaryDirectory(prefix="cpcr-page-") as folder:
        check_report(browser, pathlib.Path(folder), options.screenshots)


# --- A real run.

# Of the demonstration's kind, steps of some ten milliseconds; long enough for a loss and a return.
SETS = ["patch_size=32", "batch.labelled=4", "batch.unlabelled=4", "loss.warmup_epochs=0", "validate.every=100",
        "checkpoint.every=50"]
# Notes when a loss shows: a lost worker's row, or an interruption more.
WATCH = """
const losses = () => document.querySelectorAll("#timeline li[data-loss]").length;
const lost = () => document.querySelector("#workers tr[data-state='lost']") !== null;
window.before = losses();
new MutationObserver(() => {
  const what = lost() ? "a lost worker" : losses() > window.before ? "an interruption" : null;
  if (what && !window.seen) window.seen = [what, Date.now()];
}).observe(document.body, { subtree: true, childList: true, attributes: true, characterData: true });
"""


class Run:
    """A run of the launcher in a folder of its own."""

    def __init__(self, binaries, iterations):
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="cpcr-dashboard-"))
        self.log = self.folder / "launcher.log"
        command = [binaries / "cpcr-launch", "--nodes", "2:3", "--backend", "gloo", "--run", self.folder / "run"]
        for pair in [*SETS, f"train.iterations={iterations}"]:
            command += ["--set", pair]
        with open(self.log, "w") as log:
            self.launcher = subprocess.Popen(command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    def address(self):
        """Where the dashboard is, once that was said."""
        if self.launcher.poll() is not None:
            raise Gone(f"the launcher ended with {self.launcher.returncode}: {self.tail()}")
        return self.said(r"dashboard: (http://\S+)")

    def said(self, pattern):
        found = re.search(f"^{pattern}", self.log.read_text(), re.MULTILINE)
        return found and found[1]

    def tail(self):
        return " / ".join(self.log.read_text().strip().splitlines()[-5:])

    def report(self):
        """Where the launcher said that the report is."""
        return pathlib.Path(wait_for("the report's place", lambda: self.said(r"report: (/.*index\.html)")))

    def processes(self, program, command):
        """Descendants of the launcher that are that program at that command, the newest last."""
        parents, lines = {}, {}
        for entry in pathlib.Path("/proc").glob("[0-9]*"):
            try:
                # After the name, which may hold anything, come the state and the parent.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                lines[int(entry.name)] = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue  # it ended meanwhile
        ours = {self.launcher.pid}
        while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
            ours |= more
        wanted = (program.encode(), command.encode())
        told = lambda words: len(words) > 1 and (words[0].rpartition(b"/")[2], words[1]) == wanted
        return sorted(pid for pid in ours if told(lines.get(pid, [])))

    def names(self):
        """What its dataset calls volumes and patients: nothing that a live page is to say."""
        data = pathlib.Path(self.report().parents[2], "data/manifest.json")
        volumes = json.loads(data.read_text())["volumes"]
        return {volume[key] for volume in volumes for key in ("name", "patient")}

    def close(self):
        if self.launcher.poll() is None:
            self.launcher.terminate()
            try:
                self.launcher.wait(60)
            except subprocess.TimeoutExpired:
                self.launcher.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def watch_run(browser, run, screenshots):
    address = wait_for("the dashboard's address", run.address, 120)
    said = []

    def look(name):
        browser.screenshot(screenshots, f"run-{name}")
        said.append(browser.value("document.documentElement.outerHTML"))
        for path in ("data.json", "metrics"):
            with urllib.request.urlopen(address + path, timeout=10) as answer:
                said.append(answer.read().decode())

    browser.look(DESKTOP)
    browser.open(address)
    browser.js("window.same = 1")
    step = lambda: int(browser.stands("step") or 0)
    at_work = lambda: browser.stands("link") == "live" and browser.stands("phase") in ("training", "validating", "saving")
    wait_for("training", lambda: at_work() and step() > 20, 120)
    wait_for("three workers", lambda: browser.count("#workers tr[data-state='training']") == 3, 60)
    look("training")
    browser.look(PHONE)
    look("training-phone")
    check("nothing sticks out on a phone", not browser.sticks_out(PHONE))
    browser.look(DESKTOP)
    lose_a_trainer(browser, run, look)
    wait_for("training goes on", at_work, 60)
    wait_for("its return", lambda: browser.count("#workers tr[data-state='training']") == 3 and at_work(), 60)
    others = [entry for entry in browser.console() if entry["source"] != "network"]
    check("the console is clean", others == [], others)
    lose_the_coordinator(browser, run, step, at_work)
    wait_for("a picture of a validation", browser.pictures_are_drawn, RUN_S_MAX)
    captions = browser.value("[...document.querySelectorAll('#overlays figcaption')].map((it) => it.textContent)")
    unnamed = all(re.fullmatch(r"(step \d+: )?volume \d+, slice \d+", caption) for caption in captions)
    check("pictures are numbered, not named", captions and unnamed, captions)
    look("validated")
    wait_for("the end of the run", lambda: browser.stands("link") == "ended", RUN_S_MAX)
    check("the end is shown", "Complete" in browser.text("#progress"), browser.text("#progress"))
    check("without a reload", browser.value("window.same") == 1)
    check("the loss is still in the list", "killed" in browser.text("#timeline"), browser.text("#timeline .body"))
    browser.screenshot(screenshots, "run-end")
    said.append(browser.value("document.documentElement.outerHTML"))
    check("the launcher ended well", (status := run.launcher.wait(60)) == 0, f"{status}: {run.tail()}")
    check("the last state stays", browser.stands("link") == "ended")
    names = run.names()
    named = sorted(name for name in names if any(name in text for text in said))
    check("no case of the dataset is named while it lives", names and named == [], named[:5])
    # Its server goes away with the run, which browsers put on the console.
    others = [entry for entry in browser.console() if entry["source"] != "network"]
    check("the console is clean to the end", others == [], others)
    look_at_report(browser, run, screenshots)


def lose_a_trainer(browser, run, look):
    generation = int(browser.stands("generation"))
    victim = run.processes("cpcr-engine", "trainer")[-1]
    browser.js(WATCH)
    killed = time.time()
    os.kill(victim, signal.SIGKILL)
    what, seen = wait_for("the loss on the page", lambda: browser.value("window.seen"), 20)
    look("recovery")
    after = seen / 1000 - killed
    print(f"the page showed {what} {after:.2f} s after a trainer was killed", flush=True)
    check(f"a loss shows within {SEEN_S_MAX} s", after <= SEEN_S_MAX, f"{after:.2f} s")
    wait_for("another generation", lambda: int(browser.stands("generation")) > generation, 60)
    check("the list has it", "killed" in browser.text("#timeline"), browser.text("#timeline .body"))


def lose_the_coordinator(browser, run, step, at_work):
    """Which serves the page: its successor does so at the same address, and the page finds it."""
    [victim], killed, before = run.processes("cpcr", "coordinator"), time.monotonic(), step()
    os.kill(victim, signal.SIGKILL)
    wait_for("a lost connection", lambda: browser.stands("link") == "lost", 10)
    wait_for("the run going on", lambda: at_work() and step() > before, 60)
    print(f"the page showed the run going on {time.monotonic() - killed:.2f} s after the coordinator was killed", flush=True)


def look_at_report(browser, run, screenshots):
    browser.open(run.report().as_uri())
    wait_for("the report", lambda: browser.stands("phase") == "finished")
    check("the report has the loss", "killed" in browser.text("#timeline"), browser.text("#timeline .body"))
    check("the report says how it ended", "Complete" in browser.text("#progress"), browser.text("#progress"))
    check("the report's pictures are drawn", browser.pictures_are_drawn())
    parts = ("scores", "cases", "curves", "workers", "timeline", "goodput", "checkpoints", "overlays", "commands", "setup")
    hidden = [part for part in parts if browser.text(f"#{part} .body").strip() == ""]
    check("the report has all its parts", hidden == [], hidden)
    browser.screenshot(screenshots, "run-report")
    browser.look(PHONE)
    browser.screenshot(screenshots, "run-report-phone")
    check_looks(browser, "report")
    check("the report's console is clean", (told := browser.console()) == [], told)


def test_run(browser, options):
    run = Run(options.bin.resolve(), options.iterations)
    try:
        watch_run(browser, run, options.screenshots)
    except Gone as gone:
        raise Gone(f"{gone}; the launcher: {run.tail()}") from None
    finally:
        run.close()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["page", "run"])
    parser.add_argument("--bin", type=pathlib.Path, help="where cpcr-launch is, for `run`")
    parser.add_argument("--iterations", type=int, default=600, help="steps of the run (600)")
    parser.add_argument("--screenshots", type=pathlib.Path, help="a folder for pictures")
    parser.add_argument("--strict", action="store_true", help="fail where there is no browser")
    options = parser.parse_args()
    if options.mode == "run" and options.bin is None:
        parser.error("run: --bin DIR is needed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        print(SKIPPED, file=sys.stderr)
        return 1 if options.strict else 0
    browser = Browser(chromium, driver)
    try:
        (test_page if options.mode == "page" else test_run)(browser, options)
    except Gone as gone:
        failures.append(str(gone))
        print(f"FAILED: {gone}", file=sys.stderr)
    finally:
        browser.close()
    print(f"the dashboard in a browser, {options.mode}: {passed} checks passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
