"""Offers states to a UDP port at a rate; with UDP segmentation offload one send carries many, so it is not the limit.

python3 sender.py PORT RATE SECONDS ENGINES     RATE 0 = as fast as it goes; prints what was sent as JSON
    python3 sender.py PORT RATE SECONDS ENGINES KEY each signed, as an agent with that line of a KEYS_FILE does
    python3 sender.py PORT spread SECONDS ENGINES   each engine every 200 ms, one by one at even distances
    python3 sender.py PORT together SECONDS ENGINES each engine every 200 ms, all of them one after another
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import socket
import struct
import sys
import time

UDP_SEGMENT = 103  # Linux; not in the socket module
# Where every engine's timestamps begin, 13 digits; later than another sender's ended.
CLOCK = time.time_ns() // 1_000_000


FIRST_SEQ = 1_000_000  # so that all have as many digits


class Signer:
    """What an agent adds to a state when it signs."""

    def __init__(self, key: str) -> None:
        """`key` is a line of a KEYS_FILE."""
        self._key_id, digits, *_ = key.split()
        self._key = bytes.fromhex(digits)
        self._boot = secrets.token_hex(8)

    def signed(self, state: bytes, turn: int) -> bytes:
        """The datagram with boot, seq, phase and what else an agent says, and its signature."""
        text = (
            b'%b, "boot": "%b", "seq": %d, "phase": "serving", "model": "a-model", "num_requests_running": 3,'
            b' "num_requests_waiting": 0, "engine": "vllm 0.11.2", "agent": "1.0.0"'
            % (state[:-1], self._boot.encode(), FIRST_SEQ + turn)
        )
        code = hmac.digest(self._key, text, "sha256")[:16].hex()
        return b'%b, "sig": "%b:%b"}' % (text, self._key_id.encode(), code.encode())


def templates(engines: int) -> list[tuple[bytes, bytes]]:
    """A busy engine's datagram for each engine, in two parts with the timestamp between them; all of one size."""
    parts = []
    for number in range(engines):
        state = {
            "engine_id": f"http://10.100.{100 + number // 100}.{100 + number % 100}:8000",
            "timestamp_ms": CLOCK,
            "latency_pred_ms": 16.11793779048644,
            "scheduling_mode": "latency_optimized",
            "pending_tokens_total": 5000,
            "kv_cache_free_blocks": 100,
            "kv_cache_total_blocks": 1000,
            "engine_capacity": 59768.2749641796,
        }
        before, _, after = json.dumps(state).encode().partition(str(CLOCK).encode())
        parts.append((before, after))
    return parts


def send(port: int, rate: float, seconds: float, engines: int, signer: Signer | None = None) -> dict[str, float]:
    """Send for so many seconds; returns how many were sent, and in what time."""
    parts = templates(engines)
    first = b"%b%d%b" % (parts[0][0], CLOCK, parts[0][1])
    size = len(first if signer is None else signer.signed(first, 0))
    many = min(64, 60_000 // size)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))]
    sent = turn = number = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        if rate and sent >= elapsed * rate:
            time.sleep(0.0005 if rate < 20_000 else 0.0001)  # no spinning: the core is the readers' too
            continue
        count = many if not rate else max(1, min(many, int(elapsed * rate) - sent))
        datagrams = []
        for _ in range(count):
            before, after = parts[number]
            state = b"%b%d%b" % (before, CLOCK + turn, after)
            datagrams.append(state if signer is None else signer.signed(state, turn))
            number += 1
            if number == engines:
                number = 0
                turn += 1
        try:
            sock.sendmsg([b"".join(datagrams)], ancillary)
        except ConnectionRefusedError:
            continue
        except OSError:  # no segmentation offload here
            for one in datagrams:
                with contextlib.suppress(ConnectionRefusedError):
                    sock.send(one)
        sent += count
    return {"sent": sent, "seconds": time.perf_counter() - start}


def send_every_200_ms(port: int, spread: bool, seconds: float, engines: int) -> dict[str, float]:
    """As engines do, one datagram a send."""
    parts = templates(engines)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    sent = 0
    start = time.perf_counter()
    for turn in range(int(seconds / 0.2)):
        for number, (before, after) in enumerate(parts):
            due = start + turn * 0.2 + (number * 0.2 / engines if spread else 0)
            while time.perf_counter() < due:
                pass
            try:
                sock.send(b"%b%d%b" % (before, CLOCK + turn * 100, after))
            except ConnectionRefusedError:
                continue
            sent += 1
    return {"sent": sent, "seconds": time.perf_counter() - start}


def main() -> None:
    """Send what the command line asks for."""
    port, rate, seconds, engines = int(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    if rate in ("spread", "together"):
        print(json.dumps(send_every_200_ms(port, rate == "spread", seconds, engines)))
    else:
        signer = Signer(sys.argv[5]) if len(sys.argv) > 5 else None
        print(json.dumps(send(port, float(rate), seconds, engines, signer)))


if __name__ == "__main__":
    main()
