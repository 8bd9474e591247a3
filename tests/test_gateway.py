"""The whole gateway in one process: its counters, its threads, and its use from Python (the contract's section 7)."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import embedded_gateway
from config import ConfigError, read_config
from gateway import VERSION, StartError, StateGateway, get_state_gateway
from sockets import open_udp_sockets
from tests.harness import (
    DEADLINE_S,
    TOP,
    FakeClock,
    FolderCase,
    ask,
    clean_environment,
    datagram,
    fields,
    free_port,
    heartbeat,
    read_log,
    wait_until,
)
from tests.test_state_query import parse_metrics

LOOPBACK = {"BIND_ADDRESS": "127.0.0.1", "UDP_PORT": 0, "STALE_THRESHOLD": 600_000}  # nobody goes stale meanwhile


class GatewayCase(FolderCase):
    def setUp(self) -> None:
        super().setUp()
        self.log_file = self.folder / "states.jsonl"

    def config(self, **settings: object) -> Any:
        merged = {**LOOPBACK, "LOG_FILE": self.log_file, **settings}
        return read_config({f"VLLM_STATE_GATEWAY_{name}": str(value) for name, value in merged.items()})

    def run_gateway(self, *, clock: FakeClock | None = None, **settings: object) -> StateGateway:
        gateway = StateGateway(self.config(**settings), clock=clock or time.monotonic)
        gateway.open()
        self.addCleanup(gateway.shutdown)
        gateway.start()
        return gateway

    def send(self, gateway: StateGateway, *datagrams: bytes) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            for one in datagrams:
                sock.sendto(one, ("127.0.0.1", gateway.udp_port))

    def received(self, gateway: StateGateway, count: int) -> dict[str, Any]:
        return wait_until(  # type: ignore[no-any-return]
            f"{count} received", lambda: (stats := gateway.get_stats())["total_received"] >= count and stats
        )


class Statistics(GatewayCase):
    """/stats and /metrics show every counter, from the same numbers."""

    def test_every_outcome_is_counted_once_and_the_sum_is_right(self) -> None:
        gateway = self.run_gateway(MAX_ENGINES=1)
        with self.assertLogs("elrar.listener", "WARNING") as logged:
            self.send(
                gateway,
                datagram(timestamp_ms=1000),
                datagram(timestamp_ms=1000),
                datagram(timestamp_ms=900),
                heartbeat(timestamp_ms=1100),
                datagram(engine_id="one too many"),
                b"junk",
                b"\xff",
                datagram(timestamp_ms=1200),
            )
            stats = self.received(gateway, 8)
            wait_until("the rejections to be said", lambda: logged.records)
        expected = {
            "network_mode": "unicast",
            "bind_address": "127.0.0.1",
            "udp_port": gateway.udp_port,
            "stale_threshold_ms": 600_000,
            "version": VERSION,
            "active_engines": 1,
            "total_engines": 1,
            "total_received": 8,
            "valid_states": 5,
            "invalid_states": 2,
            "valid_rate": 5 / 8,
            "unicast_received": 8,
            "broadcast_received": 0,
            "heartbeats": 1,
            "duplicates": 1,
            "out_of_order": 1,
            "rejected_capacity": 1,
            "rejected_source": 0,
            "expired_engines": 0,
            "kernel_dropped": 0 if sys.platform == "linux" else None,
        }
        self.assertEqual({name: stats[name] for name in expected}, expected)
        self.assertEqual({r: n for r, n in stats["invalid_reasons"].items() if n}, {"not_json": 1, "not_utf8": 1})
        self.assertGreater(stats["last_received"], 1.7e9)
        self.assertGreater(stats["receive_buffer_bytes"], 0)
        written = wait_until("the log to be written", lambda: gateway.get_stats()["log"]["written"])
        self.assertEqual(written, stats["valid_states"] - stats["duplicates"])
        log = {"enabled": True, "file": str(self.log_file), "written": 4, "dropped": 0, "errors": 0, "rotations": 0}
        self.assertEqual(gateway.get_stats()["log"], log)

    def test_http_shows_the_same_as_python(self) -> None:
        gateway = self.run_gateway()
        assert gateway.http_port is not None
        self.send(gateway, datagram())
        self.received(gateway, 1)
        shown, own = ask(gateway.http_port, "/stats").json, gateway.get_stats()
        self.assertEqual(list(shown), list(own))
        for name in ("total_received", "valid_states", "instance", "invalid_reasons", "receive_buffer_bytes"):
            self.assertEqual(shown[name], own[name])
        snapshot = ask(gateway.http_port, "/engines").json
        self.assertEqual(snapshot["instance"], own["instance"])
        self.assertEqual(list(snapshot["engines"]), ["test"])

    def test_metrics_are_valid_named_by_the_rules_and_show_the_counters(self) -> None:
        gateway = self.run_gateway()
        assert gateway.http_port is not None
        with self.assertLogs("elrar.listener", "WARNING") as logged:
            self.send(gateway, datagram(), datagram(), b"junk")
            self.received(gateway, 3)
            wait_until("the rejection to be said", lambda: logged.records)
        answer = ask(gateway.http_port, "/metrics")
        self.assertEqual(answer.headers["Content-Type"], "text/plain; version=0.0.4; charset=utf-8")
        types, samples = parse_metrics(answer.body.decode())
        self.assertEqual(set(types), set(samples))
        for name, kind in types.items():
            with self.subTest(name):
                self.assertTrue(name.startswith(("elrar_state_gateway_", "process_")))
                self.assertEqual(name.endswith("_total"), kind == "counter")
                self.assertNotRegex(name, "_ms$|_ms_|milli|kilo|mega")
        outcomes = {dict(labels)["outcome"]: n for labels, n in samples["elrar_state_gateway_datagrams_total"].items()}
        self.assertEqual(
            {outcome: n for outcome, n in outcomes.items() if n}, {"accepted": 1, "duplicate": 1, "invalid": 1}
        )
        (info,) = samples["elrar_state_gateway_info"]
        self.assertEqual(dict(info)["version"], VERSION)
        ((_, known),) = [
            (s, n) for s, n in samples["elrar_state_gateway_engines"].items() if s == (("status", "live"),)
        ]
        self.assertEqual(known, 1)

    def test_the_sums_of_the_fleet_are_metrics_with_the_engines_behind_each(self) -> None:
        gateway = self.run_gateway()
        assert gateway.http_port is not None
        self.send(gateway, datagram(engine_id="a"), datagram(engine_id="b", kv_cache_free_blocks=-1))
        self.received(gateway, 2)
        _, samples = parse_metrics(ask(gateway.http_port, "/metrics?engines=no").body.decode())
        prefix = "elrar_state_gateway_fleet_"
        sums = gateway.get_stats()["fleet"]["sums"]
        self.assertEqual(samples[prefix + "pending_tokens"], {(): sums["pending_tokens_total"]["sum"]})
        self.assertEqual(samples[prefix + "capacity_tokens_per_second"], {(): sums["engine_capacity"]["sum"]})
        self.assertEqual(samples[prefix + "kv_cache_free_blocks"], {(): 100})
        known = samples[prefix + "known_engines"]
        self.assertEqual({dict(labels)["field"]: n for labels, n in known.items()},
                         {name: one["engines"] for name, one in sums.items()})  # fmt: skip

    def test_before_anything_came_last_received_is_null(self) -> None:
        self.assertIsNone(self.run_gateway().get_stats()["last_received"])

    def test_without_a_log_it_says_so(self) -> None:
        gateway = self.run_gateway(ENABLE_LOG="false")
        self.send(gateway, datagram())
        stats = self.received(gateway, 1)
        self.assertEqual((stats["log"]["enabled"], stats["log"]["written"]), (False, 0))
        self.assertFalse(self.log_file.exists())


class Opening(GatewayCase):
    """Everything is opened, or nothing is and the error says what to do."""

    def test_one_number_for_udp_and_http(self) -> None:
        gateway = self.run_gateway()
        self.assertEqual(gateway.http_port, gateway.udp_port)
        self.assertNotEqual(gateway.udp_port, 0)

    def test_http_can_have_its_own_port_or_none(self) -> None:
        self.assertNotEqual((gateway := self.run_gateway(HTTP_PORT=0)).http_port, gateway.udp_port)
        without = self.run_gateway(HTTP_PORT="off", ENABLE_LOG="false")
        self.assertIsNone(without.http_port)
        self.assertEqual(sorted(without.threads()), ["reaper", "udp-listener"])

    def assert_start_error(self, pattern: str, **settings: object) -> None:
        gateway = StateGateway(self.config(**settings))
        with self.assertRaisesRegex(StartError, pattern):
            gateway.open()
        gateway.shutdown()

    def test_a_udp_port_that_is_taken(self) -> None:
        other = self.run_gateway(ENABLE_LOG="false")
        self.assert_start_error(
            rf"cannot listen on UDP 127\.0\.0\.1:{other.udp_port}: Address already in use.*ss -lunp.*UDP_PORT.*HTTP",
            UDP_PORT=other.udp_port,
        )

    def test_a_tcp_port_that_is_taken_lets_go_of_the_udp_port(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            self.assert_start_error(rf"cannot listen on TCP 127\.0\.0\.1:{port}.*ss -ltnp.*HTTP_PORT", HTTP_PORT=port)
            udp_port = free_port()
            self.assert_start_error("cannot listen on TCP", UDP_PORT=udp_port, HTTP_PORT=port)
            self.run_gateway(UDP_PORT=udp_port, HTTP_PORT=0)

    def test_an_address_of_another_host(self) -> None:
        self.assert_start_error("no interface of this host has that address.*ip addr", BIND_ADDRESS="192.0.2.1")

    def test_a_log_that_cannot_be_opened(self) -> None:
        for path in (self.folder, "/dev/full", self.folder / "states.jsonl" / "x"):
            self.log_file.touch()
            with self.subTest(str(path)):
                self.assert_start_error(rf"cannot open the state log {path}.*LOG_FILE.*ENABLE_LOG=false", LOG_FILE=path)

    def test_a_smaller_receive_buffer_than_asked_is_told_with_the_remedy(self) -> None:
        with (
            mock.patch("sockets._SO_RCVBUFFORCE", socket.SO_RCVBUF),
            self.assertLogs("elrar.gateway", "WARNING") as logged,
        ):
            self.run_gateway(RECEIVE_BUFFER=2**30 - 1)
        self.assertIn("sysctl -w net.core.rmem_max=1073741823", logged.output[0])

    def test_broadcast_mode_says_that_the_address_is_not_used(self) -> None:
        with self.assertLogs("elrar.gateway", "WARNING") as logged:
            gateway = self.run_gateway(NETWORK_MODE="broadcast")
        self.assertIn("BIND_ADDRESS=127.0.0.1 is not used", logged.output[0])
        self.send(gateway, datagram())
        stats = self.received(gateway, 1)
        self.assertEqual((stats["broadcast_received"], stats["unicast_received"]), (1, 0))
        self.assertEqual((stats["bind_address"], stats["network_mode"]), ("0.0.0.0", "broadcast"))


class Stopping(GatewayCase):
    """Intake stops first, then the log has everything, then the answers end; twice is harmless."""

    def test_everything_received_is_in_the_log(self) -> None:
        gateway = self.run_gateway()
        self.send(gateway, *(datagram(timestamp_ms=number) for number in range(500)))
        gateway.shutdown()
        stats = gateway.get_stats()
        first, *states, last = read_log(self.log_file)
        self.assertEqual([line["state"]["timestamp_ms"] for line in states], list(range(500)))
        self.assertEqual(stats["log"]["written"], 500)
        self.assertEqual((first["event"], last["event"]), ("gateway_started", "gateway_stopped"))
        self.assertIn("network mode: unicast", first["message"])
        self.assertEqual((last["total_received"], last["valid_states"], last["log_written"]), (500, 500, 500))

    def test_twice_at_once_is_harmless(self) -> None:
        gateway = self.run_gateway()
        others = [threading.Thread(target=gateway.shutdown) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join(DEADLINE_S)
        gateway.shutdown()
        self.assertEqual([line["event"] for line in read_log(self.log_file)], ["gateway_started", "gateway_stopped"])
        self.assertFalse(gateway.is_ready())

    def test_no_thread_and_no_port_is_left(self) -> None:
        before = set(threading.enumerate())
        gateway = self.run_gateway()
        port = gateway.udp_port
        gateway.shutdown()
        self.assertEqual(set(threading.enumerate()), before)
        self.assertEqual(self.run_gateway(UDP_PORT=port).udp_port, port)


class Threads(GatewayCase):
    """A dead thread is a dead gateway, and a stuck one shows at /livez."""

    def test_all_threads_move(self) -> None:
        gateway = self.run_gateway()
        self.assertEqual(
            gateway.threads(), dict.fromkeys(("udp-listener", "reaper", "state-log", "query-server"), True)
        )

    def test_each_thread_that_dies_is_reported_with_its_traceback(self) -> None:
        for name, method in (
            ("udp-listener", "udp_listener.UdpListener.step"),
            ("reaper", "state_store.StateStore.sweep"),
            ("state-log", "state_log.LineBuffer.remove_waiting"),
            ("query-server", "query_server.QueryServer._wait"),
        ):
            with self.subTest(name):
                dead: list[str] = []
                gateway = StateGateway(self.config(), on_death=dead.append)
                gateway.open()
                with (
                    mock.patch(method, side_effect=ZeroDivisionError("nobody expected this")),
                    self.assertLogs("elrar.gateway", "CRITICAL") as logged,
                ):
                    gateway.start()
                    wait_until(f"{name} to die", lambda found=dead: found)  # type: ignore[misc]
                self.assertEqual(dead, [name])
                self.assertIn("nobody expected this", logged.output[0])
                self.assertFalse(gateway.is_ready())
                with self.assertRaisesRegex(RuntimeError, name):
                    gateway.get_engine_states_dict()
                gateway.shutdown()

    def test_want_of_memory_ends_it_with_a_sentence_whatever_python_calls_it(self) -> None:
        for error in (MemoryError(), OSError(12, "Cannot allocate memory"), RuntimeError("can't allocate read lock")):
            with self.subTest(error):
                dead: list[str] = []
                gateway = StateGateway(self.config(), on_death=dead.append)
                gateway.open()
                with (
                    mock.patch("state_store.StateStore.sweep", side_effect=error),
                    self.assertLogs("elrar.gateway", "CRITICAL") as logged,
                ):
                    gateway.start()
                    wait_until("it to end", lambda found=dead: found)  # type: ignore[misc]
                self.assertRegex(logged.output[0], "no more memory.*MAX_ENGINES.*thread=reaper$")
                gateway.shutdown()

    def test_a_stuck_thread_shows_after_its_limit(self) -> None:
        clock = FakeClock()
        release, entered = threading.Event(), threading.Event()
        self.addCleanup(release.set)

        def stuck(_: object) -> int:
            entered.set()
            release.wait(DEADLINE_S)
            return 0

        with mock.patch("state_store.StateStore.sweep", stuck):
            gateway = self.run_gateway(clock=clock)
            assert gateway.http_port is not None
            self.assertTrue(entered.wait(DEADLINE_S))
            others = [part for part in gateway._threads.threads if part.name != "reaper"]
            for _ in range(11):
                self.assertEqual(ask(gateway.http_port, "/livez").status, 200)
                clock.move(0.95)  # less than what is taken for a pause of the whole process
                wait_until("the others to move", lambda: all(p.component.last_progress_at == clock.now for p in others))
            answer = ask(gateway.http_port, "/livez")
            self.assertEqual(answer.status, 503)
            stuck_threads = [name for name, state in answer.json["threads"].items() if state != "ok"]
            self.assertEqual(stuck_threads, ["reaper"])
            release.set()

    def test_after_a_pause_of_the_whole_process_nobody_is_stuck(self) -> None:
        clock = FakeClock()
        gateway = self.run_gateway(clock=clock)
        assert gateway.http_port is not None
        clock.move(60)
        self.assertEqual(ask(gateway.http_port, "/livez").status, 200)


@contextlib.contextmanager
def environment(**settings: object) -> Iterator[None]:
    with mock.patch.dict(os.environ, clean_environment(**settings), clear=True):
        yield


class FromPython(GatewayCase):
    """A router in the same process: one gateway, whose answers are the caller's own."""

    def setUp(self) -> None:
        super().setUp()
        self.addCleanup(self.forget)

    def forget(self) -> None:
        if embedded_gateway._process_gateway is not None:
            embedded_gateway._process_gateway.shutdown()
        embedded_gateway._process_gateway = None

    def get(self, *, forgetful: bool = True, **settings: object) -> StateGateway:
        """The gateway of this process; `forgetful`: without memory of a start that failed just now."""
        if forgetful:
            embedded_gateway._last_failure = None
        with environment(**{**LOOPBACK, "LOG_FILE": self.log_file, **settings}):
            gateway = get_state_gateway()
        assert isinstance(gateway, StateGateway)
        return gateway

    def test_there_is_one_gateway_and_it_starts_once(self) -> None:
        found: list[Any] = []
        with environment(**{**LOOPBACK, "LOG_FILE": self.log_file}):
            callers = [threading.Thread(target=lambda: found.append(get_state_gateway())) for _ in range(8)]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(DEADLINE_S)
        self.assertEqual(len(found), 8)
        self.assertEqual(len(set(map(id, found))), 1)
        self.assertEqual(len(read_log(self.log_file)), 1)

    def test_the_dictionary_is_the_caller_s_own(self) -> None:
        gateway = self.get()
        self.send(gateway, datagram(), datagram(engine_id="http://a:8000"))
        self.received(gateway, 2)
        states = gateway.get_engine_states_dict()
        self.assertEqual(states, {"test": fields(), "http://a:8000": fields(engine_id="http://a:8000")})
        states["test"]["pending_tokens_total"] += 1000
        del states["http://a:8000"]
        self.assertEqual(gateway.get_engine_states_dict()["test"], fields())
        self.assertEqual(gateway.get_total_engines_count(), 2)

    def test_one_state_is_the_caller_s_own(self) -> None:
        gateway = self.get()
        self.send(gateway, datagram())
        self.received(gateway, 1)
        state = gateway.get_engine_state("test")
        assert state is not None
        self.assertEqual(state.as_dict(), fields())
        state.pending_tokens_total = 0
        again = gateway.get_engine_state("test")
        assert again is not None
        self.assertEqual(again.pending_tokens_total, 10)
        self.assertIsNone(gateway.get_engine_state("nobody"))

    def test_counts_and_freshness(self) -> None:
        gateway = self.get()
        self.send(gateway, datagram(), heartbeat(engine_id="idle"))
        self.received(gateway, 2)
        self.assertEqual((gateway.get_active_engines_count(), gateway.get_total_engines_count()), (2, 2))
        snapshot = gateway.get_engine_snapshot()
        self.assertEqual((snapshot["test"]["status"], snapshot["idle"]["heartbeat"]), ("live", True))
        self.assertEqual(gateway.get_stats()["valid_states"], 2)

    def test_an_error_is_raised_and_a_later_call_tries_again(self) -> None:
        with self.assertRaises(ConfigError):
            self.get(UDP_PORT="abc")
        with self.assertRaises(StartError):
            self.get(BIND_ADDRESS="192.0.2.1")
        self.assertTrue(self.get().is_ready())

    def test_a_start_that_failed_is_not_tried_again_at_each_request(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            with (
                mock.patch("bound_ports.open_udp_sockets", wraps=open_udp_sockets) as tries,
                mock.patch("time.sleep") as sleep,
            ):
                for _ in range(20):
                    with self.assertRaisesRegex(StartError, "Address already in use"):
                        self.get(forgetful=False, UDP_PORT=port)
        self.assertEqual((tries.call_count, sleep.call_count), (1, 0))
        with self.assertRaisesRegex(StartError, "Address already in use"):
            self.get(forgetful=False, UDP_PORT=port)
        with mock.patch("embedded_gateway.FAILURE_REMEMBERED_S", 0):
            self.assertTrue(self.get(forgetful=False, UDP_PORT=port, HTTP_PORT=0).is_ready())

    def test_other_settings_are_tried_at_once(self) -> None:
        with self.assertRaises(StartError):
            self.get(BIND_ADDRESS="192.0.2.1")
        self.assertTrue(self.get(forgetful=False).is_ready())

    def test_after_a_shutdown_the_next_call_starts_a_new_one(self) -> None:
        first = self.get()
        first.shutdown()
        second = self.get()
        self.assertIsNot(first, second)
        self.assertTrue(second.is_ready())

    def test_a_gateway_whose_thread_died_is_replaced(self) -> None:
        with (
            mock.patch("state_store.StateStore.sweep", side_effect=ZeroDivisionError),
            self.assertLogs("elrar.gateway", "CRITICAL"),
        ):
            first = self.get()
            wait_until("the reaper to die", lambda: not first.is_ready())
        with self.assertRaises(RuntimeError):
            first.get_active_engines_count()
        self.assertTrue(self.get(UDP_PORT=first.udp_port).is_ready())

    def test_a_start_that_fails_half_way_lets_go_of_everything(self) -> None:
        port = free_port()
        start, started = threading.Thread.start, []

        def no_third(thread: threading.Thread) -> None:
            started.append(thread)
            if len(started) == 3:
                raise RuntimeError("can't start new thread")
            start(thread)

        with (
            mock.patch("threading.Thread.start", no_third),
            self.assertRaisesRegex(StartError, "start a thread.*ulimit -u"),
        ):
            self.get(UDP_PORT=port, HTTP_PORT=0)
        self.assertTrue(self.get(UDP_PORT=port, HTTP_PORT=0).is_ready())

    def test_what_cannot_be_made_closes_what_was_opened(self) -> None:
        with (
            mock.patch("query_server.selectors.DefaultSelector", side_effect=OSError(24, "Too many open files")),
            self.assertRaisesRegex(StartError, "Too many open files"),
        ):
            self.get()
        self.assertTrue(self.get().is_ready())

    def test_after_a_shutdown_no_old_table_is_shown(self) -> None:
        gateway = self.get()
        gateway.shutdown()
        with self.assertRaisesRegex(RuntimeError, "shut down"):
            gateway.get_engine_states_dict()
        self.assertEqual(gateway.get_stats()["total_received"], 0)

    def test_no_signal_handler_is_installed_and_no_logging_configured(self) -> None:
        import signal

        before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
        handlers = logging.getLogger().handlers.copy()
        self.get()
        self.assertEqual([signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)], before)
        self.assertEqual(logging.getLogger().handlers, handlers)

    def test_a_log_that_cannot_be_opened_is_told_once_and_opened_later(self) -> None:
        self.log_file.mkdir()
        with self.assertLogs("elrar", "ERROR") as logged:
            gateway = self.get()
        (line,) = logged.output
        self.assertRegex(line, "cannot open the state log.*States are received meanwhile.*tried again every second")
        self.send(gateway, datagram())
        self.received(gateway, 1)
        self.assertEqual(gateway.get_engine_states_dict(), {"test": fields()})
        with self.assertLogs("elrar", "WARNING") as logged:
            self.log_file.rmdir()
            wait_until("the state to be logged", lambda: gateway.get_stats()["log"]["written"])
        self.assertEqual(len(logged.output), 1)
        self.assertIn("writing the state log again", logged.output[0])
        gateway.shutdown()
        events = [line.get("event", "state") for line in read_log(self.log_file)]
        self.assertEqual(events, ["gateway_started", "state", "gateway_stopped"])

    def test_a_log_that_never_can_be_opened_holds_up_no_end(self) -> None:
        self.log_file.mkdir()
        with self.assertLogs("elrar", "ERROR"):
            self.get().shutdown()

    def test_a_tcp_port_that_is_taken_is_told_once_and_bound_later(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            with self.assertLogs("elrar", "ERROR") as logged:
                gateway = self.get(HTTP_PORT=port, STALE_THRESHOLD=60_000)
            (line,) = logged.output
            self.assertRegex(line, rf"cannot listen on TCP 127\.0\.0\.1:{port}.*States are received meanwhile")
            self.send(gateway, datagram())
            self.received(gateway, 1)
            self.assertEqual(gateway.get_active_engines_count(), 1)
            self.assertEqual(set(gateway.threads().values()), {True})
        with mock.patch("late_query_server.RETRY_S", 0.05), self.assertLogs("elrar.http", "WARNING") as logged:
            wait_until("the port to be bound", lambda: logged.records)
        self.assertEqual(list(ask(port, "/engines").json["engines"]), ["test"])
        gateway.shutdown()

    def test_an_end_before_the_tcp_port_was_free(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken, self.assertLogs("elrar", "ERROR"):
            gateway = self.get(HTTP_PORT=taken.getsockname()[1])
            gateway.shutdown()
        self.assertEqual(gateway.get_stats()["http"]["connections"], 0)

    def test_where_the_state_log_goes_is_told(self) -> None:
        with self.assertLogs("elrar.gateway", "INFO") as logged:
            self.get()
        self.assertIn(f"state log {self.log_file}", logged.output[-1])
        embedded_gateway._process_gateway.shutdown()  # type: ignore[union-attr]
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.folder)
        with environment(**LOOPBACK), self.assertLogs("elrar.gateway", "WARNING") as logged:
            get_state_gateway()
        self.assertRegex(logged.output[-1], rf"up to 1100 MiB file={self.folder}/engine_states\.jsonl")

    def test_a_logging_level_that_only_the_router_knows_is_no_error(self) -> None:
        self.assertTrue(self.get(VLLM_LOGGING_LEVEL="CRITICAL").is_ready())


ROUTER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from gateway import get_state_gateway
gateway = get_state_gateway()
child = os.fork()
if child == 0:
    try:
        get_state_gateway()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    gateway.shutdown()  # the parent's: nothing may happen to it
    sys.exit(0)
os.waitpid(child, 0)
import socket
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.sendto(sys.argv[2].encode(), ("127.0.0.1", gateway.udp_port))
while not gateway.get_active_engines_count():
    os.sched_yield()
print(list(gateway.get_engine_states_dict()), flush=True)
"""


PREFORK = """
import os, sys
sys.path.insert(0, sys.argv[1])
from gateway import get_state_gateway
gateway = get_state_gateway()
goes_on, tell = os.pipe()
forked, has_forked = os.pipe()
child = os.fork()
if child == 0:
    os.close(tell)
    os.write(has_forked, b"x")  # it has closed what it inherited
    try:
        gateway.get_engine_states_dict()
    except RuntimeError as error:
        print(error, flush=True)
    os.read(goes_on, 1)
    os._exit(0)
os.read(forked, 1)
gateway.shutdown()
print("again", get_state_gateway().is_ready(), flush=True)  # while the child lives
os.close(tell)
os.waitpid(child, 0)
"""


class SecondProcess(GatewayCase):
    """A forked worker of the same router is told that the port is taken; the first goes on, and its log is whole."""

    def test_a_child_holds_nothing_and_shows_no_old_table(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", PREFORK, str(TOP)],
            env=clean_environment(**{**LOOPBACK, "LOG_FILE": self.log_file, "UDP_PORT": free_port()}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertIn("again True", done.stdout)
        self.assertIn("of the parent process; read it over HTTP", done.stdout)

    def test_a_fork_is_told_and_harms_nothing(self) -> None:
        port = free_port()
        done = subprocess.run(
            [sys.executable, "-c", ROUTER, str(TOP), datagram().decode()],
            env=clean_environment(**{**LOOPBACK, "UDP_PORT": port, "HTTP_PORT": 0, "LOG_FILE": self.log_file}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        self.assertEqual(done.returncode, 0, done.stderr)
        error, engines = done.stdout.splitlines()
        self.assertRegex(error, f"StartError cannot listen on UDP 127.0.0.1:{port}: Address already in use.*over HTTP")
        self.assertEqual(engines, "['test']")
        documents = [json.loads(line) for line in self.log_file.read_text().splitlines()]
        self.assertEqual([d.get("event", "state") for d in documents], ["gateway_started", "state", "gateway_stopped"])


if __name__ == "__main__":
    unittest.main()
