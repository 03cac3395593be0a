#!/usr/bin/env python3
"""The page of a run in a real browser: headless Chromium, driven through chromedriver's WebDriver protocol.

    scripts/test-dashboard.py page              the page alone, fed by a server in here with made-up documents
    scripts/test-dashboard.py run --bin DIR     a real run of DIR/cpcr-launch: a trainer is killed, then the coordinator

`--screenshots DIR` keeps pictures of what was seen. Without chromium and chromedriver it says that it was skipped,
and that is a failure only with `--strict`. The standard library only. What it is not: a test of other browsers.
"""

import argparse
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request

sys.dont_write_bytecode = True  # the modules are beside the sources
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent / "observability"))
from basics import Failed, check, failures, passed, wait_for  # noqa: E402
from browser import DESKTOP, PHONE, Browser, check_looks  # noqa: E402
from page_checks import test_page  # noqa: E402
from runs import RUN_S_MAX, Launched, names_in  # noqa: E402

SKIPPED = ("SKIPPED: the dashboard in a browser: chromium and chromedriver are not installed "
           "(apt-get install chromium chromium-driver)")
# A loss must be seen on the page after so long.
SEEN_S_MAX = 2.0
# Steps of some ten milliseconds; long enough for a loss and a return.
SETS = ["loss.warmup_epochs=0", "validate.every=100", "checkpoint.every=50"]
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


def watch_run(browser, run, screenshots):
    address = run.address(120)
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
    check("the launcher ended well", (status := run.process.wait(60)) == 0, f"{status}: {run.tail()}")
    check("the last state stays", browser.stands("link") == "ended")
    report = report_of(run)
    names = names_in(report.parents[2] / "data")
    named = sorted(name for name in names if any(name in text for text in said))
    check("no case of the dataset is named while it lives", names and named == [], named[:5])
    # Its server goes away with the run, which browsers put on the console.
    others = [entry for entry in browser.console() if entry["source"] != "network"]
    check("the console is clean to the end", others == [], others)
    look_at_report(browser, report, screenshots)


def lose_a_trainer(browser, run, look):
    generation = int(browser.stands("generation"))
    victim = run.processes("trainer")[-1]
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
    [victim], killed, before = run.processes("coordinator"), time.monotonic(), step()
    os.kill(victim, signal.SIGKILL)
    wait_for("a lost connection", lambda: browser.stands("link") == "lost", 10)
    wait_for("the run going on", lambda: at_work() and step() > before, 60)
    print(f"the page showed the run going on {time.monotonic() - killed:.2f} s after the coordinator was killed", flush=True)


def report_of(run):
    """Where the launcher said that the report is."""
    return pathlib.Path(wait_for("the report's place", lambda: run.said(r"report: (/.*index\.html)")))


def look_at_report(browser, report, screenshots):
    browser.open(report.as_uri())
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
    with tempfile.TemporaryDirectory(prefix="cpcr-dashboard-", ignore_cleanup_errors=True) as folder:
        folder = pathlib.Path(folder)
        run = Launched(options.bin.resolve(), folder, ["--nodes", "2:3", "--run", folder / "run"],
                       [*SETS, f"train.iterations={options.iterations}"])
        try:
            watch_run(browser, run, options.screenshots)
        except Failed as failed:
            raise Failed(f"{failed}; the launcher: {run.tail()}") from None
        finally:
            run.stop()


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
    except Failed as failed:
        failures.append(str(failed))
        print(f"FAILED: {failed}", file=sys.stderr)
    finally:
        browser.close()
    print(f"the dashboard in a browser, {options.mode}: {len(passed)} checks passed, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
