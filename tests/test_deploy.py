"""The pipeline on other engines: what `celestial deploy` writes is fresh, and a real Airflow and a real SLURM run it.

`pytest -m slurm` needs the Debian packages slurm-wlm and munge; it starts daemons of its own, on loopback. `pytest -m airflow`
makes an environment once, 600 MB in ~/.cache/celestial, unless CELESTIAL_AIRFLOW names the folder of one.
"""

import json
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
import yaml
from programs import free_port
from projects import ROOT, Celestial
from test_three_ways import same_products

from celestial_ml.core.params import load_params
from celestial_ml.flow.engines import deploy, engines
from celestial_ml.flow.pipeline import Plan
from celestial_ml.flow.steps import load_tasks, step_parameters

Run = Callable[..., str]
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


def submit(script: str, env: dict[str, str], project: Path) -> str:
    "What a script of deploy/slurm prints: the jobs that it has submitted."
    done = subprocess.run(["bash", script, "--export=ALL"], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slurm
def test_slurm_gives_the_same_metrics(smoke: Plan, celestial: Celestial, slurm: dict[str, str], project: Path) -> None:
    assert celestial("deploy", "slurm", "smoke", "--run", "by-slurm").returncode == 0
    ended = jobs(slurm, submit("deploy/slurm/by-slurm.sh", slurm, project))
    logs = "\n".join(path.read_text() for path in (project / "output/by-slurm/logs").iterdir())
    assert [job["Comment"] for job in ended] == list(smoke.tasks)
    assert {job["JobState"] for job in ended} == {"COMPLETED"}, logs
    assert all(one["EndTime"] <= other["StartTime"] for one, other in pairwise(ended))
    same_products(project / "output/smoke", project / "output/by-slurm")
    assert {path.stem for path in (project / "output/by-slurm").glob("*.html")} > smoke.tasks.keys()


@pytest.mark.slurm
def test_slurm_cancels_what_waits_for_a_failed_step(celestial: Celestial, slurm: dict[str, str], project: Path) -> None:
    "Submitted twice: the steps of a run never run beside each other."
    too_much = ("--set", "check.min_per_class=1000", "--run", "refused")
    assert celestial("deploy", "slurm", "smoke", *too_much).returncode == 0
    printed = [submit("deploy/slurm/refused.sh", slurm, project) for _ in range(2)]
    ended = jobs(slurm, "".join(printed))
    states = [job["JobState"] for job in ended]
    assert states == 2 * ["COMPLETED", "FAILED", *["CANCELLED"] * (len(states) // 2 - 2)]
    ran = [job for job in ended if job["JobState"] != "CANCELLED"]
    assert all(one["EndTime"] <= other["StartTime"] for one, other in pairwise(ran))


@pytest.mark.slurm
def test_slurm_asks_the_triggers(celestial: Celestial, slurm: dict[str, str], project: Path, state: Path) -> None:
    assert celestial("deploy", "slurm").returncode == 0
    (job,) = jobs(slurm, f"job {submit('deploy/slurm/default-retrain.sh', slurm, project)}")
    assert job["JobState"] == "COMPLETED"
    assert json.loads((state / "monitor/retrain.jsonl").read_text().splitlines()[-1])["event"] == "skipped"


def test_argo_files_fit_argos_schema(tmp_path: Path) -> None:
    "With each step's parameters and edges; a misspelt key doesn't fit."
    folder, schema = ROOT / "deploy/argo", ROOT / "tests/reference/argo_workflow.schema.json"
    misspelt = tmp_path / "misspelt.yaml"
    misspelt.write_text(
        (folder / "default-retrain.yaml").read_text().replace("concurrencyPolicy:", "concurencyPolicy:")
    )
    check = [str(Path(sys.executable).with_name("check-jsonschema")), "--schemafile", str(schema)]
    assert subprocess.run([*check, *map(str, folder.glob("*.yaml"))], capture_output=True).returncode == 0
    assert subprocess.run([*check, str(misspelt)], capture_output=True).returncode == 1
    main, step = yaml.safe_load((folder / "default.yaml").read_text())["spec"]["templates"]
    for task, (name, about) in zip(main["dag"]["tasks"], load_tasks(ROOT, "default").items(), strict=True):
        assert (task["name"], tuple(task["dependencies"]), task["template"]) == (name, about.upstream, step["name"])
        values = {one["name"]: one["value"] for one in task["arguments"]["parameters"]}
        told = step_parameters(name, load_params("default")) | {"run": "default"}
        assert values.keys() == {one["name"] for one in step["inputs"]["parameters"]}
        assert (values["notebook"], yaml.safe_load(values["parameters"])) == (str(about.source), told)


@pytest.fixture(scope="module")
def airflow(environment: dict[str, str], project: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    "A command in Airflow's environment, as deploy/airflow wants it: the project's own is a kernel."
    folder = Path(os.environ.get("CELESTIAL_AIRFLOW") or Path.home() / ".cache/celestial/airflow-3.3")
    home = tmp_path_factory.mktemp("airflow")
    if not (folder / "bin/airflow").exists():
        needs = ("apache-airflow>=3.3,<3.4", "apache-airflow-providers-papermill>=3.13")
        if uv := shutil.which("uv"):
            make = [[uv, "venv", "-q", str(folder)], [uv, "pip", "install", "-q", "--python", str(folder), *needs]]
        else:
            make = [[sys.executable, "-m", "venv", str(folder)], [str(folder / "bin/pip"), "install", "-q", *needs]]
        for command in make:
            subprocess.run(command, check=True)
    kernel = [sys.executable, "-m", "ipykernel", "install", "--name", "celestial", "--prefix", str(home)]
    subprocess.run(kernel, check=True, capture_output=True)
    env = environment | {"AIRFLOW_HOME": str(home), "JUPYTER_PATH": str(home / "share/jupyter")}
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(project / "deploy/airflow"), "AIRFLOW__CORE__LOAD_EXAMPLES": "False"}

    def run(program: str, *arguments: str) -> str:
        command = [str(folder / "bin" / program), *arguments]
        done = subprocess.run(command, cwd=home, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    run("airflow", "db", "migrate")
    yield run


DAGS = """
import json, runpy, sys
from airflow.sdk import DAG
edges = lambda dag: {task.task_id: sorted(task.upstream_task_ids) for task in dag.tasks}
about = lambda dag: [dag.max_active_runs, dag.max_active_tasks, dag.catchup, edges(dag)]
dags = {}
DAG.__exit__ = lambda dag, *_: dags.update({dag.dag_id: dag})
runpy.run_path(sys.argv[1])
print(json.dumps({name: about(dag) for name, dag in dags.items()}))
"""


@pytest.mark.airflow
def test_airflow_gives_the_same_metrics(smoke: Plan, celestial: Celestial, airflow: Run, project: Path) -> None:
    assert celestial("deploy", "airflow", "smoke", "--run", "by-airflow").returncode == 0
    airflow("airflow", "dags", "test", "celestial-by-airflow")
    same_products(project / "output/smoke", project / "output/by-airflow")
    assert {path.stem for path in (project / "output/by-airflow").glob("*.html")} > smoke.tasks.keys()


@pytest.mark.airflow
def test_airflow_asks_the_triggers(celestial: Celestial, airflow: Run, project: Path, state: Path) -> None:
    "One run at a time, and none for the past."
    assert celestial("deploy", "airflow").returncode == 0
    edges = {name: sorted(task.upstream) for name, task in load_tasks(ROOT, "default").items()}
    shown = json.loads(airflow("python", "-c", DAGS, str(project / "deploy/airflow/default.py")).splitlines()[-1])
    once = [1, 1, False]
    assert shown == {"celestial-default": [*once, edges], "celestial-default-retrain": [*once, {"retrain": []}]}
    airflow("airflow", "dags", "test", "celestial-default-retrain")
    assert json.loads((state / "monitor/retrain.jsonl").read_text().splitlines()[-1])["event"] == "skipped"
