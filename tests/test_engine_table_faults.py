"""engine_table.py beside gateways that are killed, paused, restarted, stalled and slow: at no look is it wrong.

Takes a minute: only with STATE_GATEWAY_LONG_TESTS=1.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import select
import signal
import socket
import tempfile
import threading
import time
import unittest
from collections import deque
from pathlib import Path

from engine_table import EngineTable
from tests.harness import DEADLINE_S, Daemon, again_and_again, ask, datagram, free_port, heartbeat

THRESHOLD_S = 1.0
MARGIN_S = 0.1
ENGINES = [f"http://172.17.0.{number}:8000" for number in range(3, 23)]


class Way:
    """A way to a gateway's TCP port that can be slow or stand still."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0  # each way
        self.stalled = False
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ended = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        ways: dict[socket.socket, socket.socket] = {}
        opened = [self._listener]
        waiting: deque[tuple[float, socket.socket, bytes]] = deque()  # when it may go on, where to, what; b"" ends it
        while not self._ended:
            readable, _, _ = select.select([self._listener, *ways], [], [], 0.005)
            for sock in readable:
                if sock is self._listener:
                    ours, _ = sock.accept()
                    ours.settimeout(DEADLINE_S)
                    opened.append(ours)
                    try:
                        theirs = socket.create_connection(("127.0.0.1", self._port), DEADLINE_S)
                    except OSError:
                        ours.close()
                        continue
                    opened.append(theirs)
                    ways.update({ours: theirs, theirs: ours})
                    continue
                with contextlib.suppress(OSError):
                    received = b""
                    received = sock.recv(65536)
                waiting.append((time.monotonic() + self.delay_s, ways[sock], received))
                if not received:
                    del ways[sock]
            while waiting and not self.stalled and waiting[0][0] <= time.monotonic():
                _, sock, text = waiting.popleft()
                with contextlib.suppress(OSError):
                    if text:
                        sock.sendall(text)
                    else:
                        sock.shutdown(socket.SHUT_RDWR)
        for sock in opened:
            sock.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join(DEADLINE_S)


@unittest.skipUnless(os.environ.get("STATE_GATEWAY_LONG_TESTS"), "takes a minute: set STATE_GATEWAY_LONG_TESTS=1")
class Faults(unittest.TestCase):
    """No engine is missing that a reachable gateway knows as live; none is live that has been silent for longer."""

    def setUp(self) -> None:
        logger = logging.getLogger("engine_table")
        logger.disabled = True
        self.addCleanup(setattr, logger, "disabled", False)
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = Path(folder.name)
        self.ports = [free_port(), free_port()]
        self.gateways = [self.start(number) for number in (0, 1)]
        self.way = Way(self.ports[0])
        self.addCleanup(self.way.close)
        self.silent: set[str] = set()
        self.beats: set[str] = set()  # send heartbeats only
        self.gone: set[str] = set()  # said farewell, which one hears before the other
        self.said: dict[str, float] = {}  # when each engine sent something last
        self.unreachable_until = [0.0, 0.0]  # by then the table has had the time to come back to it
        self.live_since: list[dict[str, float]] = [{}, {}]  # when each gateway began to say so
        self.back_since: dict[str, float] = {}  # when each engine spoke again after a silence
        self.looks = 0
        self.lag_s = 0.0
        self.wrong: list[str] = []
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(self.socket.close)

    def start(self, number: int) -> Daemon:
        settings = {
            "UDP_PORT": self.ports[number],
            "BIND_ADDRESS": "127.0.0.1",
            "STALE_THRESHOLD": round(THRESHOLD_S * 1000),
            "EXPIRE_AFTER": 3000,
            "ENABLE_LOG": "false",
        }
        running = Daemon(self.folder, settings)
        self.addCleanup(running.close)
        return running.wait_ready()

    # -- what goes on meanwhile

    def push(self, turn: int) -> None:
        """Every engine that is not silent says something to both gateways, every tenth of a second."""
        for number, engine_id in enumerate(ENGINES):
            if engine_id in self.silent:
                continue
            state = {"engine_id": engine_id, "timestamp_ms": int(time.time() * 1000), "pending_tokens_total": turn}
            one = heartbeat(**{**state, "pending_tokens_total": 0}) if engine_id in self.beats else datagram(**state)
            now = time.monotonic()
            if now - self.said.get(engine_id, 0.0) > THRESHOLD_S / 2:
                self.back_since[engine_id] = now
            self.said[engine_id] = now
            self.say(one)
            if number % 7 == 0:
                time.sleep(0)

    def say(self, one: bytes) -> None:
        for port in self.ports:
            self.socket.sendto(one, ("127.0.0.1", port))

    def look(self, _: int) -> None:
        """A look at the table, against what was sent."""
        began = time.monotonic()
        live = {entry.engine_id: entry for entry in self.table.live()}
        ended = time.monotonic()
        self.lag_s = max(ended - began, self.lag_s * 0.98)
        said = dict(self.said)
        for engine_id, entry in live.items():
            silent_s = began - said[engine_id]
            if silent_s > THRESHOLD_S + MARGIN_S + self.lag_s:
                self.wrong.append(f"{engine_id} is live after {silent_s:.3f} s of silence, {entry!r}, {entry.gateway}")
        self.looks += 1

    def compare(self, _: int) -> None:
        """What reachable gateways know as live is in the table, and live there as soon as the way takes."""
        for number, port in enumerate(self.ports):
            since = self.live_since[number]
            if not self.is_reachable(number):
                since.clear()
                continue
            try:
                engines = ask(port, "/engines?status=live").json["engines"]
            except (OSError, http.client.HTTPException):
                continue
            now = time.monotonic()
            takes_s = 0.2 + self.way.delay_s
            for engine_id in since.keys() - engines.keys():
                del since[engine_id]
            for engine_id, entry in engines.items():
                if engine_id in self.gone:
                    continue
                # Of one that has just spoken again the table is told after what the way takes.
                if now - max(since.setdefault(engine_id, now), self.back_since[engine_id]) > 0.1 + takes_s:
                    must_be_live = entry["age_ms"] < (THRESHOLD_S - takes_s - 0.1) * 1000
                    self.expect(number, engine_id, must_be_live, now + takes_s)

    def is_reachable(self, number: int) -> bool:
        return self.gateways[number].process.poll() is None and time.monotonic() > self.unreachable_until[number]

    def expect(self, number: int, engine_id: str, must_be_live: bool, until: float) -> None:
        """An engine is in the table at once, and live by then, unless its gateway was made unreachable meanwhile."""
        entry = self.table.get(engine_id)
        while entry is not None and must_be_live and entry.status != "live" and time.monotonic() < until:
            time.sleep(0.01)
            entry = self.table.get(engine_id)
        if (entry is None or (must_be_live and entry.status != "live")) and self.is_reachable(number):
            self.wrong.append(f"gateway {number} knows {engine_id}, the table {entry!r}; {self.table.gateways()}")

    # -- what is done to them

    def wait(self, seconds: float) -> None:
        """Let it go on for so long; fails as soon as a look was wrong."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.assertEqual(self.wrong[:1], [])
            time.sleep(0.01)

    def unreachable(self, number: int, seconds: float) -> None:
        self.unreachable_until[number] = time.monotonic() + seconds

    def run_through(self) -> None:
        """Every trouble, one after another."""
        first, second, last = ENGINES[0], ENGINES[1], ENGINES[-1]
        self.wait(1.5)
        self.silent = {first, second}
        self.wait(2.0)  # stale
        self.silent = {second}
        self.wait(2.5)  # removed
        self.silent = set()
        self.beats = {last}
        self.wait(2.5)

        # One says farewell, and comes back.
        if "phase" in self.table.entries()[0].as_dict():
            self.silent = self.gone = {second}
            self.wait(0.2)
            for _ in range(3):
                self.say(datagram(engine_id=second, timestamp_ms=int(time.time() * 1000), phase="gone"))
            # From 200 ms on, which the way may take.
            self.said[second] = time.monotonic() + 0.2 - THRESHOLD_S - MARGIN_S
            self.wait(0.3)
            self.assertIsNone(self.table.get(second))
            self.silent = set()
            self.wait(1.0)
            self.gone = set()

        # One is killed, and comes back.
        self.gateways[0].process.kill()
        self.gateways[0].process.wait(DEADLINE_S)
        self.wait(1.5)
        self.silent = {first}
        self.wait(1.5)
        self.gateways[0] = self.start(0)
        self.unreachable(0, 1.5)
        self.silent = set()
        self.wait(2.0)

        # One is paused, with an engine that dies meanwhile; then for so long that it is taken for hung.
        for seconds in (1.5, 4.0):
            self.unreachable(1, seconds + 2.5)
            self.gateways[1].signal(signal.SIGSTOP)
            self.wait(0.3)
            self.silent = {second}
            self.wait(seconds)
            self.gateways[1].signal(signal.SIGCONT)
            self.wait(1.0)
            self.silent = set()
            self.wait(2.0)

        # The path to one stands still, and what was on it comes late; an engine dies meanwhile.
        for seconds in (0.6, 1.8):
            self.unreachable(0, seconds + 2.5)
            self.way.stalled = True
            self.silent = {first}
            self.wait(seconds)
            self.way.stalled = False
            self.wait(1.5)
            self.silent = set()
            self.wait(1.0)

        # The path to one is slow, and nobody else is there; engines die one after another.
        self.unreachable(1, 8.0)
        self.way.delay_s = 0.3
        self.gateways[1].signal(signal.SIGSTOP)
        for engine_id in ENGINES[:3]:
            self.silent.add(engine_id)
            self.wait(0.8)
        self.silent = set()
        self.wait(1.0)

        # The other comes back when this one is gone, too.
        self.gateways[0].process.kill()
        self.gateways[0].process.wait(DEADLINE_S)
        self.wait(1.6)
        self.assertEqual(self.table.live(), [])
        self.unreachable(1, 2.5)
        self.gateways[1].signal(signal.SIGCONT)
        self.wait(3.0)
        self.assertEqual(len(self.table.live()), len(ENGINES))
        self.way.delay_s = 0.0
        self.gateways[0] = self.start(0)
        self.wait(2.0)

        # All is gone: what is known grows old, and is removed.
        for running in self.gateways:
            running.process.kill()
            running.process.wait(DEADLINE_S)
        self.wait(THRESHOLD_S + MARGIN_S + 0.1)
        self.assertEqual(self.table.live(), [])
        self.wait(2.5)
        self.assertEqual(len(self.table), 0)

    def test_at_no_look_is_the_table_wrong(self) -> None:
        urls = [f"http://127.0.0.1:{self.way.port}", f"http://127.0.0.1:{self.ports[1]}"]
        with EngineTable(*urls) as self.table, again_and_again(0.1, self.push):
            deadline = time.monotonic() + 10
            while len(self.table.live()) < len(ENGINES) and time.monotonic() < deadline:
                time.sleep(0.01)
            with again_and_again(0.005, self.look), again_and_again(0.05, self.compare):
                self.run_through()
        self.assertEqual(self.wrong, [])
        self.assertGreater(self.looks, 1000)


if __name__ == "__main__":
    unittest.main()
