"How the suite runs fast: more processes than cores, and kernels and services that are forked from one process each."

import atexit
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path

import nbval.plugin
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.connect import write_connection_file
from nbval.kernel import RunningKernel
from xdist.workermanage import WorkerController

ROOT = Path(__file__).parent
FEW = 8  # notebooks for which it does not pay to import all libraries first


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fresh-kernels", action="store_true", help="never fork the kernels of notebooks")


def pytest_xdist_auto_num_workers() -> int:
    "Twice as many processes as cores: a third of the time, tests wait for a timeout, a lock or a page."
    return min(len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1, 6) * 2


def pytest_configure_node(node: WorkerController) -> None:
    "All processes of the tests fork their kernels from one, and their services from another."
    if sys.platform == "linux":
        node.workerinput["fork_servers"] = {kind: fork_server(kind) for kind in ("kernel", "service")}


def pytest_configure(config: pytest.Config) -> None:
    if servers := getattr(config, "workerinput", {}).get("fork_servers"):
        os.environ["TESTS_FORK_SERVER"] = servers["service"]  # for tests/serving.py; alone, a test forks nothing


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    "Where there are many notebooks, their kernels are forked."
    notebooks = {item.path for item in items if item.path.suffix == ".ipynb"}
    if len(notebooks) > FEW and sys.platform == "linux" and not config.getoption("--fresh-kernels"):
        servers = getattr(config, "workerinput", {}).get("fork_servers")
        ForkedKernel.server = servers["kernel"] if servers else fork_server("kernel")
        nbval.plugin.RunningKernel = ForkedKernel
        ask(ForkedKernel.server)  # it imports the libraries while tests run


@cache
def fork_server(kind: str) -> str:
    "The socket of the process that kernels or services are forked from; it ends with this one."
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    if kind == "kernel":  # what one of Jupyter's has in its environment before matplotlib reads it
        env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    command = [sys.executable, str(ROOT / "tests/fork_server.py"), kind, f"{folder.name}/socket"]
    server = subprocess.Popen(command, env=env, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdout and server.stdout.readline(), "it listens"
    atexit.register(server.communicate)
    return command[-1]


def ask(server: str, **kernel: str) -> str:
    "Ask a fork server for a kernel, or, without one, to get ready; its answer."
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server)
        connection.sendall(json.dumps(kernel).encode() + b"\n")
        return connection.makefile().readline() if kernel else ""


class ForkedKernel(RunningKernel):
    "nbval's kernel, but forked from a process that has the large libraries imported."

    server: str

    def __init__(self, kernel_name: str, cwd: str, startup_timeout: int = 60):
        self.folder = tempfile.TemporaryDirectory()
        connection = f"{self.folder.name}/connection.json"
        write_connection_file(connection, transport="ipc", ip=f"{self.folder.name}/socket")
        self.pid = int(ask(self.server, connection=connection, folder=cwd))
        self.kc = BlockingKernelClient(connection_file=connection)
        self.kc.load_connection_file()
        self.kc.start_channels(hb=False)  # a busy machine is late with heartbeats
        self.kc.wait_for_ready(timeout=startup_timeout)
        self._ensure_iopub_up()

    def is_alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def interrupt(self) -> None:
        os.kill(self.pid, signal.SIGINT)

    def stop(self) -> None:
        self.kc.stop_channels()
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.folder.cleanup()
