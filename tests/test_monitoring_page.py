"""docs/monitoring.md lists the metrics that the daemon has and the alerts that there are, and nothing else."""

from __future__ import annotations

import re
import unittest

from tests.documents import read, rows, twin
from tests.harness import daemon, datagram
from tests.test_monitoring_examples import ALERTS

PAGE = "docs/monitoring.md"
PREFIX = "elrar_state_gateway_"
OF_LINUX = ("kernel_dropped_datagrams_total", "process_resident_memory_bytes")


def metrics_page() -> str:
    """/metrics of a gateway that has heard from an engine which says all that it can say."""
    further = {"model": "m", "role": "both", "num_requests_running": 1, "num_requests_waiting": 2}
    with daemon(BIND_ADDRESS="127.0.0.1") as running:
        running.send(datagram(boot="b", seq=1, phase="serving", **further))
        running.wait_received(1)
        return running.ask("/metrics").body.decode()


class Page(unittest.TestCase):
    """What is looked up there is right, to the letter."""

    def test_it_lists_exactly_the_metrics_of_the_daemon(self) -> None:
        text = metrics_page()
        types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
        found = {}
        for name, meaning in re.findall(r"^# HELP (\S+) (.*)$", text, re.MULTILINE):
            labels = {label for one in re.findall(rf"^{name}\{{(.*)\}} ", text, re.MULTILINE)
                      for label in re.findall(r'(\w+)="', one)}  # fmt: skip
            found[name.removeprefix(PREFIX)] = (types[name], labels, meaning)
        listed = {}
        for row in rows(PAGE):
            cells = [cell.strip() for cell in row.strip("|").split("|")]
            if len(cells) == 4 and cells[1] in ("gauge", "counter"):
                listed[cells[0].strip("`")] = (cells[1], set(re.findall(r"`(\w+)`", cells[2])), cells[3])
        for name in OF_LINUX:
            found.setdefault(name, listed[name])
        self.assertEqual(listed, found)

    def test_it_lists_exactly_the_alerts(self) -> None:
        alerts = re.findall(r"- alert: (\w+)\n.*?severity: (\w+)", ALERTS.read_text(encoding="utf-8"), re.DOTALL)
        for page in (PAGE, twin(PAGE)):
            listed = re.findall(r"^\| `(Elrar\w+)` \| (\w+) \|", read(page), re.MULTILINE)
            self.assertEqual(sorted(listed), sorted(alerts))


if __name__ == "__main__":
    unittest.main()
