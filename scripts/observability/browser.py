"""A headless Chromium, driven through chromedriver's WebDriver protocol, and what is asked of any page in it.

What it is not: knowledge of what the page shows. The standard library only.
"""

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from basics import Failed, check, free_port, stop, wait_for

PHONE, DESKTOP = 360, 1280


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
            raise Failed(f"{path}: {json.load(error)['value']['message'].splitlines()[0]}") from None

    def cdp(self, command, **parameters):
        return self.call("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def open(self, url):
        self.call("POST", "/url", {"url": url})

    def js(self, script, *arguments):
        return self.call("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def value(self, expression):
        return self.js(f"return {expression}")

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
        except (OSError, Failed):
            pass
        stop(self.driver, 20)
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
