"""Several processes with one port: one listens, the others follow it, and one of them takes its place."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import embedded_gateway
import following_gateway
from embedded_gateway import get_state_gateway
from following_gateway import FollowingGateway
from start_errors import StartError
from tests.harness import (
    DEADLINE_S,
    TOP,
    Daemon,
    again_and_again,
    clean_environment,
    daemon,
    datagram,
    free_port,
    heartbeat,
    wait_until,
)

WORKER = """
import json, sys, time
from gateway import get_state_gateway
from start_errors import StartError

until = time.monotonic() + 20
while True:
    try:
        gateway = get_state_gateway()
        break
    except StartError:  # on a busy machine the other one may take longer than 0.1 s; a later call tries again
        if time.monotonic() > until:
            raise
        time.sleep(0.1)
print(json.dumps(["started", type(gateway).__name__]), flush=True)
for line in sys.stdin:  # a look each time that it is asked
    gateway = get_state_gateway()
    states = gateway.get_engine_states_dict()
    live = gateway.get_active_engines_count()
    listens = type(gateway).__name__ == "StateGateway" or getattr(gateway, "_own", None) is not None
    pending = {name: state["pending_tokens_total"] for name, state in states.items()}
    print(json.dumps(["look", listens, live, pending]), flush=True)
"""


class InOneProcess(unittest.TestCase):
    """This process follows a daemon."""

    def setUp(self) -> None:
        self.port = free_port()
        self.settings: dict[str, Any] = {
            "UDP_PORT": self.port, "BIND_ADDRESS": "127.0.0.1", "STALE_THRESHOLD": 60_000, "ENABLE_LOG": "false",
        }  # fmt: skip
        self.addCleanup(self.forget)
        logger = logging.getLogger("engine_table")
        logger.disabled = True
        self.addCleanup(setattr, logger, "disabled", False)

    def forget(self) -> None:
        if embedded_gateway._process_gateway is not None:
            embedded_gateway._process_gateway.shutdown()
        embedded_gateway._process_gateway = embedded_gateway._last_failure = None

    def get(self, *, ask_timeout_s: float = DEADLINE_S, **settings: object) -> FollowingGateway:
        """Waits longer than a router would, because this machine may be busy."""
        embedded_gateway._last_failure = None
        with (
            mock.patch.dict(os.environ, clean_environment(**{**self.settings, **settings}), clear=True),
            mock.patch.object(following_gateway, "ASK_TIMEOUT_S", ask_timeout_s),
        ):
            gateway = get_state_gateway()
        assert isinstance(gateway, FollowingGateway)
        return gateway

    def test_it_is_the_same_table(self) -> None:
        with daemon(**self.settings) as running:
            running.send(datagram(engine_id="a"), datagram(engine_id="b", pending_tokens_total=7))
            running.wait_received(2)
            gateway = self.get()
            wait_until("both to be known", lambda: gateway.get_total_engines_count() == 2)
            shown = running.ask("/engines").json["engines"]
            self.assertEqual(gateway.get_engine_states_dict().keys(), shown.keys())
            for engine_id, fields in gateway.get_engine_states_dict().items():
                self.assertEqual(fields, {name: shown[engine_id][name] for name in fields})
                self.assertEqual(len(fields), 8)
            for engine_id, entry in gateway.get_engine_snapshot().items():
                ages = {"age_ms": 0, "state_age_ms": 0}
                self.assertEqual({**entry, **ages}, {**entry, **shown[engine_id], **ages})
            state = gateway.get_engine_state("b")
            assert state is not None
            self.assertEqual(state.pending_tokens_total, 7)
            self.assertIsNone(gateway.get_engine_state("c"))
            self.assertEqual(gateway.get_active_engines_count(), 2)
            self.assertEqual(gateway.get_stats()["total_received"], 2)
            self.assertEqual(gateway.get_stats()["instance"], running.stats()["instance"])
            self.assertTrue(gateway.is_ready())
            self.assertIs(self.get(), gateway)
            gateway.shutdown()
            gateway.shutdown()
            with self.assertRaisesRegex(RuntimeError, "shut down"):
                gateway.get_engine_states_dict()
            self.assertIsNot(self.get(), gateway)

    def test_a_restarting_daemon_finds_its_port(self) -> None:
        with daemon(**self.settings) as running:
            running.send(datagram(engine_id="a"))
            gateway = self.get()
            wait_until("a to be known", lambda: gateway.get_total_engines_count() == 1)
            self.assertEqual(gateway.get_stats()["total_received"], 1)
            running.stop()
            wait_until("it to be noticed", lambda: gateway._gone_since is not None)
            self.assertEqual(gateway.get_active_engines_count(), 1)
            self.assertEqual(gateway.get_stats()["total_received"], 1)  # as it said last
        with daemon(**self.settings) as running:
            wait_until("it to be followed again", gateway.is_ready)
            self.assertEqual(gateway.get_active_engines_count(), 1)
            running.send(datagram(engine_id="b"))
            wait_until("b to be known", lambda: gateway.get_engine_state("b"))

    def test_one_that_came_back_is_followed_without_the_tables_delay(self) -> None:
        delays = mock.patch.multiple("engine_table", FIRST_RETRY_S=1000.0, LONGEST_RETRY_S=1000.0)
        with delays, daemon(**self.settings) as running:
            running.send(datagram(engine_id="a"))
            gateway = self.get()
            wait_until("a to be known", lambda: gateway.get_total_engines_count() == 1)
            running.stop()
            wait_until("it to be noticed", lambda: gateway._gone_since is not None)
            with daemon(**self.settings):
                wait_until("it to be followed again", gateway.is_ready)

    def test_a_daemons_place_is_taken_when_it_has_been_gone_for_long(self) -> None:
        with mock.patch.object(following_gateway, "DAEMON_GONE_S", 0.2):
            with daemon(**self.settings) as running:
                running.send(datagram(engine_id="a"))
                gateway = self.get()
                wait_until("a to be known", lambda: gateway.get_total_engines_count() == 1)
            wait_until("its place to be taken", lambda: gateway.describe().startswith("network mode"))
            self.assertEqual(gateway.get_active_engines_count(), 1)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(datagram(engine_id="b"), ("127.0.0.1", self.port))
            wait_until("b to be known", lambda: gateway.get_engine_state("b"))
            self.assertEqual(gateway.get_stats()["total_received"], 1)
            self.assertEqual(gateway.get_engine_states_dict().keys(), {"a", "b"})
            self.assertIs(self.get(), gateway)

    def test_a_heartbeat_that_comes_first_hides_no_load_that_is_known(self) -> None:
        with mock.patch.object(following_gateway, "DAEMON_GONE_S", 0.2):
            with daemon(**self.settings) as running:
                running.send(datagram(engine_id="busy"))
                gateway = self.get()
                wait_until("it to be known", gateway.get_total_engines_count)
            wait_until("its place to be taken", lambda: gateway._own)
        assert gateway._own is not None
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.sendto(heartbeat(engine_id="busy", timestamp_ms=9_999_999_999), ("127.0.0.1", self.port))
            wait_until("the heartbeat", gateway._own.get_total_engines_count)
            busy = gateway.get_engine_snapshot()["busy"]
            self.assertEqual((busy["pending_tokens_total"], busy["heartbeat"], busy["status"]), (10, False, "live"))
            self.assertEqual(busy["age_ms"], min(busy["age_ms"], busy["state_age_ms"]))
            state = gateway.get_engine_state("busy")
            assert state is not None
            self.assertEqual(state.pending_tokens_total, 10)
            sock.sendto(
                datagram(engine_id="busy", timestamp_ms=9_999_999_999 + 1, pending_tokens_total=3),
                ("127.0.0.1", self.port),
            )
            wait_until("its load", lambda: gateway.get_engine_states_dict()["busy"]["pending_tokens_total"] == 3)

    def test_one_that_answers_a_byte_at_a_time_holds_up_nobody(self) -> None:
        ended = threading.Event()

        def trickle(listener: socket.socket) -> None:
            listener.settimeout(DEADLINE_S)
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                while not ended.wait(0.02):
                    connection.sendall(b"H")

        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other,
            socket.create_server(("127.0.0.1", self.port)) as listener,
        ):
            other.bind(("127.0.0.1", self.port))
            thread = threading.Thread(target=trickle, args=(listener,), daemon=True)
            thread.start()
            try:
                with self.assertRaisesRegex(
                    StartError, "in use.*it is no gateway.*(no whole answer within 0.1 s|timed out)"
                ):
                    self.get(ask_timeout_s=following_gateway.ASK_TIMEOUT_S)
            finally:
                ended.set()
                thread.join(DEADLINE_S)

    def test_the_error_says_so_where_there_is_nobody_to_follow(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
            other.bind(("127.0.0.1", self.port))
            with self.assertRaisesRegex(StartError, "in use.*/version, it is no gateway.*refused"):
                self.get()
            with self.assertRaisesRegex(StartError, "in use.*HTTP_PORT=off there is nobody to ask"):
                self.get(HTTP_PORT="off")

    @contextlib.contextmanager
    def followed_with_tokens(self, text: str) -> Iterator[tuple[Path, Daemon, FollowingGateway]]:
        """The tokens' file, the daemon that asks for them and knows an engine, and who follows it with the first."""
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(text)
            file.flush()
            with daemon(**self.settings, HTTP_TOKENS_FILE=file.name) as running:
                running.send(datagram(engine_id="a"))
                gateway = self.get(HTTP_TOKENS_FILE=file.name)
                wait_until("a to be known", lambda: gateway.get_total_engines_count() == 1)
                yield Path(file.name), running, gateway

    def test_it_reads_with_a_token(self) -> None:
        with self.followed_with_tokens("0123456789abcdef\nanother-token-0123\n") as (_, _, gateway):
            self.assertEqual(gateway.get_stats()["total_received"], 1)

    def test_it_goes_on_with_the_tokens_that_replace_its_own(self) -> None:
        """The daemon reads them at SIGHUP and ends streams of old ones; a worker has no signal, and looks itself."""
        with self.followed_with_tokens("0123456789abcdef\n") as (tokens, running, gateway):
            tokens.write_text("another-token-0123\n")
            self.assertEqual(gateway._other.tokens(), ("0123456789abcdef", "another-token-0123"))
            self.assertEqual(gateway.get_stats()["http"]["unauthorized"], 0)  # no guess, while the old one is right
            running.signal(signal.SIGHUP)

            def knows_b() -> bool:
                running.send(datagram(engine_id="b"))
                return "b" in gateway.get_engine_states_dict()

            wait_until("it to be followed with the new one", knows_b)
            wait_until(
                "the old one to be forgotten",
                lambda: gateway.get_stats() and gateway._other.tokens() == ("another-token-0123",),
            )


class Worker:
    """A router's worker in a process of its own, which looks when it is asked."""

    # In the short trial, which runs beside everything else, a worker may be kept from its core for seconds.
    STALE_THRESHOLD_MS = 2000 if os.environ.get("STATE_GATEWAY_LONG_TESTS") else 10_000

    def __init__(self, folder: Path, port: int) -> None:
        settings: dict[str, object] = {"UDP_PORT": port, "BIND_ADDRESS": "127.0.0.1", "ENABLE_LOG": "false"}
        settings["STALE_THRESHOLD"] = self.STALE_THRESHOLD_MS
        descriptor, path = tempfile.mkstemp(dir=folder)
        self._said = Path(path)
        said = os.fdopen(descriptor, "w")
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            cwd=folder,
            env={**clean_environment(**settings), "PYTHONPATH": str(TOP)},
        )
        said.close()
        self._answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        (self.kind,) = self._answer()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put('["ended"]')

    def look(self) -> tuple[bool, int, dict[str, int]]:
        """Whether it listens, how many engines are live, and what each has pending."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        listens, live, pending = self._answer()
        return listens, live, pending

    def _answer(self) -> list[Any]:
        answer: list[Any] = json.loads(self._answers.get(timeout=DEADLINE_S))
        if answer[0] == "ended":
            raise AssertionError(f"a worker ended: {self._said.read_text()[-2000:]}")
        return answer[1:]

    def kill(self) -> bool:
        self.process.kill()
        self.process.wait(DEADLINE_S)
        self._thread.join(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()
        return False


class Workers(unittest.TestCase):
    """A router with several workers has one table, whichever of them listens."""

    KILLS = 3 if os.environ.get("STATE_GATEWAY_LONG_TESTS") else 1
    LOOKS = 500 if os.environ.get("STATE_GATEWAY_LONG_TESTS") else 50

    def test_no_look_is_without_an_engine_whoever_is_killed(self) -> None:
        engines = [f"http://172.17.0.{number}:8000" for number in range(3, 43)]
        port = free_port()
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)

        def push(turn: int) -> None:
            for engine_id in engines:
                sock.sendto(
                    datagram(engine_id=engine_id, timestamp_ms=turn, pending_tokens_total=turn), ("127.0.0.1", port)
                )

        workers = [Worker(Path(folder.name), port) for _ in range(4)]
        self.addCleanup(lambda: any(worker.kill() for worker in workers))
        self.assertEqual(sorted(worker.kind for worker in workers), ["FollowingGateway"] * 3 + ["StateGateway"])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, again_and_again(0.1, push):
            wait_until("all to know all", lambda: all(worker.look()[1] == len(engines) for worker in workers))
            for _ in range(self.KILLS):
                self.look_on(workers, engines)
                listening = [worker for worker in workers if worker.look()[0]]
                self.assertEqual(len(listening), 1)
                listening[0].kill()
                workers.remove(listening[0])
                self.look_on(workers, engines)
                wait_until("another one to listen", lambda: any(worker.look()[0] for worker in workers))
                self.look_on(workers, engines)
                workers.append(Worker(Path(folder.name), port))
                wait_until("the new one to know all", lambda: workers[-1].look()[1] == len(engines))
            self.look_on(workers, engines)

    def look_on(self, workers: list[Worker], engines: list[str]) -> None:
        for _ in range(self.LOOKS):
            for worker in workers:
                _, live, pending = worker.look()
                self.assertEqual((live, pending.keys()), (len(engines), set(engines)))
            time.sleep(0.01)


if __name__ == "__main__":
    unittest.main()
