"""The status page: what may be in the file, and, where it is asked for, the page in a real Chromium.

STATE_GATEWAY_BROWSER_TESTS=1 runs the browser's part, which needs chromium and chromedriver (Debian: chromium-driver).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import MODES
from datagram_signature import SIGNATURE_REASONS
from engine_state import REASONS
from fleet_events import EVENT_KINDS
from gateway_counters import COUNTERS, OUTCOMES
from query_server import REJECTIONS
from state_query import status_page
from state_watch import MAX_READERS
from tests.harness import DEADLINE_S, TOP, Daemon, again_and_again, daemon, datagram, free_port, heartbeat, wait_until

PAGE = (TOP / "status_page.html").read_text(encoding="utf-8")
SVG = "http://www.w3.org/2000/svg"  # the name of a language, and no address that is asked for anything
ENTER, ESCAPE, TAB, LEFT, UP, RIGHT, DOWN = (
    "\ue007",
    "\ue00c",
    "\ue004",
    "\ue012",
    "\ue013",
    "\ue014",
    "\ue015",
)  # as WebDriver writes them
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(2)>',
    "a'b\"c&amp;d `${alert(3)}`",
    "../../etc/passwd?x#y%2e",
    "..",
    "__proto__",
    "محرك-الرياض",
    "引擎-上海",
    "x" * 256,
]


def elements(name: str) -> list[str]:
    """The texts of the elements of that name that have no attributes."""
    return re.findall(rf"<{name}>(.*?)</{name}>", PAGE, flags=re.DOTALL)


def element(name: str) -> str:
    """All of them together."""
    return "".join(elements(name))


def markup() -> str:
    """The page without the text of its scripts and style."""
    page = PAGE
    for text in elements("script") + elements("style"):
        page = page.replace(text, "")
    return page


class File(unittest.TestCase):
    """The file keeps what the policy that it is served with asks of it, and has every text in both languages."""

    def test_two_scripts_and_one_style_without_attributes(self) -> None:
        for name, count in (("script", 2), ("style", 1)):
            self.assertEqual(len(re.findall(rf"<{name}\b", PAGE)), count)
            self.assertEqual(PAGE.count(f"</{name}>"), count)
            self.assertTrue(all(len(text) > 1000 for text in elements(name)))
        for script in elements("script"):
            self.assertTrue(script.startswith('\n"use strict";\n'))

    def test_nothing_inline_that_the_policy_would_refuse(self) -> None:
        self.assertNotRegex(markup(), r"(?i)\son\w+\s*=")
        self.assertNotRegex(markup(), r"(?i)\sstyle\s*=")
        self.assertNotRegex(PAGE, r"(?i)javascript:")
        self.assertNotRegex(element("script"), r'setAttribute\(\s*"(style|on\w+)"')

    def test_without_a_script_it_says_so_first(self) -> None:
        """And not below a screen of empty boxes; in both languages, for no script chooses one."""
        said = re.fullmatch(r"<noscript>(.*)</noscript>", markup().partition("<body>")[2].split("\n")[1])
        assert said is not None
        self.assertIn("JavaScript", said[1])
        self.assertIn('<span lang="zh-CN">', said[1])

    def test_no_text_becomes_markup_or_code(self) -> None:
        for word in (
            r"innerHTML", r"outerHTML", r"insertAdjacentHTML", r"document\.write", r"\beval\b", r"new Function",
            r"DOMParser", r"createContextualFragment", r"srcdoc", r"setHTML", r'setTimeout\(\s*["\'`]', r"\bimport\b",
        ):  # fmt: skip
            self.assertNotRegex(element("script"), word)

    def test_no_outside_resource(self) -> None:
        self.assertEqual(set(re.findall(r"\w+://[^\s'\"`)]*", PAGE)), {SVG})
        for name, value in re.findall(r"\s(href|src|action|srcset|data|poster)=\"([^\"]*)", markup()):
            self.assertRegex(value, r"^(#|data:image/svg\+xml,|(engines|stats)$)", name)
        self.assertNotRegex(element("style"), r"url\(|@import|@font-face")
        script = element("script")
        asked = re.findall(r"""(?:\bask\(\s*|=> )["'`](\w+)(?:\?\w+=)?["'`]""", script)
        self.assertEqual(set(asked), {"engines", "history", "stats", "livez", "samples", "events"})
        begun = re.findall(r"(?:fetch|EventSource)\(([^,)]*)", script)
        self.assertEqual(begun, ["PLACE + path", "`${PLACE}watch?min_interval_ms=${this.pace.interval}`"])
        self.assertEqual(len(re.findall(r"\bWorker\(|\bSharedWorker\(", script)), 1)
        self.assertEqual(set(re.findall(r"createScriptURL: (.*?) }", script)), {'() => PLACE + "status-feed.js"'})
        self.assertRegex(script, r"const PLACE = location\.origin \+ \(.*location\.pathname")

    def test_the_feed_is_the_first_script_and_of_a_policy_as_strict(self) -> None:
        page, feed = status_page()
        self.assertEqual(feed.body.decode(), elements("script")[0])
        for name in ("document.querySelector", "window", "STRINGS"):
            self.assertNotIn(name, elements("script")[0], "a worker has none")
        (policy,) = (line for line in feed.headers if line.startswith("Content-Security-Policy: "))
        self.assertEqual(policy, "Content-Security-Policy: default-src 'none'; connect-src 'self'")
        (policy,) = (line for line in page.headers if line.startswith("Content-Security-Policy: "))
        self.assertIn("; worker-src 'self';", policy)
        self.assertTrue(policy.endswith("; require-trusted-types-for 'script'; trusted-types status-feed"))
        self.assertNotIn("unsafe", policy)


class Strings(unittest.TestCase):
    """Every text is in the one table, in both languages."""

    def setUp(self) -> None:
        table = re.search(r"const STRINGS = (\{.*?\n\});\n", element("script"), flags=re.DOTALL)
        assert table is not None
        self.strings: dict[str, list[str]] = json.loads(table[1])
        self.code = element("script").replace(table[0], "")

    def test_both_languages_have_every_text(self) -> None:
        languages = re.search(r"const LANGUAGES = (\[.*?\]);", self.code)
        assert languages is not None
        self.assertEqual(json.loads(languages[1]), ["en", "zh-CN"])
        for key, texts in self.strings.items():
            self.assertEqual(len(texts), 2, key)
            english, chinese = texts
            self.assertTrue(english.strip() and chinese.strip(), key)
            named_in_english, named_in_chinese = (sorted(re.findall(r"\{\w+\}", text)) for text in texts)
            self.assertEqual(named_in_english, named_in_chinese, key)
            self.assertNotRegex(english, r"[\u3000-\u9fff\uff00-\uffef]", key)

    def used(self) -> set[str]:
        """The keys that the page asks for by name."""
        keys = set(re.findall(r'data-t(?:-label)?="([^"]*)"', markup()))
        for arguments in re.findall(r"\bt\(((?:[^(),]|\([^()]*\))*)[,)]", self.code):
            keys |= set(re.findall(r'"([^"]*)"(?! \+)', arguments))
        for arguments in re.findall(r'\bsay(?:Grown)?\("\w+", ([^,)]*)', self.code):
            keys |= set(re.findall(r'"([^"]*)"', arguments))
        keys |= set(re.findall(r'^  \["\w+", "(\w+)", \(', self.code, flags=re.MULTILINE))  # the columns
        keys |= {f"is_{status}" for status in ("live", "stale", "unavailable", "unknown", "lost")}
        return keys

    def test_every_key_that_is_used_exists(self) -> None:
        used = self.used()
        self.assertGreater(len(used), 90)
        self.assertEqual(used - set(self.strings), set())

    def test_every_key_is_used(self) -> None:
        code = self.code + markup()
        unused = {key for key in self.strings if f'"{key}"' not in code} - self.used()
        told = {f"invalid_reasons.{reason}" for reason in REASONS} | {f"event.{kind}" for kind in EVENT_KINDS}
        told |= {f"signature_reasons.{reason}" for reason in SIGNATURE_REASONS}
        told |= {f"phase.{phase}" for phase in ("starting", "draining", "sleeping", "stuck")}
        told |= {f"do.{section}" for section in sections().values()} | set(counter_paths())
        why = "the reasons come by /stats, the events by /events, the phases with an engine"
        self.assertEqual((unused - told, told - set(self.strings)), (set(), set()), why)


def counter_paths() -> list[str]:
    """Every counter of /stats, as `section.name` or `name`."""
    no_counters = {"uptime_s", "stale_threshold_ms", "last_received", "receive_buffer_bytes", "log.enabled"}
    return [
        *("total_received", "valid_states", "lost_states"),
        *(outcome.counter for outcome in OUTCOMES if outcome.counter),
        *(counter.path for counter in COUNTERS if counter.path not in no_counters),
        *(f"invalid_reasons.{reason}" for reason in REASONS),
        *(f"signature_reasons.{reason}" for reason in SIGNATURE_REASONS),
        *(f"{mode}_received" for mode in MODES),
        *(f"http.rejections.{reason}" for reason in REJECTIONS),
    ]


def sections() -> dict[str, str]:
    """The notes that say what to do, each with its section of docs/troubleshooting.md."""
    table = re.search(r"const SECTIONS = \{(.*?)\};", element("script"), flags=re.DOTALL)
    assert table is not None
    return dict(re.findall(r'(\w+): "([a-z-]+)"', table[1]))


class WhatToDo(unittest.TestCase):
    """Whatever the page says is wrong, it says what to do, and where there is more."""

    def test_every_note_but_those_of_wellbeing_has_its_few_words(self) -> None:
        noted = set(re.findall(r'\bsay(?:Grown)?\("(?:bad|warn|info)", (?:known \? )?"(\w+)"', element("script")))
        self.assertGreater(len(noted), 15)
        self.assertEqual(noted | {"no_answer"}, set(sections()) | {"other_version"})

    def test_the_section_of_each_is_there(self) -> None:
        for name in ("troubleshooting.md", "troubleshooting.zh-CN.md"):
            text = (TOP / "docs" / name).read_text(encoding="utf-8")
            anchors = set(re.findall(r'<a id="([a-z-]+)"', text))
            self.assertEqual(set(sections().values()) - anchors, set(), name)


def why_no_browser() -> str:
    """Why the browser's part is skipped, or nothing where it is not."""
    if os.environ.get("STATE_GATEWAY_BROWSER_TESTS") != "1":
        return "STATE_GATEWAY_BROWSER_TESTS=1 is not set"
    for tool in ("chromedriver", "chromium"):
        if shutil.which(tool) is None:
            return f"{tool} is not on this machine"
    return ""


class Browser:
    """A headless Chromium with a new profile, driven by the WebDriver protocol; it talks to the loopback only."""

    def __init__(self, language: str, width: int = 1440, height: int = 900) -> None:
        # In a process group of its own, which Chromium is in as well: so both can be ended, however they are doing.
        self._driver = subprocess.Popen(
            ["chromedriver", "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        try:
            self._open_session(language, width, height)
        except BaseException:
            self._end()
            raise

    def _open_session(self, language: str, width: int, height: int) -> None:
        assert self._driver.stdout is not None
        late = threading.Timer(2 * DEADLINE_S, self._driver.kill)  # so that its output ends
        late.daemon = True
        late.start()
        for line in self._driver.stdout:
            started = re.search(rb"started successfully on port (\d+)", line)
            if started:
                late.cancel()
                break
        else:
            raise AssertionError(f"chromedriver ended, or took over {2 * DEADLINE_S:.0f} s, without saying its port")
        self._port = int(started[1])
        arguments = [
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}", f"--accept-lang={language}",
        ]  # fmt: skip
        wanted = {
            "browserName": "chrome",
            "goog:loggingPrefs": {"browser": "ALL"},
            "goog:chromeOptions": {"args": arguments, "binary": shutil.which("chromium")},
        }
        self._path = "/session"
        session = self._call("POST", "", {"capabilities": {"alwaysMatch": wanted}})
        self._path = f"/session/{session['sessionId']}"

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=2 * DEADLINE_S)
        try:
            connection.request(method, self._path + path, None if body is None else json.dumps(body))
            value = json.loads(connection.getresponse().read())["value"]
        finally:
            connection.close()
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value

    def open(self, url: str) -> None:
        """Open a page, and wait until it is loaded; at the same address with another fragment it is not loaded anew."""
        self._call("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        """What the body of a function returns that is run in the page."""
        return self._call("POST", "/execute/sync", {"script": script, "args": arguments})

    def text(self, selector: str) -> str | None:
        """The text of the first element, without what is hidden; None where there is none."""
        return self.run("return document.querySelector(arguments[0])?.innerText ?? null", selector)  # type: ignore[no-any-return]

    def click(self, selector: str) -> None:
        """Click on the first element as a person does; fails where it is hidden or covered."""
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/click", {})

    def press(self, *keys: str) -> None:
        """Press keys, one after the other, wherever the focus is."""
        actions = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keyboard", "actions": actions}]})

    def command(self, name: str, **parameters: Any) -> Any:
        """What a command of the browser's own protocol answers."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": name, "params": parameters})

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        move = {"type": "pointerMove", "x": round(x), "y": round(y), "duration": 0}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move]}
        self._call("POST", "/actions", {"actions": [mouse]})

    def resize(self, width: int, height: int) -> None:
        """Make the view so large, below what a window can be."""
        self.command(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def open_window(self) -> str:
        """Open one more window of the same browser, have all that follows be in it, and return its name."""
        handle: str = self._call("POST", "/window/new", {"type": "window"})["handle"]
        self.use_window(handle)
        return handle

    def use_window(self, handle: str) -> None:
        """Have all that follows be in this window."""
        self._call("POST", "/window", {"handle": handle})

    def complaints(self) -> list[str]:
        """What the browser's console has said since the last time: errors, and what the policy refused."""
        return [entry["message"] for entry in self._call("POST", "/se/log", {"type": "browser"})]

    def close(self) -> None:
        """End it."""
        try:
            with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
                self._call("DELETE", "")
        finally:
            self._end()

    def _end(self) -> None:
        """Also a driver or a Chromium that hangs, and what they started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._driver.pid, signal.SIGKILL)  # not waited for yet: the number is still its own
        self._driver.wait(DEADLINE_S)
        assert self._driver.stdout is not None
        self._driver.stdout.close()
        self._profile.cleanup()


@contextlib.contextmanager
def pushing(running: Daemon, count: int, interval_s: float) -> Iterator[None]:
    """Engines that push for as long as the context lasts; engine-n has n tokens waiting."""

    def push(turn: int) -> None:
        for first in range(0, count, 100):
            numbers = range(first, min(count, first + 100))
            running.send(
                *(datagram(engine_id=f"engine-{n}", timestamp_ms=turn, pending_tokens_total=n) for n in numbers)
            )

    with again_and_again(interval_s, push):
        yield


# What is cut (though a name may be, before its end, and a note's one line), or is a number in two lines.
CUT = r"""
  const cells = "td:not(.name), td .value, th button, :is(.tile, .fleet) :is(dt, b, small), .pasts figcaption *";
  const further = "button, select, #count, #past-at, summary, .axis span, #event-list li > :not(:last-child), dd";
  const shown = [...document.querySelectorAll(`${cells}, ${further}`)].filter((one) => one.checkVisibility());
  const lines = (one) => {
    const range = document.createRange();
    range.selectNodeContents(one);
    return new Set([...range.getClientRects()].filter(({ width }) => width > 0).map(({ top }) => Math.round(top))).size;
  };
  const isCut = (one) => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 2;
  const clips = (one) => getComputedStyle(one).display !== "inline" && getComputedStyle(one).overflow !== "visible";
  const isNumber = (one) => one.childElementCount === 0 && /^[+−-]?[\d.,]+\s*\S{0,9}$/.test(one.textContent);
  const size = (one) => `${one.scrollWidth}x${one.scrollHeight} in ${one.clientWidth}x${one.clientHeight}`;
  return shown.filter((one) => clips(one) && isCut(one) || isNumber(one) && lines(one) > 1)
    .map((one) => `${one.tagName}.${one.className || one.id}: ${one.textContent} (${size(one)})`);
"""


@unittest.skipIf(why_no_browser(), why_no_browser())
class InChromium(unittest.TestCase):
    """The page in a real browser, against the real daemon."""

    browser: Browser

    @classmethod
    def setUpClass(cls) -> None:
        cls.browser = Browser("en-US")
        cls.addClassCleanup(cls.browser.close)

    def setUp(self) -> None:
        self.expected_complaints = "(?!)"  # none
        self.browser.resize(1440, 900)

    def tearDown(self) -> None:
        said = [line for line in self.browser.complaints() if not re.search(self.expected_complaints, line)]
        self.assertEqual(said, [], "the console is silent: no error, nothing that the policy refused")

    @contextlib.contextmanager
    def gateway(self, **settings: Any) -> Iterator[Daemon]:
        """A gateway that the page is left before, so that it does not complain that it has gone."""
        with daemon(**settings) as running:
            try:
                yield running
            finally:
                self.browser.open("about:blank")

    def open(self, running: Daemon, fragment: str = "") -> None:
        self.browser.open("about:blank")
        self.browser.open(f"http://127.0.0.1:{running.http_port}/{fragment}")

    @contextlib.contextmanager
    def own_feed(self) -> Iterator[None]:
        """Pages that are opened meanwhile are in a browser that has no shared workers."""
        script = self.browser.command("Page.addScriptToEvaluateOnNewDocument", source="delete globalThis.SharedWorker")
        try:
            yield
        finally:
            self.browser.command("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])

    def wait_text(self, selector: str, pattern: str) -> str:
        """Wait until the element's text matches, and return it."""
        seen: list[str | None] = [None]

        def matches() -> bool:
            seen[0] = self.browser.text(selector)
            return seen[0] is not None and re.search(pattern, seen[0]) is not None

        try:
            wait_until(f"{selector} to say {pattern!r}", matches)
        except AssertionError as error:
            raise AssertionError(f"{error}; it says {seen[0]!r}") from None
        return seen[0] or ""

    def until(self, condition: str, *arguments: Any) -> None:
        """Wait until an expression in the page is true."""
        wait_until(condition, lambda: self.browser.run(f"return {condition}", *arguments))

    def wait_rows(self, count: int) -> None:
        self.until("document.querySelectorAll('#rows tr').length === arguments[0]", count)

    def wait_sheet(self, engine_id: str) -> None:
        """Wait until the sheet of one engine is open."""
        wait_until(f"the sheet of {engine_id!r}", lambda: self.browser.text("#engine[open] #engine-name") == engine_id)

    def cells(self, engine_id: str) -> dict[str, str]:
        """What an engine's row says, by column."""
        script = """
          const rows = [...document.querySelectorAll("#rows tr")];
          const row = rows.find((one) => one.querySelector("a").textContent === arguments[0]);
          return row && Object.fromEntries([...row.cells].map((cell) => [cell.classList[0], cell.innerText.trim()]));"""
        return wait_until(f"a row for {engine_id!r}", lambda: self.browser.run(script, engine_id))  # type: ignore[no-any-return]

    def names(self) -> list[str]:
        """The engines in the table, from the top."""
        script = "return [...document.querySelectorAll('#rows a')].map((one) => one.textContent)"
        return self.browser.run(script)  # type: ignore[no-any-return]

    def wait_cell(self, engine_id: str, column: str, pattern: str) -> None:
        wait_until(
            f"{column} of {engine_id!r} to say {pattern!r}, and not {self.cells(engine_id)}",
            lambda: re.search(pattern, self.cells(engine_id)[column]),
        )

    def test_engines_appear_go_stale_and_vanish(self) -> None:
        """Without an engine the page says how to send a state; one that was sent is live, stale, and lost at last."""
        with self.gateway(STALE_THRESHOLD=3000, EXPIRE_AFTER=6000) as running:
            self.open(running)
            self.wait_text("#empty-text", "No engine has been heard from yet")
            self.wait_text("#try-command", rf"^echo '\{{.*\}}' \| nc -u -w1 127\.0\.0\.1 {running.udp_port}$")
            self.wait_text("#notices", "^.\\s*All is well")
            self.assertEqual(self.browser.text("#connection"), "Connected")
            running.send(datagram(engine_id="first", latency_pred_ms=12.34, pending_tokens_total=4321))
            self.wait_text("#live", "^1$")
            cells = self.cells("first")
            self.assertEqual(cells["status"], "live")
            self.assertEqual(cells["latency"], "12.3")
            self.assertEqual(cells["pending"], "4,321")
            self.assertEqual(cells["kv"], "90%")
            self.assertEqual(cells["capacity"], "1,000")
            self.assertEqual(cells["mode"], "latency_optimized")
            self.assertRegex(cells["source"], r"^127\.0\.0\.1:\d+$")
            self.assertEqual(self.browser.run("return document.title"), "1 live, 0 stale - state gateway")
            self.wait_cell("first", "status", "^stale$")
            self.wait_text("#stale", "^1$")
            self.assertEqual(self.browser.run("return document.title"), "0 live, 1 stale - state gateway")
            self.wait_text("#lost", "^1$")
            self.wait_rows(0)
            self.wait_text("#notices", "No engine is live")
            self.assertIn("first", self.wait_text("#notices", "Removed after falling silent"))
            self.wait_text("#empty-text", "fell silent and were removed")
            running.send(datagram(engine_id="first"))
            self.wait_text("#lost", "^0$")
            self.wait_cell("first", "status", "^live$")

    def test_hostile_names_stay_text(self) -> None:
        """Whatever an engine or a mode is called is shown as it is, makes no element, and can be opened and linked."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(*(datagram(engine_id=name, scheduling_mode=name[:64]) for name in HOSTILE))
            self.open(running)
            self.wait_text("#live", f"^{len(HOSTILE)}$")
            for name in HOSTILE:
                self.assertEqual(self.cells(name)["mode"], name[:64])
                links = "[...document.querySelectorAll('#rows a')]"
                self.browser.run(f"{links}.find((one) => one.textContent === arguments[0]).click()", name)
                self.wait_sheet(name)
                self.wait_text("#fields", re.escape(name[:64]))
                address = self.browser.run("return location.hash")
                self.browser.press(ESCAPE)
                self.until("!document.querySelector('#engine').open && !location.hash")
                self.open(running, address)
                self.wait_sheet(name)
                self.browser.press(ESCAPE)
                self.until("!document.querySelector('#engine').open && !location.hash")
            foreign = self.browser.run(
                "return document.querySelectorAll('img, iframe, object, main script, dialog script').length"
            )
            self.assertEqual(foreign, 0)

    def test_what_is_unknown_is_shown_as_unknown(self) -> None:
        """Placeholders, -1 and a capacity or total of 0 are never shown as a load of 0; a load of 0 is."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(
                heartbeat(engine_id="beating"),
                datagram(engine_id="half", kv_cache_free_blocks=-1, engine_capacity=0),
                datagram(engine_id="none", kv_cache_free_blocks=0, kv_cache_total_blocks=0),
                datagram(engine_id="odd", kv_cache_free_blocks=20, kv_cache_total_blocks=10),
                datagram(
                    engine_id="zero",
                    pending_tokens_total=0,
                    latency_pred_ms=0,
                    kv_cache_free_blocks=10,
                    kv_cache_total_blocks=10,
                ),
            )
            self.open(running)
            self.wait_text("#live-note", "^of 5, load of 1 unknown$")
            beating = self.cells("beating")
            self.assertEqual(
                [beating[name] for name in ("latency", "pending", "kv", "capacity")],
                ["no load known", "", "unknown", "unknown"],
            )
            self.assertEqual(
                [self.cells("half")[name] for name in ("pending", "kv", "capacity")], ["10", "unknown", "unknown"]
            )
            self.assertEqual(self.cells("none")["kv"], "unknown")
            self.assertEqual(self.cells("odd")["kv"], "⚠\ufe0e 0%")
            self.assertEqual([self.cells("zero")[name] for name in ("latency", "pending", "kv")], ["0.0", "0", "0%"])
            self.browser.click("th.capacity button")  # the highest first, and the unknown last in either direction
            for direction in ("descending", "ascending"):
                self.assertEqual(self.browser.run("return document.querySelector('th.capacity').ariaSort"), direction)
                wait_until(f"{direction} order", lambda: self.names() == ["none", "odd", "zero", "beating", "half"])
                self.browser.click("th.capacity button")
            self.open(running, "#engine=beating")
            fields = self.wait_text("#fields", "Heartbeat\n*yes")
            self.assertEqual(len(re.findall(r"\bunknown\b", fields)), 7)
            self.wait_text("#engine-state", "^live, heard from .* ago; only heartbeats lately")

    def test_chinese_and_english(self) -> None:
        """The browser's language decides, and no English is left in the Chinese page."""
        with self.gateway(STALE_THRESHOLD=600_000) as running, contextlib.closing(Browser("zh-CN,zh")) as chinese:
            running.send(heartbeat(engine_id="test"))
            self.open(running)
            self.wait_text("#live", "^1$")
            chinese.open(f"http://127.0.0.1:{running.http_port}/#engine=test")
            wait_until("the engine", lambda: "心跳" in (chinese.text("#fields") or ""))
            wait_until("the statistics", lambda: "一切正常" in (chinese.text("#notices") or ""))
            pages = {"en": self.browser, "zh-CN": chinese}
            for language, browser in pages.items():
                self.assertEqual(browser.run("return document.documentElement.lang"), language)
            self.assertEqual(self.browser.run("return document.title"), "1 live, 0 stale - state gateway")
            self.assertEqual(chinese.run("return document.title"), "1 在线，0 陈旧 - 状态网关")
            self.assertEqual(chinese.text("th.status"), "状态")
            shown = chinese.run(
                "return document.querySelector('.wrap').innerText + document.querySelector('#engine').innerText"
            )
            for name in (running.stats()["log"]["file"], running.stats()["instance"], chinese.text("#curl") or "?"):
                shown = shown.replace(name, "")
            kept = {
                "token",
                "curl",
                "cache",
                "latency",
                "optimized",
                "test",
                "unicast",
                "UDP",
                "HTTP",
                "JSON",
                "MiB",
                "KiB",
            }
            self.assertEqual(set(re.findall(r"[A-Za-z]{3,}", shown)) - kept, set())
            self.assertEqual(chinese.complaints(), [])

    def test_a_gateway_that_stops_and_starts_again(self) -> None:
        """A page that has lost the gateway says so and how old everything is; it recovers, and tells of the restart."""
        port = free_port()
        settings: dict[str, Any] = {"UDP_PORT": port, "STALE_THRESHOLD": 3000, "EXPIRE_AFTER": 600_000}
        self.expected_complaints = "net::ERR_|Failed to load resource"
        with daemon(**settings) as running:
            self.open(running)
            running.send(datagram(engine_id="kept"), datagram(engine_id="gone"))
            self.wait_text("#live", "^2$")
            instance = running.stats()["instance"]
            self.wait_text("#about", instance)
            running.stop()
            self.wait_text("#connection", "^Disconnected$")
            self.wait_text("#notices", "Disconnected from the gateway. All of this is as of .* ago")
            self.wait_text("#as-of", "^As of .* ago, not current$")
            self.wait_cell("kept", "status", "^unknown$")
            self.wait_cell("kept", "age", "^≤ [0-9]")
            self.assertEqual(self.browser.run("return document.title"), "Disconnected - state gateway")
            self.assertEqual(self.browser.text("#live"), "2", "as it was then")
        with self.gateway(**settings) as running, pushing(running, 1, 0.2):
            running.send(datagram(engine_id="kept"))
            self.wait_text("#connection", "^Connected$")
            self.wait_text("#notices", "The gateway was restarted .* ago")
            missing = self.wait_text("#notices", r"not heard from since \(1\)")
            self.assertIn("gone", missing)
            self.wait_text("#about", running.stats()["instance"])
            self.wait_cell("engine-0", "status", "^live$")
            self.assertTrue(self.browser.run("return document.querySelector('#as-of').hidden"))
            self.assertNotEqual(running.stats()["instance"], instance)

    def test_a_gateway_that_is_paused(self) -> None:
        """Ages grow by themselves: nothing looks live beyond the threshold, though no connection was closed."""
        with self.gateway(STALE_THRESHOLD=1000, EXPIRE_AFTER=600_000) as running, pushing(running, 3, 0.1):
            self.open(running)
            self.wait_text("#live", "^3$")
            self.wait_text("#connection", "^Connected$")
            running.signal(signal.SIGSTOP)
            try:
                self.wait_cell("engine-0", "status", "^(stale|unknown)$")
                self.wait_text("#connection", "^Disconnected$")
                self.wait_cell("engine-0", "status", "^unknown$")
            finally:
                running.signal(signal.SIGCONT)
            self.wait_text("#connection", "^Connected$")
            self.wait_cell("engine-0", "status", "^live$")

    def test_a_stream_that_comes_late_does_not_look_live(self) -> None:
        """Where the gateway has received what the stream has not brought, the stream is left, and asked for again."""
        with self.gateway(STALE_THRESHOLD=20_000) as running, self.own_feed():
            self.open(running)
            running.send(datagram(engine_id="good"))
            self.wait_text("#live", "^1$")
            self.until("samples.at(-1)?.stats.valid_states === 1")
            self.browser.run("""
              const { stats } = samples.at(-1);
              const later = { valid_states: stats.valid_states + 1, last_received: stats.last_received + 60 };
              ownFeed.judgePace({ ...stats, ...later }, stats);""")
            self.wait_text("#connection", "^Polling$")
            self.wait_cell("good", "status", "^live$")
            self.wait_text("#connection", "^Connected$")

    def test_a_computer_that_slept(self) -> None:
        """Ages grow over the sleep of the reader's computer, of which its monotonic clock may not know."""
        with self.gateway(STALE_THRESHOLD=100_000) as running:
            self.open(running)
            running.send(datagram(engine_id="good"))
            self.wait_cell("good", "status", "^live$")
            self.browser.run("ticking.ticked[1] -= 300_000")
            self.wait_cell("good", "age", "^5m$")
            self.wait_cell("good", "status", "^stale$")
            running.send(datagram(engine_id="good", timestamp_ms=1234567891))
            self.wait_cell("good", "status", "^live$")

    def test_what_is_said_to_screen_readers(self) -> None:
        """Trouble that is new is announced, once; numbers that change are not."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            self.open(running)
            self.wait_text("#notices", "All is well")
            self.browser.run("""
              window.said = [];
              const place = document.querySelector("#announcement");
              new MutationObserver(() => said.push(place.textContent)).observe(place, { childList: true });""")
            running.send(b"junk", datagram(engine_id="good"))
            who = r"The last one, .* ago, came from 127\.0\.0\.1:\d+: not_json, in 4 bytes\."
            self.wait_text("#announcement", rf"^Invalid datagrams in the last .*: 1 \(not JSON 1\)\. {who}$")
            self.browser.run("saidAt -= 60_000")  # so that it may speak again
            running.send(b"junk")
            self.wait_text("#notices", "not JSON 2")
            self.assertEqual(self.browser.run("return said.length"), 1)

    def test_polling_where_there_is_no_stream(self) -> None:
        """Where all readers' places are taken, the page asks every second, says so, and takes a place that is free."""
        self.expected_complaints = "/watch.* status of 503"
        with self.gateway(STALE_THRESHOLD=3000, EXPIRE_AFTER=600_000) as running, contextlib.ExitStack() as readers:
            for _ in range(MAX_READERS):
                reader = readers.enter_context(socket.create_connection(("127.0.0.1", running.http_port), DEADLINE_S))
                reader.sendall(b"GET /watch HTTP/1.1\r\nHost: a\r\n\r\n")
                self.assertTrue(reader.recv(1))
            self.open(running)
            self.wait_text("#connection", "^Polling$")
            running.send(datagram(engine_id="polled"))
            self.wait_cell("polled", "status", "^live$")
            self.wait_text("#notices", "There is no event stream at the moment")
            self.wait_cell("polled", "status", "^stale$")
            running.send(datagram(engine_id="polled", timestamp_ms=1234567891, pending_tokens_total=77))
            self.wait_cell("polled", "pending", "^77$")
            readers.close()
            self.wait_text("#connection", "^Connected$")
            wait_until("the notice to go", lambda: "event stream" not in (self.browser.text("#notices") or ""))

    def see_seven_windows(self, running: Daemon, *, without_workers: bool) -> list[str]:
        """What each of seven windows of one browser says of its connection, once all show what was sent last."""
        browser = Browser("en-US")
        self.addCleanup(browser.close)
        windows = []
        for _ in range(7):
            windows.append(browser.open_window())
            if without_workers:
                browser.command("Page.addScriptToEvaluateOnNewDocument", source="delete globalThis.SharedWorker")
            browser.open(f"http://127.0.0.1:{running.http_port}/")
        running.send(datagram(engine_id="a", timestamp_ms=2_000_000_000, pending_tokens_total=4711))
        said = []
        for handle in windows:
            browser.use_window(handle)
            wait_until("the last state", lambda: "4,711" in (browser.text("#rows td.pending") or ""))
            self.assertEqual(browser.text("#live"), "1")
            self.assertEqual(browser.run("return document.querySelector('#as-of').hidden"), True)
            self.assertEqual(browser.run("return ownFeed !== null"), without_workers)
            said.append(browser.text("#connection") or "")
        self.assertEqual(browser.complaints(), [])
        return said

    def test_seven_windows_of_one_browser_share_one_stream(self) -> None:
        """A browser has six connections a host; all windows show the same, and one reader is counted."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="a", timestamp_ms=1_000_000_000))
            said = self.see_seven_windows(running, without_workers=False)
            self.assertEqual(said, ["Connected"] * 7)
            self.assertEqual(running.stats()["watch"]["readers"], 1)

    def test_seven_windows_work_without_shared_workers(self) -> None:
        """Two of them stream, the others poll, and none says that it is disconnected."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="a", timestamp_ms=1_000_000_000))
            said = self.see_seven_windows(running, without_workers=True)
            self.assertEqual(sorted(said), ["Connected"] * 2 + ["Polling"] * 5)

    def test_a_worker_that_falls_silent_is_replaced(self) -> None:
        """A page whose shared feed was ended, or is of another version, has a feed of its own."""
        with self.gateway(STALE_THRESHOLD=600_000) as running, pushing(running, 1, 0.2):
            self.open(running)
            self.wait_text("#connection", "^Connected$")
            self.until("ownFeed === null")
            self.browser.run(
                "sharedPort.dispatchEvent(new MessageEvent('message', { data: { kind: 'hello', feed: 'x' } }))"
            )
            self.until("ownFeed !== null && ownFeed.link.streaming")
            self.open(running)
            self.until("ownFeed === null && engines.size === 1")
            self.browser.run("sharedPort.postMessage(undefined)")  # so that it says nothing more to this page
            self.browser.run("sayAwake = () => {}")
            self.until("ownFeed !== null && ownFeed.link.streaming")
            self.wait_text("#connection", "^Connected$")

    def test_with_a_token(self) -> None:
        """Where readers need a token, the shared feed has the one that the browser was given."""
        with tempfile.TemporaryDirectory() as folder:
            tokens = Path(folder, "tokens")
            tokens.write_text("a-token-of-many-letters\n")
            tokens.chmod(0o600)
            with self.gateway(STALE_THRESHOLD=600_000, HTTP_TOKENS_FILE=tokens) as running:
                running.send(datagram(engine_id="a"))
                self.browser.open(f"http://x:a-token-of-many-letters@127.0.0.1:{running.http_port}/")
                self.wait_text("#connection", "^Connected$")
                self.wait_rows(1)
                self.until("ownFeed === null && past.length > 0")
                tokens.write_text("another-token-of-many-letters\n")
                running.signal(signal.SIGHUP)
                self.expected_complaints = "status of 401"
                self.wait_text("#notices", "Disconnected from the gateway: 401, it wants a token")

    def test_histories_that_cannot_be_read_are_no_secret(self) -> None:
        """A curve that is missing, in the table or in an engine's sheet, is missing with a word."""
        self.expected_complaints = "status of 404"
        with self.gateway(STALE_THRESHOLD=600_000) as running, pushing(running, 3, 0.2):
            self.open(running)
            self.wait_rows(3)
            self.until("[...engines.values()].every(({ points }) => points)")
            self.assertNotIn("history", self.browser.text("#notices") or "")
            self.browser.run("""
              const asked = window.fetch;
              window.fetch = (path, how) => asked(path.replace("history?", "nowhere?"), how);
              for (const engine of engines.values()) [engine.points, engine.askedAt] = [null, -Infinity];""")
            self.wait_text("#notices", r"The history of engines cannot be read \(history: 404\)")
            self.browser.run("location.hash = '#engine=engine-1'")
            self.wait_text("#engine-trouble", r"^Its history cannot be read \(history: 404\)")
            self.until("document.querySelector('#charts .stroke').getAttribute('d').includes('L')")

    def test_the_fleet_at_a_glance(self) -> None:
        """How many engines are usable and why the others are not, what waits in all, and who stands out."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(
                datagram(engine_id="a", pending_tokens_total=1000, engine_capacity=1000, kv_cache_free_blocks=500),
                datagram(engine_id="b", pending_tokens_total=3000, engine_capacity=1000, kv_cache_free_blocks=250),
                datagram(engine_id="c", pending_tokens_total=0, engine_capacity=0, kv_cache_free_blocks=-1),
                heartbeat(engine_id="d"),
            )
            self.open(running)
            self.wait_text("#usable", "^3 of 4$")
            self.assertEqual(self.browser.text("#usable-note"), "not: load unknown 1")
            self.assertEqual(self.browser.text("#work"), "2.0s")
            self.assertEqual(self.browser.text("#work-note"), "4,000 tokens; 2,000 tokens/\u2060s of 2 engines")
            self.assertEqual([self.browser.text(f"#kv-{what}") for what in ("most", "spread .most b")], ["b", "75%"])
            self.assertEqual([self.browser.text(f"#work-{what}") for what in ("most", "spread .most b")], ["b", "3.0s"])
            self.assertEqual(self.browser.text("#modes"), "latency_optimized 3")
            self.assertEqual(self.browser.text("#phases"), "serving 4")
            label = self.browser.run("return document.querySelector('#kv-spread svg').ariaLabel")
            self.assertEqual(label, "2 engines from 50% to 75%; the highest: b")
            self.browser.click("#kv-most")
            self.wait_sheet("b")
            self.browser.press(ESCAPE)
            self.browser.run("""
              const now = clock(), { entry } = engines.get("a");
              heard({ ...entry, status: "unavailable", phase: "draining" }, now);
              render();""")
            self.wait_cell("a", "status", "^draining$")
            self.wait_text("#usable-note", "draining 1")
            self.wait_text("#phases", r"^serving 3,\s+draining 1$")
            self.wait_text("#usable", "^2 of 4$")

    def test_a_conflict_is_noted_with_both_sources_and_what_to_do(self) -> None:
        """The note names the engine and two sources, in words of the language; unfolded, it says what to do."""
        with self.gateway(STALE_THRESHOLD=60_000) as running:
            with contextlib.ExitStack() as stack:
                ports = [free_port() for _ in range(2)]
                socks = [stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) for _ in ports]
                for sock, port in zip(socks, ports, strict=True):
                    sock.bind(("127.0.0.1", port))
                for turn in range(8):
                    one = datagram(engine_id="both", timestamp_ms=turn, pending_tokens_total=turn)
                    socks[turn % 2].sendto(one, ("127.0.0.1", running.udp_port))
                    running.wait_received(turn + 1)
            wait_until("the event", lambda: "conflict" in [event["event"] for event in running.ask("/events").json])
            self.open(running)
            note = self.wait_text("#notices", r"Several senders use one engine_id \(1; the first from 127")
            self.assertEqual({int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", note)}, set(ports))
            self.assertNotIn("What to do", note)
            self.browser.click("#notices-more")
            self.wait_text("#notices", r"What to do: Find the two senders.*docs/troubleshooting\.md#conflict")
            self.wait_text("#notices .lines", r"^both: from 127\.0\.0\.1:\d+ and 127\.0\.0\.1:\d+$")
            self.wait_text("#usable-note", "conflict 1")
            self.browser.click("#events-title")
            self.wait_text("#event-list", r"both from 127\.0\.0\.1:\d+ and 127\.0\.0\.1:\d+")
            self.open(running, "?lang=zh#engine=both")
            self.wait_text("#notices", r"第一个 来自 127\.0\.0\.1:\d+ 和 127\.0\.0\.1:\d+）")
            self.wait_text("#fields", r"来自 127\.0\.0\.1:\d+ 和 127\.0\.0\.1:\d+ \(冲突\)")

    def test_who_sent_what_was_rejected(self) -> None:
        """Unfolded, a note has the last source and detail of each reason."""
        with self.gateway(STALE_THRESHOLD=60_000) as running:
            running.send(b"junk", b"{}", datagram(engine_id=5))
            self.open(running)
            self.wait_text("#notices", "Invalid datagrams in the last .*: 3")
            self.browser.click("#notices-more")
            said = self.wait_text("#notices .lines", "(?s)a field missing.*wrong type|wrong type.*a field missing")
            for line in said.splitlines():
                self.assertRegex(line, r": 1 in the last .*; the last one .* ago from 127\.0\.0\.1:\d+: \w+")
            self.assertEqual(len(said.splitlines()), 3)

    def test_the_keys(self) -> None:
        """`/` searches, arrows walk the rows, also beyond those in view, Enter opens, Esc closes, `?` lists them."""
        focus = "document.activeElement.id || document.activeElement.textContent"
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(*(datagram(engine_id=f"engine-{n}") for n in range(100)))
            self.open(running)
            self.wait_text("#live", "^100$")
            self.browser.press("?")
            self.until("document.querySelector('#keys').open")
            self.assertIn("walk the rows", self.browser.text("#keys-list") or "")
            self.browser.press(ESCAPE)
            self.until("!document.querySelector('#keys').open")
            self.browser.press("/", *"ENGINE-4")
            self.until(f"{focus} === 'find'")
            self.wait_text("#count", "^11 of 100$")
            self.browser.press(DOWN, DOWN)
            self.until(f"{focus} === 'engine-40'")
            self.browser.press(ENTER)
            self.wait_sheet("engine-40")
            self.browser.press(ESCAPE)
            self.until(f"!document.querySelector('#engine').open && {focus} === 'engine-40'")
            self.browser.press("/", *"x", ESCAPE)
            self.browser.run("document.querySelector('#find').value = ''")
            self.browser.run("document.querySelector('#find').dispatchEvent(new Event('input'))")
            self.wait_text("#count", "^100 of 100$")
            self.browser.run("document.activeElement.blur(); scrollTo(0, 0)")
            self.browser.press(DOWN)
            self.until(f"{focus} === 'engine-0'")
            self.browser.press(*[DOWN] * 60)
            self.until(f"{focus} === 'engine-60'")
            self.until("document.activeElement.getBoundingClientRect().bottom <= innerHeight")
            self.browser.press(*[UP] * 58)
            self.until(f"{focus} === 'engine-2'")
            head = "document.querySelector('#heads').getBoundingClientRect().bottom"
            self.until(f"document.activeElement.getBoundingClientRect().top >= {head}")

    def test_an_engine_as_a_curl_command(self) -> None:
        """What can be copied is run as it is, whatever the engine is called, and answers with its entry."""
        name = "a'b\"c&amp;d $(x) `y`\\"
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id=name), datagram(engine_id="other"))
            self.open(running)
            self.wait_rows(2)
            self.browser.run("location.hash = '#engine=' + encodeURIComponent(arguments[0])", name)
            self.wait_sheet(name)
            self.assertEqual(self.browser.text("#curl-copy"), "Copy as curl")
            command = self.browser.text("#curl") or ""
            self.assertRegex(command, rf"^curl -s 'http://127\.0\.0\.1:{running.http_port}/engines\?engine_id=")
            if shutil.which("curl"):
                answer = subprocess.run(["sh", "-c", command], capture_output=True, check=True, timeout=DEADLINE_S)
                self.assertEqual(list(json.loads(answer.stdout)["engines"]), [name])
            self.browser.click("#curl-copy")
            self.wait_text("#curl-copy", "^Copied$")

    def test_a_screen_on_the_wall(self) -> None:
        """?kiosk=1 has nothing to press, fills the screen without scrolling, and is larger on a larger one."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="a"), datagram(engine_id="b", phase="stuck"), b"junk")
            for width, height in ((1280, 720), (1920, 1080), (1920, 970), (1024, 768), (3840, 2160)):
                self.browser.resize(width, height)
                self.open(running, "?kiosk=1#engine=a")
                self.wait_text("#live", "^1$")
                self.wait_text("#notices", "(?s)Stuck.*Invalid datagrams")
                controls = self.browser.run("""
                  const shown = [...document.querySelectorAll("button, input, select, summary")];
                  return shown.filter((one) => one.checkVisibility()).length""")
                self.assertEqual(controls, 0)
                self.assertFalse(self.browser.run("return document.querySelector('#engine').open"))
                whole = self.browser.run("""
                  const { documentElement: page } = document, list = document.querySelector("#event-list");
                  return [page.scrollWidth <= innerWidth, page.scrollHeight <= innerHeight + 1,
                    list.getBoundingClientRect().bottom <= innerHeight, list.getBoundingClientRect().height > 20]""")
                self.assertEqual(whole, [True] * 4, width)
                size = self.browser.run("return document.querySelector('#live').getBoundingClientRect().height")
                self.assertGreater(size / min(width, height * 16 / 9), 24 / 1280)

    def test_nothing_is_cut_and_no_number_breaks_at_any_usual_width(self) -> None:
        """Neither usual values nor the largest there are, in either language."""
        self.maxDiff = None
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            modes = ("latency_optimized", "throughput_optimized", "balanced")
            phases = ("serving", "draining", "starting", "sleeping", "stuck")
            for n in range(15):
                about = {"scheduling_mode": modes[n % 3], "phase": phases[n % 5], "latency_pred_ms": 10.0**n}
                load = {"pending_tokens_total": min(2**53, 10 ** (n + 2)), "engine_capacity": 3 * 10.0 ** (2 * n)}
                running.send(datagram(engine_id=f"http://10.77.0.{n}:8000", **about, **load))
            running.send(heartbeat(engine_id="http://10.77.0.99:8000"), b"junk", b"{}", b"[]")
            found: list[str] = []
            for language in ("en", "zh"):
                self.open(running, f"?lang={language}")
                self.until("past.length > 0 && samples.length > 0 && engines.size === 16")
                self.wait_text("#rejected", "^3$")
                self.browser.run("document.querySelector('#events').open = true")
                for width in (390, 1024, 1280, 1440, 1920):
                    self.browser.resize(width, 900)
                    self.until("innerWidth === arguments[0]", width)
                    self.browser.run("document.querySelector('#table').scrollIntoView()")
                    self.until("document.querySelector('#rows tr:nth-child(5)') !== null")
                    cut = self.browser.run(CUT)
                    found += [f"{language}, {width} pixels: {one}" for one in cut]
            self.assertEqual(found, [])

    def test_language_and_theme_by_the_address_and_what_search_finds(self) -> None:
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="a", scheduling_mode="Balanced"), datagram(engine_id="b"))
            self.open(running, "?lang=zh&theme=dark#find=balanced")
            self.wait_text("#past-heading", "^发生了什么$")
            ground = self.browser.run("return getComputedStyle(document.body).backgroundColor")
            self.assertEqual(ground, "rgb(13, 17, 21)")
            wait_until("the one", lambda: self.names() == ["a"])
            running.send(
                datagram(engine_id="c", timestamp_ms=2, phase="sleeping", model="Deep-Thought", role="prefill")
            )
            for found in ("deep-thought", "role=prefill", "PREFILL", "sleeping"):
                self.browser.run("location.hash = 'find=' + arguments[0]", found)
                wait_until(f"the one found by {found}", lambda: self.names() == ["c"])
            self.browser.run("location.hash = 'find=balanced'")
            wait_until("the one", lambda: self.names() == ["a"])
            source = self.cells("a")["source"]
            self.open(running, f"?lang=en#find={source}")
            self.wait_text("#past-heading", "^What happened$")
            wait_until("both, of one source", lambda: self.names() == ["a", "b"])

    def test_what_is_seen_is_in_the_address(self) -> None:
        """Filter, sort, range and the open engine stay over a reload, whatever they are called."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            modes = ("a&b=c#%", "latency_optimized")
            running.send(
                *(
                    datagram(engine_id=f"engine&{n}", pending_tokens_total=n, scheduling_mode=modes[n % 2])
                    for n in range(10)
                )
            )
            self.open(running)
            self.wait_rows(10)
            self.assertEqual(self.browser.run("return location.hash"), "")
            self.browser.click("th.pending button")
            self.browser.run("""
              const mode = document.querySelector("#by-mode");
              mode.value = "a&b=c#%";
              mode.dispatchEvent(new Event("input"));""")
            self.browser.click("#past-range button:last-child")
            self.wait_rows(5)
            self.browser.click("#rows a")
            self.wait_sheet("engine&8")
            address = self.browser.run("return location.hash")
            self.open(running, address)
            self.wait_sheet("engine&8")
            self.browser.press(ESCAPE)
            self.until("!document.querySelector('#engine').open && location.hash")
            wait_until("the same rows", lambda: self.names() == [f"engine&{n}" for n in (8, 6, 4, 2, 0)])
            self.until("document.querySelector('#past-range button:last-child').ariaPressed === 'true'")
            self.assertEqual(self.browser.run("return location.hash"), address.partition("&")[2].join(("#", "")))

    def test_what_was_is_there_after_a_reload(self) -> None:
        """Curves, events and the tiles' last minutes come from the gateway's memory, not from the page's."""
        with self.gateway(STALE_THRESHOLD=300, EXPIRE_AFTER=900) as running:
            running.send(datagram(engine_id="vanished"), b"junk")
            wait_until("the removal", lambda: "removed" in [one["event"] for one in running.ask("/events").json])
            for _ in range(2):
                self.open(running)
                self.wait_text("#lost", "^1$")
                self.wait_text("#rejected", "^1$")
                self.assertIn("vanished", self.wait_text("#notices", "Removed after falling silent"))
                self.wait_text("#events-title", "^Events: 4 of the last")
            self.browser.click("#events-title")
            self.assertIn(
                "vanished", self.wait_text("#event-list", "(?s)removed.*went stale.*appeared.*gateway started")
            )
            self.browser.run("document.querySelector('#find-event').focus()")
            self.browser.press(*"stale")
            self.until("document.querySelectorAll('#event-list li').length === 1")
            self.browser.click("#event-list a")
            self.wait_sheet("vanished")
            self.browser.press(ESCAPE)

    def test_of_a_flood_of_removals_it_says_after_a_reload_that_there_were_more(self) -> None:
        """The gateway's memory names the first of them, and counts the rest."""
        with self.gateway(STALE_THRESHOLD=300, EXPIRE_AFTER=900) as running:
            running.send(*(datagram(engine_id=f"engine-{n}") for n in range(40)))

            def removed() -> int:
                return sum(one.get("count", 1) for one in running.ask("/events").json if one["event"] == "removed")

            wait_until("the removals", lambda: removed() == 40)
            named = sum(one["event"] == "removed" for one in running.ask("/events").json)
            self.assertLess(named, 40)
            self.open(running)
            self.wait_text("#lost", rf"^{named}\+$")
            self.wait_text("#lost-note", "removed 40")
            self.wait_text("#notices", rf"Removed after falling silent.*\({named}\+\)")

    def test_a_point_of_the_past_is_read_with_the_pointer_and_by_keyboard(self) -> None:
        """The curves say their values at one time; arrow keys move it, and Escape lets go of it."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="a", pending_tokens_total=4321))
            running.wait_received(1)
            self.open(running)
            self.until("past.length > 0")
            self.browser.run("""
              const [first] = past, later = structuredClone(first);
              later.time_ms += 10_000;
              later.uptime_s += 10;
              later.total_received = 500;
              later.fleet.usable = 7;
              later.fleet.sums.pending_tokens_total = { sum: 99, engines: 7 };
              takeSamples([later]);
              pastChanged = true;
              document.querySelector("#pasts").focus();""")
            text = "document.querySelector('#pasts').ariaValueText"
            self.until(f"{text}.startsWith('now; ') && {text}.includes('Usable / stale 1 / 0; Pending tokens 4,321;')")
            self.browser.press(RIGHT)
            self.until(f"{text}.includes('States a second 50; Usable / stale 7 / 0; Pending tokens 99;')")
            self.browser.press(LEFT)
            self.until(f"{text}.includes('Usable / stale 0 / 0;')")
            self.until("!document.querySelector('#pasts .pin').hidden")
            self.browser.press(ESCAPE)
            self.until("document.querySelector('#pasts .pin').hidden")
            self.until("document.querySelector('#pasts .starts').getAttribute('d') !== ''")
            self.browser.click("#past-range button:last-child")
            self.until("document.querySelector('#pasts .axis span').textContent !== ''")

    def test_no_line_is_drawn_over_what_nobody_remembers(self) -> None:
        """A curve ends where the gateway stood still or was restarted, and goes on where only its clock was set."""
        lives = "return past.map(({ at, begins }) => [at - past.at(-1).at, begins]).slice(-3)"
        lines = "return document.querySelector('#pasts .stroke').getAttribute('d').split('M').length - 1"
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            self.open(running)
            self.until("past.length > 0")
            take = """
              const last = past.at(-1), [ms, seconds, received] = arguments;
              takeSamples([{ ...structuredClone(last), time_ms: last.time_ms + ms, uptime_s: last.uptime_s + seconds,
                total_received: received }]);
              drawPast(clock());"""
            self.browser.run("past = []; takeSamples([{ ...arguments[0], uptime_s: 100 }])", self.memory(running)[0])
            for received in (10, 20, 30):
                self.browser.run(take, 10_000, 10, received)
            self.assertEqual(self.browser.run(lines), 1)
            self.browser.run(take, -3_590_000, 10, 40)
            self.browser.run(take, 10_000, 10, 50)
            self.assertEqual(self.browser.run(lives), [[-20_000, False], [-10_000, False], [0, False]])
            self.assertEqual(self.browser.run(lines), 1, "the clock was set back by an hour")
            self.browser.run(take, 30_000, 30, 60)
            self.browser.run(take, 10_000, 10, 70)
            self.assertEqual(self.browser.run(lines), 2, "it stood still for half a minute")
            self.browser.run(take, 10_000, -150, 0)
            self.browser.run(take, 10_000, 10, 10)
            self.assertEqual(self.browser.run(lives), [[-20_000, False], [-10_000, True], [0, False]])
            self.assertEqual(self.browser.run(lines), 3, "it was restarted")
            self.browser.run("past = past.slice(-2, -1)")
            self.browser.run(take, 7_000, 0.1, 5)
            self.assertEqual(self.browser.run(lives), [[-7_000, True], [0, True]], "it ends and starts again and again")

    def memory(self, running: Daemon) -> Any:
        """What /samples says, once it has one."""
        return wait_until("a sample", lambda: running.ask("/samples").json)

    def test_what_is_wrong_is_said_in_words(self) -> None:
        """What was rejected is said with its reason, also what was rejected before the page was opened."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="good"), b"[]")
            running.wait_received(2)
            self.open(running)
            self.wait_text("#notices", r"Invalid datagrams in the last .*: 1 \(not an object 1\)\.")
            self.wait_text("#rejected", "^1$")
            running.send(b"junk", b"junk", b"{}", datagram(engine_id="good"))
            self.wait_text("#notices", r"Invalid datagrams in the last .*: 4 \(not JSON 2, .*a field missing 1.*\)\.")
            self.assertNotIn("All is well", self.browser.text("#notices") or "")
            self.assertEqual(self.browser.text("#rejected"), "4")
            self.wait_text("#rejected-note", "no fault: duplicates 1$")
            self.browser.click("#counters-title")
            self.wait_text("#counters", r"(?i)rejected: not an object\s+1 \(\+1\)\n")

    def test_every_counter_is_that_of_the_statistics(self) -> None:
        """Each counter of /stats is on the page, with a name in words, and exactly as it is, however large."""
        words = "return Object.fromEntries(arguments[0].map((path) => [path, nameOf(path)]))"
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            for turn in range(3):
                running.send(*(datagram(engine_id=f"e{n}", timestamp_ms=turn) for n in range(5)), b"junk", b"{}")
            running.send(heartbeat(engine_id="e1"), datagram(engine_id="e2", timestamp_ms=2), datagram(more=[1]))
            running.wait_received(24)
            self.open(running)
            self.wait_text("#live", "^6$")
            self.browser.click("#counters-title")
            self.until("samples.length > 1")
            shown = self.browser.run("""
              const pairs = [...document.querySelectorAll("#counters div")].map((one) => [...one.children]);
              return pairs.map(([name, value]) => [name.textContent, value.textContent.replace(/ \\(\\+.*/, "")])""")
            stats = self.browser.run("return samples.at(-1).stats")
            named = self.browser.run(words, counter_paths())
            on_page = {name.removeprefix("Rejected: "): value for name, value in shown}
            for path in counter_paths():
                value = stats
                for part in path.split("."):
                    value = value[part]
                expected = "unknown" if value is None else f"{value:,}"
                self.assertEqual(on_page[named[path]], expected, path)
            self.assertEqual(self.browser.run("return exact(9007199254740991)"), "9,007,199,254,740,991")
            self.assertEqual(len(shown), len(counter_paths()), "and nothing else")

    def test_by_keyboard(self) -> None:
        """An engine is opened by Enter and closed by Escape, and the focus is where it was; Enter sorts."""
        focus = "return document.activeElement.id || document.activeElement.innerText"
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(*(datagram(engine_id=f"engine-{n}", pending_tokens_total=n) for n in (1, 2, 10)))
            self.open(running)
            self.wait_rows(3)
            self.browser.run("document.querySelector('#rows a').focus()")
            self.browser.press(TAB)
            self.assertEqual(self.browser.run(focus), "engine-2", "names are sorted by their numbers")
            self.browser.press(ENTER)
            self.wait_text("#engine[open] #engine-name", "^engine-2$")
            self.assertEqual(self.browser.run(focus), "engine-close")
            self.until("document.querySelector('#charts .stroke').getAttribute('d')")
            self.browser.press(ESCAPE)
            wait_until("the focus", lambda: self.browser.run(focus) == "engine-2")
            self.browser.run("document.querySelector('th.pending button').focus()")
            self.browser.press(ENTER)
            wait_until("the order", lambda: self.browser.text("#rows a") == "engine-10")
            self.browser.press(ENTER)
            wait_until("the order", lambda: self.browser.text("#rows a") == "engine-1")

    def test_narrow_screens(self) -> None:
        """At no width does the page have to be moved sideways, and at each an engine can be read."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(datagram(engine_id="x" * 256), datagram(engine_id="y"), b"junk")
            self.open(running)
            self.wait_rows(2)
            for width in (320, 360, 700, 701, 900, 1200, 1420, 2560):
                self.browser.resize(width, 700)
                self.until("innerWidth === arguments[0]", width)
                self.browser.run("document.querySelector('#table').scrollIntoView()")
                self.assertLessEqual(self.browser.run("return document.documentElement.scrollWidth"), width)
                self.assertEqual([self.cells("y")[name] for name in ("status", "name", "kv")], ["live", "y", "90%"])
                outside = self.browser.run("""
                  const shown = [...document.querySelectorAll("td.age, td.kv, .tile, .tools > *")].filter(
                    (one) => one.getClientRects().length);
                  return shown.filter((one) => one.getBoundingClientRect().right > innerWidth).length""")
                self.assertEqual(outside, 0, width)

    def test_nothing_jumps_while_a_fleet_flaps(self) -> None:
        """Notices come and go, counts and rows change, and no box moves: from the first picture on."""
        watching = """
          globalThis.shift = 0;
          globalThis.moved = [];
          new PerformanceObserver((list) => {
            for (const { value, sources } of list.getEntries()) {
              shift += value;
              moved.push([value, ...sources.map(({ node }) => node?.id || node?.className || node?.nodeName)]);
            }
          }).observe({ type: "layout-shift", buffered: true });"""
        script = self.browser.command("Page.addScriptToEvaluateOnNewDocument", source=watching)
        try:
            with self.gateway(STALE_THRESHOLD=400, EXPIRE_AFTER=1200) as running:

                def push(turn: int) -> None:
                    there = (n for n in range(200) if (n + turn // 20) % 3)
                    running.send(*(datagram(engine_id=f"engine-{n}", timestamp_ms=turn) for n in there), b"junk")

                with again_and_again(0.1, push):
                    self.open(running)
                    self.wait_text("#notices", "Silent, and removed if that lasts")
                    self.browser.run("""
                      globalThis.seen = new Set();
                      globalThis.wrong = new Set();
                      const numberIn = (id) => parseInt(document.getElementById(id).textContent);
                      const label = pastCharts.find(({ name }) => name === "past_engines").now;
                      (function look() {
                        const said = ["live", "stale", "usable"].map(numberIn), [live, stale, usable] = said;
                        seen.add(said.join());
                        const agree = live === usable && shown.length && label.textContent === `${usable} / ${stale}`;
                        if (!agree) wrong.add(`${said}: ${label.textContent}`);
                        requestAnimationFrame(look);
                      })()""")
                    self.wait_text("#notices", "Removed after falling silent")
                    said = "document.querySelector('#notices').firstChild.innerText"
                    for _ in range(5):
                        before = self.browser.run(f"return {said}")
                        self.until(f"{said} !== arguments[0]", before)
                    for enough in ("seen.size > 2", "samples.length > 2", "events.length > 100"):
                        self.until(enough)
                    self.assertEqual(self.browser.run("return [...wrong]"), [], "live, stale, usable, and the curve's")
                moved = self.browser.run("return moved")
                self.assertLess(self.browser.run("return shift"), 0.05, moved)
        finally:
            self.browser.command("Page.removeScriptToEvaluateOnNewDocument", identifier=script["identifier"])

    def test_no_row_moves_under_the_pointer(self) -> None:
        """Sorted by what changes, rows stay while the pointer is over them, and settle when it leaves."""
        with self.gateway(STALE_THRESHOLD=600_000) as running:
            running.send(*(datagram(engine_id=f"e{n}", pending_tokens_total=n) for n in range(5)))
            self.open(running)
            self.wait_rows(5)
            self.browser.click("th.pending button")
            wait_until("the busiest first", lambda: self.names() == ["e4", "e3", "e2", "e1", "e0"])
            self.browser.run("document.querySelector('#table').scrollIntoView()")
            box = self.browser.run("return document.querySelector('#rows tr').getBoundingClientRect().toJSON()")
            self.browser.point(box["x"] + 600, box["y"] + 10)
            self.until("isOver")
            busy = [
                datagram(engine_id=f"e{n}", timestamp_ms=2_000_000_000, pending_tokens_total=9 - n) for n in range(5)
            ]
            running.send(*busy, datagram(engine_id="new", pending_tokens_total=50))
            self.wait_cell("e0", "pending", "^9$")
            self.wait_cell("new", "pending", "^50$")
            self.assertEqual(self.names(), ["e4", "e3", "e2", "e1", "e0", "new"])
            self.browser.point(5, 5)
            wait_until("the order of now", lambda: self.names() == ["new", "e0", "e1", "e2", "e3", "e4"])

    def test_a_thousand_engines(self) -> None:
        """They are all there, few are in the document, and frames go on while each pushes five times a second."""
        with self.gateway(STALE_THRESHOLD=20_000) as running, pushing(running, 1000, 0.2):
            self.open(running)
            self.wait_text("#live", "^1,000$")
            self.until("document.title === '1000 live, 0 stale - state gateway'")
            self.until("document.querySelector('#table').ariaRowCount === '1001'")
            self.assertLess(self.browser.run("return document.querySelectorAll('#rows tr').length"), 60)
            self.browser.run("""
              window.gaps = [];
              let last = performance.now();
              (function frame() {
                gaps.push(performance.now() - last);
                last = performance.now();
                requestAnimationFrame(frame);
              })()""")
            self.until("gaps.length > 200")
            frames = sorted(self.browser.run("return gaps"))
            self.assertLess(frames[len(frames) // 2], 50, "ms, the median")
            self.assertLess(frames[-1], 1000, "ms, the longest")
            self.browser.run("scrollTo(0, document.documentElement.scrollHeight)")
            self.cells("engine-999")
            self.browser.run("scrollTo(0, 0)")
            self.browser.click("th.pending button")
            wait_until("the busiest at the top", lambda: self.browser.text("#rows a") == "engine-999")
            self.browser.run("document.querySelector('#find').focus()")
            self.browser.press(*"ENGINE-77")
            self.wait_text("#count", "^11 of 1,000$")
            self.wait_rows(11)
            self.browser.press(ESCAPE)
            self.wait_text("#count", "^1,000 of 1,000$")


if __name__ == "__main__":
    unittest.main()
