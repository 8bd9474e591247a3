"""The operators' guide is in the Chinese pages: each of its sections, and each of its commands as it is written there.

The guide lies beside the project where this was built, and is read only there; what it says is listed here.
"""

from __future__ import annotations

import re
import unittest

from tests.documents import read
from tests.harness import TOP

GUIDE = TOP.parent / "shared" / "operators-guide.zh.md"

README = "README.zh-CN.md"
DEPLOY, DESIGN, ENGINES, HTTP, LOG, MONITORING, PERFORMANCE, TROUBLE = (
    f"docs/{name}.zh-CN.md"
    for name in ("deploy", "design", "engines", "http", "state-log", "monitoring", "performance", "troubleshooting")
)

# Each section of the guide: the page and the heading under which its content is, and words that must be there.
SECTIONS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "概述": (ENGINES, "网络模式", ("Kubernetes", "点播", "广播")),
    "功能特性": (ENGINES, "网络模式", ("unicast", "broadcast")),
    "网络模式支持": (ENGINES, "网络模式", ("broadcast（广播）", "兼容旧的部署")),
    "配置方式": (README, "配置", ("环境变量", "VLLM_STATE_GATEWAY_UDP_PORT")),
    "Kubernetes 友好": (ENGINES, "网络模式", ("跨 Pod", "跨节点", "网络策略")),
    "配置参数": (README, "配置", ("| 变量 | 默认值 | 含义 |",)),
    "环境变量配置": (README, "配置", ("启动时读取一次",)),
    "配置说明": (README, "配置", ("VLLM_STATE_GATEWAY_NETWORK_MODE", "VLLM_STATE_GATEWAY_LOG_FILE")),
    "使用方法": (README, "正式运行", ("docker", "kubectl", "systemd")),
    "使用启动脚本（推荐）": (ENGINES, "网络模式", ("./start_gateway_unicast.sh",)),
    "直接使用 Python": (README, "先试一下", ("python3 gateway.py",)),
    "Docker 运行": (DEPLOY, "Docker", ("--network host", "-v /tmp/elrar:/data")),
    "Kubernetes 部署": (DEPLOY, "Kubernetes", ("kubectl create namespace vllm",)),
    "网络架构": (ENGINES, "网络模式", ("──UDP──",)),
    "UDP 点播模式": (ENGINES, "网络模式", ("vLLM engine 3 ──UDP──",)),
    "UDP 广播模式（向后兼容）": (ENGINES, "网络模式", ("──UDP broadcast──",)),
    "工作原理": (DESIGN, "代码布局", ("套接字 -> 解析 -> 存储 -> 日志和查询",)),
    "初始化阶段": (DESIGN, "代码布局", ("`sockets.py`", "点播")),
    "监听阶段": (DESIGN, "线程和锁", ("`udp-listener`",)),
    "状态处理阶段": (ENGINES, "一个数据报的结局", ("`invalid_states`", "accepted")),
    "状态管理阶段": (HTTP, "新鲜、陈旧、消失", ("STALE_THRESHOLD", "EXPIRE_AFTER", "被移除")),
    "性能特点": (PERFORMANCE, "有多快", ("个/秒",)),
    "优势": (ENGINES, "网络模式", ("能穿过路由器",)),
    "注意事项": (HTTP, "新鲜、陈旧、消失", ("网络延迟", "STALE_THRESHOLD")),
    "故障排除": (TROUBLE, "故障排除", ()),
    "常见问题": (TROUBLE, "症状", ()),
    "端口被占用": (TROUBLE, "启动不了", ("Address already in use", "UDP_PORT")),
    "权限不足": (TROUBLE, "启动不了", ("Permission denied", "root")),
    "网络不通": (TROUBLE, "症状", ("什么都没到", "防火墙")),
    "状态不更新": (TROUBLE, "症状", ("不更新", "state_age_ms")),
    "调试技巧": (TROUBLE, "旧指南里的命令", ("tcpdump", "nc -u")),
    "迁移指南": (ENGINES, "从广播迁移到点播", ("unicast_received",)),
    "从广播模式迁移到点播模式": (
        ENGINES,
        "从广播迁移到点播",
        ("VLLM_STATE_GATEWAY_NETWORK_MODE", "pkill -f gateway.py"),
    ),
    "参考资源": (README, "文档", ("docs/engines.zh-CN.md", "docs/design.zh-CN.md")),
    "贡献": (README, "贡献", ("Issue", "Pull Request")),
}

SETTINGS = {  # what the guide exports at its default, and the README has in its table
    "VLLM_STATE_GATEWAY_UDP_PORT": "9999",
    "VLLM_STATE_GATEWAY_STALE_THRESHOLD": "2000",
    "VLLM_STATE_GATEWAY_NETWORK_MODE": "unicast",
    "VLLM_STATE_GATEWAY_BIND_ADDRESS": "0.0.0.0",
    "VLLM_STATE_GATEWAY_ENABLE_LOG": "true",
    "VLLM_STATE_GATEWAY_LOG_FILE": "engine_states.jsonl",
}
COMMANDS = {  # every other command of the guide, and the page that has it
    'export VLLM_STATE_GATEWAY_UDP_PORT="8888"': ENGINES,
    'export VLLM_STATE_GATEWAY_BIND_ADDRESS="127.0.0.1"': ENGINES,
    'export VLLM_STATE_GATEWAY_NETWORK_MODE="broadcast"': ENGINES,
    "./start_gateway_unicast.sh": ENGINES,
    "python3 gateway.py": README,
    "docker run -d --name elrar-state-gateway --network host -e VLLM_STATE_GATEWAY_NETWORK_MODE=unicast"
    " -e VLLM_STATE_GATEWAY_UDP_PORT=9999 -e VLLM_STATE_GATEWAY_BIND_ADDRESS=0.0.0.0"
    " -e VLLM_STATE_GATEWAY_STALE_THRESHOLD=2000 -e VLLM_STATE_GATEWAY_ENABLE_LOG=true"
    " -e VLLM_STATE_GATEWAY_LOG_FILE=/data/engine_states.jsonl -v /tmp/elrar:/data"
    " elrar/state-gateway:latest": DEPLOY,
    "kubectl create namespace vllm": DEPLOY,
    "kubectl apply -f config_examples": DEPLOY,
    "kubectl get pods -n vllm": DEPLOY,
    "kubectl get services -n vllm": DEPLOY,
    "netstat -un | grep :9999": TROUBLE,
    "sudo netstat -un | grep :9999": TROUBLE,
    "lsof -i :9999": TROUBLE,
    "sudo ./start_gateway_unicast.sh": TROUBLE,
    "ping <target_ip>": TROUBLE,
    "telnet <target_ip> 9999": TROUBLE,
    "sudo ufw status": TROUBLE,
    "sudo iptables -L": TROUBLE,
    "tail -f engine_states.jsonl": TROUBLE,
    "export VLLM_LOGGING_LEVEL=DEBUG": TROUBLE,
    "ss -un | grep :9999": TROUBLE,
    "sudo tcpdump -i any udp port 9999": TROUBLE,
    'echo \'{"engine_id":"test","timestamp_ms":1234567890,"latency_pred_ms":100.0,'
    '"scheduling_mode":"latency_optimized","pending_tokens_total":10,"kv_cache_free_blocks":100,'
    '"kv_cache_total_blocks":1000,"engine_capacity":1000.0}\' | nc -u localhost 9999': TROUBLE,
    "pkill -f gateway.py": ENGINES,
    'grep "network mode" engine_states.jsonl': ENGINES,
}


def on_one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text.replace("\\\n", " "))


def under(page: str, heading: str) -> str:
    """What a page has under a heading, with what is below that."""
    found = re.search(rf"(?ms)^(#+) {re.escape(heading)}\n(.*?)(?=^(?!\1#)#{{1,6}} |\Z)", read(page))
    return found[2] if found else ""


class ChinesePages(unittest.TestCase):
    """Who was used to the guide finds everything of it."""

    def test_each_section_is_there(self) -> None:
        for section, (page, heading, words) in SECTIONS.items():
            with self.subTest(section):
                self.assertTrue(under(page, heading), f"{page}: {heading}")
                for word in words:
                    self.assertTrue(word in under(page, heading), f"{page}, {heading}: {word}")

    def test_each_command_is_there(self) -> None:
        for command, page in COMMANDS.items():
            with self.subTest(command):
                self.assertTrue(command in on_one_line(read(page)), f"{page}: {command}")

    def test_each_setting_is_there_with_the_guide_s_default(self) -> None:
        for variable, default in SETTINGS.items():
            self.assertIn(f"\n| `{variable}` | `{default}` |", read(README))

    @unittest.skipUnless(GUIDE.exists(), "the operators' guide is not beside the project")
    def test_these_are_all_that_the_guide_has(self) -> None:
        text = GUIDE.read_text(encoding="utf-8")
        shell = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
        commands = [re.sub(r"\s+#.*$", "", line).strip() for block in shell for line in on_lines(block)]
        exported = [f'export {variable}="{default}"' for variable, default in SETTINGS.items()]
        self.assertEqual({command for command in commands if command}, {*COMMANDS, *exported})
        titles = re.findall(r"(?m)^##+ (.*)$", re.sub(r"(?s)```.*?```", "", text))
        self.assertEqual({re.sub(r"^\W*([0-9]+\. )?", "", title.replace("*", "")) for title in titles}, set(SECTIONS))


def on_lines(block: str) -> list[str]:
    """The commands of a block, each on one line, without comments."""
    lines = [re.sub(r"\s+", " ", line) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if not line.lstrip().startswith("#")]


if __name__ == "__main__":
    unittest.main()
