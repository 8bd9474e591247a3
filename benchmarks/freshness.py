"""Simulates what routers lose when they know their engines' load too late: a table and a plot for docs/why.md.

    python3 benchmarks/freshness.py             prints the table
    python3 benchmarks/freshness.py --write     writes it into docs/why.md, and the plot to docs/why.svg
    python3 benchmarks/freshness.py --check     runs it again and compares it with what docs/why.md has

It is a simulation, not a measurement: 50 engines with continuous batching, and routers that know the load as it was
some time ago. Only the age of that knowledge differs between two rows; the requests are the same to the last token.
The standard library is all that it needs, and the same seed gives the same numbers.

An engine reads prompts one after the other at PREFILL_TOKENS_PER_S, once one of its SLOTS is free, and then writes the
answer, a token every STEP_S, slower the more requests it has. A request waits from its arrival to its first token.
"""

from __future__ import annotations

import argparse
import heapq
import random
import sys
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, quantiles

ENGINES = 50
SLOTS = 48  # requests that an engine works on at a time
PREFILL_TOKENS_PER_S = 12_000.0
STEP_S = 0.02  # one token of each request, if there is one request
CROWDING = 1.0  # how many times longer a step takes more if all slots are taken
UTILISATION = 0.8  # of the slots, if requests were spread without any loss
SECONDS = 120.0
WARM_UP_S = 20.0  # requests that arrive earlier are not counted
MEAN_PROMPT, MEAN_ANSWER = 1_200.0, 220.0  # tokens
SPREAD = 1.0  # sigma of the lengths' log-normal distribution: a tenth of the prompts has more than 2.6 times the mean
LONGEST = 16_000  # tokens
FREEZE_AT_S = 60.0
PROVEN_WITHIN_S = 1.5  # after so long without proof that it moves, an engine is called stuck
SEED = 20_260

AGES_S = (0.1, 1.0, 5.0, 15.0)
ROUTERS = (1, 2, 4, 8)
LEAST_LOADED, COUNTS_ITS_OWN, TWO_CHOICES = "least loaded", "least loaded, counts its own", "two choices"
POLICIES = (LEAST_LOADED, COUNTS_ITS_OWN, TWO_CHOICES)

DOCS = Path(__file__).resolve().parent.parent / "docs"
BEGIN, END = "<!-- benchmarks/freshness.py: begin -->", "<!-- end -->"


@dataclass(slots=True)
class Request:
    """One request: lengths in tokens, moments in seconds since the simulation's start."""

    arrived_at: float
    router: int
    prompt: int
    answer: int
    waited_s: float = -1.0  # to the first token; below 0 while there is none
    engine: int = -1


@dataclass(slots=True)
class Engine:
    """One engine: who runs, who waits, and until when its prefill is busy."""

    running: int = 0
    waiting: deque[Request] = field(default_factory=deque)
    pending_tokens: int = 0
    prefill_free_at: float = 0.0
    frozen: bool = False

    def load_s(self) -> float:
        """Seconds of work ahead: prompts to be read, and a share of a mean answer for each request that runs."""
        answers_s = self.running / SLOTS * MEAN_ANSWER * STEP_S
        return self.pending_tokens / PREFILL_TOKENS_PER_S + answers_s + len(self.waiting) * MEAN_ANSWER * STEP_S / SLOTS


def make_requests(rng: random.Random, routers: int) -> list[Request]:
    """The requests of one run, in the order of their arrival: a Poisson process, lengths log-normal."""

    def length(mean: float) -> int:
        return min(LONGEST, max(1, round(mean * rng.lognormvariate(-SPREAD * SPREAD / 2, SPREAD))))

    in_slot_s = MEAN_PROMPT / PREFILL_TOKENS_PER_S + MEAN_ANSWER * STEP_S * (1 + CROWDING * UTILISATION)
    per_s = UTILISATION * ENGINES * SLOTS / in_slot_s
    requests, now = [], 0.0
    while (now := now + rng.expovariate(per_s)) < SECONDS:
        requests.append(Request(now, rng.randrange(routers), length(MEAN_PROMPT), length(MEAN_ANSWER)))
    return requests


class Fleet:
    """The engines, and the moments at which something ends on them."""

    def __init__(self) -> None:
        self.engines = [Engine() for _ in range(ENGINES)]
        self._ends: list[tuple[float, int, int]] = []  # when, a number to tell apart what ends at once, which engine
        self._number = 0

    def advance(self, now: float) -> None:
        """Let everything end that ends by `now`, and let what waited begin."""
        while self._ends and self._ends[0][0] <= now:
            at, _, number = heapq.heappop(self._ends)
            engine = self.engines[number]
            if engine.frozen:
                continue
            engine.running -= 1
            self._begin(number, at)

    def add(self, number: int, request: Request) -> None:
        """Give a request to an engine, as soon as it arrives."""
        engine = self.engines[number]
        request.engine = number
        engine.waiting.append(request)
        engine.pending_tokens += request.prompt
        if not engine.frozen:
            self._begin(number, request.arrived_at)

    def _begin(self, number: int, now: float) -> None:
        engine = self.engines[number]
        while engine.waiting and engine.running < SLOTS:
            request = engine.waiting.popleft()
            engine.pending_tokens -= request.prompt
            engine.running += 1
            first_token_at = max(now, engine.prefill_free_at) + request.prompt / PREFILL_TOKENS_PER_S
            engine.prefill_free_at = first_token_at
            request.waited_s = first_token_at - request.arrived_at
            step_s = STEP_S * (1 + CROWDING * engine.running / SLOTS)
            self._number += 1
            heapq.heappush(self._ends, (first_token_at + request.answer * step_s, self._number, number))


def simulate(policy: str, age_s: float, routers: int, *, freezes: bool = False, proves: bool = False) -> list[Request]:
    """One run, without the warm-up's requests. `freezes`: an engine hangs in mid-run; `proves`: that is noticed."""
    requests = make_requests(random.Random(SEED), routers)
    rng = random.Random(SEED + 1)
    fleet = Fleet()
    known = [[0.0] * ENGINES for _ in range(routers)]
    last_proven = 0.0
    next_look = [age_s * (router + 0.5) / routers for router in range(routers)]
    for request in requests:
        now = request.arrived_at
        fleet.advance(now)
        if freezes and now >= FREEZE_AT_S and not fleet.engines[0].frozen:
            last_proven = fleet.engines[0].load_s()
            fleet.engines[0].frozen = True
        router = request.router
        if now >= next_look[router]:
            next_look[router] += age_s * (1 + (now - next_look[router]) // age_s)
            # A hung engine's own page may well read idle; an agent that asks for proof repeats what was proven last.
            hung_s = last_proven if proves else 0.0
            known[router] = [hung_s if engine.frozen else engine.load_s() for engine in fleet.engines]
        excluded = freezes and proves and now >= FREEZE_AT_S + PROVEN_WITHIN_S
        chosen = _choose(policy, known[router], 1 if excluded else 0, rng)
        if policy == COUNTS_ITS_OWN:
            known[router][chosen] += request.prompt / PREFILL_TOKENS_PER_S + MEAN_ANSWER * STEP_S / SLOTS
        fleet.add(chosen, request)
    fleet.advance(float("inf"))
    return [request for request in requests if request.arrived_at >= WARM_UP_S]


def _choose(policy: str, known: Sequence[float], first: int, rng: random.Random) -> int:
    if policy == TWO_CHOICES:
        one, other = rng.randrange(first, ENGINES), rng.randrange(first, ENGINES)
        return one if known[one] <= known[other] else other
    least = min(known[first:])
    return rng.choice([number for number in range(first, ENGINES) if known[number] == least])


def waits(requests: Sequence[Request]) -> tuple[float, float]:
    """Mean and 99th percentile of the seconds to the first token."""
    waited = [request.waited_s for request in requests]
    return fmean(waited), quantiles(waited, n=100)[98]


def _wait_rows(show: Callable[[str], None]) -> tuple[list[str], dict[tuple[str, int], list[float]]]:
    rows, p99s = [], {}
    for policy in POLICIES:
        for routers in ROUTERS:
            cells, tails = [], []
            for age_s in AGES_S:
                mean_s, p99_s = waits(simulate(policy, age_s, routers))
                cells.append(f"{mean_s:.2f} / {p99_s:.2f}")
                tails.append(p99_s)
            p99s[policy, routers] = tails
            rows.append(f"| {policy} | {routers} | {' | '.join(cells)} |")
            show(rows[-1])
    return rows, p99s


def _frozen_rows(show: Callable[[str], None]) -> list[str]:
    rows = []
    for policy in POLICIES:
        for age_s, proves in ((0.1, True), (1.0, False), (5.0, False), (15.0, False)):
            requests = simulate(policy, age_s, 4, freezes=True, proves=proves)
            after = [request for request in requests if request.arrived_at >= FREEZE_AT_S]
            lost = [request for request in after if request.engine == 0]
            how = "pushed, with proof" if proves else f"scraped every {age_s:g} s"
            rows.append(f"| {policy} | {how} | {len(lost)} of {len(after)} ({100 * len(lost) / len(after):.1f} %) |")
            show(rows[-1])
    return rows


def make_text(rows: Sequence[str], frozen: Sequence[str]) -> str:
    """Both tables, as docs/why.md has them."""
    heads = " | ".join("0.1 s (pushed)" if age_s == 0.1 else f"{age_s:g} s (scraped)" for age_s in AGES_S)
    return "\n".join(
        [
            BEGIN,
            "",
            "Seconds from a request's arrival to its first token, mean / 99th percentile:",
            "",
            f"| router chooses by | routers | {heads} |",
            f"|---|---|{'---|' * len(AGES_S)}",
            *rows,
            "",
            f"One of the {ENGINES} engines hangs and goes on to read idle; requests that were sent to it in the next"
            f" {SECONDS - FREEZE_AT_S:g} s, by four routers:",
            "",
            "| router chooses by | it knows the load | lost on the hung engine |",
            "|---|---|---|",
            *frozen,
            "",
            END,
        ]
    )


def make_plot(p99s: dict[tuple[str, int], list[float]]) -> str:
    """The 99th percentiles over the age of what routers know, as SVG; both axes are logarithmic."""
    from math import log10

    width, height, left, bottom, top = 800, 420, 64, 360, 40
    values = [value for tails in p99s.values() for value in tails]
    low, high = 10 ** (int(log10(min(values)) * 2 - 1) / 2), max(values) * 1.3

    def x(age_s: float) -> float:
        return left + 40 + (log10(age_s) - log10(0.1)) / (log10(15) - log10(0.1)) * 420

    def y(value: float) -> float:
        return bottom - (log10(value) - log10(low)) / (log10(high) - log10(low)) * (bottom - top)

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif"'
        ' font-size="13" role="img" aria-label="Wait for the first token, by the age of what routers know">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="22" font-size="15">Wait for the first token (s, 99th percentile) - a simulation</text>',
    ]
    for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100):
        if low <= tick <= high:
            out.append(f'<path d="M{left} {y(tick):.1f}H{left + 500}" stroke="#ddd"/>')
            out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for age_s in AGES_S:
        out.append(f'<text x="{x(age_s):.1f}" y="{bottom + 20}" text-anchor="middle">{age_s:g} s</text>')
    out.append(f'<text x="{left + 250}" y="{bottom + 40}" text-anchor="middle">age of what the routers know</text>')
    colours = {1: "#9ecae1", 2: "#6baed6", 4: "#3182bd", 8: "#08306b"}
    labelled_at = 0.0
    for (policy, routers), tails in sorted(p99s.items(), key=lambda item: item[1][-1], reverse=True):
        points = " ".join(f"{x(age_s):.1f},{y(tail):.1f}" for age_s, tail in zip(AGES_S, tails, strict=True))
        dash = {LEAST_LOADED: "", COUNTS_ITS_OWN: ' stroke-dasharray="2 3"', TWO_CHOICES: ' stroke-dasharray="8 4"'}[
            policy
        ]
        out.append(f'<polyline points="{points}" fill="none" stroke="{colours[routers]}" stroke-width="2"{dash}/>')
        at = labelled_at = max(y(tails[-1]), labelled_at + 15)
        plural = "s" if routers > 1 else ""
        out.append(f'<text x="{x(15) + 10:.1f}" y="{at + 4:.1f}">{policy}, {routers} router{plural}</text>')
    return "\n".join([*out, "</svg>", ""])


def main() -> int:
    """Run it; 1 if `--check` finds that docs/why.md has other numbers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write docs/why.md's tables and docs/why.svg")
    parser.add_argument("--check", action="store_true", help="compare with what docs/why.md and docs/why.svg have")
    options = parser.parse_args()
    rows, p99s = _wait_rows(print)
    frozen = _frozen_rows(print)
    text, plot = make_text(rows, frozen), make_plot(p99s)
    page, picture = DOCS / "why.md", DOCS / "why.svg"
    if options.write:
        old = page.read_text(encoding="utf-8")
        before, _, rest = old.partition(BEGIN)
        page.write_text(before + text + rest.partition(END)[2], encoding="utf-8")
        picture.write_text(plot, encoding="utf-8")
    if options.check and (text not in page.read_text(encoding="utf-8") or plot != picture.read_text(encoding="utf-8")):
        print("docs/why.md and docs/why.svg have other numbers: run it with --write", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
