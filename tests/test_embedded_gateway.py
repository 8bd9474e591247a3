"""The gateway of a router's own process, as it is used from Python (the contract's section 7)."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import unittest
from collections.abc import Iterator
from typing import Any
from unittest import mock

import embedded_gateway
from config import ConfigError
from gateway import StartError, StateGateway, get_state_gateway
from sockets import open_udp_sockets
from tests.harness import (
    DEADLINE_S,
    TOP,
    ask,
    clean_environment,
    datagram,
    fields,
    free_port,
    heartbeat,
    read_log,
    wait_until,
)
from tests.test_state_gateway import LOOPBACK, GatewayCase


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
            callers = [
                threading.Thread(target=lambda: found.append(get_state_gateway()), daemon=True) for _ in range(8)
            ]
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

    def test_reopening_leaves_no_descriptor_behind(self) -> None:
        """Nor is one left to the garbage collector, which comes by rarely where a router has much in memory."""
        self.get().shutdown()
        gc.disable()
        self.addCleanup(gc.enable)
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            self.get().shutdown()
        self.assertEqual(len(os.listdir("/proc/self/fd")), before)

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
            port = free_port()
            taken.bind(("127.0.0.1", port))
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
            first = self.get(UDP_PORT=free_port())
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
            wait_until("that to be said", lambda: logged.output)
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
        port = free_port()
        with socket.create_server(("127.0.0.1", port)):
            with self.assertLogs("elrar", "ERROR") as logged:
                gateway = self.get(HTTP_PORT=port, STALE_THRESHOLD=60_000)
            (line,) = logged.output
            self.assertRegex(line, rf"cannot listen on TCP 127\.0\.0\.1:{port}.*States are received meanwhile")
            self.send(gateway, datagram())
            self.received(gateway, 1)
            self.assertEqual(gateway.get_active_engines_count(), 1)
            self.assertEqual(set(gateway.threads().values()), {True})
        with mock.patch("late_query_server.RETRY_S", 0.05), self.assertLogs("elrar.http", "WARNING") as logged:
            wait_until("the port to be bound", lambda: logged.output)
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
while not gateway.get_active_engines_count():
    sock.sendto(sys.argv[2].encode(), ("127.0.0.1", gateway.udp_port))
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


INTERRUPTED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
import state_gateway
from gateway import get_state_gateway
gateway = get_state_gateway()
signal.signal(signal.SIGTERM, lambda *_: gateway.shutdown())
state_gateway.STOP_S = -0.9  # it is not to be waited for here
with gateway._store._lock, gateway._threads._stop_lock:  # as in the middle of a question, and of another shutdown
    os.kill(os.getpid(), signal.SIGTERM)
    print("goes on", flush=True)
state_gateway.STOP_S = 30.0
os.kill(os.getpid(), signal.SIGTERM)
print(gateway.has_ended, set(gateway.threads().values()))
"""


class InASignalsHandler(GatewayCase):
    """A handler may shut the gateway down, whatever its thread was doing with it."""

    def test_an_interrupted_question_and_an_interrupted_shutdown(self) -> None:
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, str(TOP)],
            env=clean_environment(**{**LOOPBACK, "LOG_FILE": self.log_file, "UDP_PORT": 0}),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        self.assertEqual((done.returncode, done.stdout), (0, "goes on\nTrue {False}\n"), done.stderr)
        self.assertEqual(read_log(self.log_file)[-1]["event"], "gateway_stopped")


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
