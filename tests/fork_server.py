"""Forks a process for each line that its socket gets, and answers with its process id: IPython's kernels and our service.

The large libraries are imported once for all of them: a notebook's kernel starts in a tenth of a second, and imports
them in no time; a service with its demo starts in one second rather than four. Whatever a process changes stays in it,
as always. Our own modules are imported by the processes themselves. Ends with its standard input.
"""

import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import tempfile
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

SERVICE = ["numpy", "PIL.Image", "fastapi", "uvicorn", "gradio", "pydantic_settings", "sqlalchemy"]
KERNEL = [
    *SERVICE,
    "pandas",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "pyarrow.parquet",
    "tensorflow",
    "keras",
    "onnx",
    "optuna",
    "alembic.migration",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "fastapi.testclient",
    "typer.testing",
    "nbformat",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
]
# None of these may start a thread when it is imported, for a fork has only one. ONNX Runtime starts some.
LIBRARIES = {"service": SERVICE, "kernel": KERNEL}


def main(kind: str, address: str) -> None:
    "Listen, import the libraries once somebody asks, then serve."
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3"}  # or TensorFlow greets
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    print("listening", flush=True)
    server = os.getpid()
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        prepare(kind)
        with suppress(OSError, ValueError), connection:  # whoever asked is gone
            message, outputs, *_ = socket.recv_fds(connection, 1_000_000, 2)
            while not message.endswith(b"\n") and (more := connection.recv(1_000_000)):
                message += more
            if process := json.loads(message):
                if not (pid := os.fork()):
                    break
                connection.sendall(b"%d\n" % pid)
            for output in outputs:
                os.close(output)
    else:
        return
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # end with the server
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream, output in enumerate([nothing, *(outputs or [nothing, nothing])]):
        os.dup2(output, stream)
    os.chdir(process["folder"])
    sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]
    sys.modules["numpy.random"].seed()
    if kind == "kernel":
        os.setsid()
        be_kernel(server, process["connection"])
    else:
        be_program(process["code"], process["env"])


@cache
def prepare(kind: str) -> None:
    "Import the libraries."
    for name in LIBRARIES[kind]:
        with suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # or each process's collector would touch all objects, and so copy their memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for processes that ended


def be_kernel(server: int, connection: str) -> None:
    "Be an IPython kernel in a session of its own, until it is killed or the server ends."
    from ipykernel.kernelapp import IPKernelApp

    app = IPKernelApp.instance(parent_handle=server)
    app.initialize(["-f", connection])
    app.start()


def be_program(code: str, env: dict[str, str]) -> None:
    "Be `python -c code`."
    os.environ.clear()
    os.environ |= env
    tempfile.tempdir = None  # it follows the environment
    sys.argv[:] = ["-c"]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main(*sys.argv[1:])
