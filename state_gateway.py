"""The gateway: opens the sockets and the state log, creates the threads, and stops them.

This is the one place that opens sockets and files, creates threads, and stops them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

from bound_ports import BoundPorts
from component_thread import STOP_S, Component, ThreadGroup, memory_reserve
from config import MODES, Config, ConfigError
from engine_state import EngineState
from fleet_events import GATEWAY_STARTED, PAUSED, FleetEvents
from fleet_samples import FleetSamples
from gateway_counters import FINAL_COUNTERS, section
from late_query_server import LateQueryServer
from log_file import standard_stream
from own_addresses import is_one_sender
from pause_meter import PauseMeter
from query_server import QueryServer, counters_document
from reader_access import ReaderAccess, load_tokens
from signed_intake import SignedIntake
from signing_keys import load_keys
from staleness import UNAVAILABLE
from start_errors import StartError, cannot_have, cannot_log
from state_entry import entry
from state_log import LOCK_TIMEOUT_S, LogCounters, StateLog
from state_query import Query
from state_store import Reaper, StateStore
from state_watch import Watch
from udp_listener import UdpListener

VERSION = "2.0.0"

STUCK_AFTER_S = 10.0
LOG_STUCK_AFTER_S = 60.0  # a disk may hang for a while, and a restart of the gateway would not mend it
CATCH_UP_S = 0.005  # how long an answer waits, at most, for the datagrams that arrived before the question

logger = logging.getLogger("elrar.gateway")


class _Start(NamedTuple):
    """What tells one life of a gateway from another."""

    instance: str  # random, for readers
    at: float  # monotonic s


class StateGateway:
    """The gateway: `open` everything, then `start` everything, and `shutdown` in the order in which the data flows.

    Once it is started, every public method may be called from any thread, and what it returns is the caller's own.
    """

    def __init__(
        self,
        config: Config,
        *,
        embedded: bool = False,
        on_death: Callable[[str], None] | None = None,
        own_log_dropped: Callable[[], int] = lambda: 0,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        """`on_death` is called with a thread's name when it dies; without it the gateway shuts itself down then.

        `embedded`: in a router's process, the table comes first. A log that cannot be opened, or a TCP port that is
        taken, is logged and tried again while states are received, and `open` waits for nobody.
        """
        self.config = config
        self._own_log_dropped = own_log_dropped
        self._events = FleetEvents(clock=clock, wall_clock=wall_clock)
        self._clock = clock = PauseMeter(clock, on_pause=self._note_pause)
        self._wall_clock = wall_clock
        self._start = _Start(secrets.token_hex(8), clock())
        self._threads = ThreadGroup(on_death or self._shut_down_after_death)
        self._ports = BoundPorts(config, embedded=embedded)
        self._samples = FleetSamples(self.get_stats, clock=clock, wall_clock=wall_clock)
        self._store = StateStore(
            config.stale_threshold_ms,
            config.expire_after_ms,
            config.max_engines,
            config.history,
            is_one_sender=is_one_sender,
            events=self._events,
            clock=clock,
            judged_at=clock.judged_at,
        )
        self._watch = Watch(
            self._store,
            instance=self._start.instance,
            is_catching_up=clock.is_catching_up,
            clock=clock,
            wall_clock=wall_clock,
        )
        self._access = ReaderAccess(load_tokens(config.http_tokens_file), config.allowed_origins, clock=clock)
        keys = load_keys(config.keys_file)
        self._signed = (
            None if keys is None else SignedIntake(keys, config.max_engines, self._store.freshness, clock=clock)
        )
        self._log: StateLog | None = None
        self._http: QueryServer | LateQueryServer | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def open(self) -> None:
        """Bind the ports and open the state log; raises StartError, with everything closed again, if it cannot."""
        try:
            with contextlib.ExitStack() as opened:
                self._open(opened)
                opened.pop_all()
        except (OSError, MemoryError) as error:
            raise StartError(cannot_have(error)) from error

    def _open(self, opened: contextlib.ExitStack) -> None:
        config, ports = self.config, self._ports
        opened.callback(ports.close)
        ports.bind()
        if config.enable_log:
            self._log = self._open_log()
            opened.callback(self._log.close_descriptors)
        self._listener = UdpListener(
            ports.udp_sockets,
            self._store,
            self._log,
            allowed_sources=config.allowed_sources,
            signed=self._signed,
            low_latency=self._ports.embedded,
            watermark_readers=[self._clock.note_taken],
            events=self._events,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )
        opened.callback(self._listener.close_descriptors)
        reaper = Reaper(self._store, config.expire_after_ms, after_sweep=self._samples.take_due, clock=self._clock)
        add = self._threads.add  # in the order in which they are stopped
        add("udp-listener", self._listener, stuck_after_s=STUCK_AFTER_S, stop_timeout_s=1.5)
        add("reaper", reaper, stuck_after_s=STUCK_AFTER_S, stop_timeout_s=0.3)
        if self._log is not None:
            add("state-log", self._log, stuck_after_s=LOG_STUCK_AFTER_S)
        if config.http_port is not None:
            self._http = (
                self._make_query_server(ports.http_sockets)
                if ports.http_sockets
                else LateQueryServer(ports.bind_http, self._make_query_server, clock=self._clock)
            )
            add("query-server", self._http, stuck_after_s=STUCK_AFTER_S, stop_timeout_s=0.8)

    def _make_query_server(self, http_sockets: list[socket.socket]) -> QueryServer:
        return QueryServer(
            http_sockets,
            Query(self._store, self, self._watch, access=self._access, clock=self._clock),
            idle_timeout_s=self.config.http_idle_timeout_s,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )

    def _open_log(self) -> StateLog:
        config = self.config
        log = StateLog(
            self._absolute_log_path(),
            config.log_max_bytes,
            config.log_backups,
            events=self._events,
            clock=self._clock,
            wall_clock=self._wall_clock,
        )
        try:
            # A router's thread is not held up for a log that another process has locked.
            lock_timeout_s = 0 if self._ports.embedded else LOCK_TIMEOUT_S
            log.open("gateway_started", self._describe(log.path), lock_timeout_s=lock_timeout_s, **self._identity())
        except OSError as error:
            text = cannot_log(log.path, error)
            if not self._ports.embedded:
                raise StartError(text) from error
            logger.error("%s. States are received meanwhile, and it is tried again every second", text)
            log.open_later("gateway_started", self._describe(log.path), **self._identity())
        return log

    def _absolute_log_path(self) -> str:
        """Absolute from the start on, since the working folder may go away or change."""
        if standard_stream(self.config.log_file) is not None:
            return self.config.log_file
        try:
            return os.path.abspath(self.config.log_file)
        except FileNotFoundError as error:  # the working folder is gone already
            raise StartError(cannot_log(self.config.log_file, error)) from error

    def start(self) -> None:
        """Start every thread; everything is open by now."""
        self._clock.start()
        try:
            self._events.record(GATEWAY_STARTED, message=self.describe())
            self._samples.take_due()
            self._threads.start()
        except (RuntimeError, MemoryError) as error:
            memory_reserve.release()
            self.shutdown()
            raise StartError(cannot_have(error)) from error

    def describe(self) -> str:
        """The network mode, what was really bound, and where the state log is."""
        return self._describe(self.log_path if self.config.enable_log else "off")

    def _describe(self, log: str) -> str:
        return f"network mode: {self.config.network_mode}, {self._ports.describe()}, state log {log}"

    def reopen_log(self) -> None:
        """Open the state log anew, as after SIGHUP."""
        if self._log is not None:
            self._log.reopen()

    def reload_keys(self) -> None:
        """Read the keys again, as after SIGHUP; if they cannot be used, the old ones stay."""
        if self._signed is None:
            return
        try:
            keys = load_keys(self.config.keys_file)
        except ConfigError as error:
            logger.error("the keys stay as they were: %s", error)
            return
        if keys is not None:
            self._signed.set_keys(keys)

    def reload_tokens(self) -> None:
        """Read the readers' tokens again, as after SIGHUP; if they cannot be used, the old ones stay."""
        try:
            self._access.set_tokens(load_tokens(self.config.http_tokens_file))
        except ConfigError as error:
            logger.error("the readers' tokens stay as they were: %s", error)

    def _shut_down_after_death(self, name: str) -> None:
        threading.Thread(target=self.shutdown, name="gateway-shutdown", daemon=True).start()

    @property
    def udp_port(self) -> int:
        """The number that is really bound, once it is open."""
        return self._ports.udp_port

    @property
    def http_port(self) -> int | None:
        """The same of HTTP; None if there is none."""
        return self._ports.http_port

    @property
    def died_of(self) -> str | None:
        """The name of the thread that died, if one has."""
        return self._threads.died_of

    @property
    def has_ended(self) -> bool:
        """Whether it was shut down, or one of its threads died."""
        return self._threads.is_stopping or self.died_of is not None

    @property
    def log_path(self) -> str:
        """Where the state log is, or would be."""
        return self.config.log_file if self._log is None else self._log.path

    def shutdown(self) -> None:
        """Stop: intake first, then the log once it has everything, then the answers. Within 5 s; twice is harmless.

        Of an embedded one also from a signal's handler, which may have interrupted a question, or another shutdown, of
        its own thread.
        """
        in_handler = self.embedded and threading.current_thread() is threading.main_thread()  # or it may be in one
        if in_handler and not self._threads.is_inherited:
            # Locks that this thread may hold are waited for in another one.
            stopping = threading.Thread(target=self._stop, name="gateway-shutdown", daemon=True)
            try:
                stopping.start()
            except (RuntimeError, MemoryError):  # at the interpreter's end there are no new threads
                self._stop()
            else:
                stopping.join(STOP_S + 1.0)
        else:
            self._stop()

    def _stop(self) -> None:
        self._threads.stop(self._begin_shutdown, self._end)

    def _begin_shutdown(self) -> None:
        self._clock.stop()
        if self._http is not None:
            self._http.refuse_new()  # the next gateway may have the port at once

    def _end(self, component: Component, ended: bool) -> None:
        if component is self._log:
            self._end_log(self._log, ended)
        elif ended:
            component.close()

    def _end_log(self, log: StateLog, ended: bool) -> None:
        if ended:
            stopped = self._final_counters()
            given_up = log.end("gateway_stopped", f"network mode: {self.config.network_mode}, stopped", **stopped)
        else:
            given_up = log.give_up()  # its disk hangs
        if given_up:
            logger.error("gave up on states that could not be written states=%d file=%s", given_up, log.path)

    def _final_counters(self) -> dict[str, Any]:
        try:
            stats = self.get_stats()
        except (MemoryError, OverflowError):  # a thread that had no memory left half an engine
            memory_reserve.release()
            return {}
        return {name: stats[name] for name in FINAL_COUNTERS}

    def close_descriptors(self) -> None:
        """Close the descriptors that a forked child has of its parent's gateway; takes no lock, writes nothing."""
        self._threads.close_descriptors()

    # -- answers -------------------------------------------------------------------------------------------------------

    @property
    def version(self) -> str:
        """The version of the gateway."""
        return VERSION

    @property
    def embedded(self) -> bool:
        """Whether it runs in a router's process."""
        return self._ports.embedded

    def get_engine_states_dict(self) -> dict[str, dict[str, Any]]:
        """The eight fields of every engine that is live or stale, by engine_id; the caller may change it in place.

        Engines that say that they are not serving are left out; `get_engine_snapshot` has them.

        Raises RuntimeError if the gateway was shut down, if one of its threads died, and in a forked child.
        """
        self._refuse_if_gone()
        return {view.engine_id: view.state.as_dict() for view in self._store.views() if view.status != UNAVAILABLE}

    def get_engine_snapshot(self) -> dict[str, dict[str, Any]]:
        """As `get_engine_states_dict`, with what /engines says of freshness too: status, age_ms, heartbeat, ..."""
        self._refuse_if_gone()
        return {view.engine_id: entry(view) for view in self._store.views()}

    def get_engine_state(self, engine_id: str) -> EngineState | None:
        """The state of one engine, live or stale, or None if it is not known; raises RuntimeError as above."""
        self._refuse_if_gone()
        view = self._store.view(engine_id)
        return None if view is None else EngineState(**view.state.as_dict())

    def get_active_engines_count(self) -> int:
        """How many engines are live; raises RuntimeError as above."""
        self._refuse_if_gone()
        return self._store.counts()[0]

    def get_total_engines_count(self) -> int:
        """How many engines are known, live or stale; raises RuntimeError as above."""
        self._refuse_if_gone()
        return self._store.counts()[1]

    def _refuse_if_gone(self) -> None:
        """Raise if no new state can come any more: an old table must not pass for the present one."""
        if self._threads.is_inherited:
            raise RuntimeError("this is the state gateway of the parent process; read it over HTTP, at /engines")
        if self.died_of is not None:
            raise RuntimeError(f"the state gateway has stopped: its thread {self.died_of} died, see the log")
        if self._threads.is_stopping:
            raise RuntimeError("the state gateway was shut down")

    def get_stats(self) -> dict[str, Any]:
        """The document of /stats; the counters of datagrams are of one moment and add up. Also after `shutdown`."""
        counters = self._store.counters()
        del counters["accepted"]  # what is left of valid_states
        fleet = self._store.fleet()
        log = LogCounters() if self._log is None else self._log.counters()
        mode = self.config.network_mode
        return {
            **self._identity(),
            "uptime_s": round(self._clock() - self._start.at, 3),
            "active_engines": fleet["live"],
            "total_engines": fleet["live"] + fleet["unavailable"] + fleet["stale"],
            "fleet": fleet,
            **{each.counter: counters["total_received"] if each.name == mode else 0 for each in MODES.values()},
            **counters,
            "receive_buffer_bytes": self._ports.receive_buffer_bytes,
            "kernel_dropped": self._listener.kernel_dropped(),
            "log": {
                "enabled": self.config.enable_log,
                "file": self.log_path,
                **section("log", log),
            },
            "http": counters_document() if self._http is None else self._http.counters(),
            "watch": section("watch", self._watch),
            "held_up_ms": int(self._clock.held_up_s * 1000),
            "own_log_dropped": self._own_log_dropped(),
            "rejected_samples": self._listener.rejected_samples(),
        }

    def _identity(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "instance": self._start.instance,
            "network_mode": self.config.network_mode,
            "bind_address": self._ports.address,
            "udp_port": self.udp_port,
            "http_port": self.http_port,
            "stale_threshold_ms": self.config.stale_threshold_ms,
        }

    def _note_pause(self, length_s: float) -> None:
        self._events.record(PAUSED, message=f"the gateway itself stood still for {length_s:.1f} s")

    def get_events(self, since_ms: int = 0) -> list[dict[str, Any]]:
        """The document of /events, from a time on, in ms since the epoch."""
        return self._events.documents(since_ms)

    def samples_json(self, since_ms: int = 0) -> bytes:
        """The document of /samples, likewise, as JSON text."""
        return self._samples.json_text(since_ms)

    def snapshot_header(self) -> dict[str, Any]:
        """What heads the document of /engines."""
        return {
            "instance": self._start.instance,
            "uptime_ms": int((self._clock() - self._start.at) * 1000),
            "time_ms": int(self._wall_clock() * 1000),
            "stale_threshold_ms": self.config.stale_threshold_ms,
        }

    def catch_up(self) -> None:
        """Have everything taken that has arrived by now; waits for that, CATCH_UP_S at most. For the query server."""
        self._listener.catch_up(CATCH_UP_S)

    def threads(self) -> dict[str, bool]:
        """For each thread, by name, whether it is alive and moving."""
        return self._threads.progress(self._clock)

    def is_ready(self) -> bool:
        """Whether everything is open and nothing is stopping."""
        return self._threads.is_running

    def ready_in_ms(self) -> int:
        """How much of READY_AFTER is left: until then readers are better served by another gateway."""
        up_ms = int((self._clock() - self._start.at) * 1000)
        return max(0, self.config.ready_after_ms - up_ms)
