"""Two gateways for the same engines: their examples, and what readers see while one of the two is away."""

from __future__ import annotations

import copy
import tempfile
import unittest
from pathlib import Path
from typing import Any

import engine_agent
from config import SETTINGS, read_config, unknown_variables
from tests.harness import TOP, daemon, datagram, wait_until
from tests.test_config_examples import applied_files, manifests

FOLDER = TOP / "config_examples" / "two-gateways"
COMPOSE = TOP / "config_examples" / "compose" / "two-gateways.yaml"


def objects(paths: list[Path]) -> dict[tuple[str, str], Any]:
    return {(one["kind"], one["metadata"]["name"]): one for one in manifests(*paths)}


def pod_of(deployment: Any) -> Any:
    return deployment["spec"]["template"]["spec"]


class Kubernetes(unittest.TestCase):
    """The folder of two is the example of one, but for what two need."""

    def setUp(self) -> None:
        self.one, self.two = objects(applied_files()), objects(sorted(FOLDER.glob("*.yaml")))
        self.deployment = self.two["Deployment", "elrar-state-gateway"]
        self.settings: dict[str, str] = self.two["ConfigMap", "elrar-state-gateway"]["data"]

    def test_the_same_objects_and_names(self) -> None:
        """Engines and readers go on as they are when it takes the place of the other."""
        self.assertEqual(self.two.keys() - self.one.keys(), {("Service", "elrar-state-gateway-each")})
        self.assertEqual(self.one.keys() - self.two.keys(), set())
        self.assertEqual({path.name for path in FOLDER.iterdir()}, {path.name for path in applied_files()})
        for name in self.one:
            if name[0] not in ("ConfigMap", "Deployment"):
                with self.subTest(name):
                    self.assertEqual(self.two[name], self.one[name])

    def test_what_is_not_for_two_is_as_for_one(self) -> None:
        expected = copy.deepcopy(self.one["Deployment", "elrar-state-gateway"])
        found = copy.deepcopy(self.deployment)
        for deployment in (expected, found):
            for name in ("replicas", "strategy"):
                del deployment["spec"][name]
            pod_of(deployment).pop("affinity", None)
            for name in ("startupProbe", "readinessProbe"):
                del pod_of(deployment)["containers"][0][name]
        self.assertEqual(found, expected)
        settings = {**self.one["ConfigMap", "elrar-state-gateway"]["data"]}
        self.assertEqual(self.settings.items() - settings.items(), {("VLLM_STATE_GATEWAY_READY_AFTER", "15000")})

    def test_one_is_always_there(self) -> None:
        """Neither a rollout nor drains nor the loss of one node takes both."""
        spec = self.deployment["spec"]
        self.assertEqual(spec["replicas"], 2)
        self.assertEqual(spec["strategy"]["rollingUpdate"], {"maxSurge": 0, "maxUnavailable": 1})
        self.assertEqual(self.two["PodDisruptionBudget", "elrar-state-gateway"]["spec"]["maxUnavailable"], 1)
        (term,) = pod_of(self.deployment)["affinity"]["podAntiAffinity"][
            "requiredDuringSchedulingIgnoredDuringExecution"
        ]
        labels = spec["template"]["metadata"]["labels"]
        self.assertEqual(term["topologyKey"], "kubernetes.io/hostname")
        self.assertLessEqual(term["labelSelector"]["matchLabels"].items(), labels.items())

    def test_datagrams_come_before_readers(self) -> None:
        """A pod that starts is sent datagrams at once, and readers only once it has heard of the engines."""
        for name, published in (("udp", True), ("each", True), ("http", None)):
            service = self.two["Service", f"elrar-state-gateway-{name}"]["spec"]
            self.assertEqual(service.get("publishNotReadyAddresses"), published)
            self.assertEqual(service.get("clusterIP"), "None" if published else None)
        (container,) = pod_of(self.deployment)["containers"]
        self.assertEqual(container["readinessProbe"]["httpGet"]["path"], "/readyz")
        self.assertEqual(container["startupProbe"]["httpGet"]["path"], "/livez")
        look_up_ms = engine_agent.LOOK_UP_EVERY_S * 1000
        config = read_config(self.settings)
        self.assertEqual(unknown_variables(self.settings), [])
        self.assertGreaterEqual(config.ready_after_ms, look_up_ms + 5000 + 2000)  # a DNS's memory; a heartbeat's period

    def test_no_port_number_is_listed_twice(self) -> None:
        for (kind, _), one in self.two.items():
            if kind == "Service":
                self.assertEqual(len(one["spec"]["ports"]), 1)


class Compose(unittest.TestCase):
    def test_it_sets_what_is_a_setting(self) -> None:
        text = COMPOSE.read_text(encoding="utf-8")
        lines = [line.strip() for line in text.splitlines() if line.strip().startswith("VLLM_")]
        environ = dict(line.replace('"', "").split(": ") for line in lines)
        self.assertEqual(len(lines), 3)
        self.assertLessEqual(environ.keys(), {setting.variable for setting in SETTINGS})
        self.assertEqual(read_config(environ).http_port, 9998)

    def test_the_agent_takes_what_it_says(self) -> None:
        (line,) = [line for line in COMPOSE.read_text(encoding="utf-8").splitlines() if "ELRAR_GATEWAY_HOST=" in line]
        value = line.split("ELRAR_GATEWAY_HOST=")[1].split(" ")[0].replace("<host>", "10.0.0.5")
        gateways = engine_agent.read_settings({"ELRAR_GATEWAY_HOST": value}).gateways
        self.assertEqual([(one.host, one.port) for one in gateways], [("10.0.0.5", 9999), ("10.0.0.5", 9998)])


class ReadyAfter(unittest.TestCase):
    def test_it_answers_before_it_is_ready(self) -> None:
        """Datagrams are taken and questions answered; only /readyz says that another is the better one to ask."""
        with tempfile.TemporaryDirectory() as folder, daemon(Path(folder), READY_AFTER=3_600_000) as running:
            answer = running.ask("/readyz")
            self.assertEqual(answer.status, 503)
            self.assertRegex(answer.json["status"], r"^not ready: for another 3[0-9]{6} ms, by READY_AFTER$")
            self.assertEqual(running.ask("/livez").status, 200)
            running.send(datagram(engine_id="early"))
            running.wait_received(1)
            self.assertEqual(running.ask("/engines/early").status, 200)

    def test_it_becomes_ready(self) -> None:
        with tempfile.TemporaryDirectory() as folder, daemon(Path(folder), READY_AFTER=700) as running:
            wait_until("it is ready", lambda: running.ask("/readyz").status == 200)
            self.assertGreaterEqual(running.ask("/engines").json["uptime_ms"], 700)


if __name__ == "__main__":
    unittest.main()
