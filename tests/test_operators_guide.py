"""The commands of the operators' guide, as they are written there: port 9999, `localhost`, `pkill -f gateway.py`.

They run in namespaces of network, processes and mounts that the test makes, so that the port is free, `localhost` is
what it is on most hosts (::1 first), and pkill finds nobody else's gateway.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

from tests.harness import DEADLINE_S, TOP, clean_environment, ipv6_works

NAMESPACES = ("unshare", "--net", "--pid", "--fork", "--mount", "--mount-proc")
HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n"

PRELUDE = """
ip link set lo up
mount --bind "$FOLDER/hosts" /etc/hosts
ready() { until grep -q "ready: " "$1"; do kill -0 $2 || exit 99; done; }
GET='import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).read().decode())'
ask() { python3 -c "$GET" "http://127.0.0.1:$1"; }
send_as_in_the_guide() {
    # The guide's nc waits for answers for ever: it is ended once its datagram is there.
    echo '{"engine_id":"test","timestamp_ms":1234567890,"latency_pred_ms":100.0,"scheduling_mode":"latency_optimized",\
"pending_tokens_total":10,"kv_cache_free_blocks":100,"kv_cache_total_blocks":1000,"engine_capacity":1000.0}' \
        | nc -u localhost $1 &
    until ask $1/engines/test 2>/dev/null; do kill -0 $2 || exit 98; done
    kill %nc 2>/dev/null || kill $!
}
"""


def why_not() -> str:
    """Why this machine lets the test make no namespaces, or nothing where it does."""
    for tool in (*NAMESPACES[:1], "ip", "mount"):
        if shutil.which(tool) is None:
            return f"{tool} is not on this machine"
    tried = subprocess.run(
        [*NAMESPACES, "ip", "link", "set", "lo", "up"], capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    return f"no namespaces can be made here: {tried.stderr.strip()}" if tried.returncode else ""


@unittest.skipIf(why_not(), why_not())
class Guide(unittest.TestCase):
    """Every command does what the guide says of it."""

    def run_guide(self, script: str, *tools: str) -> str:
        for tool in tools:
            if shutil.which(tool) is None:
                self.skipTest(f"{tool} is not on this machine")
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            (folder / "hosts").write_text(HOSTS)
            (folder / "bin").mkdir()
            wrapper = folder / "bin" / "python3"
            wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            wrapper.chmod(0o755)
            (folder / "work").mkdir()
            (folder / "script").write_text(PRELUDE + script)
            environment = clean_environment()
            environment.update(FOLDER=str(folder), GATEWAY=str(TOP), PATH=f"{folder / 'bin'}:{environment['PATH']}")
            done = subprocess.run(
                [*NAMESPACES, "bash", str(folder / "script")],
                cwd=folder / "work",
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=DEADLINE_S,
                check=False,
            )
            self.assertEqual(done.returncode, 0, done.stdout)
            return done.stdout

    def test_start_script_with_defaults_test_state_log_migration_and_stop(self) -> None:
        output = self.run_guide(
            """
            "$GATEWAY/start_gateway_unicast.sh" 2>said & gateway=$!
            ready said $gateway
            send_as_in_the_guide 9999 $gateway
            ask 9999/stats | grep -o '"unicast_received": 1'
            grep "network mode" engine_states.jsonl
            tail -n +1 -f engine_states.jsonl | grep --line-buffered -m1 '"state"'
            pkill -f gateway.py
            wait $gateway; echo "exit status $?"
            """,
            "nc",
            "pkill",
        )
        self.assertIn('"engine_id": "test"', output)
        self.assertIn('"status": "live"', output)
        self.assertIn('"unicast_received": 1', output)
        self.assertIn('"message": "network mode: unicast', output)
        self.assertIn('"state": {"engine_id": "test", "timestamp_ms": 1234567890', output)
        self.assertIn("exit status 0", output)

    @unittest.skipUnless(ipv6_works(), "no IPv6 on this machine")
    def test_localhost_is_ipv6_first_here(self) -> None:
        self.assertRegex(self.run_guide("getent ahosts localhost", "getent"), r"^::1 ")

    def test_start_script_with_exported_settings(self) -> None:
        output = self.run_guide(
            """
            export VLLM_STATE_GATEWAY_UDP_PORT="8888"
            export VLLM_STATE_GATEWAY_BIND_ADDRESS="127.0.0.1"
            "$GATEWAY/start_gateway_unicast.sh" 2>said & gateway=$!
            ready said $gateway
            cat said
            send_as_in_the_guide 8888 $gateway
            kill $gateway; wait $gateway
            """,
            "nc",
        )
        self.assertIn("network mode: unicast, UDP 127.0.0.1:8888", output)
        self.assertIn('"engine_id": "test"', output)

    def test_python_directly_with_every_setting_of_the_guide(self) -> None:
        output = self.run_guide(
            """
            export VLLM_STATE_GATEWAY_UDP_PORT="9999"
            export VLLM_STATE_GATEWAY_STALE_THRESHOLD="2000"
            export VLLM_STATE_GATEWAY_NETWORK_MODE="unicast"
            export VLLM_STATE_GATEWAY_BIND_ADDRESS="0.0.0.0"
            export VLLM_STATE_GATEWAY_ENABLE_LOG="true"
            export VLLM_STATE_GATEWAY_LOG_FILE="engine_states.jsonl"
            cd "$GATEWAY"
            VLLM_STATE_GATEWAY_LOG_FILE="$FOLDER/states.jsonl" python3 gateway.py 2>"$FOLDER/said" & gateway=$!
            ready "$FOLDER/said" $gateway
            cat "$FOLDER/said"
            kill $gateway; wait $gateway
            """
        )
        self.assertIn("network mode: unicast, UDP 0.0.0.0:9999", output)
        self.assertNotIn("WARNING", output)

    def test_telnet_and_ping_reach_it(self) -> None:
        output = self.run_guide(
            """
            "$GATEWAY/start_gateway_unicast.sh" 2>said & gateway=$!
            ready said $gateway
            echo quit | telnet 127.0.0.1 9999
            kill $gateway; wait $gateway
            """,
            "telnet",
        )
        self.assertIn("Connected to 127.0.0.1", output)

    def test_who_has_the_port(self) -> None:
        output = self.run_guide(
            """
            python3 "$GATEWAY/gateway.py" 2>said & gateway=$!
            ready said $gateway
            echo "lsof:"; lsof -i :9999
            echo "ss -lun:"; ss -lun | grep :9999
            echo "netstat -un:"; netstat -un | grep :9999
            echo "ss -un:"; ss -un | grep :9999
            echo "second:"; python3 "$GATEWAY/gateway.py"; echo "exit status $?"
            kill $gateway; wait $gateway
            """,
            "lsof",
            "ss",
            "netstat",
        )
        self.assertRegex(output, r"lsof:\n.*\n(.*UDP \*:9999.*\n)(.*\n)*ss -lun:\nUNCONN")
        self.assertRegex(output, r"netstat -un:\nss -un:\nsecond:\n")
        self.assertRegex(output, r"Address already in use.*\nexit status 1\n")

    def test_debug_says_what_became_of_each_datagram(self) -> None:
        output = self.run_guide(
            """
            export VLLM_LOGGING_LEVEL=DEBUG
            "$GATEWAY/start_gateway_unicast.sh" 2>said & gateway=$!
            ready said $gateway
            send_as_in_the_guide 9999 $gateway >/dev/null
            kill $gateway; wait $gateway
            cat said
            """,
            "nc",
        )
        self.assertRegex(output, r"DEBUG elrar\.listener: datagram accepted engine_id='test' source=")

    def test_from_broadcast_to_unicast(self) -> None:
        output = self.run_guide(
            """
            export VLLM_STATE_GATEWAY_NETWORK_MODE="broadcast"
            python3 "$GATEWAY/gateway.py" 2>old & gateway=$!
            ready old $gateway
            export VLLM_STATE_GATEWAY_NETWORK_MODE="unicast"
            export VLLM_STATE_GATEWAY_BIND_ADDRESS="0.0.0.0"
            pkill -f gateway.py
            "$GATEWAY/start_gateway_unicast.sh" 2>new & new=$!
            ready new $new
            wait $gateway
            kill $new; wait $new
            grep "network mode" engine_states.jsonl
            """,
            "pkill",
        )
        modes = [line.split('"message": "')[1].split(",")[0] for line in output.splitlines() if '"message"' in line]
        self.assertEqual(
            sorted(modes),
            ["network mode: broadcast", "network mode: broadcast", "network mode: unicast", "network mode: unicast"],
        )


if __name__ == "__main__":
    unittest.main()
