"""config_examples for systemd, logrotate, Prometheus and Grafana: what they name exists, in the daemon that is here.

.ci/monitoring tries them with the tools that they are for; here is what needs no tool but logrotate.
"""

from __future__ import annotations

import contextlib
import getpass
import grp
import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from config import SETTINGS
from query_connection import RESERVE_CONNECTIONS
from query_server import MAX_CONNECTIONS
from tests.harness import DEADLINE_S, TOP, daemon, datagram, heartbeat
from tests.test_faults import honest_engines

EXAMPLES = TOP / "config_examples"
UNIT = EXAMPLES / "systemd" / "elrar-state-gateway.service"
LOGROTATE = EXAMPLES / "logrotate" / "elrar-state-gateway"
PROMETHEUS = EXAMPLES / "prometheus" / "prometheus.yaml"
ALERTS = EXAMPLES / "prometheus" / "alerts.yaml"
ALERTS_TEST = EXAMPLES / "prometheus" / "alerts_test.yaml"
DASHBOARD = EXAMPLES / "grafana" / "elrar-state-gateway.json"
MINE = (UNIT, *sorted(UNIT.parent.glob("*.conf")), LOGROTATE, PROMETHEUS, ALERTS, ALERTS_TEST, DASHBOARD)

DEFAULTS = {setting.name: setting.default for setting in SETTINGS}
METRIC = re.compile(r"\belrar_state_gateway_[a-z_]*[a-z]\b")
SELECTOR = re.compile(r"\b(elrar_state_gateway_[a-z_]*[a-z])\{([^}]*)\}")
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')
OF_THE_SCRAPE = ("job", "instance", "pool")  # labels that Prometheus adds


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


class Page(unittest.TestCase):
    """Nothing asks for a series that a real daemon's /metrics page does not have."""

    samples: list[tuple[str, dict[str, str]]]  # name and labels of each on the page
    counts_kernel_drops: bool

    @classmethod
    def setUpClass(cls) -> None:
        with daemon(BIND_ADDRESS="127.0.0.1") as running:
            running.send(datagram(engine_id="busy"), heartbeat(engine_id="idle"))
            running.send(datagram(engine_id="hung", boot="b", seq=1, phase="stuck", model="m", role="both"))
            running.send(datagram(engine_id="well", boot="b", seq=1, phase="serving", model="m", role="both"))
            running.wait_received(4)
            cls.counts_kernel_drops = running.stats()["kernel_dropped"] is not None
            page = running.ask("/metrics").body.decode()
        cls.samples = [
            (match[1], dict(re.findall(r'(\w+)="([^"]*)"', match[2] or "")))
            for match in re.finditer(r"^(\w+)(?:\{(.*)\})? \S+$", page, re.MULTILINE)
        ]

    def names(self) -> set[str]:
        names = {name for name, _ in self.samples}
        self.assertIn("elrar_state_gateway_engine_live", names)
        if not self.counts_kernel_drops:  # not Linux
            names.add("elrar_state_gateway_kernel_dropped_datagrams_total")
        return names

    def test_every_metric_that_is_named_is_there(self) -> None:
        for path in (ALERTS, ALERTS_TEST, DASHBOARD):
            named = set(METRIC.findall(text(path)))
            self.assertTrue(named, path)
            self.assertEqual(named - self.names(), set(), path)

    def test_every_label_that_is_asked_for_is_there_with_that_value(self) -> None:
        expressions = text(ALERTS) + text(ALERTS_TEST) + "\n".join(dashboard_expressions())
        asked = 0
        for selector in SELECTOR.finditer(expressions):
            for label, operator, value in MATCHER.findall(selector[2]):
                if label in (*OF_THE_SCRAPE, "engine_id"):
                    continue
                there = {labels.get(label) for name, labels in self.samples if name == selector[1]}
                for alternative in value.split("|") if operator.endswith("~") else [value]:
                    asked += 1
                    self.assertIn(alternative, there, selector[0])
        self.assertGreater(asked, 10)

    def test_every_label_that_is_grouped_by_or_shown_is_there(self) -> None:
        labels = {label for _, labels in self.samples for label in labels}
        labels |= {*OF_THE_SCRAPE, "alertname", "severity"}
        shown = text(ALERTS) + text(DASHBOARD)
        grouped = [part for by in re.findall(r"\b(?:by|without) \(([^)]*)\)", shown) for part in by.split(", ")]
        grouped += re.findall(r"\$labels\.(\w+)", shown) + re.findall(r"\{\{(\w+)\}\}", shown)
        self.assertIn("engine_id", grouped)
        self.assertEqual(set(grouped) - labels, set())

    def test_the_series_that_prometheus_may_drop_are_there(self) -> None:
        dropped = re.findall(r"regex: (elrar_\S+)", text(PROMETHEUS))
        self.assertEqual(len(dropped), 2)
        for pattern in dropped:  # of load, and of all that single engines have
            hit = {name for name in self.names() if re.fullmatch(pattern, name)}
            self.assertTrue(hit, pattern)
            for alternative in re.findall(r"\((.*)\)", pattern):
                self.assertEqual(len(hit), len(alternative.split("|")), pattern)
            self.assertTrue(all("engine_id" in labels for name, labels in self.samples if name in hit), pattern)
        self.assertFalse([name for name in METRIC.findall(text(ALERTS)) if re.fullmatch(dropped[0], name)])

    def test_an_engine_has_as_many_series_as_prometheus_yaml_says(self) -> None:
        series = sum(labels.get("engine_id") == "busy" for _, labels in self.samples)
        self.assertIn(f"Each engine has {series} series", text(PROMETHEUS))


class Alerts(unittest.TestCase):
    """Each alert says how bad it is, what is wrong and what to do, and is proved to fire."""

    def alerts(self) -> Iterator[tuple[str, str]]:
        """Each alert's name and its block."""
        blocks = re.split(r"^ *- alert: ", text(ALERTS), flags=re.MULTILINE)[1:]
        self.assertGreater(len(blocks), 10)
        for block in blocks:
            yield block.split("\n", 1)[0], block

    def test_each_is_whole(self) -> None:
        for _, block in self.alerts():
            for wanted in (r" expr: ", r" severity: (critical|warning|info)\n", r" summary: ", r" description: >-\n"):
                self.assertRegex(block, wanted)

    def test_names_are_unique(self) -> None:
        names = [name for name, _ in self.alerts()]
        self.assertEqual(len(names), len(set(names)))

    def test_each_is_fired_by_a_test(self) -> None:
        fired = set(re.findall(r'alertname="(\w+)", alertstate="firing"', text(ALERTS_TEST)))
        self.assertEqual(fired, {name for name, _ in self.alerts()})

    def test_those_that_need_single_engines_have_names_that_say_so(self) -> None:
        for name, block in self.alerts():
            expression = block.partition("labels:")[0]
            self.assertEqual("_engine_" in expression, bool(re.match("ElrarEngine(?!s)", name)), name)

    def test_there_is_never_one_an_engine(self) -> None:
        for name, block in self.alerts():
            expression = block.partition("labels:")[0]
            if "_engine_" in expression:
                self.assertIn("count without (engine_id) (", expression, name)

    def test_the_job_is_the_one_that_is_scraped(self) -> None:
        jobs = set(re.findall(r'job="([^"]*)"', text(ALERTS)))
        self.assertEqual(jobs, set(re.findall(r"^  - job_name: (\S+)", text(PROMETHEUS), re.MULTILINE)))

    def test_the_receive_buffer_is_what_is_asked_for(self) -> None:
        self.assertIn(f"elrar_state_gateway_receive_buffer_bytes < {DEFAULTS['RECEIVE_BUFFER']}\n", text(ALERTS))


def dashboard() -> Any:
    return json.loads(text(DASHBOARD))


def panels() -> list[Any]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def dashboard_expressions() -> list[str]:
    expressions = [target["expr"] for panel in panels() for target in panel["targets"]]
    return expressions + [one["expr"] for one in dashboard()["annotations"]["list"] if "expr" in one]


class Dashboard(unittest.TestCase):
    """It can be imported as it is, explains itself, and stays usable with thousands of engines."""

    def test_each_panel_explains_itself(self) -> None:
        for panel in panels():
            self.assertTrue(panel["title"])
            self.assertRegex(panel["description"], r"\.$", panel["title"])
            if panel["type"] != "table":
                self.assertTrue(panel["fieldConfig"]["defaults"]["unit"], panel["title"])

    def test_no_data_source_is_built_in(self) -> None:
        self.assertEqual({one["uid"] for one in found(dashboard(), "datasource")}, {"${datasource}", "-- Grafana --"})
        self.assertEqual(dashboard()["templating"]["list"][0]["name"], "datasource")
        self.assertIsNone(dashboard()["id"])

    def test_every_variable_is_declared(self) -> None:
        declared = {variable["name"] for variable in dashboard()["templating"]["list"]}
        used = set(re.findall(r"\$\{?([a-z]\w*)", text(DASHBOARD)))
        self.assertEqual(used, declared)

    def test_panels_have_places_and_numbers_of_their_own(self) -> None:
        everything = dashboard()["panels"]
        self.assertEqual(len({panel["id"] for panel in everything}), len(everything))
        taken: set[tuple[int, int]] = set()
        for panel in everything:
            at = panel["gridPos"]
            cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
            self.assertFalse(cells & taken, panel["title"])
            self.assertTrue(all(x < 24 for x, _ in cells), panel["title"])
            taken |= cells

    def test_no_panel_draws_a_line_for_every_engine(self) -> None:
        bounded = re.compile(r"^(topk\(\$top,|max\b|sum\b|count\b|quantile\b)")
        for expression in dashboard_expressions():
            if "_engine_" in expression and not bounded.match(expression):
                selectors = re.findall(r"_engine_\w+\{[^}]*\}", expression)
                self.assertTrue(all('engine_id="$engine"' in one for one in selectors), expression)

    def test_what_is_unknown_is_not_shown_as_a_load(self) -> None:
        """Heartbeats' zeros and -1 are left out, and a capacity that is unknown adds nothing to a sum."""
        for expression in dashboard_expressions():
            for name in METRIC.findall(expression):
                if name.endswith(("pending_tokens", "latency_pred_seconds")):
                    self.assertRegex(expression, r" and elrar_state_gateway_engine_heartbeat\{[^}]*\} == 0")
                if name.endswith("kv_cache_free_blocks"):
                    self.assertRegex(expression, name + r"\{[^}]*\} >= 0\)")
                if name.endswith("kv_cache_total_blocks"):
                    self.assertRegex(expression, name + r"\{[^}]*\} > 0\)")


def found(document: Any, key: str) -> Iterator[Any]:
    """Every value of a key, at any depth."""
    if isinstance(document, dict):
        if key in document:
            yield document[key]
        for value in document.values():
            yield from found(value, key)
    elif isinstance(document, list):
        for value in document:
            yield from found(value, key)


def directives(path: Path) -> dict[str, list[str]]:
    """The settings of a unit file; one may be there more than once."""
    settings: dict[str, list[str]] = {}
    for line in text(path).splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            settings.setdefault(name, []).append(value)
    return settings


class Systemd(unittest.TestCase):
    """The unit agrees with the daemon, with the settings' defaults and with the files beside it."""

    def one(self, name: str) -> str:
        (value,) = directives(UNIT)[name]
        return value

    def test_it_is_given_the_time_that_the_daemon_takes(self) -> None:
        self.assertEqual(self.one("Type"), "notify")
        self.assertGreater(int(self.one("TimeoutStopSec")), 5)
        self.assertGreater(int(self.one("WatchdogSec")), 10)

    def test_bad_settings_are_not_tried_again(self) -> None:
        self.assertEqual(self.one("Restart"), "on-failure")
        self.assertEqual(self.one("RestartPreventExitStatus"), "2")
        self.assertEqual(self.one("StartLimitIntervalSec"), "0")

    def test_there_are_enough_descriptors_for_every_connection(self) -> None:
        connections = MAX_CONNECTIONS + RESERVE_CONNECTIONS
        self.assertGreater(int(self.one("LimitNOFILE")), 2 * connections)
        self.assertIn(f"# {connections} HTTP connections", text(UNIT))

    def test_the_user_is_the_one_that_sysusers_makes_and_logrotate_becomes(self) -> None:
        user, group = self.one("User"), self.one("Group")
        self.assertRegex(text(UNIT.parent / "sysusers.conf"), rf"(?m)^u {user} - ")
        self.assertRegex(text(LOGROTATE), rf"(?m)^ +su {user} {group}$")

    def test_logrotate_rotates_the_log_that_the_unit_writes(self) -> None:
        folder = self.one("LogsDirectory")
        self.assertEqual(self.one("WorkingDirectory"), f"%L/{folder}")
        self.assertRegex(text(LOGROTATE), rf"(?m)^/var/log/{folder}/{DEFAULTS['LOG_FILE']} {{$")

    def test_the_kernel_allows_the_receive_buffer_that_is_asked_for(self) -> None:
        self.assertIn(f"\nnet.core.rmem_max = {DEFAULTS['RECEIVE_BUFFER']}\n", text(UNIT.parent / "sysctl.conf"))


class Paths(unittest.TestCase):
    def test_every_example_that_is_named_is_there(self) -> None:
        named = {name for path in MINE for name in re.findall(r"config_examples(/[\w./-]*\w)", text(path))}
        self.assertTrue(named)
        for name in sorted(named):
            self.assertTrue((EXAMPLES / name[1:]).exists(), name)

    def test_every_setting_that_is_named_is_there(self) -> None:
        variables = {setting.variable for setting in SETTINGS}
        for path in MINE:
            self.assertEqual(set(re.findall(r"VLLM_STATE_GATEWAY_\w+", text(path))) - variables, set(), path)

    def test_nothing_but_manifests_is_applied_by_kubectl(self) -> None:
        """kubectl takes every .yaml, .yml and .json at the top level: these files are all below it."""
        self.assertFalse([path for path in MINE if path.parent == EXAMPLES])


class Logrotate(unittest.TestCase):
    """The example, run by the real logrotate with the log's path and its user replaced."""

    @unittest.skipUnless(shutil.which("logrotate"), "logrotate is not on this machine")
    def test_rotated_and_compressed_under_load_nothing_is_lost(self) -> None:
        try:
            user, group = getpass.getuser(), grp.getgrgid(os.getgid()).gr_name
        except KeyError:
            self.skipTest("logrotate asks for names, and this user has none")
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            log = folder / DEFAULTS["LOG_FILE"]
            configuration = folder / "configuration"
            example = text(LOGROTATE).replace(f"/var/log/elrar-state-gateway/{log.name}", str(log))
            example = re.sub(r"(?m)^( +su) .*", rf"\1 {user} {group}", example)
            configuration.write_text(example)
            configuration.chmod(0o644)
            running = stack.enter_context(daemon(folder, BIND_ADDRESS="127.0.0.1", LOG_MAX_BYTES=0))
            with honest_engines(running, 200):
                for _ in range(3):
                    received = running.stats()["total_received"]
                    running.wait_received(received + 400)
                    command = ["logrotate", "--force", "--state", str(folder / "state"), str(configuration)]
                    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
                    self.assertEqual((done.returncode, done.stderr), (0, ""))
            self.assertEqual(running.stop(), 0)
            files = sorted(path.name for path in folder.glob(f"{log.name}*"))
            self.assertEqual(files, [log.name, *(f"{log.name}{end}" for end in (".1", ".2.gz", ".3.gz"))])
            logged = 0
            for name in files:
                data = (folder / name).read_bytes()
                data = gzip.decompress(data) if name.endswith(".gz") else data
                documents = [json.loads(line) for line in data.splitlines()]
                logged += sum("state" in document for document in documents)
                if name == log.name:
                    self.assertEqual(documents[-1]["event"], "gateway_stopped")
                    taken = documents[-1]["valid_states"]
            self.assertGreater(logged, 1200)
            self.assertEqual(logged, taken)
