"""The agent inside vLLM: what it makes of vLLM's calls, and that nothing that goes wrong in it reaches the engine.

The fakes have the shape of what a real vLLM 0.32.0 was seen to pass; where its recorded calls are there, they are used.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import types
import unittest
from types import SimpleNamespace
from typing import Any
from unittest import mock

import engine_agent
from engine_agent import (
    GONE,
    HIDDEN,
    SERVING,
    STARTING,
    FrontEnd,
    Meeting,
    PluginAgent,
    ServerFacts,
    StepWatch,
    Summary,
)
from tests.harness import TOP, FakeClock, wait_until
from tests.test_engine_agent import settings

RECORDED = TOP.parent / "shared" / "engines" / "vllm_record_calls.jsonl"


class Spiteful:
    """Raises for every attribute, and whatever else is done with it."""

    error: type[BaseException] = RuntimeError

    def _raise(self, *_: object) -> Any:
        raise type(self).error("spite")

    __getattribute__ = __bool__ = __iter__ = __hash__ = __eq__ = __add__ = __radd__ = _raise


class Fatal(Spiteful):
    """Raises what is no Exception, and what `except Exception` lets through."""

    error = SystemExit


class Cancelled(Spiteful):
    """The same, by what asyncio cancels a task with."""

    error = asyncio.CancelledError


def stats(running: int, waiting: int = 0, usage: float = 0.0, **more: Any) -> Any:
    return SimpleNamespace(num_running_reqs=running, num_waiting_reqs=waiting, kv_cache_usage=usage,
                           **{"num_skipped_waiting_reqs": 0, "iteration_details": None, **more})  # fmt: skip


def iteration(
    generated: int = 0, prompt: int = 0, latencies: tuple[float, ...] = (), finished: tuple[int, ...] = ()
) -> Any:
    return SimpleNamespace(
        num_generation_tokens=generated,
        prompt_token_stats=SimpleNamespace(computed=prompt, total=prompt),
        inter_token_latencies_iter=list(latencies),
        finished_requests=[SimpleNamespace(num_prompt_tokens=tokens) for tokens in finished],
    )


class Processor:
    """vLLM's output processor: it has the table of requests."""

    def __init__(self) -> None:
        self.request_states: dict[str, Any] = {}

    def add(self, name: str, tokens: int, prefilling: bool = True) -> None:
        self.request_states[name] = SimpleNamespace(prompt_len=tokens, is_prefilling=prefilling)


class Core:
    """vLLM's client of its engine cores."""

    def __init__(self, ranks: int = 1) -> None:
        self.resources = SimpleNamespace(engine_dead=False)
        if ranks > 1:
            self.core_engines = [rank.to_bytes(2, "little") for rank in range(ranks)]
            self.reqs_in_flight: dict[str, bytes] = {}


class Engine:
    """vLLM's AsyncLLM."""

    def __init__(self, ranks: int = 1) -> None:
        self.output_processor = Processor()
        self.engine_core = Core(ranks)


def config(**parallel: Any) -> Any:
    return SimpleNamespace(
        cache_config=SimpleNamespace(num_gpu_blocks=4096, block_size=128),
        parallel_config=SimpleNamespace(**{"_api_process_count": 1, "_api_process_rank": 0, **parallel}),
        model_config=SimpleNamespace(served_model_name="tiny", model="/models/tiny"),
    )


class Steps(unittest.TestCase):
    """vLLM's calls become numbers; the thread is woken for what cannot wait."""

    def setUp(self) -> None:
        self.clock = FakeClock()
        self.engine = Engine()
        self.wakes = 0
        self.watch = self.watched([0])

    def watched(self, indexes: list[int]) -> StepWatch:
        return StepWatch(indexes, FrontEnd(self.engine), self.woken, clock=self.clock, wall_clock=self.clock)

    def woken(self) -> None:
        self.wakes += 1

    def look(self, *others: Summary, servers: int = 1, indexes: tuple[int, ...] = (0,), blocks: int = 4096) -> Any:
        return engine_agent.look_of([self.watch.summary(), *others], servers, indexes, blocks, 1.0)

    def test_a_busy_engine(self) -> None:
        self.engine.output_processor.add("a", 100)
        self.engine.output_processor.add("b", 1500)
        self.engine.output_processor.add("c", 64, prefilling=False)
        self.watch.record(stats(1, 1, 1 / 4095, num_skipped_waiting_reqs=1), iteration(1, 64, (0.004, 0.006)), 0)
        self.watch.record(stats(1, 1, 100 / 4095, num_skipped_waiting_reqs=1), iteration(1), 0)
        look = self.look()
        (reading,) = look.readings
        self.assertEqual((reading.running, reading.waiting), (1, 2))
        self.assertEqual((reading.free, reading.total, reading.pending), (3995, 4095, 1600))
        self.assertEqual(reading.step_times, (0.005, 1))
        self.assertEqual((reading.tokens, reading.step_tokens), (66, (66, 2)))
        self.assertEqual(reading.proof, (1000.0, 1_000_000))
        self.assertEqual(look.in_flight, 3)

    def test_before_the_first_step_an_engine_is_idle_and_its_kv_cache_free(self) -> None:
        (reading,) = self.look().readings
        self.assertEqual((reading.running, reading.waiting, reading.free, reading.pending), (0, 0, 4095, 0))

    def test_calls_without_scheduler_statistics_are_no_proof(self) -> None:
        self.watch.record(stats(0), None, 0)
        before = self.look().readings[0].marker
        self.clock.move(1.0)
        self.watch.record(None, iteration(1), 0)
        self.assertEqual(self.look().readings[0].marker, before)

    def test_iteration_details_are_more_exact_than_what_is_credited_at_the_end_of_a_prefill(self) -> None:
        details = SimpleNamespace(num_ctx_tokens=2048, num_generation_tokens=7)
        self.watch.record(stats(1, iteration_details=details), iteration(7, 0), 0)
        self.assertEqual(self.look().readings[0].tokens, 2055)

    def test_older_iteration_statistics(self) -> None:
        old = SimpleNamespace(num_generation_tokens=1, num_prompt_tokens=50, inter_token_latencies_iter=[],
                              finished_requests=[])  # fmt: skip
        self.watch.record(stats(1), old, 0)
        self.assertEqual(self.look().readings[0].tokens, 51)

    def test_the_first_request_after_idle_wakes_the_thread_once(self) -> None:
        self.look()
        self.engine.output_processor.add("a", 10)
        self.look()  # a regular look that saw the request before the engine did
        for _ in range(5):
            self.watch.record(stats(1), iteration(1), 0)
        self.assertEqual(self.wakes, 1)
        self.look()
        self.watch.record(stats(1), iteration(1), 0)
        self.assertEqual(self.wakes, 1)

    def test_pending_tokens_that_double_or_halve_by_256_wake_it(self) -> None:
        self.watch.record(stats(1), None, 0)
        for tokens, woken in ((255, 0), (1, 1), (256, 1), (1000, 1)):
            self.look()
            self.wakes = 0
            self.engine.output_processor.add(f"r{tokens}", tokens)
            self.watch.record(stats(1), iteration(1), 0)
            self.assertEqual(self.wakes, woken if tokens != 1 else 0, tokens)
        self.look()
        self.wakes = 0
        self.watch.record(stats(1), iteration(1, prompt=1400), 0)
        self.assertEqual(self.wakes, 1)

    def test_at_most_twenty_extra_looks_a_second(self) -> None:
        for turn in range(100):
            self.engine.output_processor.request_states.clear()
            self.watch.record(stats(0), None, 0)
            self.look()
            self.engine.output_processor.add(f"r{turn}", 5000)
            self.watch.record(stats(1), None, 0)
            self.clock.move(0.01)
        self.assertEqual(self.wakes, 20)
        self.clock.move(0.1)
        self.look()
        self.watch.record(stats(1), iteration(prompt=5000), 0)
        self.assertEqual(self.wakes, 21)

    def test_asleep_and_awake(self) -> None:
        for call, asleep in (((1, 1), True), ((0, 0), False), ((1, 0), True), ((0, 0), False)):
            self.clock.move(1.0)
            self.watch.record_sleep_state(*call)
            self.assertEqual(self.look().asleep, asleep)
        self.assertEqual(self.wakes, 4)

    def test_an_engine_that_died_is_seen(self) -> None:
        self.assertFalse(self.watch.summary().dead)
        self.engine.engine_core.resources.engine_dead = True
        self.assertTrue(self.watch.summary().dead)

    def test_a_front_end_that_ended_has_no_requests(self) -> None:
        self.engine.output_processor.add("a", 10)
        front_end = FrontEnd(self.engine)
        self.engine = Engine()
        self.assertEqual(front_end.pending(), (0, 0))

    def test_several_api_servers_are_one_engine(self) -> None:
        other = StepWatch([0], FrontEnd(self.engine), self.woken, api_rank=1, clock=self.clock, wall_clock=self.clock)
        self.watch.record(stats(8, 2), iteration(8), 0)
        self.clock.move(0.1)
        other.record(stats(0), iteration(4), 0)
        self.watch.record(None, iteration(2), 0)
        self.engine.output_processor.add("a", 10)
        passed_on = Summary.of_json(other.summary().as_json())
        look = self.look(passed_on, servers=2)
        (reading,) = look.readings
        self.assertEqual((reading.running, reading.tokens, reading.pending, look.in_flight), (0, 14, 20, 2))
        self.assertEqual(reading.marker, self.clock.now)

    def test_what_another_api_server_does_not_say_is_hidden(self) -> None:
        self.assertEqual(self.look(servers=2).in_flight, HIDDEN)
        other = StepWatch([0], None, self.woken, api_rank=1, clock=self.clock, wall_clock=self.clock).summary()
        self.assertIsNone(self.look(other, servers=2).in_flight)
        self.clock.move(1.5)
        self.assertEqual(self.look(other, servers=2).in_flight, HIDDEN)

    def test_idleness_is_as_old_as_the_oldest_that_was_said(self) -> None:
        other = StepWatch([0], FrontEnd(Engine()), self.woken, api_rank=1, clock=self.clock, wall_clock=self.clock)
        said = other.summary()
        self.clock.move(0.3)
        self.assertEqual(self.look(said, servers=2).at, (1000.0, 1_000_000))

    def test_data_parallel_ranks(self) -> None:
        self.engine = Engine(ranks=2)
        self.watch = self.watched([0, 1])
        self.watch.record(stats(3, 0, 0.5), iteration(3), 0)
        self.watch.record(stats(0), None, 1)
        for name, tokens, rank in (("a", 100, 0), ("b", 200, 1)):
            self.engine.output_processor.add(name, tokens)
            self.engine.engine_core.reqs_in_flight[name] = rank.to_bytes(2, "little")
        look = self.look(indexes=(0, 1), blocks=8192)
        self.assertEqual([one.total for one in look.readings], [4095, 4095])
        self.assertEqual([one.free for one in look.readings], [2048, 4095])
        self.assertEqual([one.pending for one in look.readings], [100, 200])
        self.assertEqual(look.in_flight_by_rank, {0: 1, 1: 1})
        self.engine.output_processor.add("on its way", 50)
        look = self.look(indexes=(0, 1), blocks=8192)
        self.assertIsNone(look.in_flight_by_rank)
        self.assertEqual(sum(one.pending for one in look.readings), 350)

    def test_a_kv_cache_that_is_not_known_is_unknown(self) -> None:
        self.watch.record(SimpleNamespace(num_running_reqs=1, num_waiting_reqs=0), None, 0)
        self.assertEqual(self.look().readings[0].free, -1)
        self.watch.record(stats(1, 0, 0.5), None, 0)
        self.assertEqual(engine_agent.look_of([self.watch.summary()], 1, (0,), None, 1.0).readings[0].total, -1)

    @unittest.skipUnless(RECORDED.exists(), "the recorded calls of a real vLLM are not here")
    def test_the_calls_of_a_real_vllm(self) -> None:
        def thing(value: Any) -> Any:
            if isinstance(value, dict):
                return SimpleNamespace(**{name: thing(one) for name, one in value.items()})
            return [one for one in map(thing, value) if not isinstance(one, str)] if isinstance(value, list) else value

        calls = [json.loads(line) for line in RECORDED.read_text().splitlines()]
        watches: dict[Any, StepWatch] = {}
        for call in calls:
            watch = watches.setdefault(call["pid"], self.watched([0, 1] if "data-parallel" in call["from"] else [0]))
            if call["event"] == "record":
                watch.record(thing(call["scheduler_stats"]), thing(call["iteration_stats"]), call["engine_idx"])
                if call["scheduler_stats"]:
                    seen = watch._ranks[call["engine_idx"]].stats
                    assert seen is not None
                    self.assertEqual(seen[2], call["scheduler_stats"]["num_running_reqs"])
                    self.assertEqual(seen[4], call["scheduler_stats"]["kv_cache_usage"])
            elif call["event"] == "sleep":
                watch.record_sleep_state(call["is_awake"], call["level"])
        self.assertGreater(len(watches), 5)
        self.assertEqual(sum(watch.failures for watch in watches.values()), 0)


class Meetings(unittest.TestCase):
    """API servers of one vLLM find each other, and listen to nobody else's nonsense."""

    def setUp(self) -> None:
        try:
            self.first, self.second = Meeting(), Meeting()
            self.first.open()
        except OSError as error:
            self.skipTest(f"no abstract Unix sockets here: {error}")
        self.addCleanup(self.first.close)
        self.addCleanup(self.second.close)
        self.first._socket.settimeout(10.0)

    def test_a_summary_arrives_as_it_was_sent(self) -> None:
        summary = Summary(1, 5.0, 5000, 3, 100, {0: [1, 2], 1: [3, 4]}, True, 4.0, False,
                          {0: (1.0, 1000, 1, 2, 0.5)}, {0: [0.0] * 7}, urgent=True)  # fmt: skip
        self.second.send(summary)
        self.assertEqual(self.first.receive(), summary)

    def test_nonsense_is_passed_over(self) -> None:
        for junk in (b"", b"\xff", b"[]", b"{}", b"null", b'{"api_rank": 1}', b"[" * 5000):
            self.second._socket.sendto(junk, self.second._name)
            self.assertIsNone(self.first.receive())

    def test_only_one_can_be_the_first(self) -> None:
        with self.assertRaises(OSError):
            self.second.open()


class Base:
    """In the place of vLLM's AggregateStatLoggerBase."""


def fake_vllm() -> Any:
    """Modules in the place of vLLM's, for as long as the patch lasts."""
    loggers = types.ModuleType("vllm.v1.metrics.loggers")
    loggers.AggregateStatLoggerBase = Base  # type: ignore[attr-defined]
    names = {"vllm": types.ModuleType("vllm"), "vllm.v1": types.ModuleType("vllm.v1")}
    names["vllm"].__version__ = "0.33.0"  # type: ignore[attr-defined]
    names["vllm.v1.metrics"] = types.ModuleType("vllm.v1.metrics")
    return mock.patch.dict(sys.modules, {**names, "vllm.v1.metrics.loggers": loggers})


class InsideVllm(unittest.TestCase):
    """The class that vLLM makes: an exception out of it would end somebody's server."""

    def setUp(self) -> None:
        patch = fake_vllm()
        patch.start()
        self.addCleanup(patch.stop)
        self.addCleanup(lambda: engine_agent.__dict__.pop("StatLogger", None))
        self.lines: list[str] = []
        say = mock.patch.object(engine_agent, "_say_in_vllm", self.lines.append)
        say.start()
        self.addCleanup(say.stop)
        for registry in (mock.patch.object(atexit, "register"), mock.patch.object(os, "register_at_fork")):
            registry.start()
            self.addCleanup(registry.stop)
        self.gateway = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(self.gateway.close)
        self.gateway.bind(("127.0.0.1", 0))
        self.gateway.settimeout(20.0)
        self.environ({"ELRAR_GATEWAY_PORT": str(self.gateway.getsockname()[1]), "ELRAR_PUSH_INTERVAL": "20"})

    def environ(self, values: dict[str, str]) -> None:
        patch = mock.patch.dict(os.environ, values, clear=True)
        patch.start()
        self.addCleanup(patch.stop)

    def made(self, **arguments: Any) -> Any:
        """A logger made as vLLM makes it: in the constructor of the engine, below the API server's start."""
        args = SimpleNamespace(host=None, port=self.port(), root_path="", ssl_certfile=None)
        assert args is not None  # found among the callers' variables
        logger = Construction(engine_agent.StatLogger, arguments).logger
        self.addCleanup(lambda: logger._agent and logger._agent.end(wait_s=10.0))
        return logger

    def port(self) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        self.addCleanup(listener.close)
        return int(listener.getsockname()[1])

    def state(self, phase: str) -> dict[str, Any]:
        for _ in range(2000):
            state: dict[str, Any] = json.loads(self.gateway.recv(9000))
            if state["phase"] == phase:
                return state
        raise AssertionError(f"no {phase}, but {state}")

    def serving(self, running: int) -> dict[str, Any]:
        for _ in range(2000):
            state = self.state(SERVING)
            if state["num_requests_running"] == running:
                return state
        raise AssertionError(f"not {running}, but {state}")

    def test_the_class_derives_from_vllms_and_is_made_once(self) -> None:
        self.assertTrue(issubclass(engine_agent.StatLogger, Base))
        self.assertIs(engine_agent.StatLogger, engine_agent.StatLogger)
        with self.assertRaises(AttributeError):
            engine_agent.Nothing  # noqa: B018

    def test_from_idle_to_busy_to_the_farewell(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        idle = self.state(SERVING)
        self.assertRegex(idle["engine_id"], r"\Ahttp://127\.0\.0\.1:[0-9]+\Z")
        self.assertEqual((idle["kv_cache_free_blocks"], idle["num_requests_running"]), (4095, 0))
        self.assertEqual(
            (idle["model"], idle["engine"], idle["agent"]), ("tiny", "vllm 0.33.0", f"elrar {engine_agent.VERSION}")
        )
        logger.record(scheduler_stats=stats(8, 16), iteration_stats=iteration(8), mm_cache_stats=None, engine_idx=0)
        busy = self.serving(8)
        self.assertEqual(busy["num_requests_waiting"], 16)
        self.assertEqual(busy["boot"], idle["boot"])
        logger._agent.end(wait_s=10.0)
        farewells = [self.state(GONE) for _ in range(3)]
        self.assertEqual(len({one["seq"] for one in farewells}), 3)
        self.assertEqual([line for line in self.lines if "reports this engine" not in line], [])

    def test_the_first_farewell_is_sent_before_the_signals_handler_returns(self) -> None:
        # Of several API servers vLLM kills each a few ms after its SIGTERM: whoever waits for a thread comes too late.
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        self.state(SERVING)
        # On a busy machine a look may take longer than it is usually waited for.
        patient = mock.patch.object(PluginAgent, "MOST_WAIT_S", 30.0)
        with patient, mock.patch.object(logger._agent, "_wake", mock.Mock(spec=threading.Event())):
            logger._agent.end()
            self.gateway.setblocking(False)
            phases = []
            with contextlib.suppress(BlockingIOError):
                while True:
                    phases.append(json.loads(self.gateway.recv(9000))["phase"])
        self.assertIn(GONE, phases)
        logger._agent.end(wait_s=10.0)

    def test_a_look_that_takes_long_does_not_hold_the_signals_handler_up(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        self.state(SERVING)
        with mock.patch.object(PluginAgent, "MOST_WAIT_S", 0.0), logger._agent._turn:
            logger._agent.end()
        self.assertEqual(len({self.state(GONE)["seq"] for _ in range(3)}), 3)

    def test_until_its_port_answers_it_is_starting(self) -> None:
        with mock.patch.object(self, "port", lambda: 1):  # nobody listens there
            logger = self.made(vllm_config=config(), engine_indexes=[0])
        self.assertEqual(self.state(STARTING)["num_requests_running"], None)
        logger.record(scheduler_stats=stats(1), iteration_stats=None, engine_idx=0)
        self.assertEqual(self.state(SERVING)["num_requests_running"], 1)

    def test_every_entry_point_with_every_broken_argument(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        anything: tuple[Any, ...] = (Spiteful(), None, "8", 1)
        broken: tuple[Any, ...] = (
            None, Spiteful(), Fatal(), Cancelled(), object(), 0, -1, 2**70, 10**400, math.nan, 1.5, "x", b"x", [], {},
            [Spiteful()], SimpleNamespace(),
            *(stats(one, 0, usage) for one, usage in itertools.product(anything, repeat=2)),
            stats(1, iteration_details=Spiteful()), SimpleNamespace(inter_token_latencies_iter=Spiteful()),
            SimpleNamespace(inter_token_latencies_iter=[None]), SimpleNamespace(finished_requests=[Spiteful()]),
            SimpleNamespace(prompt_token_stats=Spiteful()), SimpleNamespace(num_generation_tokens=None),
        )  # fmt: skip
        for one, two in itertools.product(broken, repeat=2):
            logger.record(scheduler_stats=one, iteration_stats=two, mm_cache_stats=Spiteful(), engine_idx=0)
            logger.record_sleep_state(one, two)
        for one in broken:
            logger.record(stats(1), iteration(1), engine_idx=one)
            logger.record(one, one, one, one, one, something_new=one)
            logger.log_engine_initialized(one)
            logger.record_admission_rejection(one)
        logger.record()
        logger.log()
        logger.record_sleep_state()
        for name in dir(logger):
            if name.startswith("record"):
                getattr(logger, name)("one", "argument", "too", "many", "here", "and", "there")
        logger.record_sleep_state(0, 0)
        logger.record(scheduler_stats=stats(5, 6, 0.5), iteration_stats=iteration(5), engine_idx=0)
        state = self.serving(5)
        self.assertEqual((state["num_requests_waiting"], state["kv_cache_free_blocks"]), (6, 2048))

    def test_every_broken_way_to_make_it(self) -> None:
        spiteful = Spiteful()
        for arguments in (
            {},
            {"vllm_config": None, "engine_indexes": None},
            {"vllm_config": spiteful, "engine_indexes": [0]},
            {"vllm_config": Fatal(), "engine_indexes": [Fatal()]},
            {"vllm_config": config(), "engine_indexes": Cancelled()},
            {"vllm_config": config(), "engine_indexes": spiteful},
            {"vllm_config": config(), "engine_indexes": ["x"]},
            {"vllm_config": SimpleNamespace(cache_config=spiteful, parallel_config=None), "engine_indexes": [0]},
            {"vllm_config": config(_api_process_count="two", _api_process_rank=None), "engine_indexes": 0},
            {"vllm_config": config(), "engine_indexes": [0], "more": 1},
        ):
            logger = self.made(**arguments)
            logger.record(scheduler_stats=stats(1), iteration_stats=iteration(1), engine_idx=0)
            logger.record_sleep_state(1, 1)
        self.assertTrue(all(len(line) < 400 for line in self.lines))

    def test_wrong_settings_are_one_line_and_silence(self) -> None:
        self.environ({"ELRAR_PUSH_INTERVAL": "1", "ELRAR_GATEWAY_HOST": "a b"})
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        logger.record(scheduler_stats=stats(1), iteration_stats=None, engine_idx=0)
        self.assertIsNone(logger._agent)
        (line,) = self.lines
        self.assertIn("ELRAR_PUSH_INTERVAL='1'", line)
        self.assertIn("ELRAR_GATEWAY_HOST='a b'", line)

    def test_a_gateway_that_cannot_be_reached_is_one_line(self) -> None:
        self.environ({"ELRAR_PUSH_INTERVAL": "20"})
        with mock.patch.object(engine_agent.Sender, "_socket", side_effect=OSError(101, "Network is unreachable")):
            logger = self.made(vllm_config=config(), engine_indexes=[0])
            wait_until("three tries", lambda: logger._agent._sender.unreachable > 3)
            logger.record(scheduler_stats=stats(1), iteration_stats=None, engine_idx=0)
        self.assertEqual(len([line for line in self.lines if "Network is unreachable" in line]), 1)

    def test_an_engine_without_a_table_of_requests_is_said_and_reported_all_the_same(self) -> None:
        with mock.patch.object(Engine, "__init__", lambda self: None):
            logger = self.made(vllm_config=config(), engine_indexes=[0])
        logger.record(scheduler_stats=stats(2), iteration_stats=iteration(2), engine_idx=0)
        self.serving(2)
        self.assertTrue(any("the table of requests cannot be read" in line for line in self.lines), self.lines)

    def test_a_table_that_breaks_later_does_not_stop_it(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        engine = logger.engine
        engine.output_processor.request_states = Spiteful()
        for _ in range(50):
            logger.record(scheduler_stats=stats(2), iteration_stats=iteration(2), engine_idx=0)
        wait_until("the trouble is said", lambda: any("failed" in line for line in self.lines))
        ends = mock.MagicMock(spec={}, __class__=dict, values=mock.Mock(side_effect=SystemExit))
        engine.output_processor.request_states = ends
        wait_until("what ends other threads is looked at again", lambda: ends.values.call_count > 3)
        engine.output_processor.request_states = {"a": Spiteful(), "b": None}
        logger.record(scheduler_stats=stats(3), iteration_stats=iteration(2), engine_idx=0)
        engine.output_processor.request_states = {}
        logger.record(scheduler_stats=stats(4), iteration_stats=iteration(2), engine_idx=0)
        self.serving(4)

    def test_in_a_forked_child_it_does_nothing(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        agent = logger._agent
        logger._forget()
        logger.record(scheduler_stats=Spiteful(), iteration_stats=Spiteful(), engine_idx=0)
        self.assertEqual(agent.watch.failures, 0)
        agent.end(wait_s=10.0)

    def test_an_engine_core_that_died_is_a_farewell(self) -> None:
        logger = self.made(vllm_config=config(), engine_indexes=[0])
        self.state(SERVING)
        logger.engine.engine_core.resources.engine_dead = True
        self.assertEqual(len([self.state(GONE) for _ in range(3)]), 3)


class Construction:
    """vLLM's AsyncLLM while it is constructed, with the class of the plugin called in it."""

    def __init__(self, plugin: Any, arguments: dict[str, Any]) -> None:
        engine = Engine()
        if hasattr(engine, "output_processor"):
            self.output_processor, self.engine_core = engine.output_processor, engine.engine_core
        self.logger = plugin(**arguments)
        self.logger.engine = self


class Endings(unittest.TestCase):
    """SIGTERM is a farewell at once, and the engine gets its signal all the same."""

    def setUp(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.addCleanup(signal.signal, number, signal.getsignal(number))
        register = mock.patch.object(atexit, "register")
        register.start()
        self.addCleanup(register.stop)
        self.agent = mock.Mock(spec=PluginAgent)

    def test_the_farewell_comes_before_the_engines_own_handler_whoever_puts_one_there(self) -> None:
        order: list[str] = []
        self.agent.end.side_effect = lambda: order.append("farewell")

        async def serve() -> None:
            ending = engine_agent._Ending(self.agent)
            loop = asyncio.get_running_loop()
            for name in ("first", "second"):
                # As vLLM does, and again, as uvicorn may.
                loop.add_signal_handler(signal.SIGTERM, order.append, name)
                ending._put_before(signal.SIGTERM)
                ending._put_before(signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
                while name not in order:
                    await asyncio.sleep(0)
            loop.remove_signal_handler(signal.SIGTERM)

        asyncio.run(asyncio.wait_for(serve(), 30))
        self.assertEqual(order[0], "farewell")
        self.assertEqual([one for one in order if one != "farewell"], ["first", "second"])

    def test_where_the_engine_has_no_handler_the_signal_keeps_its_meaning(self) -> None:
        ending = engine_agent._Ending(self.agent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        ending._put_before(signal.SIGTERM)
        self.assertEqual(signal.getsignal(signal.SIGTERM), signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ending._put_before(signal.SIGINT)
        self.assertEqual(signal.getsignal(signal.SIGINT), signal.default_int_handler)

    def test_what_the_engines_handler_raises_is_raised(self) -> None:
        def interrupt(*_: Any) -> None:
            raise KeyboardInterrupt

        signal.signal(signal.SIGTERM, interrupt)
        engine_agent._Ending(self.agent)._put_before(signal.SIGTERM)
        with self.assertRaises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            threading.Event().wait(10)
        self.agent.end.assert_called_once()

    def test_a_forked_child_says_no_farewell(self) -> None:
        signal.signal(signal.SIGTERM, lambda *_: None)
        ending = engine_agent._Ending(self.agent)
        ending._put_before(signal.SIGTERM)
        with mock.patch.object(os, "getpid", return_value=-1):
            signal.getsignal(signal.SIGTERM)(signal.SIGTERM, None)  # type: ignore[operator, misc]
            ending._at_exit()
        self.agent.end.assert_not_called()


class WhatItIs(unittest.TestCase):
    """Model, version, address: from whatever vLLM has, and without raising where it has nothing."""

    def facts(self, vllm_config: Any, argv: tuple[str, ...] = ()) -> ServerFacts:
        with fake_vllm():
            return engine_agent._facts(vllm_config, [0], argv)

    def test_the_port_of_the_command_line(self) -> None:
        for argv, port in (((), 8000), (("--port", "81"), 81), (("--port=82",), 82), (("--port",), 8000)):
            self.assertEqual(self.facts(None, argv).port, port)

    def test_the_arguments_of_the_server_come_first(self) -> None:
        for args, expected in (
            (SimpleNamespace(host="0.0.0.0", port=9, ssl_certfile="x"), ("https", "127.0.0.1", 9)),
            (SimpleNamespace(host="::", port=9), ("http", "::1", 9)),
            (SimpleNamespace(host="10.0.0.1", port=9), ("http", "10.0.0.1", 9)),
            (SimpleNamespace(host=None, port=9, uds="/run/vllm"), ("http", "127.0.0.1", None)),
        ):
            self.assertIsNotNone(args)
            facts = self.facts(None)
            self.assertEqual((facts.scheme, facts.host, facts.port), expected)

    def test_the_model(self) -> None:
        for name, expected in (("tiny", "tiny"), (["a", "b"], "a"), ([], "/models/x"), (None, "/models/x"), (7, None)):
            model_config = SimpleNamespace(served_model_name=name, model="/models/x")
            self.assertEqual(self.facts(SimpleNamespace(model_config=model_config)).model, expected)

    def test_one_of_several_api_servers(self) -> None:
        facts = self.facts(config(_api_process_count=4, _api_process_rank=2))
        self.assertEqual((facts.servers, facts.api_rank), (4, 2))
        facts = self.facts(config(_api_process_count=-1, _api_process_rank=-1))
        self.assertEqual((facts.servers, facts.api_rank), (1, 0))

    def test_one_that_is_not_the_first_sends_nothing_but_passes_on_what_it_knows(self) -> None:
        facts = ServerFacts("tiny", "vllm 0.33.0", "http", 8000, "127.0.0.1", 1, 2, (0,))
        with mock.patch.object(engine_agent, "Meeting"):
            agent = PluginAgent(settings(), facts, config(), Engine(), lambda _: None)
            self.addCleanup(agent._sender.stop)
            agent.step(urgent=True)
            assert isinstance(agent._meeting, mock.Mock)
            (summary,) = agent._meeting.send.call_args.args
        self.assertEqual((summary.api_rank, summary.urgent), (1, True))
        self.assertEqual(agent._sender.sent, 0)


if __name__ == "__main__":
    unittest.main()
