"""`celestial data check` on a folder, beside cleanvision and dataeval, and against reading everything once."""

import hashlib
import json
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np

from bench import CELESTIAL, PEER, Growth, Row, environment, in_turn, wall
from celestial_ml.data.images import decode_image, find_pictures

PEERS = ("cleanvision", "dataeval")
WHY = (
    "It is a command from the shell, imports included, and runs a network over each picture, for near duplicates, outliers and wrong "
    "labels; neither the loop nor cleanvision looks for outliers or wrong labels."
)


def read_once(folder: Path) -> float:
    "Seconds of hashing and decoding every picture, in one thread."
    began = time.perf_counter()
    for path in find_pictures(folder):
        content = Path(path).read_bytes()
        hashlib.sha256(content).hexdigest()
        np.asarray(decode_image(content))
    return time.perf_counter() - began


def check_rows(folder: Path, times: int) -> list[Row | Growth]:
    "The command with a full feature store (as in a pipeline), with an empty one, and the peers' libraries without their start."
    with tempfile.TemporaryDirectory() as home:
        command = [CELESTIAL, "data", "check", str(folder.resolve()), "--reference", "none", "--output", home]
        states = iter(range(2 * times + 2))
        ways = {
            "full": lambda: wall(command, CELESTIAL_HOME=f"{home}/full"),
            "empty": lambda: wall(command, CELESTIAL_HOME=f"{home}/{next(states)}"),
            "once": lambda: read_once(folder),
        }
        ways["full"]()
        for peer in PEERS:
            if python := environment(peer):
                ways[peer] = lambda peer=peer, python=python: _peer(peer, python, folder)
        took = in_turn(times, **ways)
    beside = {peer: took[peer] for peer in PEERS if peer in took}
    once = {"hashing and decoding once": took["once"]}
    return [
        Row("celestial data check, for the first time", "s", took["empty"], beside, once, 1.0, 1 / 1.5, WHY),
        Row("celestial data check, with a full feature store", "s", took["full"], beside, once, 1.0, 1 / 1.5, WHY),
    ]


def _peer(name: str, python: Path, folder: Path) -> float:
    done = subprocess.run([python, PEER / "checks.py", name, folder], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["seconds"]
