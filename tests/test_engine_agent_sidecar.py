"""The agent beside an engine: what each kind says, what is made of it, and what happens when one answers badly."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import engine_agent
from engine_agent import (
    ADAPTERS,
    GONE,
    SERVING,
    SLEEPING,
    STARTING,
    STUCK,
    Complaints,
    EngineClient,
    EngineWatch,
    LlamaCppAdapter,
    Look,
    NoAnswer,
    NoNumbers,
    Outcome,
    Page,
    Proof,
    RefusedConnection,
    SglangAdapter,
    Sidecar,
    VllmAdapter,
    find_adapter,
    label_of,
)
from tests.harness import TOP, FakeClock
from tests.test_engine_agent import Kept, settings

RECORDED = TOP.parent / "shared" / "engines"


def vllm_page(running: int, waiting: int, steps: int, *, engines: tuple[str, ...] = ("0",), awake: int = 1,
              usage: float = 0.5, blocks: int = 1001) -> str:  # fmt: skip
    """A page of vLLM's, in small."""
    lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches.",
             'http_requests_total{handler="/v1/completions"} 7.0']  # fmt: skip
    for engine in engines:
        labels = f'engine="{engine}",model_name="tiny"'
        lines += [
            f"vllm:num_requests_running{{{labels}}} {running}.0",
            f"vllm:num_requests_waiting{{{labels}}} {waiting}.0",
            f"vllm:kv_cache_usage_perc{{{labels}}} {usage}",
            f'vllm:engine_sleep_state{{{labels},sleep_state="awake"}} {awake}.0',
            f'vllm:engine_sleep_state{{{labels},sleep_state="discard_all"}} 0.0',
            f"vllm:iteration_tokens_total_sum{{{labels}}} {steps * 300}.0",
            f"vllm:iteration_tokens_total_count{{{labels}}} {steps}.0",
            f"vllm:inter_token_latency_seconds_sum{{{labels}}} {steps * 0.02}",
            f"vllm:inter_token_latency_seconds_count{{{labels}}} {steps * 2}.0",
            f"vllm:request_prompt_tokens_sum{{{labels}}} {steps * 100}.0",
            f"vllm:request_prompt_tokens_count{{{labels}}} {steps}.0",
            f'vllm:cache_config_info{{block_size="16",engine="{engine}",num_gpu_blocks="{blocks * len(engines)}"}} 1.0',
        ]
    return "\n".join(lines) + "\n"


class Client(EngineClient):
    """Answers from a table of paths, without a socket."""

    def __init__(self, answers: Mapping[str, Any] | None = None) -> None:
        super().__init__("http://127.0.0.1:8000")
        self.answers: dict[str, Any] = dict(answers or {})
        self.asked: list[str] = []

    def get(self, path: str) -> tuple[int, bytes]:
        self.asked.append(path)
        answer = self.answers.get(path, self.answers.get(path.split("?")[0], 404))
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return answer, b"<html>no</html>"
        return 200, answer.encode() if isinstance(answer, str) else json.dumps(answer).encode()

    def get_all(self, *paths: str) -> list[tuple[int, bytes]]:
        return [self.get(path) for path in paths]


class Pages(unittest.TestCase):
    """Of a page of metrics only what is asked for is read, and only what is a number."""

    def test_samples(self) -> None:
        text = (
            b'# TYPE a gauge\na{x="1",y="a,b} c"} 1.5\na{x="2"} 2 1700000000\nab 9\nb NaN\nb_sum 4\nb_count 2\n'
            b'c{x="q\\"uo\\\\te"} +Inf\nd 1e3\n a 7\na{x="3"} nonsense\n'
        )
        page = Page(Page.pattern(["a", "b", "b_sum", "b_count", "c", "d"]), text)
        self.assertEqual(page.total("a"), 3.5)
        self.assertEqual(page.by("x", "a"), {"1": 1.5, "2": 2.0})
        self.assertEqual(page.by("x", "a", y="a,b} c"), {"1": 1.5})
        self.assertEqual(page.counted("b"), (4.0, 2.0))
        self.assertEqual((page.total("b"), page.total("c"), page.total("d")), (None, None, 1000.0))
        with self.assertRaisesRegex(NoNumbers, "no b "):
            page.need("b")

    def test_labels(self) -> None:
        self.assertEqual(label_of(b'ax="1",x="2"', "x"), "2")
        self.assertEqual(label_of(b'x="q\\"u",y="2"', "y"), "2")
        self.assertIsNone(label_of(b'ax="1"', "x"))

    def test_a_page_of_fifty_megabytes_is_read_in_linear_time(self) -> None:
        line = b'vllm:num_requests_running{engine="0"' + b"} x" * 100_000 + b"\n"
        began = time.process_time()
        self.assertIsNone(Page(Page.pattern(VllmAdapter.MOVING), line * 20).total("vllm:num_requests_running"))
        self.assertLess(time.process_time() - began, 20)  # quadratic, it would be hours


class Finding(unittest.TestCase):
    """Which engine it is, is found out."""

    def test_by_the_names_of_its_metrics(self) -> None:
        for kind in ADAPTERS:
            name = kind.prefixes[0].decode()
            path = "/prometheus/metrics" if kind.kind == "tensorrt-llm" else "/metrics"
            client = Client({path: f"# HELP x y\npython_info 1\n# TYPE {name}x gauge\n"})
            self.assertIs(type(find_adapter(client)), kind)

    def test_sglang_without_metrics(self) -> None:
        self.assertIsInstance(find_adapter(Client({"/v1/loads": {"loads": []}})), SglangAdapter)

    def test_by_whom_the_model_is_owned(self) -> None:
        for kind in ADAPTERS:
            if kind.owner:
                client = Client({"/v1/models": {"data": [{"id": "m", "owned_by": kind.owner}]}})
                self.assertIs(type(find_adapter(client)), kind)

    def test_something_else_is_said_with_what_was_asked(self) -> None:
        for answer in (404, 503, "<html>", {"data": "no list"}, {"data": [{"owned_by": 7}]}):
            with self.assertRaisesRegex(NoAnswer, "none of the engines that are known"):
                find_adapter(Client({"/v1/models": answer, "/metrics": "up 1\n"}))


class Vllm(unittest.TestCase):
    """vLLM: the filtered page, the whole one where that is empty, and /load where it counts."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        patch = mock.patch.object(engine_agent.time, "monotonic", self.clock)  # type: ignore[attr-defined]
        patch.start()
        self.addCleanup(patch.stop)
        self.client = Client({"/metrics/": vllm_page(0, 0, 0), "/load": {"server_load": 0}})
        self.adapter = VllmAdapter(self.client)

    interval_s = 0.2

    def look(self, **answers: Any) -> Look:
        self.clock.move(self.interval_s)
        self.client.answers.update({"/" + name.replace("_", "/"): answer for name, answer in answers.items()})
        self.client.asked.clear()
        return self.adapter.look(lambda: Proof(self.clock.now, int(self.clock.now * 1000)))

    def test_a_busy_engine(self) -> None:
        (one,) = self.look(metrics_=vllm_page(8, 16, 100, usage=0.25)).readings
        self.assertEqual((one.running, one.waiting, one.free, one.total), (8, 16, 750, 1000))
        self.assertEqual((one.step_times, one.step_tokens, one.tokens), ((2.0, 200), (30000, 100), 30000))
        self.assertEqual((one.prompts, one.rank), ((10000, 100), 0))
        self.assertEqual(self.adapter.model, "tiny")
        self.assertEqual(self.look(metrics_=vllm_page(8, 16, 100)).readings[0].marker, one.marker)
        self.assertNotEqual(self.look(metrics_=vllm_page(8, 16, 101)).readings[0].marker, one.marker)

    def test_only_what_is_needed_is_asked_for(self) -> None:
        self.look(metrics_=vllm_page(1, 0, 1))
        self.assertIn("name%5B%5D=vllm:cache_config_info", self.client.asked[0])
        self.look()
        (asked, *_) = self.client.asked
        self.assertNotIn("cache_config_info", asked)
        self.assertIn("name%5B%5D=vllm:iteration_tokens_total_count", asked)

    def test_an_idle_engine_is_asked_for_less(self) -> None:
        for _ in range(9):
            look = self.look()
        self.assertEqual(self.adapter.tracking.counts, None)
        self.assertEqual((look.readings[0].free, look.readings[0].total), (500, 1000))
        asked: list[str] = []
        for _ in range(4):
            self.look()
            asked += self.client.asked
        self.assertLessEqual(len([one for one in asked if "iteration" in one]), 1)
        self.assertLessEqual(len(asked), 8)

    def test_an_idle_engine_whose_load_is_tracked_is_asked_for_a_page_every_third_time(self) -> None:
        """Each look is proof of idleness all the same, and that it fell asleep shows within three."""
        self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3})
        self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0})
        asked: list[str] = []
        for _ in range(9):
            self.assertEqual(self.look().in_flight, 0)
            asked += self.client.asked
        self.assertEqual(len([one for one in asked if one == "/load"]), 9)
        self.assertEqual(len([one for one in asked if one.startswith("/metrics")]), 3)
        self.assertTrue(any(self.look(metrics_=vllm_page(0, 0, 2, awake=0)).asleep for _ in range(3)))

    def test_with_a_long_interval_no_look_at_an_idle_engine_misses_that_it_sleeps_or_has_requests(self) -> None:
        self.interval_s = 2.0
        self.look()
        self.assertEqual(self.look(load={"server_load": 2}).in_flight, 2, "whether it counts was not known")
        for _ in range(4):
            self.look(load={"server_load": 0})
        self.assertTrue(self.look(metrics_=vllm_page(0, 0, 0, awake=0)).asleep)

    def test_with_a_short_interval_an_idle_engine_is_not_asked_for_more_pages(self) -> None:
        self.interval_s = 0.02
        self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3})
        asked: list[str] = []
        for _ in range(100):
            self.assertEqual(self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0}).in_flight, 0)
            asked += self.client.asked
        self.assertLessEqual(len([one for one in asked if one.startswith("/metrics")]), 5)

    def test_load_that_is_not_tracked_is_not_asked_for_any_more(self) -> None:
        self.look(metrics_=vllm_page(3, 0, 1))
        self.assertIsNone(self.adapter.tracking.counts, "its request may have ended just now")
        self.look(metrics_=vllm_page(3, 0, 2))
        self.assertIs(self.adapter.tracking.counts, False)
        for step in range(9):
            self.assertIsNone(self.look(metrics_=vllm_page(3 * (step % 2), 0, step)).in_flight)
            self.assertNotIn("/load", self.client.asked)

    def test_load_that_is_tracked_shows_a_hang_from_idle(self) -> None:
        self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3})
        self.assertIs(self.adapter.tracking.counts, True)
        self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0})
        self.assertEqual([self.look().in_flight for _ in range(5)], 5 * [0])
        self.assertEqual([self.look(load={"server_load": 5}).in_flight for _ in range(5)], 5 * [5])

    def test_while_it_is_not_known_whether_load_counts_every_look_says_something(self) -> None:
        """Its zero alone proves nothing then; that it counts shows with the second look."""
        asked: list[str] = []
        for _ in range(6):
            self.assertIn(self.look().in_flight, (0, None))
            asked += self.client.asked
        self.assertGreaterEqual(len([one for one in asked if one.startswith("/metrics")]), 6)
        self.assertIn(5, [self.look(load={"server_load": 5}).in_flight for _ in range(2)])
        self.assertIs(self.adapter.tracking.counts, True)

    def test_a_hang_from_idle_is_seen_in_time_whether_or_not_it_was_busy_before(self) -> None:
        for was_busy, looks in itertools.product((False, True), range(8, 14)):
            with self.subTest(was_busy=was_busy, looks=looks):
                self.setUp()
                sent: list[dict[str, Any]] = []
                sender = mock.Mock(send=lambda datagram, sent=sent: sent.append(json.loads(datagram)))
                agent = engine_agent.Agent(settings(), sender, clock=self.clock)
                agent.identify("e", "m", "vllm 0.33.0")
                if was_busy:
                    agent.saw(self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3}))
                for _ in range(looks):
                    agent.saw(self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0}))
                before = len(sent)
                hung_at = self.clock.now
                while sent[-1]["phase"] == SERVING and self.clock.now - hung_at < 1.4:
                    agent.saw(self.look(load={"server_load": 2}))
                self.assertEqual(sent[-1]["phase"], STUCK)
                self.assertLessEqual(len(sent) - before, 2, "one more as idle, at most")

    def test_an_idle_engine_is_woken_once_for_a_page_its_health_and_its_load(self) -> None:
        self.look()
        self.look()
        at_once: list[tuple[str, ...]] = []
        whole = self.client.get_all

        def asked_at_once(*paths: str) -> list[tuple[int, bytes]]:
            at_once.append(paths)
            return whole(*paths)

        with mock.patch.object(self.client, "get_all", asked_at_once):
            for _ in range(6):
                self.client.asked.clear()
                look = self.look()
                self.assertLessEqual(look.at.at, self.clock.now)
        self.assertTrue(any(len(paths) > 1 for paths in at_once), at_once)
        self.assertFalse(self.adapter._ahead, "an answer is used once, and not kept for another look")

    def test_an_idle_engine_is_woken_once_a_look_and_its_numbers_are_as_old_as_the_question(self) -> None:
        for _ in range(2):
            self.look()
        at_once: list[tuple[str, ...]] = []
        whole = self.client.get_all

        def asked_at_once(*paths: str) -> list[tuple[int, bytes]]:
            at_once.append(paths)
            found = whole(*paths)
            self.clock.move(0.1)  # the answers take their time
            return found

        with mock.patch.object(self.client, "get_all", asked_at_once):
            for _ in range(12):
                self.client.asked.clear()
                before = self.clock.now
                look = self.look()
                self.assertEqual(len(at_once), 1)
                self.assertEqual(self.client.asked, list(at_once.pop()), "nothing is asked for apart from these")
                self.assertAlmostEqual(look.at.at, before + 0.2)
        self.assertEqual(look.readings[0].tokens, 0)

    def test_a_request_that_shows_in_load_is_looked_at_with_all_numbers_at_once(self) -> None:
        self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3})
        self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0})
        look = self.look(metrics_=vllm_page(1, 0, 3), load={"server_load": 1})
        self.assertEqual(look.readings[0].tokens, 900)
        self.assertEqual(len([one for one in self.client.asked if one.startswith("/metrics/")]), 1)

    def test_a_request_that_comes_to_an_idle_engine_is_seen_with_the_next_look(self) -> None:
        self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3})
        self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0})
        for turn in range(4):
            self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0})
            look = self.look(metrics_=vllm_page(1, 0, 3 + turn), load={"server_load": 1})
            self.assertEqual(
                (look.readings[0].running, look.readings[0].step_tokens), (1, (900 + 300 * turn, 3 + turn))
            )

    def test_several_api_servers_have_an_empty_filter(self) -> None:
        self.client.answers |= {"/metrics/": "", "/metrics": vllm_page(8, 0, 1)}
        self.assertEqual(self.look().readings[0].running, 8)
        self.look()
        self.assertEqual([path for path in self.client.asked if path != "/load"], ["/metrics"])

    def test_missing_gauges_are_unknown_and_never_0(self) -> None:
        self.client.answers |= {"/metrics/": "", "/metrics": "# HELP vllm:x y\npython_info 1.0\n"}
        with self.assertRaisesRegex(NoNumbers, "vllm:num_requests_running"):
            self.look()
        with self.assertRaisesRegex(NoNumbers, "vllm:num_requests_waiting"):
            self.look(metrics_='vllm:num_requests_running{engine="0"} 1\n')
        bare = 'vllm:num_requests_running{engine="0"} 1\nvllm:num_requests_waiting{engine="0"} 0\n'
        (one,) = self.look(metrics_=bare).readings
        self.assertEqual((one.free, one.total, one.step_times, one.tokens), (-1, -1, None, None))

    def test_one_step_behind_a_hang_is_seen_with_the_next_look_though_its_clients_gave_up(self) -> None:
        agent, sent = self.agent()
        agent.saw(self.look(metrics_=vllm_page(3, 0, 1), load={"server_load": 3}))
        for _ in range(8):
            agent.saw(self.look(metrics_=vllm_page(0, 0, 2), load={"server_load": 0}))
        for waiting in (2, 0):
            for _ in range(13):
                agent.saw(self.look(load={"server_load": waiting}))
            self.assertEqual(sent[-1]["phase"], STUCK)
        agent.saw(self.look(metrics_=vllm_page(0, 0, 3)))  # one came and went between two looks
        self.assertEqual(sent[-1]["phase"], SERVING)
        asked = []
        for _ in range(4):
            self.assertEqual(self.look().in_flight, 0)
            asked.append(list(self.client.asked))
        self.assertIn(["/load"], asked, "all is well again: it is asked for less")

    FRESH = "".join(
        line + "\n"
        for line in vllm_page(0, 0, 0, engines=("0", "1")).splitlines()
        if "num_requests" not in line and "usage" not in line
    )

    def agent(self) -> tuple[engine_agent.Agent, list[dict[str, Any]]]:
        sent: list[dict[str, Any]] = []
        sender = mock.Mock(send=lambda datagram: sent.append(json.loads(datagram)))
        agent = engine_agent.Agent(settings(), sender, clock=self.clock)
        agent.identify("e", "m", "vllm 0.33.0")
        return agent, sent

    def test_several_api_servers_before_the_first_request_are_idle_since_no_step_was_made(self) -> None:
        """If they stayed unusable, no router would ever send them the request that brings the gauges."""
        self.client.answers |= {"/metrics/": "", "/metrics": self.FRESH, "/health": ""}
        agent, sent = self.agent()
        for _ in range(8):
            agent.saw(self.look())
        for said in sent:
            self.assertEqual((said["phase"], said["num_requests_running"]), (SERVING, 0))
            self.assertEqual((said["kv_cache_free_blocks"], said["kv_cache_total_blocks"]), (2000, 2000))
        self.assertEqual(len(sent), 8)
        self.assertNotIn("/metrics/", [path.split("?")[0] for path in self.client.asked], "the filter says nothing")

    def test_the_first_request_of_several_api_servers_moves_them(self) -> None:
        self.client.answers |= {"/metrics/": "", "/metrics": self.FRESH, "/health": ""}
        agent, sent = self.agent()
        agent.saw(self.look())
        agent.saw(self.look(metrics=vllm_page(1, 0, 1, engines=("0", "1"))))
        self.assertEqual((sent[-1]["phase"], sent[-1]["num_requests_running"]), (SERVING, 2))
        for _ in range(8):
            agent.saw(self.look())
        self.assertEqual(sent[-1]["phase"], STUCK)

    def test_several_api_servers_that_hang_before_their_first_step_are_stuck_where_load_shows_it(self) -> None:
        self.client.answers |= {"/metrics/": "", "/metrics": self.FRESH, "/health": ""}
        agent, sent = self.agent()
        for _ in range(8):
            agent.saw(self.look())
        for _ in range(8):
            agent.saw(self.look(load={"server_load": 2}))
        self.assertEqual(sent[-1]["phase"], STUCK)

    def test_gauges_that_are_missing_behind_a_first_step_stay_unknown(self) -> None:
        for counters in ("1.0", "NaN", "x"):
            page = self.FRESH.replace('model_name="tiny"} 0.0', f'model_name="tiny"}} {counters}')
            self.client.answers |= {"/metrics/": "", "/metrics": page, "/health": ""}
            with self.subTest(counters=counters), self.assertRaisesRegex(NoNumbers, "vllm:num_requests_running"):
                self.look()

    def test_one_that_is_unhealthy_before_its_first_request_is_not_idle(self) -> None:
        self.client.answers |= {"/metrics/": "", "/metrics": self.FRESH, "/health": 503}
        with self.assertRaisesRegex(NoAnswer, "/health is answered with 503"):
            self.look()

    def test_data_parallel_ranks_share_what_the_label_says(self) -> None:
        look = self.look(metrics_=vllm_page(1, 0, 1, engines=("0", "1", "10")))
        self.assertEqual([(one.rank, one.total) for one in look.readings], [(0, 1000), (1, 1000), (10, 1000)])

    def test_a_rank_without_gauges_leaves_the_whole_engines_blocks_unknown(self) -> None:
        """With several API servers a rank has none before its first request; its blocks are not left out silently."""
        both = vllm_page(0, 0, 1, engines=("0", "1"))
        one = "".join(line + "\n" for line in both.splitlines() if 'engine="1"' not in line or "cache_config" in line)
        sent: list[dict[str, Any]] = []
        sender = mock.Mock(send=lambda datagram: sent.append(json.loads(datagram)))
        agent = engine_agent.Agent(settings(), sender, clock=self.clock)
        agent.identify("e", "m", "vllm 0.33.0")
        for page, blocks in ((one, -1), (both, 2000)):
            for _ in range(8):
                agent.saw(self.look(metrics_=page))
            said = sent[-1]
            self.assertEqual((said["phase"], said["num_requests_running"]), (SERVING, 0))
            self.assertEqual(said["kv_cache_total_blocks"], blocks)
            self.assertLessEqual(said["kv_cache_free_blocks"], blocks)

    def test_asleep(self) -> None:
        self.assertTrue(self.look(metrics_=vllm_page(0, 0, 1, awake=0)).asleep)
        self.assertFalse(self.look(metrics_=vllm_page(0, 0, 1)).asleep)

    def test_an_old_vllm(self) -> None:
        page = vllm_page(1, 0, 1).replace("kv_cache_usage", "gpu_cache_usage").replace("inter_token", "time_per_output")
        page = page.replace("time_per_output_latency", "time_per_output_token").replace("engine_sleep_state", "x")
        (one,) = self.look(metrics_=page).readings
        self.assertEqual((one.free, one.step_times), (500, (0.02, 2)))

    @unittest.skipUnless(RECORDED.exists(), "the recorded pages of a real vLLM are not here")
    def test_the_pages_of_a_real_vllm(self) -> None:
        for name, ranks, running, waiting in (("idle", 1, 0, 0), ("busy", 1, 8, 16), ("dp2", 2, 0, 0)):
            client = Client({"/metrics": (RECORDED / f"vllm_metrics_{name}.txt").read_text(), "/metrics/": ""})
            look = VllmAdapter(client).look(lambda: Proof(1.0, 1))
            self.assertEqual(len(look.readings), ranks)
            for one in look.readings:
                self.assertEqual((one.running, one.waiting, one.total), (running, waiting, 4095))
                self.assertEqual(one.free, 4095 - 2 * running)
                self.assertGreater((one.step_times or (0, 0))[1] + (name == "idle"), 0)
            self.assertFalse(look.asleep)


def loads(*ranks: dict[str, Any], **more: Any) -> dict[str, Any]:
    one = {"num_running_reqs": 0, "num_waiting_reqs": 0, "num_waiting_uncached_tokens": 0, "num_used_tokens": 0,
           "max_total_num_tokens": 4096, "timestamp": 1000.0, "total_prefill_uncached_tokens": 100,
           "decode_moments": [10, 40, 200_000.0, 0, 0, 40]}  # fmt: skip
    return {
        "version": "0.5.23",
        "loads": [{**one, "dp_rank": rank, **changes} for rank, changes in enumerate(ranks)],
        **more,
    }


class Others(unittest.TestCase):
    """SGLang, llama.cpp, TensorRT-LLM, TGI and LMDeploy, by what they publish."""

    def look(self, adapter: engine_agent.Adapter, at_ms: int = 1_000_100) -> Look:
        return adapter.look(lambda: Proof(at_ms / 1000, at_ms))

    def test_sglang(self) -> None:
        info = {"page_size": 16, "served_model_name": "qwen", "version": "0.5.23", "sleep_on_idle": False}
        rank = {
            "num_running_reqs": 4,
            "num_waiting_reqs": 2,
            "num_waiting_uncached_tokens": 333,
            "num_used_tokens": 1024,
        }
        client = Client({"/server_info": info, "/v1/loads": loads(rank, {"timestamp": 999.9})})
        adapter = SglangAdapter(client)
        adapter.describe()
        self.assertEqual((adapter.model, adapter.version), ("qwen", "0.5.23"))
        one, two = self.look(adapter).readings
        self.assertEqual((one.running, one.waiting, one.pending, one.free, one.total), (4, 2, 333, 192, 256))
        self.assertEqual((one.step_times, one.step_tokens, one.tokens), ((0.2, 10), (140, 10), 140))
        self.assertEqual((one.rank, two.rank, two.idle_is_proof), (0, 1, False))
        self.assertEqual(two.proof, (999.9, 999900))

    def test_a_sglang_that_sleeps_when_idle_is_given_its_second(self) -> None:
        client = Client({"/server_info": {"sleep_on_idle": True}, "/v1/loads": loads({})})
        adapter = SglangAdapter(client)
        adapter.describe()
        self.assertTrue(self.look(adapter, 1_001_000).readings[0].idle_is_proof)
        self.assertFalse(self.look(adapter, 1_003_000).readings[0].idle_is_proof)

    def test_a_sglang_without_timestamps_or_with_another_clock(self) -> None:
        old = loads({})
        del old["loads"][0]["timestamp"], old["loads"][0]["decode_moments"]
        (one,) = self.look(SglangAdapter(Client({"/v1/loads": old}))).readings
        self.assertTrue(one.idle_is_proof)
        (one,) = self.look(SglangAdapter(Client({"/v1/loads": loads({"timestamp": 2000.0})}))).readings
        self.assertIsNone(one.proof)
        self.assertEqual(one.marker, 2000.0)

    def test_what_sglang_does_not_say_is_unknown(self) -> None:
        for answer, text in ((401, "API key"), (loads(), "no loads"), ({}, "not with loads"), ([], "not with loads"),
                             (loads({"num_running_reqs": None}), "not with loads"), (500, "500"), ("[" * 9999, "not"),
                             (loads({"timestamp": 0.0}), "not with loads")):  # fmt: skip
            with self.subTest(text=text), self.assertRaisesRegex(NoNumbers, text):
                self.look(SglangAdapter(Client({"/v1/loads": answer})))

    LLAMA = (
        "llamacpp:prompt_tokens_total 1000\nllamacpp:prompt_seconds_total 0.5\nllamacpp:tokens_predicted_total 500\n"
        "llamacpp:tokens_predicted_seconds_total 1.5\nllamacpp:n_decode_total 200\nllamacpp:requests_processing 2\n"
        "llamacpp:requests_deferred 3\n"
    )

    def test_llama_cpp(self) -> None:
        slots = [
            {"n_ctx": 2048, "is_processing": True, "n_prompt_tokens": 400, "n_prompt_tokens_processed": 100,
             "n_prompt_tokens_cache": 50, "next_token": [{"n_decoded": 0}]},
            {"n_ctx": 2048, "is_processing": True, "n_prompt_tokens": 210, "n_prompt_tokens_processed": 200,
             "n_prompt_tokens_cache": 0, "next_token": [{"n_decoded": 11}]},
            {"n_ctx": 2048, "is_processing": False, "n_prompt_tokens": 999},
        ]  # fmt: skip
        look = self.look(LlamaCppAdapter(Client({"/metrics": self.LLAMA, "/slots": slots})))
        (one,) = look.readings
        self.assertEqual((one.running, one.waiting, one.pending), (2, 3, 250 + 3 * 300))
        self.assertEqual((one.total, one.free), (6144, 6144 - 400 - 211))
        self.assertEqual((one.step_times, one.step_tokens), ((1.5, 500), (1511, 200)))

    def test_a_llama_cpp_in_the_midst_of_requests_keeps_its_latency_and_counts_their_tokens(self) -> None:
        """It counts tokens and seconds when a request ends, decodes at once."""
        slot = {"n_ctx": 2048, "is_processing": True, "n_prompt_tokens": 210, "n_prompt_tokens_processed": 200}
        client = Client({"/metrics": self.LLAMA})
        adapter, meter = LlamaCppAdapter(client), engine_agent.Meter(None)
        for turn, decoded in enumerate((0, 400, 800, 1200)):
            client.answers["/slots"] = [{**slot, "next_token": [{"n_decoded": decoded}]}]
            (one,) = self.look(adapter).readings
            load = meter.measure(one, float(turn))
            client.answers["/metrics"] = client.answers["/metrics"].replace("decode_total 2", "decode_total 22")
        self.assertEqual((load.latency_pred_ms, load.engine_capacity), (0.0, 400.0))
        ended = self.LLAMA.replace("predicted_total 500", "predicted_total 2000").replace("total 1.5", "total 16.5")
        client.answers |= {"/metrics": ended, "/slots": [{**slot, "is_processing": False}]}
        load = meter.measure(self.look(adapter).readings[0], 4.0)
        self.assertEqual((round(load.latency_pred_ms, 3), load.engine_capacity), (10.0, 400.0))
        self.assertEqual(meter.measure(self.look(adapter).readings[0], 4.2).latency_pred_ms, load.latency_pred_ms)

    def test_a_llama_cpp_that_rounds_its_counters_shows_no_step_of_no_time(self) -> None:
        """It writes six digits: behind a billion tokens they move apart, and in jumps."""
        meter = engine_agent.Meter(None)
        rounded = ((1e7, 1e9), (1e7, 1e9 + 10_000), (1e7 + 100, 1e9 + 10_000), (1e7 + 100, 1e9 + 20_000))
        seen = [meter.measure(engine_agent.Reading(1, 0, step_times=engine_agent.Counted(*one)), at)
                for at, one in enumerate(rounded)]  # fmt: skip
        self.assertEqual([load.latency_pred_ms for load in seen], [0.0, 0.0, 10.0, 10.0])
        slots = [{"n_ctx": 2048, "is_processing": False}]
        page = self.LLAMA.replace("predicted_total 500", "predicted_total 1.00001e+09")
        self.assertIsNone(self.look(LlamaCppAdapter(Client({"/metrics": page, "/slots": slots}))).readings[0].tokens)

    def test_a_capacity_is_not_taken_from_the_moment_in_which_many_requests_end(self) -> None:
        for kind in (engine_agent.TgiAdapter, engine_agent.TensorRtAdapter):
            adapter, meter = kind(Client()), engine_agent.Meter(None)
            for turn in range(305):
                # Every 10 s eight requests of 500 tokens end together.
                counted = 4000.0 * (turn // 50)
                reading = engine_agent.Reading(8, 4, tokens=counted, rate_s=adapter.rate_s)
                load = meter.measure(reading, turn / 5)
            self.assertLess(abs(load.engine_capacity - 400), 140)

    def test_a_llama_cpp_without_slots_or_metrics(self) -> None:
        adapter = LlamaCppAdapter(Client({"/metrics": self.LLAMA, "/slots": 501}))
        (one,) = self.look(adapter).readings
        self.assertEqual((one.total, one.free, one.pending), (-1, -1, None))
        self.assertIn("--slots", " ".join(adapter.missing()))
        with self.assertRaisesRegex(NoAnswer, "501"):
            self.look(LlamaCppAdapter(Client({"/metrics": 501})))

    @unittest.skipUnless(RECORDED.exists(), "the recorded pages of a real llama.cpp are not here")
    def test_the_pages_of_a_real_llama_cpp(self) -> None:
        pages = {"/metrics": (RECORDED / "llamacpp_metrics_busy.txt").read_text(),
                 "/slots": json.loads((RECORDED / "llamacpp_slots_busy.json").read_text())}  # fmt: skip
        (one,) = self.look(LlamaCppAdapter(Client(pages))).readings
        self.assertEqual((one.running, one.waiting, one.total), (4, 4, 8192))
        self.assertEqual((one.pending, one.free), (4 * 300, 8192 - 348 - 3 * 347))

    def test_tensorrt_llm(self) -> None:
        page = (
            'trtllm_num_requests_running{model_name="m"} 3\ntrtllm_num_requests_waiting{model_name="m"} 2\n'
            "trtllm_kv_cache_max_blocks 1000\ntrtllm_kv_cache_free_blocks 900\ntrtllm_iteration_latency_seconds 0.03\n"
            "trtllm_prompt_tokens_total 5000\ntrtllm_generation_tokens_total 700\ntrtllm_request_success_total 10\n"
            "trtllm_total_context_tokens 2000\ntrtllm_num_generation_requests 3\n"
        )
        adapter = engine_agent.TensorRtAdapter(Client({"/prometheus/metrics": page}))
        (one,) = self.look(adapter).readings
        self.assertEqual((one.running, one.waiting, one.free, one.total), (3, 2, 900, 1000))
        self.assertEqual((one.step_ms, one.tokens, one.prompts), (30.0, 5700, (5000, 10)))
        first = one.step_tokens
        (one,) = self.look(adapter).readings
        self.assertEqual((first, one.step_tokens), ((2003, 1), (4006, 2)))
        with self.assertRaises(NoNumbers):
            self.look(engine_agent.TensorRtAdapter(Client({"/prometheus/metrics": "python_info 1\n"})))

    def test_tgi(self) -> None:
        page = (
            "tgi_batch_current_size 3\ntgi_queue_size 4\ntgi_batch_current_max_tokens 1500\n"
            "tgi_request_input_length_sum 900\ntgi_request_input_length_count 9\ntgi_request_generated_tokens_sum 100\n"
            "tgi_request_mean_time_per_token_duration_sum 0.9\ntgi_request_mean_time_per_token_duration_count 9\n"
            'tgi_batch_inference_count{method="decode"} 55\n'
        )
        client = Client({"/metrics": page, "/info": {"model_id": "m", "version": "3", "max_batch_total_tokens": 16000}})
        adapter = engine_agent.TgiAdapter(client)
        adapter.describe()
        (one,) = self.look(adapter).readings
        self.assertEqual((one.running, one.waiting, one.free, one.total), (3, 4, 14500, 16000))
        self.assertEqual((one.prompts, one.step_times, one.tokens), ((900, 9), (0.9, 9), 1000))
        client.answers["/metrics"] = page.replace("queue_size 4", "queue_size 9")
        self.assertEqual(self.look(adapter).readings[0].marker, one.marker)  # its queue grows while it hangs
        client.answers["/metrics"] = page.replace(" 55", " 56")
        self.assertNotEqual(self.look(adapter).readings[0].marker, one.marker)

    def test_a_tgi_to_which_no_request_ever_came_is_idle(self) -> None:
        """Its page names a metric with its first value: without a request there is none of requests."""
        new = Client({"/metrics": "tgi_batch_max_total_tokens 16000\n"})
        self.assertIsInstance(find_adapter(new), engine_agent.TgiAdapter)
        info = {"router": "text-generation-router", "max_batch_total_tokens": 16000}
        old = Client({"/metrics": "", "/info": info})
        adapter = find_adapter(old)
        self.assertIsInstance(adapter, engine_agent.TgiAdapter)
        adapter.describe()
        for one in (adapter, engine_agent.TgiAdapter(new)):
            (reading,) = self.look(one).readings
            self.assertEqual((reading.running, reading.waiting), (0, 0))
            self.assertEqual((reading.free, reading.total), (16000, 16000))
        for page in ("", "tgi_request_count 1\n", "tgi_batch_max_total_tokens 16000\ntgi_request_count 1\n",
                     "tgi_batch_max_total_tokens 16000\ntgi_queue_size 1\n"):  # fmt: skip
            with self.subTest(page=page), self.assertRaises(NoNumbers):
                self.look(engine_agent.TgiAdapter(Client({"/metrics": page})))

    def test_a_tgi_that_prefills_is_not_idle(self) -> None:
        """A batch that is prefilled has left the queue, and is in no gauge."""
        idle = (
            "tgi_batch_current_size 0\ntgi_queue_size 0\ntgi_batch_current_max_tokens 0\n"
            'tgi_batch_inference_count{method="prefill"} 2\ntgi_batch_inference_count{method="decode"} 9\n'
            'tgi_batch_inference_success{method="prefill"} 1\ntgi_batch_inference_success{method="decode"} 9\n'
            'tgi_batch_inference_failure{method="prefill"} 1\n'
        )
        client = Client({"/metrics": idle})
        adapter = engine_agent.TgiAdapter(client)
        self.assertEqual(self.look(adapter).readings[0].running, 0)
        client.answers["/metrics"] = idle.replace('count{method="prefill"} 2', 'count{method="prefill"} 3')
        self.assertEqual(self.look(adapter).readings[0].running, 1)

    def test_a_tensorrt_llm_moves_with_each_step_though_no_request_ends(self) -> None:
        page = (
            "trtllm_num_requests_running 3\ntrtllm_num_requests_waiting 0\ntrtllm_iteration_latency_seconds 0.03\n"
            "trtllm_prompt_tokens_total 5000\ntrtllm_generation_tokens_total 700\ntrtllm_request_success_total 10\n"
        )
        client = Client({"/prometheus/metrics": page})
        adapter = engine_agent.TensorRtAdapter(client)
        (one,) = self.look(adapter).readings
        self.assertEqual(self.look(adapter).readings[0].marker, one.marker)
        client.answers["/prometheus/metrics"] = page.replace("waiting 0", "waiting 7")
        self.assertEqual(self.look(adapter).readings[0].marker, one.marker)
        client.answers["/prometheus/metrics"] = page.replace("0.03", "0.031")
        self.assertNotEqual(self.look(adapter).readings[0].marker, one.marker)

    def test_an_lmdeploy_whose_tokens_come_is_not_idle_though_its_gauges_are_old(self) -> None:
        page = (
            "lmdeploy:num_requests_running 0\nlmdeploy:num_requests_waiting 0\nlmdeploy:prompt_tokens_total 10\n"
            "lmdeploy:generation_tokens_total 5\n"
        )
        client = Client({"/metrics": page})
        adapter = engine_agent.LmdeployAdapter(client)
        self.assertEqual([self.look(adapter).readings[0].running for _ in range(2)], [0, 0])
        client.answers["/metrics"] = page.replace(" 5", " 6")
        self.assertEqual([self.look(adapter).readings[0].running for _ in range(2)], [1, 0])

    def test_lmdeploy(self) -> None:
        page = (
            'lmdeploy:num_requests_running{engine="0"} 3\nlmdeploy:num_requests_waiting{engine="0"} 1\n'
            "lmdeploy:num_api_requests_waiting 2\nlmdeploy:prompt_tokens_total 10\nlmdeploy:generation_tokens_total 5\n"
            "lmdeploy:iteration_tokens_total_sum 15\nlmdeploy:iteration_tokens_total_count 5\n"
        )
        (one,) = self.look(engine_agent.LmdeployAdapter(Client({"/metrics": page}))).readings
        self.assertEqual((one.running, one.waiting, one.free, one.total), (3, 3, -1, -1))
        self.assertEqual((one.tokens, one.step_tokens), (15, (15, 5)))

    def test_every_kind_says_where_each_field_comes_from(self) -> None:
        for kind in ADAPTERS:
            self.assertEqual(tuple(kind.sources), engine_agent.Load._fields, kind.kind)


@contextlib.contextmanager
def server(serve: Callable[[socket.socket], None], context: ssl.SSLContext | None = None) -> Iterator[str]:
    """A TCP server on the loopback that does `serve` with each connection; gives its URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    connections: list[socket.socket] = []

    def run() -> None:
        while True:
            try:
                connection = listener.accept()[0]
                connections.append(connection)
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                    connections.append(connection)
                serve(connection)
            except OSError:
                if listener.fileno() < 0:
                    return
            finally:
                while connections:
                    connections.pop().close()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield f"http{'s' if context else ''}://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def _raise(error: Exception) -> Any:
    raise error


def request(connection: socket.socket) -> bytes:
    """One request's head; raises OSError at the end."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        data = connection.recv(65536)
        if not data:
            raise OSError
        head += data
    return head


class AskingOverHttp(unittest.TestCase):
    """Each question is bounded in time and size, whatever answers; connections are kept."""

    def get(self, *answers: bytes, timeout_s: float = 20.0, **arguments: Any) -> list[Any]:
        """What is made of these answers, sent one after the other on as many connections as it opens."""
        left, self.connections = list(answers), 0
        self.heads: list[bytes] = []

        def serve(connection: socket.socket) -> None:
            self.connections += 1
            while left:
                self.heads.append(request(connection))
                answer = left.pop(0)
                connection.sendall(answer)
                if b"content-length" not in answer.lower() and b"chunked" not in answer.lower():
                    return

        found: list[Any] = []
        with server(serve) as url:
            client = EngineClient(url + "/base/", **arguments)
            with mock.patch.object(EngineClient, "TIMEOUT_S", timeout_s), contextlib.closing(client):
                for _ in answers:
                    try:
                        found.append(client.get("/metrics"))
                    except NoAnswer as error:
                        found.append(str(error))
        return found

    def test_answers(self) -> None:
        for answer, expected in (
            (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc", (200, b"abc")),
            (b"HTTP/1.1 503 No\r\ncontent-length:0\r\n\r\n", (503, b"")),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n1\r\nc\r\n0\r\n\r\n", (200, b"abc")),
            (b"HTTP/1.0 200 OK\r\n\r\nto the end", (200, b"to the end")),
        ):
            self.assertEqual(self.get(answer), [expected])

    def test_several_are_asked_at_once_and_where_not_all_are_answered_one_by_one(self) -> None:
        """Whatever a server makes of it: all answers come, each to its question."""

        def answer(path: bytes, how: str) -> bytes:
            closes = b"Connection: close\r\n" if how == "closes" else b""
            return b"HTTP/1.%d 200 OK\r\n%bContent-Length: 2\r\n\r\n%b" % (how != "old", closes, path)

        for how, connections in (("keeps", 1), ("closes", 4), ("old", 4), ("forgets", 2), ("hates", 2), ("breaks", 2)):
            opened: list[socket.socket] = []

            def serve(connection: socket.socket, how: str = how, opened: list[socket.socket] = opened) -> None:
                opened.append(connection)
                head = b""
                while True:
                    head += connection.recv(65536) or _raise(OSError())
                    asked = [line.split()[1] for line in head.split(b"\r\n") if line.startswith(b"GET ")]
                    if how == "hates" and len(asked) > 1:
                        return
                    for number, path in enumerate(asked):
                        if number and how == "forgets":
                            break
                        if number and how == "breaks":
                            connection.sendall(b"nonsense" * 20_000)
                            return
                        connection.sendall(answer(path, how))
                        if how in ("closes", "old"):
                            return
                    head = b""

            further_s = 0.05 if how == "forgets" else 60.0
            with (
                self.subTest(how=how),
                mock.patch.multiple(EngineClient, TIMEOUT_S=60.0, FURTHER_S=further_s),
                server(serve) as url,
                contextlib.closing(EngineClient(url)) as client,
            ):
                for _ in range(2):
                    self.assertEqual(client.get_all("/1", "/2"), [(200, b"/1"), (200, b"/2")])
                self.assertEqual(len(opened), connections)

    def test_several_of_which_none_is_answered_are_said_to_be_so(self) -> None:
        release = threading.Event()

        def hang_up(connection: socket.socket) -> None:
            connection.recv(65536)

        def keep_silent(_: socket.socket) -> None:
            release.wait(60)

        for serve, text, timeout_s in ((hang_up, "without an answer", 60.0), (keep_silent, "no answer to /1", 0.05)):
            with (
                mock.patch.object(EngineClient, "TIMEOUT_S", timeout_s),
                server(serve) as url,
                contextlib.closing(EngineClient(url)) as client,
            ):
                with self.assertRaisesRegex(NoAnswer, text):
                    client.get_all("/1", "/2")
                if serve is keep_silent:
                    release.set()

    def test_what_is_asked(self) -> None:
        self.get(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", api_key="secret")
        self.assertRegex(self.heads[0], rb"\AGET /base/metrics HTTP/1\.1\r\nHost: 127\.0\.0\.1:[0-9]+\r\n")
        self.assertIn(b"\r\nAuthorization: Bearer secret\r\n", self.heads[0])

    def test_connections_are_kept_and_one_that_was_closed_is_opened_anew(self) -> None:
        kept = b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx"
        self.assertEqual(self.get(kept, kept, kept), 3 * [(200, b"x")])
        self.assertEqual(self.connections, 1)
        closed = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nx"
        self.assertEqual(self.get(closed, closed), 2 * [(200, b"x")])
        self.assertEqual(self.connections, 2)

    def test_a_server_that_closes_an_idle_connection_is_asked_again(self) -> None:
        answered = threading.Semaphore(0)

        def serve(connection: socket.socket) -> None:
            request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")
            answered.release()

        with server(serve) as url, contextlib.closing(EngineClient(url)) as client:
            for _ in range(3):
                self.assertEqual(client.get("/"), (200, b"x"))
                self.assertTrue(answered.acquire(timeout=30))

    def test_what_is_no_answer(self) -> None:
        for answer, why in (
            (b"", "closed without an answer"),
            (b"SSH-2.0-OpenSSH\r\n", "does not speak HTTP"),
            (b"SSH-2.0\r\n\r\n", "does not speak HTTP"),
            (b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 20000, "does not speak HTTP"),
            (b"HTTP/1.1 200 OK\r\nContent-Length: 52428800\r\n\r\n", "too large: 52428800"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3200000\r\n", "too large"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "invalid literal"),
            (b"HTTP/1.0 200 OK\r\n\r\n" + bytes(9_000_000), "too large"),
        ):
            with self.subTest(why=why):
                (found,) = self.get(answer)
                self.assertIn(why, str(found))

    def test_an_answer_that_is_cut_off(self) -> None:
        def serve(connection: socket.socket) -> None:
            request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx")

        with server(serve) as url, self.assertRaisesRegex(NoAnswer, "cut off"):
            EngineClient(url).get("/")

    def test_the_time_is_bounded_as_a_whole_even_where_something_comes_all_the_time(self) -> None:
        ended = threading.Event()

        def drip(connection: socket.socket) -> None:
            request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
            while not ended.wait(0.01):
                connection.sendall(b"x")

        def silent(connection: socket.socket) -> None:
            request(connection)
            ended.wait(30)

        for serve in (drip, silent):
            ended.clear()
            with server(serve) as url, contextlib.closing(EngineClient(url)) as client:
                with mock.patch.object(EngineClient, "TIMEOUT_S", 0.3), self.assertRaisesRegex(NoAnswer, "in time"):
                    client.get("/metrics")
                ended.set()

    def test_a_refused_connection_has_its_own_name(self) -> None:
        with server(lambda _: None) as url:
            pass
        with self.assertRaises(RefusedConnection):
            EngineClient(url).get("/")

    def test_a_name_that_is_none(self) -> None:
        nobody = mock.patch.object(socket, "getaddrinfo", side_effect=socket.gaierror(-2, "Name or service not known"))
        with nobody, self.assertRaisesRegex(NoAnswer, "Name or service not known") as caught:
            EngineClient("http://engine.invalid").get("/")
        self.assertNotIsInstance(caught.exception, RefusedConnection)

    def test_of_several_addresses_one_that_cannot_be_reached_does_not_hide_one_that_can(self) -> None:
        def serve(connection: socket.socket) -> None:
            request(connection)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\nyes")

        with server(serve) as url:
            port = int(url.rsplit(":", 1)[1])
            way = (socket.SOCK_STREAM, socket.IPPROTO_TCP, "")
            # An address that no stream is sent to, a family that cannot be, and the engine's.
            found = [
                (socket.AF_INET, *way, ("255.255.255.255", port)),
                (-7, *way, ()),
                (socket.AF_INET, *way, ("127.0.0.1", port)),
            ]
            with mock.patch.object(engine_agent, "_look_up", return_value=found):
                self.assertEqual(EngineClient("http://engine").get("/"), (200, b"yes"))
            with mock.patch.object(engine_agent, "_look_up", return_value=found[:2]):
                with self.assertRaises(NoAnswer) as caught:
                    EngineClient("http://engine").get("/")
                self.assertNotIsInstance(caught.exception, RefusedConnection)

    def test_a_name_server_that_does_not_answer_is_not_waited_for_longer_than_an_engine(self) -> None:
        ended = threading.Event()
        self.addCleanup(ended.set)

        def silent(*_: object, flags: int = 0, **__: object) -> list[Any]:
            if not flags:
                ended.wait(30)
            raise socket.gaierror(-3, "Temporary failure in name resolution")

        with (
            mock.patch.object(socket, "getaddrinfo", silent),
            mock.patch.object(EngineClient, "TIMEOUT_S", 0.1),
            self.assertRaisesRegex(NoAnswer, "its name 'engine.invalid' cannot be looked up in time"),
        ):
            EngineClient("http://engine.invalid").get("/")

    @unittest.skipUnless(shutil.which("openssl"), "no openssl to make a certificate with")
    def test_tls(self) -> None:
        def serve(connection: socket.socket) -> None:
            request(connection)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx")

        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(
                [
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "rsa:2048",
                    "-nodes",
                    "-days",
                    "2",
                    "-subj",
                    "/CN=engine",
                    "-addext",
                    "subjectAltName=DNS:engine",
                    "-keyout",
                    f"{folder}/key",
                    "-out",
                    f"{folder}/cert",
                ],
                check=True,
                capture_output=True,
                timeout=60,
            )
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(f"{folder}/cert", f"{folder}/key")
            real = socket.getaddrinfo

            def get(url: str, ca_file: str | None = None) -> Any:
                here = mock.patch.object(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
                with here, contextlib.closing(EngineClient(url, None, ca_file)) as client:
                    try:
                        return client.get("/")
                    except NoAnswer as error:
                        return str(error).lower()

            with server(serve, context) as url:
                named = url.replace("127.0.0.1", "engine")
                self.assertEqual(get(url), (200, b"x"))  # any certificate is believed on the loopback
                self.assertIn("mismatch", get(url, f"{folder}/cert"))  # where a CA is given, names count
                self.assertEqual(get(named, f"{folder}/cert"), (200, b"x"))
                self.assertIn("certificate", get(named))


class Beside(unittest.TestCase):
    """What a sidecar says of an engine in trouble, by a clock that is moved by hand."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        for name in ("monotonic", "time"):
            patch = mock.patch.object(engine_agent.time, name, self.clock)  # type: ignore[attr-defined]
            patch.start()
            self.addCleanup(patch.stop)
        sleep = mock.patch.object(engine_agent.time, "sleep")  # type: ignore[attr-defined]
        sleep.start()
        self.addCleanup(sleep.stop)
        self.client = Client()
        self.sent = Kept()
        self.lines: list[str] = []
        watch = EngineWatch(self.client, self.clock, self.clock)
        self.sidecar = Sidecar(
            settings(), self.sent, watch, Complaints(self.lines.append, self.clock), self.lines.append
        )
        self.sidecar._agent._clock = self.sidecar._agent._wall_clock = self.clock
        self.steps = 0

    def looks(self, turns: int, running: int = 0, waiting: int = 0, moves: bool = True, **page: Any) -> list[str]:
        """Look that many times at an engine that answers; the phases that were said."""
        for _ in range(turns):
            self.steps += moves
            text = vllm_page(running, waiting, self.steps, **page)
            self.client.answers |= {"/metrics/": text, "/metrics": text}
            self.turn()
        return self.said()

    def turn(self) -> None:
        self.clock.move(0.2)
        self.sidecar.take(self.sidecar.look())

    def fails(self, turns: int, answer: Any) -> list[str]:
        before = dict(self.client.answers)
        self.client.answers = dict.fromkeys(["/metrics/", "/metrics", "/load", "/version", "/v1/models"], answer)
        for _ in range(turns):
            self.turn()
        self.client.answers = before
        return self.said()

    def said(self) -> list[str]:
        phases = [state["phase"] for state in self.sent.take()]
        return [one for at, one in enumerate(phases) if at == 0 or one != phases[at - 1]]

    def test_busy_then_hung_then_busy(self) -> None:
        self.assertEqual(self.looks(10, 8, 16), [SERVING])
        self.assertEqual(self.looks(4, 8, 16, moves=False), [])
        self.assertEqual(self.looks(20, 8, 16, moves=False), [STUCK])
        self.assertEqual(self.looks(1, 8, 16), [SERVING])

    def test_idle_is_shown_with_real_numbers(self) -> None:
        self.client.answers["/load"] = {"server_load": 0}
        self.looks(10)
        self.turn()
        self.turn()
        (state, *_) = self.sent.take()
        self.assertEqual(
            (state["phase"], state["kv_cache_free_blocks"], state["num_requests_running"]), (SERVING, 500, 0)
        )
        self.assertEqual((state["model"], state["engine"]), ("tiny", "vllm unknown"))

    def test_hung_from_idle_where_the_front_end_can_be_seen(self) -> None:
        self.client.answers["/load"] = {"server_load": 3}
        self.looks(5, 3)
        self.client.answers["/load"] = {"server_load": 0}
        self.assertEqual(self.looks(10, moves=False), [SERVING])
        self.client.answers["/load"] = {"server_load": 5}
        self.assertEqual(self.looks(7, moves=False), [STUCK])
        self.client.answers["/load"] = {"server_load": 0}
        self.assertEqual(self.looks(5, moves=False), [STUCK])  # its clients gave up
        self.client.answers["/load"] = {"server_load": 5}
        self.assertEqual(self.looks(1, 5), [SERVING])

    def test_one_hung_rank_of_two(self) -> None:
        self.looks(10, 4, engines=("0", "1"))
        for _ in range(10):
            self.steps += 1
            text = vllm_page(4, 0, self.steps) + vllm_page(4, 0, 1, engines=("1",))
            self.client.answers |= {"/metrics/": text, "/metrics": text}
            self.turn()
        self.assertEqual(self.said(), [SERVING, STUCK])

    def test_asleep(self) -> None:
        self.looks(5)
        self.assertEqual(self.looks(10, awake=0, moves=False), [SLEEPING])
        self.assertEqual(self.looks(3), [SERVING])

    def test_starting_until_the_port_answers(self) -> None:
        self.assertEqual(self.fails(10, RefusedConnection("Connection refused")), [STARTING])
        self.assertEqual(self.looks(3), [SERVING])
        self.assertEqual(len([line for line in self.lines if "Connection refused" in line]), 1)

    def test_a_port_that_refuses_is_a_farewell_and_what_comes_after_is_a_new_life(self) -> None:
        self.looks(5)
        boots = {self.sidecar._agent._reporters[None].writer.boot}
        self.assertEqual(self.fails(1, RefusedConnection("Connection refused")), [GONE])
        self.assertEqual(self.fails(50, RefusedConnection("Connection refused")), [])
        self.assertEqual(self.fails(10, NoAnswer("no answer in time")), [])
        self.assertEqual(self.looks(3), [SERVING])
        boots.add(self.sidecar._agent._reporters[None].writer.boot)
        self.assertEqual(len(boots), 2)

    def test_bad_answers_are_no_proof(self) -> None:
        for answer in (503, "<html>hello</html>", "", NoAnswer("the answer is too large: 52428800 bytes"),
                       NoAnswer("no answer to /metrics in time"), 200, {"a": 1}):  # fmt: skip
            with self.subTest(answer=answer):
                self.looks(5, 3)
                self.assertEqual(self.fails(4, answer), [])
                self.assertEqual(self.fails(20, answer), [STUCK])
                self.looks(3, 3)

    def test_an_engine_that_takes_its_time_to_answer_is_called_stuck_meanwhile(self) -> None:
        self.looks(5, 3)
        for _ in range(15):
            self.clock.move(0.1)
            self.sidecar._agent.saw_nothing()
        self.assertEqual(self.said(), [STUCK])

    def test_numbers_that_are_missing_are_starting_and_never_0(self) -> None:
        self.client.answers |= {"/metrics": "# HELP vllm:x y\n", "/metrics/": ""}
        for _ in range(12):
            self.turn()
        states = self.sent.take()
        self.assertEqual({state["phase"] for state in states}, {STARTING})
        self.assertEqual({state["num_requests_running"] for state in states}, {None})
        self.assertTrue(any("vllm:num_requests_running" in line for line in self.lines))

    def test_a_clock_that_is_set_changes_nothing_but_timestamps(self) -> None:
        self.looks(5, 3)
        self.sidecar._watch._wall_clock = lambda: 5.0
        self.assertEqual(self.looks(10, 3), [SERVING])
        self.assertEqual(self.looks(20, 3, moves=False), [STUCK])

    def test_what_cannot_be_understood_is_said_and_tried_again(self) -> None:
        self.looks(3)
        assert self.sidecar._watch.adapter is not None
        with mock.patch.object(self.sidecar._watch.adapter, "look", side_effect=ZeroDivisionError("oops")):
            self.turn()
        self.assertTrue(any("ZeroDivisionError: oops" in line for line in self.lines))
        self.assertIn(SERVING, self.looks(3))

    def test_its_name(self) -> None:
        for values, expected in (
            ({}, "http://10.0.0.1:8000"),
            ({"ENGINE_URL": "https://localhost"}, "https://10.0.0.1:443"),
            ({"ENGINE_URL": "http://10.9.9.9:81/base"}, "http://10.9.9.9:81/base"),
            ({"ENGINE_ID": "mine"}, "mine"),
        ):
            self.assertEqual(engine_agent.default_engine_id(settings(**values), self.sent), expected)

    def test_it_ends_with_a_farewell(self) -> None:
        self.looks(3)
        self.sidecar.stop()
        stop = threading.Event()
        with mock.patch.object(self.sidecar, "_keep_looking"):
            self.sidecar.run(stop)
        self.assertEqual(self.said(), [GONE])
        self.assertTrue(stop.is_set())

    def test_outcomes_that_come_while_it_runs_are_taken(self) -> None:
        outcomes = [self.sidecar.look() for _ in range(2)]  # refused nowhere, and none of the engines that are known
        for outcome in (*outcomes, Outcome(None, NoAnswer("x")), None):
            self.sidecar._outcomes.put(outcome)
        with mock.patch.object(self.sidecar, "_keep_looking"):
            self.sidecar.run(threading.Event())
        self.assertEqual(self.said(), [STARTING, GONE])

    def test_a_busy_engine_that_hung_before_it_was_seen_is_stuck_and_not_starting(self) -> None:
        self.assertEqual(self.looks(5, 8, 16, moves=False), [])
        self.assertEqual(self.looks(5, 8, 16, moves=False), [STUCK])

    def test_a_vllm_whose_core_died_while_it_was_idle_is_not_idle(self) -> None:
        """Its gauges go on for seconds, and read idle; /health says 503."""
        self.looks(10, moves=False)
        self.client.answers["/health"] = 503
        self.looks(6, moves=False)
        self.assertEqual(self.looks(10, moves=False), [STUCK])
        del self.client.answers["/health"]
        self.assertEqual(self.looks(2, moves=False), [SERVING])

    def test_a_farewell_names_the_engine_too(self) -> None:
        self.looks(3)
        self.client.answers = {"/metrics/": RefusedConnection("no"), "/metrics": RefusedConnection("no")}
        self.sent.take()
        self.turn()
        self.assertEqual({(one["phase"], one["engine"], one["model"]) for one in self.sent.take()},
                         {(GONE, "vllm unknown", "tiny")})  # fmt: skip


class Checking(unittest.TestCase):
    """--check says what would be sent and where it comes from, in 3 s, and sends nothing."""

    def check(self, client: Client, **values: str) -> tuple[int, str]:
        out, sent = io.StringIO(), Kept()
        with (
            mock.patch.object(engine_agent, "EngineClient", lambda *_: client),
            mock.patch.object(engine_agent, "CHECK_GAP_S", 0.0),
        ):
            status = engine_agent.check(settings(**values), sent, out.write)
        self.assertEqual(sent.take(), [])
        return status, out.getvalue()

    def test_a_vllm(self) -> None:
        text = vllm_page(0, 0, 5)
        status, said = self.check(Client({"/metrics": text, "/metrics/": text, "/version": {"version": "0.33.0"}}))
        self.assertEqual(status, 0)
        lines = said.splitlines()
        self.assertEqual(lines[0], "vllm 0.33.0 at http://127.0.0.1:8000, model tiny")
        self.assertEqual([line.split()[0] for line in lines[2:10]], list(engine_agent_fields()))
        self.assertRegex(said, r"(?m)^kv_cache_free_blocks +500 +vllm:kv_cache_usage_perc, exact$")
        self.assertRegex(said, r"(?m)^engine_capacity +0\.000 \(unknown so far\)")
        self.assertIn("would help: --enable-server-load-tracking", said)
        self.assertRegex(said, r"(?m)^phase +serving ")

    def test_an_idle_vllm_that_may_or_may_not_count_its_requests(self) -> None:
        text = vllm_page(0, 0, 5)
        status, said = self.check(Client({"/metrics": text, "/metrics/": text, "/load": {"server_load": 0}}))
        self.assertEqual(status, 0)
        self.assertRegex(said, r"(?m)^phase +serving ")

    def test_a_busy_engine_that_does_not_move(self) -> None:
        text = vllm_page(3, 0, 5)
        status, said = self.check(Client({"/metrics": text, "/metrics/": text}))
        self.assertEqual(status, 0)
        self.assertRegex(said, r"(?m)^phase +not proven ")

    def test_where_nothing_can_be_said_it_is_exit_1_with_what_would_help(self) -> None:
        status, said = self.check(Client({"/metrics": RefusedConnection("Connection refused")}))
        self.assertEqual((status, said), (1, "http://127.0.0.1:8000: Connection refused\n"))
        status, said = self.check(
            Client({"/metrics": 404, "/v1/models": {"data": [{"id": "m", "owned_by": "llamacpp"}]}})
        )
        self.assertEqual(status, 1)
        self.assertIn("would help: --metrics", said)

    def test_it_gives_up_in_time(self) -> None:
        began = time.monotonic()
        client = EngineClient("http://127.0.0.1:1")
        client.give_up_at = began - 1.0
        with self.assertRaises(NoAnswer):
            client.get("/metrics")


def engine_agent_fields() -> Iterator[str]:
    yield from ("engine_id", "timestamp_ms", *engine_agent.Load._fields[:6])


if __name__ == "__main__":
    unittest.main()
