#!/usr/bin/env python3
"""One comment on a pull request or a merge request, updated in place: comment.py REPORT.md

It knows its comment by the first line and by its author, so a quotation is left alone. The standard library is all it needs.

GitHub Actions: TOKEN (of the job, with pull-requests: write) and PULL, the number.
GitLab CI:      TOKEN (of the project, role Reporter, scope api) in a merge request's pipeline.
"""

import json
import os
import sys
import urllib.request
from pathlib import Path

MARKER, LONGEST = "<!-- celestial report -->", 60_000  # GitHub takes 65,536 characters


def call(method, url, fields=None):
    "One request to the API, with and for JSON."
    data = None if fields is None else json.dumps(fields).encode()
    headers = {"Authorization": f"Bearer {os.environ['TOKEN']}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers, method=method), timeout=30) as response:
        return json.load(response)


def places():
    "Where comments are listed and made, where one is changed and how, whose they are, and the run's page."
    env = os.environ
    if "GITLAB_CI" in env:
        notes = f"{env['CI_API_V4_URL']}/projects/{env['CI_PROJECT_ID']}/merge_requests/{env['CI_MERGE_REQUEST_IID']}/notes"
        user = call("GET", f"{env['CI_API_V4_URL']}/user")["username"]
        return notes, notes, "PUT", lambda one: one["author"]["username"] == user, env["CI_PIPELINE_URL"]
    issues = f"{env['GITHUB_API_URL']}/repos/{env['GITHUB_REPOSITORY']}/issues"
    run = f"{env['GITHUB_SERVER_URL']}/{env['GITHUB_REPOSITORY']}/actions/runs/{env['GITHUB_RUN_ID']}"
    bot = "github-actions[bot]"
    return f"{issues}/{env['PULL']}/comments", f"{issues}/comments", "PATCH", lambda one: one["user"]["login"] == bot, run


def main():
    listed, changed, method, own, run = places()
    text = Path(sys.argv[1]).read_text(encoding="utf-8", errors="replace")
    if len(text) > LONGEST:
        text = text[:LONGEST].rpartition("\n")[0] + "\n\n… the rest is in the artifact."
    body = {"body": f"{MARKER}\n{text}\n[The run]({run}): its artifact `report` has the pages and the notebooks."}
    page, before = 1, None
    while before is None and (batch := call("GET", f"{listed}?per_page=100&page={page}")):
        before = next((one["id"] for one in batch if own(one) and one["body"].startswith(MARKER)), None)
        page += 1
    done = call("POST", listed, body) if before is None else call(method, f"{changed}/{before}", body)
    print(f"{'made' if before is None else 'updated'}: comment {done['id']}")


if __name__ == "__main__":
    main()
