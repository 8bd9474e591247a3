"""Agent and gateway together: what a gateway's readers see of an engine in trouble."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import unittest
from collections.abc import Iterator
from typing import Any

from tests.harness import DEADLINE_S, TOP, Daemon, daemon, wait_until
from tests.test_engine_agent_sidecar import vllm_page

ENGINE = "http://engine:8000"


class FakeEngine:
    """An engine's HTTP side: its page is what the test says, and moves with each look unless it is stopped."""

    def __init__(self, port: int = 0) -> None:
        self.running = 0
        self.moves = True
        self.steps = 1
        self.status = 200
        self.connections: list[socket.socket] = []
        engine = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = engine.page() if self.path.startswith("/metrics") else b"{}"
                self.send_response(engine.status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True

            def get_request(self) -> tuple[socket.socket, Any]:
                connection, address = super().get_request()
                engine.connections.append(connection)
                return connection, address

            def handle_error(self, request: Any, client_address: Any) -> None:
                pass  # the agent was killed

        self._server = Server(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def page(self) -> bytes:
        self.steps += self.moves
        return vllm_page(self.running, 0, self.steps).encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(DEADLINE_S)
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def agent(engine_port: int, gateway: Daemon, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The agent beside an engine, as a user starts it."""
    command = [sys.executable, "-I", str(TOP / "engine_agent.py"), "--engine", f"http://127.0.0.1:{engine_port}"]
    command += [
        "--gateway",
        f"127.0.0.1:{gateway.udp_port}",
        "--engine-id",
        ENGINE,
        "--push-interval",
        "50",
        *arguments,
    ]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("ELRAR_", "VLLM_"))}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as started:
        try:
            yield started
        finally:
            started.kill()


class InTrouble(unittest.TestCase):
    """An engine is usable only while it is proven to move or to be idle."""

    def setUp(self) -> None:
        stack = contextlib.ExitStack()
        self.addCleanup(stack.close)
        self.gateway = stack.enter_context(daemon(STALE_THRESHOLD=60_000))
        self.engine = FakeEngine()
        self.addCleanup(self.close_engine)
        self.agent = stack.enter_context(agent(self.engine.port, self.gateway))

    def close_engine(self) -> None:
        self.engine.close()  # the one that there is then

    def entry(self) -> dict[str, Any] | None:
        found: dict[str, Any] | None = self.gateway.ask("/engines").json["engines"].get(ENGINE)
        if found is not None and "usable" not in found:
            self.skipTest("this gateway knows nothing of phases")
        return found

    def wait(self, what: str, **fields: Any) -> dict[str, Any]:
        def there() -> dict[str, Any] | None:
            entry = self.entry()
            return entry if entry and all(entry.get(name) == value for name, value in fields.items()) else None

        found: dict[str, Any] = wait_until(what, there)
        return found

    def test_idle_busy_hung_and_back(self) -> None:
        idle = self.wait("it is idle", phase="serving", usable=True, pending_tokens_total=0)
        self.assertEqual((idle["status"], idle["load_known"], idle["kv_cache_free_blocks"]), ("live", True, 500))
        self.assertEqual(idle["extra"]["engine"], "vllm unknown")
        self.engine.running = 8
        self.wait("it is busy", usable=True, extra={**idle["extra"], "num_requests_running": 8})
        self.engine.moves = False
        hung = self.wait("it hangs", phase="stuck")
        self.assertEqual((hung["status"], hung["usable"]), ("unavailable", False))
        self.assertEqual(hung["extra"]["num_requests_running"], 8)
        self.engine.moves = True
        self.wait("it moves again", phase="serving", usable=True)
        self.assertEqual(self.entry() and self.wait("it is one life", phase="serving")["restarts"], 0)

    def test_a_port_that_refuses_is_an_engine_that_is_gone_until_it_answers_again(self) -> None:
        self.wait("it is idle", usable=True)
        self.engine.close()
        wait_until("it is gone", lambda: self.entry() is None)
        self.engine = FakeEngine(self.engine.port)
        self.wait("it is back", usable=True)
        self.assertEqual(self.gateway.stats()["lost_states"], 0)

    def test_answers_that_are_errors_are_no_proof(self) -> None:
        self.wait("it is idle", usable=True)
        self.engine.status = 503
        self.wait("it is stuck", phase="stuck", usable=False)
        self.engine.status = 200
        self.wait("it is back", usable=True)

    def test_the_agents_end_is_the_engines_farewell(self) -> None:
        self.wait("it is idle", usable=True)
        self.agent.send_signal(signal.SIGTERM)
        self.assertEqual(self.agent.wait(30), 0)
        wait_until("it is gone", lambda: self.entry() is None)
        self.assertEqual(self.gateway.stats()["farewells"], 3)


class Simulated(unittest.TestCase):
    """A simulated fleet arrives whole, and the gateway counts what the simulation did."""

    def test_nothing_is_lost_and_the_farewells_are_those_of_the_account(self) -> None:
        with daemon(STALE_THRESHOLD=60_000) as gateway:
            command = [sys.executable, "-I", str(TOP / "engine_agent.py"), "--simulate", "50", "--seconds", "3"]
            command += ["--gateway", f"127.0.0.1:{gateway.udp_port}"]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            account = json.loads(done.stderr.split(": ", 1)[1])
            sent = sum(account["datagrams"].values())
            stats = wait_until("all arrived", lambda: (s := gateway.stats())["total_received"] == sent and s)
            self.assertEqual(stats["invalid_states"], 0)
            if "farewells" not in stats:
                self.skipTest("this gateway knows nothing of farewells")
            self.assertEqual((stats["lost_states"], stats["ignored_fields"]), (0, 0))
            self.assertEqual(stats["farewells"], account["datagrams"]["gone"])
            self.assertEqual(gateway.ask("/engines").json["total_engines"], 0)


if __name__ == "__main__":
    unittest.main()
