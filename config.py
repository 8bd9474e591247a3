"""Settings: one table of environment variables, read once into a frozen Config.

Nothing else in the gateway reads the environment. The table SETTINGS feeds the parsing, `--help`,
`--check-config`, config_examples/gateway.env and the README; a test holds them equal. To add a setting, add a row and
a Config field.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

PREFIX = "VLLM_STATE_GATEWAY_"
LOG_LEVEL_VARIABLE = "VLLM_LOGGING_LEVEL"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Mode:
    """A network mode. To add one, add a row to MODES."""

    name: str
    listens_on: str
    on_all_interfaces: bool  # whatever BIND_ADDRESS says

    @property
    def counter(self) -> str:
        """The name in /stats of how many datagrams came in that mode."""
        return f"{self.name}_received"


MODES: dict[str, Mode] = {
    mode.name: mode
    for mode in (
        Mode("unicast", "`BIND_ADDRESS`", on_all_interfaces=False),
        Mode("broadcast", "all interfaces, always", on_all_interfaces=True),
    )
}

_TRUE = ("true", "1", "yes", "on")
_FALSE = ("false", "0", "no", "off")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# What Kubernetes injects into every pod of a namespace that has a Service named vllm-state-gateway.
_INJECTED_BY_KUBERNETES = re.compile(r"SERVICE_HOST|SERVICE_PORT(_.*)?|PORT|PORT_[0-9]+_(UDP|TCP)(_.*)?")


class ConfigError(Exception):
    """Settings that cannot be used; `errors` has one line for each, naming variable, value and what is accepted."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = errors


@dataclass(frozen=True)
class Config:
    """Effective settings. Times are in the unit that the name ends in; sizes are in bytes."""

    udp_port: int
    stale_threshold_ms: int
    network_mode: str
    bind_address: str
    enable_log: bool
    log_file: str
    expire_after_ms: int
    http_port: int | None  # None = no query interface
    log_max_bytes: int
    log_backups: int
    max_engines: int
    history: int
    allowed_sources: tuple[Network, ...]  # empty = all
    receive_buffer: int
    ready_after_ms: int
    http_idle_timeout_s: int
    keys_file: str | None  # None = datagrams need no signature
    http_tokens_file: str | None  # None = everybody may read
    allowed_origins: tuple[str, ...]  # of web pages; empty = none, ANY_ORIGIN in it = all
    stats_interval_s: int
    log_level: str
    http_follows_udp: bool  # HTTP_PORT was not set: the same number as the UDP port that is really bound


ANY_ORIGIN = "*"


class _Refused(Exception):
    """A value that its setting does not accept."""


def _whole_number(low: int, high: int) -> Callable[[str], int]:
    # int() takes more than people mean: "９９９", "9_999", " 9 ", "+9".
    digits = re.compile("[0-9]{1,18}")

    def parse(text: str) -> int:
        if not digits.fullmatch(text) or not low <= int(text) <= high:
            raise _Refused
        return int(text)

    return parse


def _port(text: str) -> int:
    return _whole_number(0, 65535)(text)


def _port_or_off(text: str) -> int | None:
    return None if text.lower() == "off" else _port(text)


def _one_of(*names: str) -> Callable[[str], str]:
    by_any_case = {name.casefold(): name for name in names}

    def parse(text: str) -> str:
        try:
            return by_any_case[text.casefold()]
        except KeyError:
            raise _Refused from None

    return parse


def _boolean(text: str) -> bool:
    word = text.lower()
    if word not in _TRUE + _FALSE:
        raise _Refused
    return word in _TRUE


def _address(text: str) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise _Refused from None
    return str(getattr(address, "ipv4_mapped", None) or address)


def _path(text: str) -> str:
    if not text or "\0" in text or not text.isprintable():
        raise _Refused  # what cannot be printed cannot be told in the log either
    return text


def _networks(text: str) -> tuple[Network, ...]:
    try:
        # Host bits may be set: an operator who writes 10.1.2.3/8 means the network.
        return tuple(_unmapped(ipaddress.ip_network(part.strip(), strict=False)) for part in text.split(","))
    except ValueError:
        raise _Refused from None


_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([a-z0-9._~-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
_PORTS_NEVER_SENT = {"http": 80, "https": 443}  # in a browser's Origin


def _origins(text: str) -> tuple[str, ...]:
    if not text.isascii():
        raise _Refused
    return tuple(_origin(part.strip().lower()) for part in text.split(","))


def _origin(text: str) -> str:
    """As browsers send it: what is written otherwise would never be equal to it."""
    if text == ANY_ORIGIN:
        return text
    parts = _ORIGIN.fullmatch(text)
    if parts is None:
        raise _Refused
    scheme, host, port = parts.groups()
    if port is None:
        return text
    number = int(port)
    if number > 65535:
        raise _Refused
    return f"{scheme}://{host}" + ("" if number == _PORTS_NEVER_SENT.get(scheme) else f":{number}")


def _unmapped(network: Network) -> Network:
    """An IPv4-mapped network (::ffff:10.0.0.0/104) as the IPv4 network that it stands for."""
    if isinstance(network, ipaddress.IPv6Network) and network.prefixlen >= 96:
        mapped = network.network_address.ipv4_mapped
        if mapped is not None:
            return ipaddress.IPv4Network((mapped, network.prefixlen - 96))
    return network


@dataclass(frozen=True)
class Setting:
    """One environment variable: how it is written, what it accepts and what it means."""

    name: str  # without the prefix
    field: str  # of Config
    default: str  # as documented; in parentheses if it is computed from something else
    accepts: str
    meaning: str
    parse: Callable[[str], object]

    @property
    def variable(self) -> str:
        """The whole name of the environment variable."""
        return self.name if self.name == LOG_LEVEL_VARIABLE else PREFIX + self.name


_MAX_BYTES = 2**53
_DAY_MS = 86_400_000

SETTINGS: tuple[Setting, ...] = (
    Setting("UDP_PORT", "udp_port", "9999",
            "a whole number from 0 to 65535", "UDP port that engines push to; 0 = any free one", _port),
    Setting("STALE_THRESHOLD", "stale_threshold_ms", "2000",
            f"a whole number of milliseconds from 1 to {_DAY_MS}",
            "ms of silence after which an engine is stale", _whole_number(1, _DAY_MS)),
    Setting("NETWORK_MODE", "network_mode", "unicast",
            " or ".join(MODES), "`unicast`, or `broadcast` for older set-ups", _one_of(*MODES)),
    Setting("BIND_ADDRESS", "bind_address", "0.0.0.0",
            "an IPv4 or IPv6 address of this host, 0.0.0.0 (all of IPv4) or :: (all of both)",
            "address to listen on, IPv4 or IPv6 (`::` takes both); broadcast mode always listens on all interfaces",
            _address),
    Setting("ENABLE_LOG", "enable_log", "true",
            "true or false (also 1/0, yes/no, on/off)", "write the state log", _boolean),
    Setting("LOG_FILE", "log_file", "engine_states.jsonl",
            "a path of printable characters",
            "path of the state log; missing folders are made; `-` = standard output, `/dev/stderr` = standard error",
            _path),
    Setting("EXPIRE_AFTER", "expire_after_ms", "(3 x STALE_THRESHOLD)",
            f"a whole number of milliseconds from STALE_THRESHOLD to {7 * _DAY_MS}",
            "ms of silence after which an engine is removed", _whole_number(1, 7 * _DAY_MS)),
    Setting("HTTP_PORT", "http_port", "(same as UDP_PORT)",
            "a whole number from 0 to 65535, or off",
            "TCP port of the query interface, on the same address; 0 = any free one; `off` = none", _port_or_off),
    Setting("LOG_MAX_BYTES", "log_max_bytes", "104857600",
            f"a whole number of bytes from 0 to {_MAX_BYTES}",
            "size at which the state log is rotated to `.1`, `.2`, ...; 0 = never", _whole_number(0, _MAX_BYTES)),
    Setting("LOG_BACKUPS", "log_backups", "10",
            "a whole number from 0 to 10000", "rotated files kept; any beyond are removed", _whole_number(0, 10_000)),
    Setting("MAX_ENGINES", "max_engines", "10000",
            "a whole number from 1 to 1000000", "engines known at a time", _whole_number(1, 1_000_000)),
    Setting("HISTORY", "history", "100",
            "a whole number from 0 to 100000", "latest states kept per engine, for looking back",
            _whole_number(0, 100_000)),
    Setting("ALLOWED_SOURCES", "allowed_sources", "(all)",
            "comma-separated networks, such as 10.0.0.0/8,fd00::/8; leave it unset to take all",
            "networks (`10.0.0.0/8,fd00::/8`) whose datagrams are taken", _networks),
    Setting("RECEIVE_BUFFER", "receive_buffer", "8388608",
            "a whole number of bytes from 1 to 1073741823",
            "bytes of kernel receive buffer asked for; what was granted is reported", _whole_number(1, 2**30 - 1)),
    Setting("READY_AFTER", "ready_after_ms", "0",
            f"a whole number of milliseconds from 0 to {_DAY_MS}",
            "ms after the start before `/readyz` says ready: beside another gateway, the time in which the engines are"
            " heard from again", _whole_number(0, _DAY_MS)),
    Setting("KEYS_FILE", "keys_file", "(none)",
            "a path of printable characters",
            "path of the keys that sign datagrams, one a line; with it, only signed datagrams are taken; read again at"
            " SIGHUP", _path),
    Setting("HTTP_IDLE_TIMEOUT", "http_idle_timeout_s", "650",
            "a whole number of seconds from 1 to 86400",
            "seconds for which an idle HTTP connection is kept: longer than balancers keep theirs, so that they close"
            " first", _whole_number(1, 86_400)),
    Setting("HTTP_TOKENS_FILE", "http_tokens_file", "(none)",
            "a path of printable characters",
            "path of readers' tokens, one a line, 16 to 256 characters of ! to ~ that do not begin with #; with it,"
            " everything but the probes asks for one; read again at SIGHUP", _path),
    Setting("ALLOWED_ORIGINS", "allowed_origins", "(none)",
            "comma-separated origins, such as https://dashboard.example:8443, without a path, or *",
            "origins of web pages that may read it from a browser (CORS), or `*`", _origins),
    Setting("STATS_INTERVAL", "stats_interval_s", "60",
            "a whole number of seconds from 0 to 86400",
            "seconds between summary lines in the daemon's own log; 0 = none", _whole_number(0, 86_400)),
    Setting(LOG_LEVEL_VARIABLE, "log_level", "INFO",
            ", ".join(_LOG_LEVELS), "how much the daemon's own log says, on stderr", _one_of(*_LOG_LEVELS)),
)  # fmt: skip


def read_config(environ: Mapping[str, str]) -> Config:
    """Read the settings from `environ`; raises ConfigError that names every value that cannot be used."""
    values: dict[str, object] = {}
    errors: list[str] = []
    for setting in SETTINGS:
        text = environ.get(setting.variable)
        if text is None:
            values[setting.field] = None if setting.default[0] == "(" else setting.parse(setting.default)
            continue
        try:
            values[setting.field] = setting.parse(text)
        except _Refused:
            errors.append(_refusal(setting, text))
    errors += _fill_computed_defaults(values, environ) + _refuse_group_address(values, environ)
    if errors:
        raise ConfigError(errors)
    return Config(**values)  # type: ignore[arg-type]


def _refusal(setting: Setting, text: str) -> str:
    line = f"{setting.variable}={text!r} cannot be used: accepted is {setting.accepts}"
    if text.startswith(("tcp://", "udp://")):
        line += " (this one was injected by Kubernetes for a Service of that name: set enableServiceLinks: false)"
    return line


def _fill_computed_defaults(values: dict[str, object], environ: Mapping[str, str]) -> list[str]:
    """Fill in what depends on another setting; returns the errors between settings. Refused values are missing."""
    values["http_follows_udp"] = PREFIX + "HTTP_PORT" not in environ
    if values["http_follows_udp"]:
        values["http_port"] = values.get("udp_port")
    for networks_or_origins in ("allowed_sources", "allowed_origins"):
        values[networks_or_origins] = values.get(networks_or_origins) or ()
    stale_ms, expire_ms = values.get("stale_threshold_ms"), values.get("expire_after_ms")
    if not isinstance(stale_ms, int):
        return []
    if PREFIX + "EXPIRE_AFTER" not in environ:
        values["expire_after_ms"] = 3 * stale_ms
    elif isinstance(expire_ms, int) and expire_ms < stale_ms:
        return [
            f"{PREFIX}EXPIRE_AFTER={environ[PREFIX + 'EXPIRE_AFTER']!r} cannot be used: accepted is"
            f" {PREFIX}STALE_THRESHOLD ({stale_ms}) or more, for an engine is stale before it is removed"
        ]
    return []


def _refuse_group_address(values: dict[str, object], environ: Mapping[str, str]) -> list[str]:
    """The kernel binds to an address of many hosts, and the gateway would be ready, and deaf to all but broadcasts."""
    mode, text = values.get("network_mode"), values.get("bind_address")
    if not isinstance(mode, str) or not isinstance(text, str) or MODES[mode].on_all_interfaces:
        return []
    if not ipaddress.ip_address(text).is_multicast and text != "255.255.255.255":
        return []
    return [
        f"{PREFIX}BIND_ADDRESS={environ[PREFIX + 'BIND_ADDRESS']!r} cannot be used: accepted is an address of this host"
        " alone, and nobody reaches HTTP at this one; 0.0.0.0 takes what is sent to broadcast addresses too"
    ]


def unknown_variables(environ: Mapping[str, str]) -> list[str]:
    """One warning for each variable that has the prefix but that no setting has, with the nearest name."""
    known = [setting.variable for setting in SETTINGS]
    warnings = []
    for variable in sorted(environ):
        if not variable.startswith(PREFIX) or variable in known:
            continue
        if _INJECTED_BY_KUBERNETES.fullmatch(variable.removeprefix(PREFIX)):
            continue
        nearest = difflib.get_close_matches(variable, known, n=1, cutoff=0)
        warnings.append(f"{variable} is no setting and is ignored: did you mean {nearest[0]}?")
    return warnings


def effective_settings(config: Config, environ: Mapping[str, str]) -> str:
    """The settings as `--check-config` prints them: one `NAME=value` a line, with where each comes from."""
    lines = []
    for setting in SETTINGS:
        origin = "environment" if setting.variable in environ else "default"
        if setting.field == "bind_address" and MODES[config.network_mode].on_all_interfaces:
            origin += f", not used in {config.network_mode} mode, which listens on all interfaces"
        lines.append(f"{setting.variable}={_written(getattr(config, setting.field), setting)}  # {origin}")
    return "\n".join(lines)


def _written(value: object, setting: Setting) -> str:
    if value is None:
        return "off" if setting.parse is _port_or_off else setting.default
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or setting.default
    return str(value)


def settings_help() -> str:
    """The table of settings for `--help`."""
    lines = ["settings, from the environment:"]
    for setting in SETTINGS:
        lines.append(f"  {setting.variable}  (default: {setting.default.strip('()')})")
        lines.append(f"      {setting.meaning.replace('`', '')}; accepted: {setting.accepts}")
    return "\n".join(lines)


def example_environment() -> str:
    """The text of config_examples/gateway.env: every setting at its default.

    `python3 -c 'import config; print(config.example_environment(), end="")'` makes it anew.
    """
    lines = [
        "# Every setting of the state gateway, at its default: for `EnvironmentFile=` of systemd, `--env-file` of",
        "# Docker, or a shell (`set -a; . ./gateway.env; set +a`). If a variable has # before it, its default",
        "# follows from other settings.",
    ]
    for setting in SETTINGS:
        computed = setting.default[0] == "("
        lines.append("")
        lines.append(f"# {setting.meaning.replace('`', '')}; accepted: {setting.accepts}")
        if computed:
            lines.append(f"# default: {setting.default.strip('()')}")
        example = _COMPUTED_EXAMPLES[setting.name] if computed else setting.default
        lines.append(f"{'#' if computed else ''}{setting.variable}={example}")
    return "\n".join(lines) + "\n"


# What the computed defaults are if everything else is at its default, or an example of what they look like.
_COMPUTED_EXAMPLES = {
    "EXPIRE_AFTER": "6000",
    "HTTP_PORT": "9999",
    "ALLOWED_SOURCES": "0.0.0.0/0,::/0",
    "KEYS_FILE": "/etc/elrar/keys",
    "HTTP_TOKENS_FILE": "/etc/elrar/http-tokens",
    "ALLOWED_ORIGINS": "https://dashboard.example:8443",
}
