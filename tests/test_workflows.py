"""The workflows of this repository: what is written in them."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = {  # by workflow and job: all that a job may write
    ("experiment", "comment"): {"pull-requests"},
    ("pages", "deploy"): {"pages", "id-token"},
}
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.y*ml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_workflow_has_the_least_rights(path: Path):
    text = path.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] in ({}, {"contents": "read"})
    triggers = workflow.get("on", workflow.get(True))  # YAML 1.1 reads `on` as true
    assert triggers and "pull_request_target" not in triggers and "workflow_run" not in triggers
    for name, job in workflow["jobs"].items():
        assert job.get("timeout-minutes", 360) <= 60, f"{name} may hang for hours"
        written = {what for what, right in (job.get("permissions") or {}).items() if right == "write"}
        assert written <= WRITTEN.get((path.stem, name), set()), name
        if written and "pull_request" in triggers:  # what may write runs nothing of the pull request
            for step in job["steps"]:
                if step.get("uses", "").startswith("actions/checkout@"):
                    assert step["with"]["ref"] == "${{ github.event.pull_request.base.sha }}", name
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step["with"]["persist-credentials"] is False
            # Whoever names a branch or a title would otherwise write our shell commands.
            assert not re.search(r"\$\{\{\s*github\.(event|head_ref)", step.get("run", ""))


@pytest.mark.parametrize("path", WORKFLOWS, ids=[path.name for path in WORKFLOWS])
def test_workflow_pins_what_it_uses(path: Path):
    used = re.findall(r"^\s*(?:- )?uses:\s*(.+)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    for action in used:
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", action.strip()), action
    pins = {line.split("@")[0]: line for line in used}
    assert all(pins[line.split("@")[0]] == line for line in used), "one action, two versions"


def test_ci_runs_what_a_person_runs():
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8"))["jobs"]
    commands = [step.get("run") for job in jobs.values() for step in job["steps"]]
    assert {"make check", "make test"} <= set(commands)
    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]


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
