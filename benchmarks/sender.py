"""Offers states to a UDP port at a rate; with UDP segmentation offload one send carries many, so it is not the limit.

python3 sender.py PORT RATE SECONDS ENGINES     RATE 0 = as fast as it goes; prints what was sent as JSON
"""

from __future__ import annotations

import json
import socket
import struct
import sys
import time

UDP_SEGMENT = 103  # Linux; not in the socket module
CLOCK = 1_755_532_567_495  # where every engine's timestamps begin, 13 digits


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


def send(port: int, rate: float, seconds: float, engines: int) -> dict[str, float]:
    """Send for so many seconds; returns how many were sent, and in what time."""
    parts = templates(engines)
    size = len(parts[0][0]) + 13 + len(parts[0][1])
    many = min(64, 60_000 // size)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.connect(("127.0.0.1", port))
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("H", size))]
    sent = turn = number = 0
    start = time.perf_counter()
    while (elapsed := time.perf_counter() - start) < seconds:
        if rate and sent >= elapsed * rate:
            if rate < 20_000:
                time.sleep(0.0005)
            continue
        count = many if not rate else max(1, min(many, int(elapsed * rate) - sent))
        datagrams = []
        for _ in range(count):
            before, after = parts[number]
            datagrams.append(b"%b%d%b" % (before, CLOCK + turn * 100, after))
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
                sock.send(one)
        sent += count
    return {"sent": sent, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    print(json.dumps(send(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))))
