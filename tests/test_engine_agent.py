"""The agent's parts: what a datagram looks like, what is taken as a setting, and that only what is proven is said."""

from __future__ import annotations

import errno
import json
import math
import os
import socket
import tempfile
import unittest
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import engine_agent
from engine_agent import (
    GONE,
    HIDDEN,
    SERVING,
    SETTINGS,
    SLEEPING,
    STARTING,
    STUCK,
    UNKNOWN_LOAD,
    Agent,
    Complaints,
    Counted,
    DatagramWriter,
    Gateway,
    Key,
    Load,
    Look,
    Meter,
    PhaseJudge,
    Printer,
    Proof,
    Prover,
    Reading,
    Sender,
    Settings,
    SettingsError,
    read_settings,
)
from engine_state import match_labelled
from tests.harness import FakeClock, match_canonical, parse_datagram

BUSY = Load(12.5, "balanced", 700, 3000, 4095, 5000.0, 8, 16)


def settings(**values: str) -> Settings:
    """Settings from the environment's names, without the prefix."""
    return read_settings({"ELRAR_" + name: value for name, value in values.items()})


class Kept(Printer):
    """In a sender's place: keeps the datagrams as objects."""

    def __init__(self) -> None:
        self.datagrams: list[dict[str, Any]] = []

    def send(self, datagram: bytes) -> None:
        self.datagrams.append(json.loads(datagram))

    def own_address(self) -> str | None:
        return "10.0.0.1"

    def take(self) -> list[dict[str, Any]]:
        taken, self.datagrams = self.datagrams, []
        return taken


class Datagrams(unittest.TestCase):
    """What the agent writes is what json.dumps would write, in one fixed order, and the gateway takes it."""

    ORDER = (
        *("engine_id", "timestamp_ms", "latency_pred_ms", "scheduling_mode", "pending_tokens_total"),
        *("kv_cache_free_blocks", "kv_cache_total_blocks", "engine_capacity"),
        *("boot", "seq", "phase", "model", "num_requests_running", "num_requests_waiting"),
    )

    def test_a_datagram_is_what_json_dumps_writes(self) -> None:
        for load in (BUSY, UNKNOWN_LOAD, Load(1e-7, "balanced", 2**60, -5, 0, 1e300, 0, None)):
            for model in ("m", None, 'a "quoted" \\ 模型\n'):
                datagram = DatagramWriter("http://10.0.0.1:8000", model=model).write(SERVING, 1795665225283, load)
                self.assertEqual(json.dumps(json.loads(datagram)).encode(), datagram)
                parse_datagram(datagram)

    def test_the_order_is_fixed(self) -> None:
        writer = DatagramWriter("a", model="m", engine="vllm 1", dp_rank=1, labels={"zone": "x", "role": "decode"})
        names = list(json.loads(writer.write(SERVING, 1, BUSY)))
        self.assertEqual(names, [*self.ORDER, "dp_rank", "role", "engine", "agent", "zone"])
        names = list(json.loads(DatagramWriter("a").write(STARTING, 1, UNKNOWN_LOAD)))
        self.assertEqual(names, [*self.ORDER, "engine", "agent"])

    def test_a_label_called_model_replaces_the_model(self) -> None:
        datagram = json.loads(DatagramWriter("a", model="m", labels={"model": "other"}).write(SERVING, 1, BUSY))
        self.assertEqual(datagram["model"], "other")

    def test_latency_and_capacity_are_always_floats_without_an_exponent(self) -> None:
        for number in (0, 1, 1e-9, 0.0004, 12.34567, 1e22, math.inf, math.nan, -1.0):
            datagram = DatagramWriter("a").write(SERVING, 1, BUSY._replace(latency_pred_ms=number))
            self.assertRegex(datagram, rb'"latency_pred_ms": (0|[1-9][0-9]{0,11})\.[0-9]{1,3}, ')

    def test_the_eight_fields_are_the_gateways_usual_form(self) -> None:
        datagram = DatagramWriter("http://10.0.0.1:8000").write(SERVING, 1795665225283, BUSY)
        eight = datagram[: datagram.index(b', "boot"')] + b"}"
        self.assertIsNotNone(match_canonical(eight))

    def test_labels_are_what_the_gateway_reads_fast(self) -> None:
        for key in (None, Key("k-1", b"k" * 16)):
            writer = DatagramWriter("a", model="m", labels={"role": "both", "zone": "eu-1a", "team": "a b"}, key=key)
            self.assertIsNotNone(match_labelled(writer.write(SERVING, 1, BUSY)))

    def test_seq_counts_every_datagram_and_a_new_life_begins_anew(self) -> None:
        writer = DatagramWriter("a")
        first = [json.loads(writer.write(SERVING, 1, BUSY)) for _ in range(3)]
        writer.new_life()
        second = json.loads(writer.write(SERVING, 1, BUSY))
        self.assertEqual([one["seq"] for one in first], [1, 2, 3])
        self.assertEqual(second["seq"], 1)
        self.assertNotEqual(second["boot"], first[0]["boot"])
        self.assertRegex(second["boot"], r"\A[0-9a-f]{16}\Z")

    def test_a_signature_is_the_last_member_over_every_byte_before_it(self) -> None:
        # By `openssl dgst -sha256 -mac HMAC -macopt hexkey:...` over the bytes before `, "sig"`.
        key = Key("k-1", bytes.fromhex("00112233445566778899aabbccddeeff"))
        self.assertEqual(
            key.sign(b'{"engine_id": "a"}'), b'{"engine_id": "a", "sig": "k-1:3284cb582f2e262b5849ea01c34fa272"}'
        )
        datagram = DatagramWriter("a", key=key).write(SERVING, 1, BUSY)
        self.assertRegex(datagram, rb', "sig": "k-1:[0-9a-f]{32}"}\Z')
        self.assertIn("boot", json.loads(datagram))


class SettingsAreChecked(unittest.TestCase):
    """Whoever gets a setting wrong learns of every error at once, and what is accepted."""

    def refused(self, environ: Mapping[str, str], flags: Mapping[str, str] | None = None) -> list[str]:
        with self.assertRaises(SettingsError) as caught:
            read_settings(environ, flags)
        return caught.exception.errors

    def test_the_defaults(self) -> None:
        found = read_settings({})
        self.assertEqual(found.gateways, (Gateway("localhost", None),))
        self.assertEqual((found.gateway_port, found.network_mode, found.data_parallel), (9999, "unicast", "merged"))
        self.assertEqual((found.engine_url, found.push_interval_s), ("http://127.0.0.1:8000", 0.2))
        self.assertIsNone(found.engine_id or found.engine_capacity or found.key or found.engine_api_key)

    def test_flags_win_and_elrar_comes_before_vllm_elrar(self) -> None:
        environ = {"VLLM_ELRAR_ENGINE_ID": "c", "ELRAR_ENGINE_ID": "b"}
        self.assertEqual(read_settings(environ, {"ENGINE_ID": "a"}).engine_id, "a")
        self.assertEqual(read_settings(environ).engine_id, "b")
        self.assertEqual(read_settings({"VLLM_ELRAR_ENGINE_ID": "c"}).engine_id, "c")

    def test_what_is_empty_counts_as_not_set(self) -> None:
        self.assertEqual(read_settings({"ELRAR_ENGINE_ID": "", "VLLM_ELRAR_ENGINE_ID": "c"}).engine_id, "c")

    def test_what_kubernetes_injects_is_passed_over(self) -> None:
        injected = {
            "ELRAR_GATEWAY_PORT": "tcp://10.96.1.2:9999",
            "ELRAR_GATEWAY_SERVICE_HOST": "10.96.1.2",
            "ELRAR_GATEWAY_SERVICE_PORT": "9999",
            "ELRAR_GATEWAY_PORT_9999_UDP": "udp://10.96.1.2:9999",
            "ELRAR_GATEWAY_PORT_9999_UDP_PROTO": "udp",
            "ELRAR_WHATEVER": "?",
        }
        self.assertEqual(read_settings(injected), read_settings({}))
        self.assertEqual(read_settings({**injected, "VLLM_ELRAR_GATEWAY_PORT": "7"}).gateway_port, 7)

    def test_gateways(self) -> None:
        for text, expected in {
            "gw": [("gw", None)],
            "gw.vllm:9, 10.0.0.1 ,[fd00::1]:7,fd00::2": [("gw.vllm", 9), ("10.0.0.1", None), ("fd00::1", 7),
                                                        ("fd00::2", None)],
        }.items():  # fmt: skip
            self.assertEqual(list(settings(GATEWAY_HOST=text).gateways), expected)

    def test_every_error_at_once(self) -> None:
        wrong = {
            "GATEWAY_HOST": "http://gw", "GATEWAY_PORT": "70000", "NETWORK_MODE": "multicast",
            "BROADCAST_ADDRESS": "::1", "ENGINE_ID": " a", "ENGINE_URL": "ftp://x", "PUSH_INTERVAL": "19",
            "ENGINE_CAPACITY": "nan", "DATA_PARALLEL": "both", "KEY_FILE": "/none/such", "LABELS": "engine=x",
            "ENGINE_API_KEY": "a b", "ENGINE_CA_FILE": "/none/such",
        }  # fmt: skip
        self.assertEqual(set(wrong), {setting.name for setting in SETTINGS})
        errors = self.refused({"ELRAR_" + name: value for name, value in wrong.items()})
        self.assertEqual(len(errors), len(wrong))
        for name, line in zip(wrong, errors, strict=True):
            self.assertTrue(line.startswith(f"ELRAR_{name}="), line)
            self.assertIn("accepted is ", line)
        self.assertNotIn("a b", "".join(errors))  # a secret is not shown

    def test_more_that_is_refused(self) -> None:
        for name, text in (
            ("GATEWAY_HOST", "a,,b"), ("GATEWAY_HOST", "a:0"), ("GATEWAY_HOST", "300.1.1.1"), ("GATEWAY_HOST", "a b"),
            ("ENGINE_URL", "http://user:secret@host"), ("ENGINE_URL", "http://h:99999"), ("ENGINE_URL", "http://"),
            ("ENGINE_URL", "http://h/?q"), ("PUSH_INTERVAL", "2001"), ("PUSH_INTERVAL", "1e2"), ("LABELS", "a"),
            ("LABELS", "role=cook"), ("LABELS", "A=b"), ("LABELS", "a=b,a=c"), ("LABELS", "a=" + 300 * "x"),
            ("LABELS", ",".join(f"a{n}=b" for n in range(9))), ("ENGINE_ID", 251 * "x"),
        ):  # fmt: skip
            with self.subTest(name=name, text=text):
                self.assertEqual(len(self.refused({"ELRAR_" + name: text})), 1)

    def test_keys(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "key"
            for text, why in (
                ("", "no key"),
                ("# x\nname", "line 2"),
                ("name 0123", "line 1"),
                ("a! " + 32 * "0", "1"),
            ):
                path.write_text(text)
                self.assertIn(why, self.refused({"ELRAR_KEY_FILE": str(path)})[0])
            path.write_text("# the gateway's own file will do\n\nname " + 16 * "aB" + " http://10.*\nother x\n")
            self.assertEqual(settings(KEY_FILE=str(path)).key, Key("name", bytes.fromhex(16 * "ab")))

    def test_each_setting_has_a_flag_and_the_help_names_it(self) -> None:
        text = engine_agent.settings_help()
        for setting in SETTINGS:
            self.assertIn(f"  {setting.option}, ELRAR_{setting.name}  ", text)


class Proving(unittest.TestCase):
    """A rank is proven to move, or to be idle, and nothing else counts."""

    def setUp(self) -> None:
        self.prover = Prover(1.0)
        self.now = 0.0

    def look(self, *readings: Reading, after: float = 0.2, **look: Any) -> list[float | None]:
        self.now += after
        proofs = self.prover.prove(Look(readings, Proof(self.now, 0), **look))
        return [None if one is None else round(one.at, 3) for one in proofs.values()]

    def test_a_busy_engine_is_proven_only_where_its_marker_changed(self) -> None:
        self.assertEqual(self.look(Reading(8, 16, marker=1)), [None])
        self.assertEqual(self.look(Reading(8, 16, marker=2)), [0.4])
        self.assertEqual(self.look(Reading(8, 16, marker=2)), [0.4])
        self.assertEqual(self.look(Reading(8, 16, marker=3)), [0.8])

    def test_an_idle_engine_is_proven_by_each_look(self) -> None:
        self.assertEqual(self.look(Reading(0, 0)), [0.2])
        self.assertEqual(self.look(Reading(0, 0), in_flight=0), [0.4])

    def test_a_request_in_the_front_end_means_that_it_is_not_idle(self) -> None:
        self.look(Reading(0, 0), in_flight=0)
        self.assertEqual(self.look(Reading(0, 0), in_flight=1), [0.2])
        self.assertEqual(self.look(Reading(0, 0), in_flight=HIDDEN), [0.2])

    def test_a_sleeping_engine_is_not_idle_by_that(self) -> None:
        self.look(Reading(0, 0))
        self.assertEqual(self.look(Reading(0, 0), asleep=True, in_flight=3), [0.2])
        self.assertEqual(self.look(Reading(0, 0), in_flight=0, after=9.0), [9.4])

    def test_clients_that_give_up_do_not_make_a_hung_engine_idle(self) -> None:
        self.look(Reading(0, 0, marker=1), in_flight=0)
        for _ in range(8):
            self.look(Reading(0, 0, marker=1), in_flight=5)
        self.assertEqual(self.look(Reading(0, 0, marker=1), in_flight=0), [0.2])
        self.assertEqual(self.look(Reading(0, 0, marker=2), in_flight=0), [2.2])
        self.assertEqual(self.look(Reading(0, 0, marker=2), in_flight=0), [2.4])

    def test_after_a_minute_it_is_given_another_chance(self) -> None:
        self.look(Reading(0, 0), in_flight=0)
        self.look(Reading(0, 0), in_flight=5, after=2.0)
        self.assertEqual(self.look(Reading(0, 0), in_flight=0, after=59.0), [0.2])
        self.assertEqual(self.look(Reading(0, 0), in_flight=0, after=2.0), [63.2])

    def test_one_that_fails_its_chance_waits_twice_as_long_for_the_next_and_a_step_makes_all_good(self) -> None:
        self.prover = Prover(1.0, 10.0)

        def pause(marker: int) -> float:
            """Clients wait for it for two seconds and give up; returns after how many seconds it is called idle."""
            for _ in range(10):
                (before,) = self.look(Reading(0, 0, marker=marker), in_flight=3)
            gave_up = self.now
            while self.look(Reading(0, 0, marker=marker), in_flight=0) == [before]:
                self.assertLess(self.now - gave_up, 100)
            return round(self.now - gave_up)

        self.look(Reading(0, 0, marker=1), in_flight=0)
        self.assertEqual([pause(1) for _ in range(5)], [10, 20, 40, 60, 60])
        self.look(Reading(0, 0, marker=2), in_flight=0)
        self.assertEqual(pause(2), 10)

    def test_requests_that_another_rank_works_on_do_not_count(self) -> None:
        def two(marker: int, running: int) -> tuple[Reading, Reading]:
            return Reading(running, 0, marker=marker, rank=0), Reading(0, 0, rank=1)

        self.look(*two(1, 0), in_flight=0)
        self.assertEqual(self.look(*two(2, 4), in_flight=4), [0.4, 0.4])
        self.assertEqual(self.look(*two(3, 4), in_flight=5), [0.6, 0.4])
        self.assertEqual(self.look(*two(4, 4), in_flight=5, in_flight_by_rank={0: 5}), [0.8, 0.8])
        self.assertEqual(self.look(*two(5, 4), in_flight=5, in_flight_by_rank={0: 4, 1: 1}), [1.0, 0.8])

    def test_an_engine_that_says_when_it_moved_is_believed(self) -> None:
        self.assertEqual(self.look(Reading(1, 0, marker=1, proof=Proof(0.15, 7))), [0.15])
        self.assertEqual(self.look(Reading(1, 0, marker=2, proof=Proof(0.33, 7))), [0.33])

    def test_where_even_idle_engines_move_idleness_is_no_proof(self) -> None:
        self.assertEqual(self.look(Reading(0, 0, marker=1, idle_is_proof=False)), [None])
        self.assertEqual(self.look(Reading(0, 0, marker=2, idle_is_proof=False)), [0.4])
        self.assertEqual(self.look(Reading(0, 0, marker=2, idle_is_proof=False)), [0.4])


class Judging(unittest.TestCase):
    """A state goes out as serving only with a new proof; everything else has its own word, once a second."""

    def setUp(self) -> None:
        self.judge = PhaseJudge(1.0)

    def said(self, statement: engine_agent.Statement | None) -> tuple[str, int | None] | None:
        return None if statement is None else (statement.phase, statement.proven_ms)

    def test_before_the_first_proof_it_is_starting_with_a_heartbeats_placeholders(self) -> None:
        first = self.judge.unproven(0.0)
        assert first is not None
        self.assertEqual(first, (STARTING, UNKNOWN_LOAD, None))
        self.assertIsNone(self.judge.unproven(0.5))
        self.assertEqual(self.said(self.judge.unproven(1.0)), (STARTING, None))

    def test_who_answers_and_was_never_proven_is_stuck_after_a_second_and_not_starting(self) -> None:
        self.assertIsNone(self.judge.proven(0.0, None, BUSY))
        self.assertIsNone(self.judge.unproven(0.5))
        self.assertEqual(self.judge.proven(1.0, None, BUSY), (STUCK, UNKNOWN_LOAD, None))

    def test_each_proof_is_said_once(self) -> None:
        self.assertEqual(self.said(self.judge.proven(0.0, Proof(0.0, 5), BUSY)), (SERVING, 5))
        self.assertIsNone(self.judge.proven(0.2, Proof(0.0, 5), BUSY))
        self.assertEqual(self.said(self.judge.proven(0.4, Proof(0.3, 8), BUSY)), (SERVING, 8))

    def test_without_a_proof_for_a_second_it_is_stuck_with_the_last_load_and_the_time_of_the_last_proof(self) -> None:
        self.judge.proven(0.0, Proof(0.0, 5), BUSY)
        self.assertIsNone(self.judge.proven(0.9, Proof(0.0, 5), UNKNOWN_LOAD))
        self.assertEqual(self.judge.proven(1.0, Proof(0.0, 5), UNKNOWN_LOAD), (STUCK, BUSY, 5))
        self.assertIsNone(self.judge.unproven(1.8))
        self.assertEqual(self.said(self.judge.unproven(2.0)), (STUCK, 5))
        self.assertEqual(self.said(self.judge.proven(2.2, Proof(2.1, 9), BUSY)), (SERVING, 9))

    def test_asleep_is_said_at_once_and_then_each_second(self) -> None:
        self.judge.proven(0.0, Proof(0.0, 5), BUSY)
        self.assertEqual(self.said(self.judge.asleep(0.2)), (SLEEPING, 5))
        self.assertIsNone(self.judge.asleep(0.4))
        self.assertEqual(self.said(self.judge.asleep(1.2)), (SLEEPING, 5))

    def test_who_wakes_up_gets_a_second_to_move(self) -> None:
        self.judge.proven(0.0, Proof(0.0, 5), BUSY)
        self.judge.asleep(50.0)
        self.assertIsNone(self.judge.unproven(50.8))
        self.assertEqual(self.said(self.judge.unproven(51.0)), (STUCK, 5))

    def test_a_farewell_is_for_those_who_were_there_and_said_once(self) -> None:
        self.assertIsNone(self.judge.gone())
        self.judge.proven(0.0, Proof(0.0, 5), BUSY)
        self.assertEqual(self.said(self.judge.gone()), (GONE, 5))
        self.assertIsNone(self.judge.gone())


class Agents(unittest.TestCase):
    """From looks to datagrams: one engine_id for all ranks, or one for each."""

    def agent(self, **values: str) -> Agent:
        self.clock = FakeClock()
        self.sent = Kept()
        agent = Agent(settings(**values), self.sent, clock=self.clock, wall_clock=lambda: self.clock.now)
        agent.identify("http://10.0.0.1:8000", "tiny", "vllm 0.33.0")
        return agent

    def look(self, *readings: Reading, **look: Any) -> Look:
        self.clock.move(0.2)
        return Look(readings, Proof(self.clock.now, int(self.clock.now * 1000)), **look)

    def test_an_idle_engine_is_shown_with_real_numbers_and_no_heartbeat(self) -> None:
        agent = self.agent()
        agent.saw(self.look(Reading(0, 0, free=4095, total=4095)))
        (state,) = self.sent.take()
        self.assertEqual(
            (state["phase"], state["kv_cache_free_blocks"], state["timestamp_ms"]), (SERVING, 4095, 1000200)
        )
        self.assertEqual((state["num_requests_running"], state["num_requests_waiting"]), (0, 0))

    def test_one_hung_rank_is_not_hidden_by_the_others(self) -> None:
        agent = self.agent()
        for turn in range(20):
            agent.saw(self.look(Reading(4, 0, marker=turn, rank=0), Reading(4, 0, marker=min(turn, 3), rank=1)))
        phases = [state["phase"] for state in self.sent.take()]
        self.assertEqual(phases[:4], [SERVING, SERVING, SERVING, STUCK])
        self.assertEqual(set(phases[3:]), {STUCK})

    def test_ranks_are_told_apart_where_asked(self) -> None:
        agent = self.agent(DATA_PARALLEL="ranks")
        for turn in range(20):
            agent.saw(self.look(Reading(4, 0, marker=turn, rank=0), Reading(4, 0, marker=min(turn, 3), rank=1)))
        phases: dict[str, str] = {}
        for state in self.sent.take():
            phases[state["engine_id"]] = state["phase"]
            self.assertEqual(state["engine_id"], f"http://10.0.0.1:8000#dp{state['dp_rank']}")
        self.assertEqual(phases, {"http://10.0.0.1:8000#dp0": SERVING, "http://10.0.0.1:8000#dp1": STUCK})

    def test_merged_numbers_are_sums_and_the_greatest_latency(self) -> None:
        one = Load(5.0, "latency_optimized", 10, 100, 200, 1000.0, 1, 2)
        two = Load(9.0, "throughput_optimized", 20, 150, 200, 0.0, 3, 4)
        self.assertEqual(
            engine_agent.merge_loads([one, two]), Load(9.0, "throughput_optimized", 30, 250, 400, 1000.0, 4, 6)
        )
        unknown = engine_agent.merge_loads([one, two._replace(kv_cache_free_blocks=-1)])
        self.assertEqual((unknown.kv_cache_free_blocks, unknown.kv_cache_total_blocks), (-1, -1))

    def test_a_farewell_is_said_three_times_within_100_ms_and_then_nothing_until_it_answers_with_a_new_boot(
        self,
    ) -> None:
        agent = self.agent()
        agent.saw(self.look(Reading(0, 0)))
        (before,) = self.sent.take()
        pauses: list[float] = []
        agent.refused(pauses.append)
        farewells = self.sent.take()
        self.assertEqual([(one["phase"], one["seq"]) for one in farewells], [(GONE, 2), (GONE, 3), (GONE, 4)])
        self.assertLess(sum(pauses), 0.1)
        agent.refused(pauses.append)
        agent.saw_nothing()
        agent.ended(pauses.append)
        self.assertEqual(self.sent.take(), [])
        agent.saw(self.look(Reading(0, 0)))
        (after,) = self.sent.take()
        self.assertEqual((after["phase"], after["seq"]), (SERVING, 1))
        self.assertNotEqual(after["boot"], before["boot"])

    def test_a_refused_connection_before_the_first_answer_is_starting(self) -> None:
        agent = self.agent()
        agent.refused()
        self.clock.move(1.0)
        agent.refused()
        states = self.sent.take()
        self.assertEqual([one["phase"] for one in states], [STARTING, STARTING])
        self.assertEqual({one["kv_cache_total_blocks"] for one in states}, {-1})
        self.assertEqual({one["num_requests_running"] for one in states}, {None})

    def test_nothing_is_said_before_it_is_known_of_whom(self) -> None:
        agent = Agent(settings(), sent := Kept())
        agent.saw(Look([Reading(0, 0)], Proof(1.0, 1)))
        agent.saw_nothing()
        agent.ended()
        self.assertEqual(sent.take(), [])

    def test_a_configured_capacity_is_the_engines_not_each_ranks(self) -> None:
        agent = self.agent(ENGINE_CAPACITY="5000")
        agent.saw(self.look(Reading(0, 0, rank=0), Reading(0, 0, rank=1)))
        self.assertEqual(self.sent.take()[0]["engine_capacity"], 5000.0)


class Measuring(unittest.TestCase):
    """Rates are those of now, and what cannot be said anew holds."""

    def test_latency_is_the_mean_step_since_the_last_look_and_held_when_idle(self) -> None:
        meter = Meter(None)
        self.assertEqual(meter.measure(Reading(1, 0, step_times=Counted(10.0, 1000)), 0.0).latency_pred_ms, 0.0)
        self.assertAlmostEqual(meter.measure(Reading(1, 0, step_times=Counted(10.2, 1010)), 0.2).latency_pred_ms, 20.0)
        self.assertAlmostEqual(meter.measure(Reading(0, 0, step_times=Counted(10.2, 1010)), 0.4).latency_pred_ms, 20.0)
        self.assertAlmostEqual(meter.measure(Reading(0, 0, step_times=Counted(0.1, 10)), 0.6).latency_pred_ms, 20.0)

    def test_the_mode_is_that_of_the_last_ten_steps(self) -> None:
        meter = Meter(None)
        steps, tokens, modes = 0, 0, []
        for each in (100, 100, 600, 600, 2000, 2000, 100, 100):
            for _ in range(5):
                steps, tokens = steps + 1, tokens + each
                mode = meter.measure(Reading(1, 0, step_tokens=Counted(tokens, steps)), steps / 5).scheduling_mode
            modes.append(mode.split("_")[0])
        self.assertEqual(modes, [*2 * ["latency"], *2 * ["balanced"], *3 * ["throughput"], "latency"])

    def test_pending_tokens_by_the_mean_prompt_of_the_last_minute_where_the_engine_does_not_say(self) -> None:
        meter = Meter(None)
        self.assertEqual(meter.measure(Reading(0, 2, prompts=Counted(1_000_000, 1000)), 0.0).pending_tokens_total, 2000)
        self.assertEqual(meter.measure(Reading(0, 2, prompts=Counted(1_000_500, 1010)), 2.0).pending_tokens_total, 100)
        self.assertEqual(meter.measure(Reading(0, 2, prompts=Counted(1_000_500, 1010)), 9.0).pending_tokens_total, 100)
        self.assertEqual(meter.measure(Reading(0, 2, pending=7), 9.2).pending_tokens_total, 7)

    def test_capacity_is_the_highest_rate_of_a_second_with_requests_waiting(self) -> None:
        meter = Meter(None)
        found = []
        for at, tokens, waiting in ((0, 0, 0), (1, 9000, 1), (2, 9500, 1), (3, 11500, 1), (4, 12000, 1), (5, 99999, 0)):
            found.append(meter.measure(Reading(1, waiting, tokens=float(tokens)), float(at)).engine_capacity)
        self.assertEqual(found, [0.0, 0.0, 500.0, 2000.0, 2000.0, 2000.0])
        self.assertEqual(Meter(123.0).measure(Reading(0, 0), 0.0).engine_capacity, 123.0)


class Sending(unittest.TestCase):
    """Datagrams go to every address and wait for nothing; what could not be sent is counted and said."""

    def setUp(self) -> None:
        self.lines: list[str] = []
        self.complaints = Complaints(self.lines.append)

    def sender(self, *, resolve: Any = socket.getaddrinfo, **values: str) -> Sender:
        sender = Sender(settings(**values), self.complaints, resolve=resolve)
        self.addCleanup(sender.stop)
        return sender

    def receiver(self) -> socket.socket:
        found = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(found.close)
        found.bind(("127.0.0.1", 0))
        found.settimeout(10.0)
        return found

    def test_localhost_is_the_ipv4_loopback(self) -> None:
        self.assertEqual(self.sender().addresses(), [(socket.AF_INET, ("127.0.0.1", 9999))])

    def test_every_address_of_every_name_gets_each_datagram_once(self) -> None:
        one, two = self.receiver(), self.receiver()
        ports = [receiver.getsockname()[1] for receiver in (one, two)]

        def resolve(host: str, port: int, **_: Any) -> list[Any]:
            return [
                (socket.AF_INET, 0, 0, "", ("127.0.0.1", ports[1])),
                (socket.AF_INET6, 0, 0, "", ("::1", port, 0, 0)),
            ]

        sender = self.sender(GATEWAY_HOST=f"127.0.0.1:{ports[0]},gw,localhost:{ports[0]}", resolve=resolve)
        for destination in sender._destinations:
            if not destination.fixed:
                sender.look_up(destination)
        sender.send(b"x")
        sender.send(b"y")
        self.assertEqual([one.recv(9), one.recv(9), two.recv(9), two.recv(9)], [b"x", b"y", b"x", b"y"])
        self.assertEqual(sender.sent, 4)

    def test_a_name_that_is_not_found_keeps_its_last_addresses_and_is_said_once(self) -> None:
        answers: list[Any] = [
            OSError(-2, "Name or service not known"),
            OSError(-2, "Name or service not known"),
            [(socket.AF_INET, 0, 0, "", ("10.0.0.9", 9999))],
            OSError(-3, "Temporary failure in name resolution"),
        ]
        sender = self.sender(GATEWAY_HOST="gw.vllm", resolve=mock.Mock(side_effect=answers))
        self.assertEqual(sender.own_address(), None)
        for _ in answers:
            sender.look_up(sender._destinations[0])
        self.assertEqual(sender.addresses(), [(socket.AF_INET, ("10.0.0.9", 9999))])
        self.assertEqual(len(self.lines), 3, self.lines)
        self.assertIn("'gw.vllm' cannot be looked up (Name or service not known)", self.lines[0])

    def test_what_cannot_be_sent_is_counted_and_never_waited_for(self) -> None:
        sender = self.sender()
        for error, counter in (
            (BlockingIOError(errno.EAGAIN, "again"), "would_block"),
            (OSError(errno.ENOBUFS, "No buffer space available"), "would_block"),
            (OSError(errno.ENETUNREACH, "Network is unreachable"), "unreachable"),
            (PermissionError(errno.EPERM, "Operation not permitted"), "unreachable"),
        ):
            before = getattr(sender, counter)
            with mock.patch.object(sender, "_socket", side_effect=error):
                sender.send(b"x")
            self.assertEqual(getattr(sender, counter), before + 1)
        self.assertEqual(len(self.lines), 1)
        self.assertIn("cannot send to 127.0.0.1 port 9999: Network is unreachable", self.lines[0])
        sender.send(b"x")
        self.assertIn("works again", self.lines[1])

    def test_sockets_never_block(self) -> None:
        self.assertFalse(self.sender()._socket(socket.AF_INET).getblocking())

    def test_in_broadcast_mode_one_datagram_goes_to_the_broadcast_address(self) -> None:
        sender = self.sender(NETWORK_MODE="broadcast", GATEWAY_HOST="elsewhere", BROADCAST_ADDRESS="10.0.0.255")
        self.assertEqual([address[0] for _, address in sender.addresses()], ["10.0.0.255", "127.0.0.1"])
        self.assertTrue(sender._socket(socket.AF_INET).getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST))

    def test_its_own_address_is_the_one_towards_the_gateway(self) -> None:
        self.assertEqual(self.sender().own_address(), "127.0.0.1")

    def test_that_there_is_no_route_is_said_also_while_the_own_address_is_unknown_and_nothing_sent(self) -> None:
        sender = self.sender(GATEWAY_HOST="10.0.0.9,10.0.0.8")
        error = OSError(errno.ENETUNREACH, "Network is unreachable")
        with mock.patch.object(socket.socket, "connect", side_effect=error):
            for _ in range(9):
                self.assertIsNone(sender.own_address())
        self.assertEqual(
            self.lines,
            [f"cannot send to 10.0.0.{one} port 9999: Network is unreachable; trying on" for one in (9, 8)],
        )

    def test_a_trouble_is_said_once_a_minute_with_its_count(self) -> None:
        clock = FakeClock()
        complaints = Complaints(self.lines.append, clock)
        for _ in range(300):
            complaints.trouble("a", "it rains")
            clock.move(0.2)
        complaints.trouble("a", "it rains")
        complaints.over("a", "it stopped")
        complaints.over("a", "it stopped")
        self.assertEqual(self.lines, ["it rains", "it rains (301 times)", "it stopped"])


class Keys(unittest.TestCase):
    """A key that changes on disk is used without a restart; one that is broken is said, and the old one stays."""

    def test_a_new_key_is_taken(self) -> None:
        lines: list[str] = []
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "key"
            path.write_text("a " + 32 * "0")
            watch = engine_agent.KeyWatch(settings(KEY_FILE=str(path)), Complaints(lines.append))
            self.assertIsNone(watch.changed(0.0))
            path.write_text("broken")
            self.assertIsNone(watch.changed(1.0))
            self.assertIsNone(watch.changed(6.0))
            self.assertEqual(len(lines), 1)
            path.write_text("b " + 64 * "1")
            os.utime(path, (1, 1))
            self.assertEqual(watch.changed(12.0), Key("b", bytes.fromhex(64 * "1")))
            self.assertIsNone(watch.changed(18.0))


if __name__ == "__main__":
    unittest.main()
