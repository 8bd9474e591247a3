"""Settings: what is accepted, and that whoever gets one wrong learns everything at once (the contract's section 3)."""

from __future__ import annotations

import ipaddress
import unittest
from unittest import mock

from config import (
    MODES,
    PREFIX,
    SETTINGS,
    Config,
    ConfigError,
    Mode,
    example_environment,
    read_config,
    settings_help,
    unknown_variables,
)
from sockets import listen_address
from tests.harness import TOP


def read(**settings: str) -> Config:
    return read_config({PREFIX + name: value for name, value in settings.items()})


class Defaults(unittest.TestCase):
    """With nothing set, the gateway runs as the contract's table says."""

    def test_defaults(self) -> None:
        config = read_config({})
        self.assertEqual(
            config,
            Config(
                udp_port=9999,
                stale_threshold_ms=2000,
                network_mode="unicast",
                bind_address="0.0.0.0",
                enable_log=True,
                log_file="engine_states.jsonl",
                expire_after_ms=6000,
                http_port=9999,
                log_max_bytes=104857600,
                log_backups=10,
                max_engines=10000,
                history=100,
                allowed_sources=(),
                receive_buffer=8388608,
                ready_after_ms=0,
                http_idle_timeout_s=650,
                keys_file=None,
                http_tokens_file=None,
                allowed_origins=(),
                stats_interval_s=60,
                log_level="INFO",
                http_follows_udp=True,
            ),
        )

    def test_expiry_follows_the_stale_threshold(self) -> None:
        self.assertEqual(read(STALE_THRESHOLD="5000").expire_after_ms, 15000)
        self.assertEqual(read(STALE_THRESHOLD="5000", EXPIRE_AFTER="5000").expire_after_ms, 5000)

    def test_origins(self) -> None:
        """Are as browsers send them: in lower case, without a path, and without the port that the scheme implies."""
        for text, as_sent in (
            ("https://A.example, http://b:8080", ("https://a.example", "http://b:8080")),
            ("https://a.example:443,http://b:080", ("https://a.example", "http://b")),
            ("https://a:80,http://b:443", ("https://a:80", "http://b:443")),
            ("http://[::1]:80,https://[2001:DB8::1]:8443", ("http://[::1]", "https://[2001:db8::1]:8443")),
            ("chrome-extension://abc", ("chrome-extension://abc",)),
        ):
            with self.subTest(text):
                self.assertEqual(read(ALLOWED_ORIGINS=text).allowed_origins, as_sent)
        self.assertEqual(read(ALLOWED_ORIGINS="*").allowed_origins, ("*",))
        for text in (
            "",
            "a.example",
            "https://a/",
            "https://a,",
            "https://a/b",
            "https://*.a",
            "null",
            "https://ä",
            "https://a b",
            "https://a:",
            "https://a:65536",
            "https://a:b",
            "https://me:secret@a",
            "https://[::1",
        ):
            with self.subTest(text), self.assertRaises(ConfigError):
                read(ALLOWED_ORIGINS=text)

    def test_the_http_port_follows_the_udp_port(self) -> None:
        self.assertEqual(read(UDP_PORT="8888").http_port, 8888)
        self.assertEqual(read(UDP_PORT="8888", HTTP_PORT="7777").http_port, 7777)
        self.assertIsNone(read(HTTP_PORT="OFF").http_port)


ACCEPTED: tuple[tuple[str, str, str, object], ...] = (
    ("UDP_PORT", "0", "udp_port", 0),
    ("UDP_PORT", "65535", "udp_port", 65535),
    ("NETWORK_MODE", "Broadcast", "network_mode", "broadcast"),
    ("NETWORK_MODE", "UNICAST", "network_mode", "unicast"),
    ("BIND_ADDRESS", "::", "bind_address", "::"),
    ("BIND_ADDRESS", "::ffff:127.0.0.1", "bind_address", "127.0.0.1"),
    ("BIND_ADDRESS", "fe80::1%eth0", "bind_address", "fe80::1%eth0"),
    *(("ENABLE_LOG", word, "enable_log", True) for word in ("true", "True", "TRUE", "1", "yes", "on")),
    *(("ENABLE_LOG", word, "enable_log", False) for word in ("false", "False", "0", "no", "OFF")),
    ("LOG_FILE", "a folder/状态.jsonl", "log_file", "a folder/状态.jsonl"),
    ("LOG_MAX_BYTES", "0", "log_max_bytes", 0),
    ("HISTORY", "0", "history", 0),
    ("STATS_INTERVAL", "0", "stats_interval_s", 0),
    (
        "ALLOWED_SOURCES",
        "10.0.0.0/8, fd00::/8,192.168.1.7,::ffff:172.16.0.0/108",
        "allowed_sources",
        tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "fd00::/8", "192.168.1.7/32", "172.16.0.0/12"))),
    ),
    ("ALLOWED_SOURCES", "10.1.2.3/8", "allowed_sources", (ipaddress.ip_network("10.0.0.0/8"),)),
)

NUMBERS = (
    "UDP_PORT", "STALE_THRESHOLD", "EXPIRE_AFTER", "HTTP_PORT", "LOG_MAX_BYTES", "LOG_BACKUPS", "MAX_ENGINES",
    "HISTORY", "RECEIVE_BUFFER", "HTTP_IDLE_TIMEOUT", "STATS_INTERVAL",
)  # fmt: skip

REFUSED: tuple[tuple[str, str], ...] = (
    *(
        (name, value)
        for name in NUMBERS
        for value in ("", "abc", "0x1f", "9_999", "９９９９", "-1", "+1", "1.5", " 1", "1\n", "1e3", "٣", "9" * 30)
    ),
    ("UDP_PORT", "65536"),
    ("HTTP_PORT", "65536"),
    ("HTTP_PORT", "none"),
    ("STALE_THRESHOLD", "0"),
    ("MAX_ENGINES", "0"),
    ("RECEIVE_BUFFER", "0"),
    ("HTTP_IDLE_TIMEOUT", "0"),
    ("RECEIVE_BUFFER", str(2**30)),
    *(("NETWORK_MODE", value) for value in ("", "unicst", "multicast", "unicast ")),
    *(("BIND_ADDRESS", value) for value in ("", "localhost", "0.0.0", "256.0.0.1", "１.0.0.1", "[::]", "0.0.0.0:9999")),
    *(("ENABLE_LOG", value) for value in ("", "ture", "2", "y")),
    ("LOG_FILE", ""),
    ("LOG_FILE", "a\nb"),
    ("LOG_FILE", "\udcff.jsonl"),
    *(("ALLOWED_SOURCES", value) for value in ("", ",", "10.0.0.0/33", "10.0.0.0/8,", "router", "all")),
)


class Values(unittest.TestCase):
    """A value is taken as it was meant, or refused by name; nothing is guessed."""

    def test_accepted_values(self) -> None:
        for name, text, field, value in ACCEPTED:
            with self.subTest(name=name, text=text):
                self.assertEqual(getattr(read(**{name: text}), field), value)

    def test_refused_values_are_named_with_what_is_accepted(self) -> None:
        accepts = {setting.name: setting.accepts for setting in SETTINGS}
        for name, text in REFUSED:
            with self.subTest(name=name, text=text):
                with self.assertRaises(ConfigError) as refused:
                    read(**{name: text})
                (error,) = refused.exception.errors
                self.assertIn(f"{PREFIX}{name}={text!r}", error)
                self.assertIn(accepts[name], error)

    def test_all_errors_come_at_once(self) -> None:
        with self.assertRaises(ConfigError) as refused:
            read(UDP_PORT="abc", NETWORK_MODE="unicst", ENABLE_LOG="ture", BIND_ADDRESS="x")
        self.assertEqual(len(refused.exception.errors), 4)

    def test_an_engine_cannot_expire_before_it_is_stale(self) -> None:
        with self.assertRaisesRegex(ConfigError, "EXPIRE_AFTER.*STALE_THRESHOLD"):
            read(EXPIRE_AFTER="1999")

    def test_an_address_of_many_hosts_is_none_to_listen_on(self) -> None:
        """The kernel would bind to it, and nobody would reach HTTP; in broadcast mode the setting is not used."""
        for text in ("255.255.255.255", "224.0.0.1", "ff02::1", "::ffff:239.1.2.3"):
            with self.subTest(text):
                with self.assertRaisesRegex(ConfigError, f"BIND_ADDRESS='{text}' .* this host alone"):
                    read(BIND_ADDRESS=text)
                self.assertEqual(read(BIND_ADDRESS=text, NETWORK_MODE="broadcast").network_mode, "broadcast")

    def test_errors_between_settings_come_with_the_others(self) -> None:
        with self.assertRaises(ConfigError) as refused:
            read(UDP_PORT="abc", EXPIRE_AFTER="0005")
        self.assertEqual(len(refused.exception.errors), 2)
        self.assertIn("EXPIRE_AFTER='0005'", refused.exception.errors[1])

    def test_the_logging_level_is_read_without_the_prefix(self) -> None:
        self.assertEqual(read_config({"VLLM_LOGGING_LEVEL": "debug"}).log_level, "DEBUG")
        with self.assertRaisesRegex(ConfigError, "VLLM_LOGGING_LEVEL='LOUD'.*DEBUG, INFO, WARNING, ERROR"):
            read_config({"VLLM_LOGGING_LEVEL": "LOUD"})

    def test_a_value_that_kubernetes_injected_is_recognised(self) -> None:
        with self.assertRaisesRegex(ConfigError, "enableServiceLinks"):
            read(HTTP_PORT="tcp://10.0.0.1:9999")


class UnknownVariables(unittest.TestCase):
    """A misspelt variable is told with the nearest name; what Kubernetes injects is passed over in silence."""

    def test_a_misspelt_variable_is_told_once(self) -> None:
        (warning,) = unknown_variables({PREFIX + "UDP_PROT": "1", PREFIX + "UDP_PORT": "2", "HOME": "/"})
        self.assertIn(PREFIX + "UDP_PROT", warning)
        self.assertIn(PREFIX + "UDP_PORT?", warning)

    def test_what_kubernetes_injects_is_no_mistake(self) -> None:
        injected = (
            "SERVICE_HOST", "SERVICE_PORT", "SERVICE_PORT_UDP", "SERVICE_PORT_HTTP", "PORT", "PORT_9999_UDP",
            "PORT_9999_UDP_PROTO", "PORT_9999_UDP_PORT", "PORT_9999_UDP_ADDR", "PORT_9999_TCP", "PORT_9999_TCP_ADDR",
        )  # fmt: skip
        self.assertEqual(unknown_variables({PREFIX + name: "tcp://10.0.0.1:9999" for name in injected}), [])

    def test_what_only_resembles_an_injected_variable_is_told(self) -> None:
        for name in ("PORTS", "PORT_UDP", "SERVICE_HOSTS", "PORT_9999_SCTP"):
            with self.subTest(name):
                self.assertEqual(len(unknown_variables({PREFIX + name: "1"})), 1)


class OneTable(unittest.TestCase):
    """The table of settings is the only list of them; everything that shows settings shows these."""

    def test_every_field_of_the_config_has_a_setting(self) -> None:
        fields = set(Config.__dataclass_fields__) - {"http_follows_udp"}
        self.assertEqual({setting.field for setting in SETTINGS}, fields)

    def test_help_lists_every_setting_with_its_default(self) -> None:
        text = settings_help()
        for setting in SETTINGS:
            self.assertIn(f"{setting.variable}  (default: {setting.default.strip('()')})", text)
            self.assertIn(setting.meaning.replace("`", ""), text)

    def test_both_readmes_have_the_table(self) -> None:
        for name in ("README.md", "README.zh-CN.md"):
            text = (TOP / name).read_text(encoding="utf-8")
            shown = [line.split("|")[1:3] for line in text.splitlines() if line.startswith("| `VLLM_")]
            with self.subTest(name):
                self.assertEqual(
                    [(variable.strip(" `"), default.strip(" `")) for variable, default in shown],
                    [(setting.variable, setting.default) for setting in SETTINGS],
                )

    def test_the_pages_on_engines_have_the_modes(self) -> None:
        for name in ("docs/engines.md", "docs/engines.zh-CN.md"):
            text = (TOP / name).read_text(encoding="utf-8")
            with self.subTest(name):
                self.assertRegex(text, r"\n\| \|" + "".join(rf" {mode}[^|]*\|" for mode in MODES) + "\n")
        listens_on = " | ".join(mode.listens_on for mode in MODES.values())
        self.assertIn(f"\n| listens on | {listens_on} |\n", (TOP / "docs" / "engines.md").read_text(encoding="utf-8"))

    def test_a_mode_is_a_row(self) -> None:
        multicast = Mode("multicast", "all interfaces", on_all_interfaces=True)
        with mock.patch.dict(MODES, multicast=multicast):
            self.assertEqual(listen_address("multicast", "127.0.0.1"), "0.0.0.0")
        self.assertEqual([mode.counter for mode in MODES.values()], ["unicast_received", "broadcast_received"])

    def test_the_example_environment_is_made_from_the_table(self) -> None:
        text = (TOP / "config_examples" / "gateway.env").read_text(encoding="utf-8")
        self.assertEqual(text, example_environment())

    def test_the_example_environment_changes_nothing(self) -> None:
        lines = (TOP / "config_examples" / "gateway.env").read_text(encoding="utf-8").splitlines()
        environ = dict(line.split("=", 1) for line in lines if line and line[0] != "#")
        self.assertEqual(read_config(environ), read_config({}))
        every = dict(line.lstrip("#").split("=", 1) for line in lines if line.lstrip("#").startswith("VLLM_"))
        self.assertEqual(list(every), [setting.variable for setting in SETTINGS])
        computed = {**vars(read_config({})), "http_follows_udp": False}
        for only_looks_like_it in ("allowed_sources", "keys_file", "http_tokens_file", "allowed_origins"):
            del computed[only_looks_like_it]
        self.assertEqual({name: getattr(read_config(every), name) for name in computed}, computed)

    def test_the_readme_says_what_the_table_says(self) -> None:
        text = (TOP / "README.md").read_text(encoding="utf-8")
        for setting in SETTINGS:
            with self.subTest(setting.name):
                self.assertIn(f"| `{setting.variable}` | `{setting.default}` | {setting.meaning} |", text)


if __name__ == "__main__":
    unittest.main()
