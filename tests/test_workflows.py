"""The workflows of this repository: what is written in them."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
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
        assert written <= {"pages", "id-token", "pull-requests"}, name
        if written:  # what may write runs nothing of what was pushed
            assert not any(step.get("uses", "").startswith("actions/checkout@") for step in job["steps"]), name
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
