"""The page without a run, in a browser: what made-up documents show, what a reader does meanwhile, hostile texts, the report.

`scripts/test-dashboard.py page` calls it. What it is not: a look at a run; `scripts/test-dashboard.py run` is. The standard library only.
"""

import pathlib
import re
import tempfile
import time

from basics import SOON_S_MAX, check, wait_for
from browser import DESKTOP, PHONE, check_looks
from documents import HOSTILE, as_report, hostile, made_up, with_a_loss
from page_server import Server, joined

TAB, LEFT = "\ue004", "\ue012"


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
    def wait(state, seconds=SOON_S_MAX):
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
