"""The pipeline on other engines: what `celestial deploy` writes is fresh, and a real Airflow and a real SLURM run it.

`pytest -m slurm` needs the Debian packages slurm-wlm and munge; it starts daemons of its own, on loopback.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from getpass import getuser
from itertools import pairwise
from pathlib import Path
from socket import gethostname

import pytest
from programs import free_port
from projects import ROOT, Celestial
from test_three_ways import same_products

from celestial_ml.flow.engines import deploy, engines
from celestial_ml.flow.pipeline import Plan

CHANGES: dict[str, Callable[[str], str]] = {
    "a notebook": lambda text: text.replace("06_explain.ipynb", "06_explain_more.ipynb"),
    "an edge": lambda text: text.replace("upstream: [prepare, train, evaluate]", "upstream: [prepare, train]"),
    "a step less": lambda text: re.sub(r"  - name: explain.*?\n\n", "", text, flags=re.S).replace("explain, ", ""),
}


@pytest.mark.parametrize("engine", engines())
def test_committed_files_are_fresh(engine: str) -> None:
    assert deploy(ROOT, engine, check=True) == [], f"celestial deploy {engine}"


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_the_pipeline_changes_every_engine(change: str, tmp_path: Path) -> None:
    "And the command says so, by its exit code, until the files are written anew."
    copy_tree = ("pipeline.yaml", "params", "deploy")
    for name in copy_tree:
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, tmp_path / name)
    changed = CHANGES[change]((tmp_path / "pipeline.yaml").read_text())
    (tmp_path / "pipeline.yaml").write_text(changed)
    for engine in engines():
        stale = deploy(tmp_path, engine, check=True)
        assert stale and deploy(tmp_path, engine) == stale and not deploy(tmp_path, engine, check=True)


@pytest.fixture(scope="module")
def environment(project: Path, state: Path) -> dict[str, str]:
    "What a person has who activated the project's environment, with the copy of the project and its state."
    env = {name: value for name, value in os.environ.items() if not name.startswith(("CELESTIAL_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}:{env['PATH']}"
    return env | {"PATH": path, "PYTHONPATH": str(project), "CELESTIAL_HOME": str(state)}


SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={node}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MinJobAge=86400
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[dict[str, str]]:
    "A SLURM of one node on loopback; the environment of its users."
    path = f"{environment['PATH']}:/usr/sbin"
    if missing := [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=path)]:
        pytest.skip(f"not installed: {', '.join(missing)} (slurm-wlm and munge)")
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o600)
    about = {"folder": folder, "host": gethostname().split(".")[0], "user": getuser(), "cpus": os.cpu_count()}
    (folder / "slurm.conf").write_text(SLURM_CONF.format(**about, controller=free_port(), node=free_port()))
    env = environment | {"PATH": path, "SLURM_CONF": str(folder / "slurm.conf")}
    socket = ("--key-file", "munge.key", "--socket", f"{folder}/munge.socket", "--pid-file", f"{folder}/munge.pid")
    with ExitStack() as ends:
        for number, command in enumerate((("munged", "-F", "-f", *socket), ("slurmctld", "-D"), ("slurmd", "-D"))):
            log = ends.enter_context((folder / f"{command[0]}.log").open("wb"))
            daemon = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=log)
            ends.callback(daemon.wait, 30)
            ends.callback(daemon.terminate)
            for _ in range(300):
                ready = ("munge", "-n", "--socket", f"{folder}/munge.socket"), ("scontrol", "ping"), ("sinfo", "-ho%t")
                answer = subprocess.run(ready[number], env=env, capture_output=True, text=True)
                if answer.returncode == 0 and (number < 2 or answer.stdout.strip() == "idle"):
                    break
                assert daemon.poll() is None, (folder / f"{command[0]}.log").read_text()
                time.sleep(0.1)
            else:
                pytest.fail((folder / f"{command[0]}.log").read_text())
        ends.callback(subprocess.run, ["scancel", f"--user={getuser()}"], env=env)
        yield env


def jobs(env: dict[str, str], submitted: str) -> list[dict[str, str]]:
    "The jobs of a submission once they have ended, as SLURM shows them."
    numbers = re.findall(r"job (\d+)", submitted)
    while subprocess.run(["squeue", "-h"], env=env, check=True, capture_output=True).stdout:
        time.sleep(0.5)
    shown = [
        subprocess.run(["scontrol", "-o", "show", "job", n], env=env, capture_output=True, text=True).stdout
        for n in numbers
    ]
    return [dict(re.findall(r"(\w+)=(\S*)", text)) for text in shown]


@pytest.mark.slurm
def test_slurm_gives_the_same_metrics(smoke: Plan, celestial: Celestial, slurm: dict[str, str], project: Path) -> None:
    "Twice at once, too: a step never runs beside another one of its run."
    assert celestial("deploy", "slurm", "smoke", "--run", "by-slurm").returncode == 0
    script = ["bash", "deploy/slurm/by-slurm.sh", "--export=ALL"]
    done = subprocess.run(script, cwd=project, env=slurm, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ended = jobs(slurm, done.stdout)
    logs = "\n".join(path.read_text() for path in (project / "output/by-slurm/logs").iterdir())
    assert [job["Comment"] for job in ended] == list(smoke.tasks)
    assert {job["JobState"] for job in ended} == {"COMPLETED"}, logs
    assert all(one["EndTime"] <= other["StartTime"] for one, other in pairwise(ended))
    same_products(project / "output/smoke", project / "output/by-slurm")
    assert {path.stem for path in (project / "output/by-slurm").glob("*.html")} > smoke.tasks.keys()
