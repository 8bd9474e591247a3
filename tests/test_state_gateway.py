"""The whole gateway in one process: its counters, its ports, its threads and its end."""

from __future__ import annotations

import socket
import sys
import threading
import time
import unittest
from typing import Any
from unittest import mock

from config import read_config
from gateway import VERSION, StartError, StateGateway
from tests.harness import (
    DEADLINE_S,
    FakeClock,
    FolderCase,
    ask,
    datagram,
    free_port,
    heartbeat,
    read_log,
    wait_until,
)
from tests.test_state_metrics import parse_metrics

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
            wait_until("the rejections to be said", lambda: logged.output)
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
        due = stats["valid_states"] - stats["duplicates"]
        wait_until("the log to be written", lambda: gateway.get_stats()["log"]["written"] >= due)
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
            wait_until("the rejection to be said", lambda: logged.output)
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
        others = [threading.Thread(target=gateway.shutdown, daemon=True) for _ in range(3)]
        for other in others:
            other.start()
        for other in others:
            other.join(DEADLINE_S)
        gateway.shutdown()
        self.assertEqual([line["event"] for line in read_log(self.log_file)], ["gateway_started", "gateway_stopped"])
        self.assertFalse(gateway.is_ready())

    def test_no_thread_and_no_port_is_left(self) -> None:
        before = set(threading.enumerate())
        port = free_port()
        gateway = self.run_gateway(UDP_PORT=port)
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


if __name__ == "__main__":
    unittest.main()
