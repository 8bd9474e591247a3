"""The Kubernetes examples: they agree with the settings, with each other, with the image and with the engines' side.

Against the Kubernetes schemas they are checked in .ci/kubernetes, which also holds `read_documents` to a real parser.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import textwrap
import unittest
import urllib.parse
from pathlib import Path
from typing import Any

import engine_agent
from config import SETTINGS, Config, ConfigError, read_config, unknown_variables
from tests.harness import DEADLINE_S, TOP, clean_environment, daemon, datagram

EXAMPLES = TOP / "config_examples"
ENGINES = EXAMPLES / "engines"
NAMESPACE = "vllm"
BUILT_IN = ("v1", "apps/v1", "networking.k8s.io/v1", "policy/v1")  # needs nothing to be installed in the cluster


def read_documents(text: str) -> list[Any]:
    """The documents of a file of block mappings, lists and one-line values; ValueError for all else that YAML knows."""
    documents = []
    for part in re.split(r"^---$", text, flags=re.MULTILINE):
        lines = [line for line in part.splitlines() if line.strip() and not line.lstrip().startswith("#")]
        if lines:
            rest = [(len(line) - len(line.lstrip(" ")), line.strip(" ")) for line in reversed(lines)]
            documents.append(_read_block(rest, 0))
            if rest:
                raise ValueError(f"not understood: {rest[-1][1]}")
    return documents


def _read_block(rest: list[tuple[int, str]], indent: int) -> Any:
    """A mapping or a list; `rest` has the lines that follow, the next one last."""
    items: list[Any] = []
    mapping: dict[str, Any] = {}
    while rest and rest[-1][0] == indent:
        _, content = rest.pop()
        if content.startswith("- "):
            rest.append((indent + 2, content[2:].strip(" ")))
            is_block = re.match(r"[^\s\"]+:( |$)", rest[-1][1])
            items.append(_read_block(rest, indent + 2) if is_block else _read_value(rest.pop()[1]))
            continue
        found = re.fullmatch(r"([A-Za-z][\w./-]*):(?: +(.+))?", content)
        if not found or found[1] in mapping:
            raise ValueError(f"not understood: {content}")
        if found[2] is None:
            if not rest or rest[-1][0] <= indent:
                raise ValueError(f"nothing follows: {content}")
            mapping[found[1]] = _read_block(rest, rest[-1][0])
        else:
            mapping[found[1]] = _read_value(found[2])
    if bool(items) == bool(mapping) or (rest and rest[-1][0] > indent):
        raise ValueError("not understood: neither a list nor a mapping")
    return items or mapping


def _read_value(text: str) -> Any:
    if text.startswith('"') or text in ("[]", "{}", "true", "false") or re.fullmatch("0|[1-9][0-9]*", text):
        return json.loads(text)
    if not re.fullmatch(r"[A-Za-z0-9/-][\w./:=-]*", text) or re.fullmatch(
        r"y|n|yes|no|on|off|null|true|false|-|---|[-+]?[0-9][0-9_.:e-]*|0[xo].*|.*:", text, re.IGNORECASE
    ):
        raise ValueError(f"quote it: {text}")
    return text


def manifests(*paths: Path) -> list[Any]:
    return [document for path in paths for document in read_documents(path.read_text(encoding="utf-8"))]


def applied_files() -> list[Path]:
    """What `kubectl apply -f config_examples` applies, in its order: these endings, without subfolders."""
    return sorted(path for path in EXAMPLES.iterdir() if path.suffix in (".yaml", ".yml", ".json"))


def applied(kind: str) -> Any:
    """The only object of a kind."""
    (found,) = (document for document in manifests(*applied_files()) if document["kind"] == kind)
    return found


def services() -> list[Any]:
    return [document for document in manifests(*applied_files()) if document["kind"] == "Service"]


def service(protocol: str) -> Any:
    """The only Service that has a port of a protocol."""
    (found,) = (one for one in services() if protocol in [port["protocol"] for port in one["spec"]["ports"]])
    return found


def gateway_pod() -> Any:
    return applied("Deployment")["spec"]["template"]


def gateway_container() -> Any:
    (container,) = gateway_pod()["spec"]["containers"]
    return container


def settings() -> dict[str, str]:
    """The environment that the ConfigMap makes."""
    data: dict[str, str] = applied("ConfigMap")["data"]
    return data


def config() -> Config:
    return read_config(settings())


def injected_variables(name: str, ports: list[Any]) -> set[str]:
    """What Kubernetes injects for a Service into every pod of its namespace that has enableServiceLinks on.

    A headless one injects nothing; it is held to the same names, since it may become another kind some day.
    """
    prefix = name.upper().replace("-", "_")
    variables = {f"{prefix}_SERVICE_HOST", f"{prefix}_SERVICE_PORT", f"{prefix}_PORT"}
    for port in ports:
        of_port = f"{prefix}_PORT_{port['port']}_{port['protocol']}"
        variables |= {of_port, f"{of_port}_PROTO", f"{of_port}_PORT", f"{of_port}_ADDR"}
        if "name" in port:
            variables.add(f"{prefix}_SERVICE_PORT_{port['name'].upper().replace('-', '_')}")
    return variables


def quantity(text: str) -> int:
    """A Kubernetes quantity of bytes."""
    found = re.fullmatch(r"([0-9]+)(Ki|Mi|Gi)", text)
    assert found, text
    return int(found[1]) << {"Ki": 10, "Mi": 20, "Gi": 30}[found[2]]


class Reader(unittest.TestCase):
    """What these tests read the manifests with refuses what it does not understand."""

    def test_it_reads_what_the_examples_use(self) -> None:
        text = '---\n# why\na: "9999"\nb:\n  - c: 1\n    d/e: f\n  - c: 2\n    g: []\nh:\n  - --i=j\n---\nk: true\n'
        self.assertEqual(
            read_documents(text),
            [{"a": "9999", "b": [{"c": 1, "d/e": "f"}, {"c": 2, "g": []}], "h": ["--i=j"]}, {"k": True}],
        )

    def test_it_refuses_all_else(self) -> None:
        for text in (
            *("a: b # c", "a: yes", "a: 1.5", "a: 010", "a: 0x1f", "a: 1e3", "a: 2026-01-01", "a: null", "a: ~", "a:"),
            *("a: |\n  b", "a: {b: c}", "a: [b]", "a: &b c", "a: 'b'", "a: 1\na: 2", "a: 1\n  b: 2", "- a\nb: c", "a"),
        ):
            with self.subTest(text), self.assertRaises(ValueError):
                read_documents(text)


class Applied(unittest.TestCase):
    """`kubectl apply -f config_examples` takes each .yaml, .yml and .json at the top level, in order of their names."""

    def test_all_are_manifests_of_the_namespace(self) -> None:
        """Nothing needs a custom resource, or a namespace other than the one that the guide creates."""
        self.assertTrue(applied_files())
        for path in applied_files():
            for document in manifests(path):
                with self.subTest(path.name, kind=document.get("kind")):
                    self.assertIn(document["apiVersion"], BUILT_IN)
                    self.assertEqual(document["metadata"]["namespace"], NAMESPACE)

    def test_each_object_is_there_once(self) -> None:
        """Applied twice, they change nothing: no two files hold the same object."""
        names = [(document["kind"], document["metadata"]["name"]) for document in manifests(*applied_files())]
        self.assertEqual(sorted(names), sorted(set(names)))

    def test_the_settings_come_before_what_reads_them(self) -> None:
        kinds = [document["kind"] for document in manifests(*applied_files())]
        self.assertLess(kinds.index("ConfigMap"), kinds.index("Deployment"))

    def test_each_file_begins_a_document(self) -> None:
        """So that all of them can be piped through sed into `kubectl apply -f -`, for a namespace of another name."""
        for path in applied_files():
            with self.subTest(path.name):
                self.assertTrue(path.read_text(encoding="utf-8").startswith("---\n"))

    def test_selectors_find_the_gateway(self) -> None:
        labels = gateway_pod()["metadata"]["labels"]
        selectors = [one["spec"]["selector"] for one in services()]
        for kind in ("Deployment", "PodDisruptionBudget"):
            selectors.append(applied(kind)["spec"]["selector"]["matchLabels"])
        selectors.append(applied("NetworkPolicy")["spec"]["podSelector"]["matchLabels"])
        for selector in selectors:
            self.assertTrue(selector)
            self.assertLessEqual(selector.items(), labels.items())


class Settings(unittest.TestCase):
    """The ConfigMap holds settings that the gateway has and accepts."""

    def test_they_are_accepted(self) -> None:
        self.assertLessEqual(settings().keys(), {setting.variable for setting in SETTINGS})
        self.assertEqual(unknown_variables(settings()), [])
        self.assertEqual(config().network_mode, "unicast")

    def test_the_container_reads_them(self) -> None:
        (source,) = gateway_container()["envFrom"]
        self.assertEqual(source["configMapRef"]["name"], applied("ConfigMap")["metadata"]["name"])

    def test_the_ports_agree_everywhere(self) -> None:
        container, pod = gateway_container(), gateway_pod()
        self.assertEqual(config().udp_port, read_config({}).udp_port)
        (udp,), (http) = service("UDP")["spec"]["ports"], service("TCP")["spec"]["ports"][0]
        self.assertEqual({udp["port"], udp["targetPort"]}, {config().udp_port})
        self.assertEqual(http["port"], config().http_port)
        (port,) = container["ports"]
        self.assertEqual((port["name"], port["containerPort"]), (http["targetPort"], config().http_port))
        self.assertEqual(pod["metadata"]["annotations"]["prometheus.io/port"], str(config().http_port))
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            self.assertEqual(container[probe]["httpGet"]["port"], port["name"])

    def test_no_port_number_is_listed_twice(self) -> None:
        """`kubectl apply` merges lists of ports by their number alone: of 9999 UDP and TCP one could be lost."""
        for ports in (gateway_container()["ports"], *(one["spec"]["ports"] for one in services())):
            numbers = [port.get("port", port.get("containerPort")) for port in ports]
            self.assertEqual(len(numbers), len(set(numbers)))


class ServiceNames(unittest.TestCase):
    """Kubernetes injects environment variables for every Service; none may be taken for a setting."""

    def test_no_injected_variable_is_a_setting(self) -> None:
        """Neither the gateway's nor the agent's nor vLLM's, which all begin with VLLM_."""
        for one in services():
            for variable in injected_variables(one["metadata"]["name"], one["spec"]["ports"]):
                with self.subTest(variable):
                    self.assertNotIn(variable, {setting.variable for setting in SETTINGS})
                    self.assertFalse(variable.startswith("VLLM_"))

    def test_the_danger_is_real(self) -> None:
        """The obvious name would inject a setting, and the gateway would not start."""
        injected = injected_variables("vllm-state-gateway-http", service("TCP")["spec"]["ports"])
        collisions = injected & {setting.variable for setting in SETTINGS}
        self.assertEqual(collisions, {"VLLM_STATE_GATEWAY_HTTP_PORT"})
        with self.assertRaisesRegex(ConfigError, "enableServiceLinks: false"):
            read_config({"VLLM_STATE_GATEWAY_HTTP_PORT": "tcp://10.96.0.10:9999"})

    def test_no_pod_takes_them(self) -> None:
        self.assertIs(gateway_pod()["spec"]["enableServiceLinks"], False)
        self.assertIs(engine_pod()["spec"]["enableServiceLinks"], False)


class Pod(unittest.TestCase):
    """One gateway, which may do nothing but run."""

    def test_there_is_one_at_a_time(self) -> None:
        """Two would each know a part of the engines."""
        spec = applied("Deployment")["spec"]
        self.assertEqual((spec["replicas"], spec["strategy"]), (1, {"type": "Recreate"}))

    def test_a_drain_of_its_node_is_never_held_up(self) -> None:
        budget = applied("PodDisruptionBudget")["spec"]
        self.assertEqual((budget["maxUnavailable"], budget["unhealthyPodEvictionPolicy"]), (1, "AlwaysAllow"))
        self.assertNotIn("minAvailable", budget)

    def test_it_has_no_rights(self) -> None:
        """What the Pod Security Standard `restricted` asks for, and more."""
        pod, container = gateway_pod()["spec"], gateway_container()
        allowed = {"runAsNonRoot", "runAsUser", "runAsGroup", "fsGroup", "seccompProfile"}
        self.assertEqual(pod["securityContext"].keys(), allowed)
        self.assertIs(pod["securityContext"]["runAsNonRoot"], True)
        self.assertEqual(pod["securityContext"]["seccompProfile"], {"type": "RuntimeDefault"})
        self.assertIs(pod["automountServiceAccountToken"], False)
        self.assertEqual(
            container["securityContext"],
            {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            },
        )
        self.assertFalse([name for name in pod if name.startswith("host") or name.endswith("Containers")])
        self.assertEqual([volume.keys() for volume in pod["volumes"]], [{"name", "emptyDir"}])
        self.assertFalse([port for port in container["ports"] if "hostPort" in port])

    def test_its_user_is_the_images(self) -> None:
        context = gateway_pod()["spec"]["securityContext"]
        self.assertEqual(context["runAsUser"], context["fsGroup"])
        parts = [TOP / "Dockerfile", TOP / "docker-entrypoint.sh"]
        texts = [part.read_text(encoding="utf-8") for part in parts if part.exists()]
        users = set(re.findall(r"^(?:USER |user=)([0-9]+)\b", "\n".join(texts), re.MULTILINE))
        if not users:
            self.skipTest("no Dockerfile or docker-entrypoint.sh here names a user")
        self.assertEqual(users, {str(context["runAsUser"])})

    def test_the_log_fits_its_volume(self) -> None:
        """A pod whose volume, or whose storage in all, grows beyond the limit is evicted: a tenth is kept free."""
        (volume,), (mount,) = gateway_pod()["spec"]["volumes"], gateway_container()["volumeMounts"]
        self.assertEqual(volume["name"], mount["name"])
        self.assertEqual(str(Path(config().log_file).parent), mount["mountPath"])
        most = config().log_max_bytes * (config().log_backups + 1)
        self.assertGreater(most, 0)
        size = quantity(volume["emptyDir"]["sizeLimit"])
        self.assertGreaterEqual(size, most * 1.1)
        resources = gateway_container()["resources"]
        self.assertGreaterEqual(quantity(resources["requests"]["ephemeral-storage"]), size)
        self.assertGreaterEqual(quantity(resources["limits"]["ephemeral-storage"]), size + (100 << 20))

    def test_it_has_time_to_stop(self) -> None:
        """It stops within 5 s; a kill before that would lose what is not written yet."""
        self.assertGreater(gateway_pod()["spec"]["terminationGracePeriodSeconds"], 5)

    def test_the_image_is_the_one_that_the_guide_names(self) -> None:
        self.assertEqual(gateway_container()["image"], "elrar/state-gateway:latest")


class Running(unittest.TestCase):
    """The real gateway, with the ConfigMap's settings, does what the manifests say of it."""

    def test_probes_scrapes_and_engines_are_answered(self) -> None:
        """Each probe, the scrape, and a state of an engine that is named as in the engines' example."""
        container = gateway_container()
        paths = {container[name]["httpGet"]["path"] for name in ("startupProbe", "readinessProbe", "livenessProbe")}
        self.assertEqual(paths, {"/readyz", "/livez"})
        self.assertEqual(container["livenessProbe"]["httpGet"]["path"], "/livez")
        paths.add(gateway_pod()["metadata"]["annotations"]["prometheus.io/path"])
        engine_id = engine_environment()["ELRAR_ENGINE_ID"].replace("$(POD_IP)", "10.244.1.7")
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "data" / Path(config().log_file).name
            changed = {"VLLM_STATE_GATEWAY_UDP_PORT": 0, "VLLM_STATE_GATEWAY_LOG_FILE": log}
            with daemon(Path(folder), **{**settings(), **changed}) as running:
                for path in sorted(paths):
                    with self.subTest(path):
                        self.assertEqual(running.ask(path).status, 200)
                running.send(datagram(engine_id=engine_id))
                running.wait_received(1)
                self.assertEqual(running.ask(f"/engines/{urllib.parse.quote(engine_id, safe='')}").status, 200)
                self.assertEqual(running.stop(), 0)
            self.assertTrue(log.exists())


def engine_deployment() -> Any:
    """The example of engines that take the agent from the gateway's image."""
    (deployment,) = manifests(ENGINES / "vllm-deployment.yaml")
    return deployment


def engine_pod() -> Any:
    return engine_deployment()["spec"]["template"]


def engine_environment() -> dict[str, str]:
    """The engine's variables, in their order; those that come from the pod itself are empty."""
    (container,) = engine_pod()["spec"]["containers"]
    return {variable["name"]: variable.get("value", "") for variable in container["env"]}


class Engines(unittest.TestCase):
    """The engines' example pushes to this gateway, and is let through to it."""

    def test_it_pushes_to_the_headless_service(self) -> None:
        target, environment = service("UDP"), engine_environment()
        self.assertEqual(environment["ELRAR_GATEWAY_HOST"], target["metadata"]["name"])
        self.assertEqual(engine_deployment()["metadata"]["namespace"], target["metadata"]["namespace"])
        given = engine_agent.read_settings({**environment, "ELRAR_ENGINE_ID": "http://10.244.1.7:8000"})
        self.assertEqual((given.network_mode, given.gateway_port), ("unicast", config().udp_port))
        self.assertEqual(target["spec"]["clusterIP"], "None")

    def test_its_id_is_its_url(self) -> None:
        """Kubernetes puts in only variables that are defined above the one that uses them."""
        names = list(engine_environment())
        self.assertLess(names.index("POD_IP"), names.index("ELRAR_ENGINE_ID"))
        (container,) = engine_pod()["spec"]["containers"]
        (port,) = container["ports"]
        self.assertEqual(engine_environment()["ELRAR_ENGINE_ID"], f"http://$(POD_IP):{port['containerPort']}")

    def test_its_agent_comes_out_of_the_gateways_image(self) -> None:
        """The command that fills the volume makes what vLLM finds there, by a user who may write nothing else."""
        pod = engine_pod()["spec"]
        (fills,), (vllm,), (volume,) = pod["initContainers"], pod["containers"], pod["volumes"]
        self.assertEqual(fills["image"], gateway_container()["image"])
        self.assertEqual(volume["name"], fills["volumeMounts"][0]["name"])
        self.assertEqual({one["mountPath"] for one in (*fills["volumeMounts"], *vllm["volumeMounts"])}, {"/elrar"})
        self.assertEqual(engine_environment()["PYTHONPATH"], "/elrar")
        with tempfile.TemporaryDirectory() as folder:
            command, argument = fills["args"]
            command_line = [sys.executable, str(TOP / command), argument.replace("/elrar", folder)]
            subprocess.run(command_line, check=True, timeout=DEADLINE_S, env=clean_environment(), capture_output=True)
            found = {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}
        self.assertEqual(
            found, {"engine_agent.py", *(f"{engine_agent.PLUGIN_FOLDER}/{name}" for name in engine_agent.PLUGIN_FILES)}
        )

    def test_the_policy_lets_engines_push_and_readers_read(self) -> None:
        policy = applied("NetworkPolicy")["spec"]
        self.assertEqual(policy["policyTypes"], ["Ingress", "Egress"])
        self.assertNotIn("egress", policy)  # an empty list would make each `kubectl apply` say "configured"
        pushers, readers = policy["ingress"]
        self.assertEqual(pushers["ports"], [{"protocol": "UDP", "port": config().udp_port}])
        self.assertEqual(readers["ports"], [{"protocol": "TCP", "port": config().http_port}])
        (engines,) = pushers["from"]
        self.assertLessEqual(engines["podSelector"]["matchLabels"].items(), engine_pod()["metadata"]["labels"].items())
        for peer in readers["from"]:
            self.assertTrue(peer["podSelector"]["matchLabels"])


KUSTOMIZE = EXAMPLES / "kustomize"


class Kustomize(unittest.TestCase):
    """The kustomization has the same gateway; .ci/kubernetes builds it and checks all of it against the schemas."""

    def test_nothing_of_it_is_applied_with_the_plain_files(self) -> None:
        self.assertNotIn("kustomization.yaml", [path.name for path in EXAMPLES.iterdir()])
        for folder in KUSTOMIZE.iterdir():
            if folder.is_dir():
                self.assertTrue((folder / "kustomization.yaml").exists(), folder)

    def test_its_gateway_is_that_of_the_plain_files(self) -> None:
        """A kustomization reads nothing above its own folder, so that it has copies."""
        for path in applied_files():
            if path.name != "configmap.yaml":
                copy = KUSTOMIZE / "gateway" / path.name
                self.assertEqual(copy.read_text(encoding="utf-8"), path.read_text(encoding="utf-8"), copy)
        lines = (KUSTOMIZE / "gateway" / "settings.env").read_text(encoding="utf-8").splitlines()
        self.assertEqual(dict(line.split("=", 1) for line in lines if not line.startswith("#")), settings())

    def test_settings_that_it_shows_are_settings(self) -> None:
        text = (KUSTOMIZE / "kustomization.yaml").read_text(encoding="utf-8")
        shown = dict(re.findall(r"- (VLLM_\w+)=(.*)", text))
        self.assertTrue(shown)
        self.assertEqual(unknown_variables({**settings(), **shown}), [])
        read_config({**settings(), **shown})

    def test_its_rules_are_the_alerts_word_by_word(self) -> None:
        alerts = (EXAMPLES / "prometheus" / "alerts.yaml").read_text(encoding="utf-8").partition("\ngroups:\n")[2]
        rule = (KUSTOMIZE / "monitoring" / "prometheus-rule.yaml").read_text(encoding="utf-8")
        self.assertEqual(textwrap.dedent(rule.partition("\n  groups:\n")[2]), textwrap.dedent(alerts))

    def test_what_leads_to_the_gateway_names_its_service_and_port(self) -> None:
        http = service("TCP")
        name, port = http["metadata"]["name"], http["spec"]["ports"][0]
        (ingress,) = manifests(KUSTOMIZE / "ingress" / "ingress.yaml")
        (path,) = ingress["spec"]["rules"][0]["http"]["paths"]
        self.assertEqual(path["backend"]["service"], {"name": name, "port": {"name": port["name"]}})
        (route,) = manifests(KUSTOMIZE / "gateway-api" / "http-route.yaml")
        for rule in route["spec"]["rules"]:
            self.assertEqual(rule["backendRefs"], [{"name": name, "port": port["port"]}])
        stream, _ = route["spec"]["rules"]
        self.assertEqual((stream["matches"][0]["path"]["value"], stream["timeouts"]), ("/watch", {"request": "0s"}))

    def test_further_policies_let_somebody_in_to_the_gateways_port(self) -> None:
        paths = sorted(KUSTOMIZE.glob("*/network-policy.yaml"))
        self.assertGreater(len(paths), 3)
        for path in paths:
            (document,) = manifests(path)
            spec = document["spec"]
            with self.subTest(path.parent.name):
                labels = gateway_pod()["metadata"]["labels"]
                self.assertLessEqual(spec["podSelector"]["matchLabels"].items(), labels.items())
                for rule in spec["ingress"]:
                    self.assertTrue(rule["from"])
                    self.assertEqual([port["port"] for port in rule["ports"]], [config().udp_port])

    def test_engines_outside_reach_the_udp_port(self) -> None:
        (outside,) = manifests(KUSTOMIZE / "engines-outside" / "service.yaml")
        (port,) = outside["spec"]["ports"]
        self.assertEqual((port["protocol"], port["targetPort"]), ("UDP", config().udp_port))
        self.assertIn(f":{port['nodePort']},", (KUSTOMIZE / "engines-outside" / "service.yaml").read_text())
        self.assertLessEqual(outside["spec"]["selector"].items(), gateway_pod()["metadata"]["labels"].items())

    def test_the_autoscalers_numbers_are_there(self) -> None:
        """What KEDA reads at /stats, and what it asks Prometheus for, are numbers of a real gateway."""
        by_stats, by_prometheus = (
            manifests(KUSTOMIZE / "autoscaling" / name)[0]["spec"]
            for name in ("scaled-object.yaml", "scaled-object-prometheus.yaml")
        )
        self.assertEqual(
            {**by_stats, "triggers": []},
            {**by_prometheus, "triggers": []},
            "one of the two is taken, with the same bounds",
        )
        self.assertEqual(by_stats["scaleTargetRef"]["name"], engine_deployment()["metadata"]["name"])
        asked = by_stats["triggers"][0]["metadata"]
        self.assertEqual(
            asked["url"], f"http://{service('TCP')['metadata']['name']}.{NAMESPACE}.svc:{config().http_port}/stats"
        )
        (metric,) = re.findall(r"\((\w+)\)", by_prometheus["triggers"][0]["metadata"]["query"])
        with daemon(ENABLE_LOG="false") as running:
            running.send(datagram(engine_id="a"), datagram(engine_id="b"))
            running.wait_received(2)
            value: Any = running.stats()
            for key in asked["valueLocation"].split("."):
                value = value[key]
            self.assertEqual(value, 20)
            self.assertIn(f"\n{metric} 20", running.ask("/metrics?engines=no").body.decode())


class StockEngines(unittest.TestCase):
    """The examples for engines as they come: each says what it does to this gateway, by settings that the agent has."""

    FILES = ("vllm-plugin.yaml", "vllm-sidecar.yaml", "sglang-sidecar.yaml")

    def pods(self) -> list[tuple[str, Any]]:
        found = []
        for name in self.FILES:
            (deployment,) = manifests(ENGINES / name)
            self.assertEqual(deployment["metadata"]["namespace"], NAMESPACE)
            labels = deployment["spec"]["template"]["metadata"]["labels"]
            self.assertLessEqual(deployment["spec"]["selector"]["matchLabels"].items(), labels.items())
            found.append((name, deployment["spec"]["template"]))
        return found

    def containers(self) -> list[tuple[str, Any]]:
        return [(name, one) for name, pod in self.pods() for one in pod["spec"]["containers"]]

    def test_all_are_tried_here(self) -> None:
        self.assertEqual({path.name for path in ENGINES.glob("*.yaml")}, {*self.FILES, "vllm-deployment.yaml"})

    def test_the_agent_takes_their_settings_and_pushes_to_the_headless_service(self) -> None:
        for name, container in self.containers():
            environ = {variable["name"]: variable["value"] for variable in container.get("env", [])}
            mine = {name for name in environ if name.startswith("ELRAR_")}
            self.assertLessEqual(mine, {"ELRAR_" + setting.name for setting in engine_agent.SETTINGS})
            if mine:
                with self.subTest(name):
                    (gateway,) = engine_agent.read_settings(environ).gateways
                    self.assertEqual(gateway.host, service("UDP")["metadata"]["name"])
                    self.assertEqual(engine_agent.read_settings(environ).gateway_port, config().udp_port)

    def test_each_is_let_through_and_takes_no_injected_variables(self) -> None:
        for name, pod in self.pods():
            with self.subTest(name):
                self.assertEqual(pod["metadata"]["labels"]["elrar-role"], "engine")
                self.assertIs(pod["spec"]["enableServiceLinks"], False)

    def test_a_sidecar_is_the_gateways_image_and_asks_its_neighbour(self) -> None:
        for name, pod in self.pods()[1:]:
            engine, agent = pod["spec"]["containers"]
            with self.subTest(name):
                self.assertEqual(agent["image"], gateway_container()["image"])
                command, *arguments = agent["args"]
                self.assertEqual(command, "engine_agent.py")
                given = engine_agent._parser().parse_args(arguments)
                (port,) = engine["ports"]
                self.assertEqual(given.ENGINE_URL, f"http://127.0.0.1:{port['containerPort']}")
                words = engine.get("command", []) + engine.get("args", [])
                self.assertIn(f"--port={port['containerPort']}", words)
                self.assertEqual(agent["securityContext"]["capabilities"], {"drop": ["ALL"]})

    def test_the_plugin_is_where_vllm_looks_for_it(self) -> None:
        (container,) = self.pods()[0][1]["spec"]["containers"]
        environ = {variable["name"]: variable["value"] for variable in container["env"]}
        (mount,), (volume,) = container["volumeMounts"], self.pods()[0][1]["spec"]["volumes"]
        self.assertEqual(environ["PYTHONPATH"], mount["mountPath"])
        self.assertEqual(mount["name"], volume["name"])
        paths = {item["key"]: item["path"] for item in volume["configMap"]["items"]}
        expected = {name: f"{engine_agent.PLUGIN_FOLDER}/{name}" for name in engine_agent.PLUGIN_FILES}
        self.assertEqual(paths, {"engine_agent.py": "engine_agent.py", **expected})

    def test_the_line_that_makes_the_config_map_names_what_is_there(self) -> None:
        text = (ENGINES / "vllm-plugin.yaml").read_text(encoding="utf-8")
        (line,) = re.findall(r"^#  +(kubectl .*)$", text.replace("\\\n#", ""), re.MULTILINE)
        keys = set()
        for path in re.findall(r"--from-file=(\S+)", line):
            found = TOP / path
            self.assertTrue(found.exists(), path)
            keys |= {one.name for one in found.iterdir()} if found.is_dir() else {found.name}
        self.assertEqual(keys, {"engine_agent.py", *engine_agent.PLUGIN_FILES})
        self.assertLess((TOP / "engine_agent.py").stat().st_size, 900_000)  # a ConfigMap holds 1 MiB

    def test_the_plugins_folder_is_what_the_agent_would_make(self) -> None:
        folder = ENGINES / engine_agent.PLUGIN_FOLDER
        self.assertEqual({path.name: path.read_text() for path in folder.iterdir()}, engine_agent.PLUGIN_FILES)

    def test_the_environment_file_is_every_setting_at_its_default(self) -> None:
        text = (ENGINES / "engine-agent.env").read_text(encoding="utf-8")
        self.assertEqual(text, engine_agent.example_environment())
        environ = dict(line.split("=", 1) for line in text.splitlines() if line and not line.startswith("#"))
        self.assertEqual(engine_agent.read_settings(environ), engine_agent.read_settings({}))

    def test_the_unit_runs_the_agent_with_arguments_that_it_has(self) -> None:
        unit = (ENGINES / "elrar-engine-agent@.service").read_text(encoding="utf-8")
        (command,) = re.findall(r"^ExecStart=/usr/bin/python3 \S+/engine_agent\.py (.*)$", unit, re.MULTILINE)
        given = engine_agent._parser().parse_args(command.replace("%i", "8000").split())
        self.assertEqual(given.ENGINE_URL, "http://127.0.0.1:8000")
        self.assertIn("RestartPreventExitStatus=2\n", unit)

    def test_the_compose_file_runs_the_image_as_the_agent(self) -> None:
        text = (ENGINES / "compose.yml").read_text(encoding="utf-8")
        self.assertIn(f"image: {gateway_container()['image']}\n", text)
        self.assertIn('command: [engine_agent.py, "--engine=http://127.0.0.1:8000"]\n', text)


if __name__ == "__main__":
    unittest.main()
