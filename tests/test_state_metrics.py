"""/metrics: Prometheus' text format, by its rules and by the naming rules."""

from __future__ import annotations

import re
import unittest

import state_metrics as metrics
from engine_state import FIELD_NAMES
from tests.test_state_query import NASTY, QueryCase

SAMPLE = re.compile(r'([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\})? (\S+)')
LABEL = re.compile(r'([a-z_]+)="((?:[^"\\\n]|\\[\\"n])*)"')
UNESCAPED = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}
Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]


def parse_metrics(text: str) -> tuple[dict[str, str], Samples]:
    """Types and samples of a page in Prometheus' text format; fails on anything that the format does not allow."""
    assert text.endswith("\n")
    types: dict[str, str] = {}
    helped: set[str] = set()
    samples: Samples = {}
    current = ""
    for line in text.splitlines():
        if line.startswith("# HELP "):
            current = line.split(" ", 3)[2]
            assert current not in helped, f"{current} comes twice"
            helped.add(current)
        elif line.startswith("# TYPE "):
            name, kind = line.split(" ")[2:]
            assert name == current and kind in ("counter", "gauge"), line
            types[name] = kind
        else:
            match = SAMPLE.fullmatch(line)
            assert match, f"no sample: {line!r}"
            assert match[1] == current, f"{match[1]} is not below its own TYPE"
            labels = tuple(
                (name, re.sub(r"\\.", lambda escape: UNESCAPED[escape[0]], value))
                for name, value in LABEL.findall(match[2] or "")
            )
            family = samples.setdefault(current, {})
            assert labels not in family, f"the series comes twice: {line}"
            family[labels] = float(match[3])
    return types, samples


class EngineMetrics(QueryCase):
    """/metrics: one series an engine and field, in base units, gone when the engine is removed."""

    def samples(self) -> Samples:
        return parse_metrics(metrics.engine_metrics(self.store.views()).decode())[1]

    def test_every_field_of_an_engine_has_its_series(self) -> None:
        self.take()
        self.clock.move(0.5)
        labels = (("engine_id", "test"),)
        prefix = "elrar_state_gateway_engine_"
        values = {
            name.removeprefix(prefix): series[labels] for name, series in self.samples().items() if labels in series
        }
        self.assertEqual(
            values,
            {
                "live": 1,
                "usable": 1,
                "restarts_total": 0,
                "heartbeat": 0,
                "age_seconds": 0.5,
                "state_age_seconds": 0.5,
                "clock_offset_seconds": (1755532567500 - 1234567890) / 1000,
                "timestamp_seconds": 1234567.89,
                "latency_pred_seconds": 0.1,
                "pending_tokens": 10,
                "kv_cache_free_blocks": 100,
                "kv_cache_total_blocks": 1000,
                "capacity_tokens_per_second": 1000,
            },
        )
        modes = self.samples()[prefix + "scheduling_mode_info"]
        self.assertEqual(modes, {(*labels, ("scheduling_mode", "latency_optimized")): 1})
        self.assertEqual(len(FIELD_NAMES), 8, "a new field needs a series")

    def test_any_name_is_escaped_and_comes_back(self) -> None:
        for engine_id in NASTY:
            self.take(engine_id=engine_id)
        live = self.samples()["elrar_state_gateway_engine_live"]
        self.assertEqual([labels[0][1] for labels in live], list(NASTY))

    def test_a_removed_engine_is_gone(self) -> None:
        self.take()
        self.clock.move(7)
        self.store.advance_watermark(self.clock())
        self.store.sweep()
        self.assertEqual(self.samples(), {})


if __name__ == "__main__":
    unittest.main()
