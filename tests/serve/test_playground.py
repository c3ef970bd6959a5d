"""The playground, in a real browser in front of a real server."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = """--headless=new --no-sandbox --disable-dev-shm-usage --disable-gpu --disable-quic --no-first-run
--disable-background-networking --disable-component-update --disable-sync"""
KEY = "a-key-of-sixteen-characters"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="chromium and chromedriver are needed: make services")


@contextmanager
def serving(store: Path, **environment: str) -> Iterator[str]:
    """`kvilt serve builtin` in a process of its own; its address."""
    command = [sys.executable, "-m", "kvilt", "serve", "builtin", "--port", "0", "--store", f"disk:path={store}"]
    path = os.pathsep.join(p for p in sys.path if p)
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path, **environment}, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stderr is not None
            told = ""
            while not (found := re.search(r"http://127\.0\.0\.1:\d+", told)):
                line = process.stderr.readline()
                assert line, told
                told += line
            yield found[0]
        finally:
            process.terminate()
            process.communicate(timeout=20)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server that asks for no key."""
    with serving(tmp_path_factory.mktemp("served") / "store") as url:
        yield url


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebDriver]:
    """A browser that nobody sees."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield made
    made.quit()


class Page:
    """The page as a person uses it."""

    def __init__(self, browser: WebDriver, url: str, width: int = 1280) -> None:
        self.browser, self.url = browser, url
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(url)
        browser.execute_script("localStorage.clear(); sessionStorage.clear()")
        browser.get(url)
        self.until(lambda: self.all("#strategy option") or self.text("#error"))

    def all(self, selector: str) -> list[WebElement]:
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.one(selector).text

    def until(self, condition: Callable[[], object]) -> None:
        WebDriverWait(self.browser, 20, 0.05).until(lambda _: condition())

    def texts(self, selector: str) -> list[str]:
        script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
        return self.browser.execute_script(script, selector)

    @property
    def order(self) -> list[str]:
        """Titles of the documents in the prompt."""
        return self.texts("#plan .strip[data-id] .title")

    @property
    def receipts(self) -> list[list[str]]:
        """Cells of the receipts, the newest first."""
        rows = "[...document.querySelectorAll('#receipts tr:not(.none)')]"
        return self.browser.execute_script(f"return {rows}.map((r) => [...r.cells].map((c) => c.textContent))")

    def planned(self) -> None:
        """The bar shows the plan of the prompt: nothing draws it again."""
        self.until(lambda: "to compute" in self.text("#plan-sum"))

    def examples(self) -> None:
        """The three examples are stored and in the prompt."""
        self.one("#examples").click()
        self.until(lambda: len(self.order) == 3 and "encoded" in self.text("#status"))
        self.planned()

    @property
    def focus(self) -> str:
        """The id, or else the text, of what has the focus."""
        return self.browser.execute_script("const e = document.activeElement; return e.id || e.textContent")

    def wait_for_receipts(self, count: int) -> None:
        self.until(lambda: len(self.receipts) == count and not self.one("#stop").is_enabled())

    def move(self, name: str, key: str) -> None:
        """Shift and an arrow key on a strip."""
        strips = "[...document.querySelectorAll('#plan .strip[data-id]')]"
        self.browser.execute_script(f"{strips}.find((s) => s.textContent.startsWith(arguments[0])).focus()", name)
        ActionChains(self.browser).key_down(Keys.SHIFT).send_keys(key).key_up(Keys.SHIFT).perform()


def test_ask_reorder_and_ask_again(browser: WebDriver, address: str) -> None:
    """Danger: another order encodes documents again, or the page shows an order that was not asked."""
    page = Page(browser, address)
    page.examples()
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    assert "Tavik" in page.text("#ours .answer")
    full, mine = page.receipts
    assert (mine[1], mine[3], mine[4]) == ("block:sink=system", "3", "0")
    assert (full[1], full[3]) == ("full", "0")
    assert "times sooner" in page.text("#status") or "First token after" in page.text("#status")
    page.move("Ada Lorn", Keys.ARROW_RIGHT)
    assert page.order == ["Tavik Press", "Ada Lorn", "Orsa"]
    assert page.focus.startswith("Ada Lorn")
    page.wait_for_receipts(4)
    page.planned()
    assert page.receipts[1][2:5] == ["Tavik Press → Ada Lorn → Orsa", "3", "0"]
    strips = {s.text.split("\n")[0]: s for s in page.all("#plan .strip[data-id]")}
    ActionChains(browser).drag_and_drop(strips["Orsa"], strips["Tavik Press"]).perform()
    page.wait_for_receipts(6)
    assert page.order[:2] in (["Orsa", "Tavik Press"], ["Tavik Press", "Orsa"])
    assert page.order[2] == "Ada Lorn"
    assert page.receipts[1][2:5] == [" → ".join(page.order), "3", "0"]
    assert "0 misses" in page.text("#ours .sum")


def test_a_reload_changes_nothing_and_deleting_does(browser: WebDriver, address: str) -> None:
    """Danger: the prompt is gone after F5, or a deleted document stays in the prompt and every question fails."""
    page = Page(browser, address)
    page.examples()
    page.one("#question").clear()
    page.one("#question").send_keys("Who is the mayor?", Keys.TAB)
    page.move("Orsa", Keys.ARROW_LEFT)
    browser.refresh()
    page.until(lambda: len(page.order) == 3)
    assert page.order == ["Ada Lorn", "Orsa", "Tavik Press"]
    assert page.one("#question").get_property("value") == "Who is the mayor?"
    page.one("[aria-label='delete Orsa']").click()
    page.until(lambda: page.order == ["Ada Lorn", "Tavik Press"])
    assert "Orsa" not in page.texts("#documents .name")
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    assert page.text("#error") == ""
    page.one("[aria-label='pin Ada Lorn']").click()
    page.until(lambda: page.all("[aria-label='unpin Ada Lorn']"))
    page.one("[aria-label='verify Ada Lorn']").click()
    page.until(lambda: "every byte is as it was written" in "".join(page.texts("#documents .told")))
    page.one("#documents [title='Read Ada Lorn']").click()
    page.until(lambda: "born in Tavik" in page.text("#reader-text"))


def test_the_keyboard_is_enough(browser: WebDriver, address: str) -> None:
    """Danger: whoever uses no mouse can neither ask nor change the prompt."""
    page = Page(browser, address)
    page.examples()
    browser.refresh()
    page.planned()
    ActionChains(browser).send_keys(Keys.TAB * 3).perform()  # past the two that copy
    assert page.focus.startswith("Ada Lorn")
    ActionChains(browser).send_keys(Keys.END).perform()
    assert page.focus.startswith("Orsa")
    ActionChains(browser).send_keys(Keys.DELETE).perform()
    assert page.order == ["Ada Lorn", "Tavik Press"]
    assert page.focus.startswith("Tavik Press")
    ActionChains(browser).send_keys(Keys.TAB).perform()
    assert page.focus == "question"
    ActionChains(browser).send_keys(Keys.ENTER).perform()
    page.wait_for_receipts(2)
    assert page.receipts[1][2] == "Ada Lorn → Tavik Press"


def test_nothing_moves_while_an_answer_is_written(browser: WebDriver, address: str) -> None:
    """Danger: what somebody is about to click jumps away under the pointer."""
    page = Page(browser, address)
    page.examples()
    places = """return ['#plan', '#ask', '#ours', '#ours .answer', '#ours .sum', '#full', '.receipts', '.drawer', '#documents']
        .map((s) => document.querySelector(s).getBoundingClientRect()).map((r) => [r.x, r.y, r.width])"""
    before = browser.execute_script(places)
    watch = """window.moved = []; const before = JSON.stringify(arguments[0]); const places = new Function(arguments[1]);
        const look = () => {
            if (JSON.stringify(places()) !== before) window.moved.push(places());
            requestAnimationFrame(look);
        };
        look()"""
    browser.execute_script(watch, before, places)
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    assert browser.execute_script("return window.moved") == []


def test_texts_of_others_stay_texts(browser: WebDriver, address: str, tmp_path: Path) -> None:
    """Danger: a document's title runs as a script in the browser of whoever looks at the list."""
    page = Page(browser, address)
    wicked = "<img src=x onerror='window.ran = 1'>"
    lines = tmp_path / "wicked.jsonl"
    lines.write_text(json.dumps({"title": wicked, "text": f"{wicked} is the title."}) + "\n")
    page.one("#files").send_keys(str(lines))
    page.until(lambda: wicked in page.texts("#documents .name"))
    assert page.order == [wicked]
    page.one(f'#documents [title="Read {wicked}"]').click()
    page.until(lambda: wicked in page.text("#reader-text"))
    page.one("#reader button").click()
    page.one("#question").send_keys(wicked)
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    assert page.all("img") == []
    assert browser.execute_script("return window.ran") is None


def test_files_are_uploaded_and_bad_ones_named(browser: WebDriver, address: str, tmp_path: Path) -> None:
    """Danger: one bad file of ten stops the others, or is passed over in silence."""
    page = Page(browser, address)
    (tmp_path / "rivers.md").write_text("# Rivers\n\nThe Tavik is a river.\n")
    (tmp_path / "plain.txt").write_text("A plain text.")
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"title": "no text"}\n')
    (tmp_path / "long.txt").write_text("A long text. " * 3000)
    files = "\n".join(str(tmp_path / name) for name in ("rivers.md", "plain.txt", "bad.jsonl", "long.txt"))
    page.one("#files").send_keys(files)
    page.until(lambda: page.text("#error"))
    assert {"Rivers", "plain.txt"} <= set(page.texts("#documents .name"))
    assert "long.txt" in page.text("#error")
    page.one("#files").send_keys(str(tmp_path / "bad.jsonl"))
    page.until(lambda: "bad.jsonl:2 is no document" in page.text("#error"))


def test_the_same_request_runs_elsewhere(browser: WebDriver, address: str) -> None:
    """Danger: what is copied is not what was asked, or does not run."""
    page = Page(browser, address)
    page.examples()
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    answer = page.text("#ours .answer")
    page.one("#copy-python").click()
    page.until(lambda: page.text("#reader-title") == "As Python")
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(page.text("#reader-text"), "copied.py", "exec"), {})
    assert printed.getvalue().splitlines()[0] == answer
    assert re.search(r"^[1-9]\d* tokens reused", printed.getvalue(), re.MULTILINE)
    page.one("#reader button").click()
    page.one("#copy-curl").click()
    page.until(lambda: page.text("#reader-title") == "As curl")
    curl = page.text("#reader-text")
    if shutil.which("curl"):
        told = subprocess.run(["bash", "-c", curl], capture_output=True, text=True, timeout=20, check=False)
        assert told.returncode == 0, told
        assert json.loads(told.stdout)["choices"][0]["message"]["content"] == answer


def test_it_fits_a_telephone_and_needs_nobody_else(browser: WebDriver, address: str) -> None:
    """Danger: the page scrolls sideways, or does not work without the internet."""
    page = Page(browser, address, width=390)
    page.examples()
    page.one("#ask-button").click()
    page.wait_for_receipts(2)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map((e) => e.name)")
    assert loaded
    assert all(name.startswith((address, "data:")) for name in loaded)
    severe = [entry["message"] for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]]
    assert severe == []


def test_a_key_is_asked_for_and_a_failing_store_is_told(browser: WebDriver, tmp_path: Path) -> None:
    """Danger: an empty page where a key is missing; a page that pretends all is well while nothing can be stored."""
    store = tmp_path / "store"
    with serving(store, KVILT_API_KEY=KEY) as url:
        page = Page(browser, url)
        assert page.one("#key-form").is_displayed()
        for key, works in (("not-the-key-of-this-server", False), (KEY, True)):
            page.one("#key").clear()
            page.one("#key").send_keys(key, Keys.ENTER)
            page.until(
                lambda works=works: bool(page.all("#strategy option")) == works and bool(page.text("#error")) != works
            )
        page.examples()
        shutil.rmtree(store)
        store.write_text("in the way")
        page.one("#ask-button").click()
        page.until(lambda: page.text("#error"))
        page.one("#text").send_keys("One more.")
        page.one("#add-button").click()
        page.until(lambda: "the document:" in page.text("#error"))
        store.unlink()
        page.one("#add-button").click()
        page.until(lambda: not page.text("#error") and "1 document encoded" in page.text("#status"))
        asked = urllib.request.Request(f"{url}/v1/documents", headers={"authorization": f"Bearer {KEY}"})
        with urllib.request.urlopen(asked) as listed:
            assert [d["title"] for d in json.loads(listed.read())["data"] if d["kind"] == "document"] != []
