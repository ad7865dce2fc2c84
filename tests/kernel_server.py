"""Forks an IPython kernel for each line that its socket gets, and answers with its process id.

The large libraries are imported once for all of them: a notebook's kernel starts in a tenth of a second, and imports
them in no time. Whatever a notebook changes stays in its own kernel, as always. Ends with its standard input.
"""

import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
from contextlib import suppress
from functools import cache
from pathlib import Path

# None of these may start a thread when it is imported, for a fork has only one. ONNX Runtime starts some.
LIBRARIES = [
    "numpy",
    "pandas",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.metrics",
    "matplotlib.pyplot",
    "PIL.Image",
    "pyarrow.parquet",
    "tensorflow",
    "keras",
    "onnx",
    "optuna",
    "sqlalchemy",
    "alembic.migration",
    "mlflow.tracking",
    "mlflow.store.tracking.sqlalchemy_store",
    "fastapi.testclient",
    "gradio",
    "pydantic_settings",
    "typer.testing",
    "nbformat",
    "ipykernel.kernelapp",
    "ipykernel.ipkernel",
]


def main() -> None:
    "Listen, import the libraries once somebody asks, then serve."
    os.environ |= {"TF_CPP_MIN_LOG_LEVEL": "3"}  # or TensorFlow greets
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen(64)
    print("listening", flush=True)
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        prepare()
        with suppress(OSError, ValueError), connection, connection.makefile("rw") as stream:  # whoever asked is gone
            if kernel := json.loads(stream.readline()):
                server = os.getpid()
                if not (pid := os.fork()):
                    break
                print(pid, file=stream, flush=True)
    else:
        return
    listener.close()
    be_kernel(server, **kernel)


@cache
def prepare() -> None:
    "Import the libraries."
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()  # or each kernel's collector would touch all objects, and so copy their memory
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for kernels that ended


def be_kernel(server: int, connection: str, folder: str) -> None:
    "Be an IPython kernel in a session of its own, until it is killed or the server ends."
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    os.chdir(folder)
    sys.path[:] = [place for place in sys.path if Path(place) != Path(__file__).parent]
    sys.modules["numpy.random"].seed()
    app = IPKernelApp.instance(parent_handle=server)
    app.initialize(["-f", connection])
    app.start()


if __name__ == "__main__":
    main()
