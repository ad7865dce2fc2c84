"MLflow's page on the project's store: for this machine alone, with runs, their parts, data sets and aliases."

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pandas as pd
import pytest
from packages import package
from serving import until

from celestial_ml.core.params import Register, Track
from celestial_ml.registry.decisions import register_version, submit
from celestial_ml.registry.state import sync_aliases
from celestial_ml.registry.tracking import open_run


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.mark.slow
def test_the_page_shows_runs_their_parts_data_sets_and_aliases(at_home: Path, state: Path) -> None:
    sweep = open_run(Track(), "sweep lr")
    part = open_run(Track(), "lr/lr-0.003", sweep.id)
    images = pd.DataFrame({"path": ["a.png"], "label": ["Mars"]})
    part.log_dataset(images, "render", "output/lr/lr-0.003/catalog.parquet", "0" * 64)
    part.log_text(["It is good."])
    submit(register_version(package(at_home / "package"), "celestial", part), Register())
    sync_aliases(part.client)
    port = free_port()
    command = [str(Path(sys.executable).with_name("celestial")), "ui", "--port", str(port)]
    process = subprocess.Popen(command, cwd=at_home, env=os.environ | {"CELESTIAL_HOME": str(state)})
    try:
        page, api = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}/api/2.0/mlflow"
        until(lambda: answers(page), 300, 0.5)
        assert "<title>MLflow</title>" in httpx.get(page).text
        found = httpx.get(f"{api}/runs/get", params={"run_id": part.id}).json()["run"]
        tags = {tag["key"]: tag["value"] for tag in found["data"]["tags"]}
        assert tags["mlflow.parentRunId"] == sweep.id and tags["mlflow.note.content"] == "- It is good."
        assert found["inputs"]["dataset_inputs"][0]["dataset"]["name"] == "render"
        models = httpx.get(f"{api}/registered-models/get", params={"name": "celestial"}).json()
        assert {(a["alias"], a["version"]) for a in models["registered_model"]["aliases"]} == {
            ("champion", "1"),
            ("candidate", "1"),
        }
        listening = [c for c in Path("/proc/net/tcp").read_text().splitlines() if f":{port:04X} " in c and " 0A " in c]
        assert listening and all("0100007F:" in line for line in listening), "no other machine reaches it"
        busy = subprocess.run(command, cwd=at_home, capture_output=True, text=True, timeout=120)
        assert busy.returncode == 2 and "--port" in busy.stderr
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(120)
    until(lambda: not answers(page), 30, 0.5)
    assert not {path.name for path in at_home.iterdir()} & {"mlruns", "mlartifacts"}, "nothing is left behind"
