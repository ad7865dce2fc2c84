"""The workflows of this repository, on GitHub and on GitLab: what is written in them."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = {  # by workflow and job: all that a job may write
    ("experiment", "comment"): {"pull-requests"},
    ("pages", "deploy"): {"pages", "id-token"},
    ("release", "publish"): {"attestations", "id-token"},
    ("release", "push"): {"attestations", "id-token", "packages"},
    ("release", "deploy"): {"id-token"},
    ("deploy", "deploy"): {"id-token"},
    ("monitor", "monitor"): {"issues"},
    ("retrain", "propose"): {"contents", "pull-requests"},
    ("update", "propose"): {"contents", "pull-requests"},
}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_workflow_has_the_least_rights(path: Path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] in ({}, {"contents": "read"}) and workflow["concurrency"]["group"]
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 reads `on` as true
    assert triggers and "pull_request_target" not in triggers and "workflow_run" not in triggers
    for name, job in workflow["jobs"].items():
        assert "uses" in job or job.get("timeout-minutes", 360) <= 60, f"{name} may hang for hours"
        written = {what for what, right in (job.get("permissions") or {}).items() if right == "write"}
        assert written <= WRITTEN.get((path.stem, name), set()), name
        if written and "pull_request" in triggers:  # what may write runs nothing of the pull request
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["ref"] == "${{ github.event.pull_request.base.sha }}", name
        for step in job.get("steps", []):
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # Whoever names a branch or a title would otherwise write our shell commands.
            assert "${{" not in step.get("run", "")


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_workflow_pins_what_it_uses(path: Path):
    used = re.findall(r"^\s*(?:- )?uses:\s*(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    used = [action for action in used if not action.startswith("./")]
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", action.strip()), action
    pins = {line.split("@")[0]: line for line in used}
    assert all(pins[line.split("@")[0]] == line for line in used), "one action, two versions"


def jobs_of(name: str) -> dict[str, Any]:
    "The jobs of a workflow."
    return yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text(encoding="utf-8"))["jobs"]


def test_ci_runs_what_a_person_runs():
    jobs = jobs_of("ci")
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make check", "make test", "make audit"} <= set(commands)
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


def test_gitlab_has_the_same_jobs_on_the_same_targets() -> None:
    "Each job of ours calls `make`, and what it calls there it calls here."
    target = r"^ *make (?:-s )?([a-z]+)|[;\"] *make ([a-z]+)"

    def called(lines: list[str]) -> set[str]:
        return {a or b for line in lines for a, b in re.findall(target, line, re.MULTILINE)}

    github = {
        path.stem: called([s.get("run", "") for job in jobs_of(path.stem).values() for s in job.get("steps", [])])
        for path in WORKFLOWS
    }
    text = (ROOT / ".gitlab-ci.yml").read_text(encoding="utf-8")
    gitlab = {name: job for name, job in yaml.safe_load(text).items() if isinstance(job, dict) and "script" in job}
    lines = [
        line
        for job in gitlab.values()
        for line in ([job["script"]] if isinstance(job["script"], str) else job["script"])
    ]
    assert called(lines) == set().union(*github.values())
    known = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert called(lines) <= known and all(github.values())
    assert all("resource_group" in gitlab[name] for name in ("deploy", "monitor", "retrain", "update"))
    assert {name for name, job in gitlab.items() if "id_tokens" in job} == {"container", "publish", "deploy"}


def test_nothing_is_deployed_before_the_gate() -> None:
    "Neither published nor pushed before `make gate`, and no image goes to the cluster that this workflow didn't sign."
    jobs = jobs_of("release")
    assert [step["run"].split(" #")[0] for step in jobs["model"]["steps"] if "run" in step] == ["make run", "make gate"]
    assert jobs["image"]["needs"] == "model" and {"build", "image"} == {
        *jobs["push"]["needs"],
        *jobs["publish"]["needs"],
    }
    assert jobs["deploy"]["needs"] == "push" and jobs_of("deploy")["deploy"]["needs"] == "gate"
    assert "gh attestation verify" in jobs_of("deploy")["gate"]["steps"][0]["run"]


def tool(name: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess:
    "Runs a program of the environment."
    command = [Path(sys.executable).with_name(name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **{"cwd": ROOT} | options)


SCHEMAS = {
    "vendor.github-workflows": WORKFLOWS,
    "vendor.gitlab-ci": [ROOT / ".gitlab-ci.yml"],
    "vendor.dependabot": [ROOT / ".github/dependabot.yml"],
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_files_have_the_form_that_their_host_reads(schema: str) -> None:
    "By the schemas that check-jsonschema has of them."
    validator = jsonschema.validators.validator_for(form := get_builtin_schema(schema))(form)
    for path in SCHEMAS[schema]:
        text = re.sub(
            "^on:", "'on':", path.read_text(encoding="utf-8"), flags=re.MULTILINE
        )  # YAML 1.1 reads it as true
        assert not [*validator.iter_errors(yaml.safe_load(text))]
        wrong = text.replace("runs-on:", "runs-onn:").replace("script:", "scriptt:").replace("interval:", "intervall:")
        assert [*validator.iter_errors(yaml.safe_load(wrong))], "a misspelt key"


def test_an_auditor_of_workflows_finds_nothing(tmp_path: Path) -> None:
    "Templates of shell commands, rights, pins, caches: zizmor, as strict as it gets."
    strict = ["--offline", "--no-progress", "--persona=pedantic", "--min-severity=low"]
    done = tool("zizmor", *strict, ROOT / ".github")
    assert done.returncode == 0, done.stdout
    unsafe = "on: push\njobs:\n  a:\n    runs-on: ubuntu-latest\n    steps:\n      - run: echo ${{ github.event.head_commit.message }}\n"
    (tmp_path / "unsafe.yml").write_text(unsafe)
    assert "template-injection" in tool("zizmor", *strict, tmp_path / "unsafe.yml").stdout


# ----------------------------------------------------------------------------------------------------- make targets


def make(target: str, folder: Path, *programs: Path, **variables: str) -> subprocess.CompletedProcess:
    "A target of our Makefile in another folder, with the environment of these tests."
    path = ":".join(map(str, [*programs, Path(sys.executable).parent, os.environ["PATH"]]))
    command = ["make", "-f", ROOT / "Makefile", "READY=", target]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PATH": path} | variables, capture_output=True, text=True
    )


def test_a_secret_in_a_file_is_found(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".secrets.baseline", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    (tmp_path / "settings.py").write_text("region = 'eu-central-1'\n")
    subprocess.run(["git", "add", "-A"], cwd=tmp_path, check=True)
    assert make("secrets", tmp_path).returncode == 0
    (tmp_path / "settings.py").write_text(f"key = '{'AKIA' + 'Z7QK4T2M9XW3PLR8'}'\n")
    done = make("secrets", tmp_path)
    assert done.returncode != 0 and "settings.py:1" in done.stdout


def test_licences_are_those_that_we_allow(tmp_path: Path) -> None:
    "`make audit` writes the report; a licence that nobody has looked at ends it."
    done = tool("pip-licenses", "--format=markdown", "--output-file", tmp_path / "licences.md")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| numpy " in (tmp_path / "licences.md").read_text()
    assert tool("pip-licenses", "--allow-only", "MIT").returncode != 0


@pytest.mark.publish
def test_an_audit_that_could_not_look_is_not_passed(tmp_path: Path) -> None:
    "A package that the service of vulnerabilities doesn't know, as all are where it can't be reached; pip-audit itself would pass."
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "requirements.lock").write_text(f"celestial-ml-unpublished==1.0 --hash=sha256:{0:064x}\n")
    (tmp_path / ".cache").symlink_to(ROOT / ".cache")
    done = make("audit", tmp_path)
    assert done.returncode != 0 and "could not be audited" in done.stderr and "nothing is known" in done.stderr


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
@pytest.mark.parametrize("ready", [True, False], ids=["ready", "never ready"])
def test_images_are_rolled_out_by_their_digests(ready: bool, tmp_path: Path) -> None:
    "kubectl renders them for real; the cluster is a list of what it was told."
    shutil.copytree(ROOT / "deploy/kubernetes", tmp_path / "deploy/kubernetes")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/kubectl").write_text(
        f"""#!/bin/sh
echo "kubectl $@" >> calls
test "$1" = apply && exec {shutil.which("kubectl")} kustomize "$3"
case "$4" in status) exit {0 if ready else 1};; esac
"""
    )
    (tmp_path / "bin/kubectl").chmod(0o755)
    images = {
        name: f"registry.example.org/we/{name}@sha256:{i:064x}"
        for i, name in enumerate(("celestial", "celestial-train"))
    }
    done = make("deploy", tmp_path, tmp_path / "bin", IMAGE=" ".join(images.values()))
    assert (done.returncode == 0) == ready, done.stderr
    used = set(re.findall(r"image: (\S+)", done.stdout))
    assert used == set(images.values())
    last = (tmp_path / "calls").read_text().splitlines()[-1]
    assert last.startswith("kubectl -n celestial rollout " + ("status" if ready else "undo"))
    for wrong in ("celestial", "we/celestial:1.0", "", "we/celestial@sha256:$(touch hacked)"):
        assert make("deploy", tmp_path, tmp_path / "bin", IMAGE=wrong).returncode == 2
    assert not (tmp_path / "hacked").exists()


# ------------------------------------------------------------------------------------------------- the one comment

MARKER = "<!-- celestial report -->"
HOSTS: dict[str, dict[str, Any]] = {  # as much of each API as a comment needs
    "GitHub": {
        "listed": "/repos/o/r/issues/12/comments",
        "changed": ("PATCH", "/repos/o/r/issues/comments/"),
        "of": lambda name: {"user": {"login": name}},
        "own": "github-actions[bot]",
        "env": {
            "GITHUB_API_URL": "{}", "GITHUB_REPOSITORY": "o/r", "PULL": "12", "GITHUB_RUN_ID": "7", "GITHUB_SERVER_URL": "https://example.org",
        },
    },
    "GitLab": {
        "listed": "/projects/5/merge_requests/12/notes",
        "changed": ("PUT", "/projects/5/merge_requests/12/notes/"),
        "of": lambda name: {"author": {"username": name}},
        "own": "project_5_bot",
        "env": {
            "GITLAB_CI": "true", "CI_API_V4_URL": "{}", "CI_PROJECT_ID": "5", "CI_MERGE_REQUEST_IID": "12", "CI_PIPELINE_URL": "https://example.org/7",
        },
    },
}  # fmt: skip


class Host(BaseHTTPRequestHandler):
    "A server that keeps comments."

    about: dict[str, Any]
    comments: list[dict[str, Any]]

    def _answer(self, value: object) -> None:
        assert self.headers["Authorization"] == "Bearer a-token"
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def _body(self) -> str:
        return json.loads(self.rfile.read(int(self.headers["Content-Length"])))["body"]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        if url.path == "/user":
            return self._answer({"username": self.about["own"]})
        assert url.path == self.about["listed"]
        query = {key: int(value[0]) for key, value in parse_qs(url.query).items()}
        first = (query["page"] - 1) * query["per_page"]
        self._answer(self.comments[first : first + query["per_page"]])

    def do_POST(self) -> None:
        assert self.path == self.about["listed"]
        self.comments.append({"id": 1000, "body": self._body()} | self.about["of"](self.about["own"]))
        self._answer(self.comments[-1])

    def _change(self) -> None:
        method, place = self.about["changed"]
        [comment] = [one for one in self.comments if self.path == f"{place}{one['id']}"]
        assert self.command == method
        comment["body"] = self._body()
        self._answer(comment)

    do_PATCH = do_PUT = _change

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", HOSTS)
def test_there_is_one_comment_and_it_is_updated(name: str, tmp_path: Path) -> None:
    "Among more comments than a page holds, each of which quotes ours."
    Host.about, others = (
        HOSTS[name],
        [{"id": i, "body": f"{MARKER} quoted"} | HOSTS[name]["of"]("somebody") for i in range(120)],
    )
    Host.comments = list(others)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Host)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    env = {key: value.format(url) for key, value in Host.about["env"].items()} | {
        "TOKEN": "a-token",
        "PATH": os.environ["PATH"],
    }
    for text, said in ("first | report", "made"), ("second\n" * 20_000, "updated"):
        (tmp_path / "report.md").write_text(text)
        command = [sys.executable, ROOT / ".ci/comment.py", tmp_path / "report.md"]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.strip() == f"{said}: comment 1000", done.stderr
        assert len(Host.comments) == 121 and Host.comments[:120] == others
        body = Host.comments[-1]["body"]
        assert body.startswith(f"{MARKER}\n{text[:5]}") and "(https://example.org/" in body and len(body) < 65_536
    server.shutdown()


def test_code_of_a_pull_request_never_gets_a_token_that_writes() -> None:
    text = (ROOT / ".github/workflows/experiment.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    assert jobs["run"]["permissions"] == {"contents": "read"} and "github.token" not in json.dumps(jobs["run"])
    assert "secrets." not in text and "head.repo.full_name == github.repository" in jobs["comment"]["if"]
