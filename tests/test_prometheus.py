"The rules for Prometheus and the dashboard for Grafana against a running server; real Prometheus and Alertmanager, slowly."

import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from programs import free_port
from serving import neptune, running, tiny_model, until

from celestial_ml.core.files import write_json
from celestial_ml.core.params import Alerts, Params
from celestial_ml.core.testing import TemporaryHome
from celestial_ml.monitor.alert_rules import _NAMES as METRICS
from celestial_ml.monitor.exported_metrics import dashboard
from celestial_ml.monitor.sinks import notify
from celestial_ml.monitor.snapshot import Snapshot, write_snapshot

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy/prometheus"
DASHBOARD = ROOT / "deploy/grafana/celestial.json"


def look(home: Path, **metrics: float) -> None:
    "What `celestial monitor check` leaves behind."
    with TemporaryHome():
        os.environ["CELESTIAL_HOME"] = str(home)
        about = {"begin": 0.0, "end": 9.0, "answers": 9, "alarms": [], "reasons": []}
        snapshot = Snapshot(time=1e9, model="celestial/3", metrics=metrics, **about)
        write_snapshot(snapshot)
        notify(snapshot, Params(alerts=Alerts(sinks=["log"])))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    "A server of a model that is watched: its URL, and its state folder."
    folder = tmp_path_factory.mktemp("prometheus")
    look(folder / "home", **dict.fromkeys(METRICS, 0.5))
    with running(tiny_model(folder / "model"), folder / "err") as url:
        for content in (neptune(), b"no picture"):
            httpx.post(f"{url}/predict", files={"image": content}, timeout=60)
        yield url, folder / "home"


def names_on(page: str) -> set[str]:
    "All names of samples, and of counters and histograms that have none yet."
    names = set(re.findall(r"^(\w+)[{ ]", page, re.MULTILINE))
    for name, kind in re.findall(r"^# TYPE (\w+) (\w+)$", page, re.MULTILINE):
        names |= {name, *([f"{name}_bucket", f"{name}_count", f"{name}_sum"] if kind == "histogram" else [])}
    return names


def names_in(expression: str) -> set[str]:
    "The metrics that a query reads."
    return set(re.findall(r"\b(?:celestial|process)_\w+\b(?=\s*[{\[)> =]|$)", expression))


def promtool(*arguments: object) -> None:
    "A check that must succeed; skipped where there is no Prometheus."
    if shutil.which("promtool") is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    done = subprocess.run(["promtool", *map(str, arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_the_rules_and_the_dashboard_is_measured(server: tuple[str, Path]) -> None:
    page = httpx.get(f"{server[0]}/metrics", timeout=60).text
    rules = (DEPLOY / "rules.yaml").read_text()
    named = names_in(rules) | set(re.findall(r"^ *(?:expr: )?.*?(celestial_\w+)", rules, re.MULTILINE))
    panels = json.loads(DASHBOARD.read_text())["panels"]
    named |= {name for panel in panels for name in names_in(panel["targets"][0]["expr"])}
    assert len(named) > 30 and named - names_on(page) == set()
    assert {f"celestial_monitor_{name}" for name in METRICS} <= names_on(page)


def test_the_dashboard_is_what_a_server_of_today_gives(server: tuple[str, Path]) -> None:
    page = httpx.get(f"{server[0]}/metrics", timeout=60).text
    command = f"curl -s URL/metrics | python -m celestial_ml.monitor.exported_metrics > {DASHBOARD.relative_to(ROOT)}"
    assert dashboard(page) == json.loads(DASHBOARD.read_text()), command


def test_the_alerts_are_measured(server: tuple[str, Path]) -> None:
    url, home = server
    page = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'celestial_alert{rule="harm",severity="critical"} 1.0' in page, "0.5 is above 0"
    look(home, **dict.fromkeys(METRICS, 0.0))
    page = httpx.get(f"{url}/metrics", timeout=60).text
    assert 'celestial_alert{rule="harm",severity="critical"} 0.0' in page
    assert 'celestial_monitor_p99_ms{model_version="celestial/3"} 0.0' in page


@pytest.mark.parametrize(
    "content", ["", "[]", '{"time": 1, "model": 3, "metrics": [1]}', '{"metrics": {"a": null}, "time": 1}']
)
def test_a_damaged_snapshot_costs_only_its_own_metrics(server: tuple[str, Path], content: str) -> None:
    url, home = server
    path = home / "monitor/snapshot.json"
    before = path.read_bytes()
    path.write_text(content)
    answer = httpx.get(f"{url}/metrics", timeout=60)
    path.write_bytes(before)
    assert answer.status_code == 200 and "celestial_log_ok 1.0" in answer.text


def test_promtool_accepts_the_rules() -> None:
    promtool("check", "rules", DEPLOY / "rules.yaml")
    promtool("check", "config", DEPLOY / "prometheus.yaml")


def test_each_rule_fires_when_it_should() -> None:
    tested = set(
        re.findall(r"alertname: (\w+)\n *exp_alerts:\n *- exp_labels", (DEPLOY / "rules_test.yaml").read_text())
    )
    assert tested == set(re.findall(r"alert: (\w+)", (DEPLOY / "rules.yaml").read_text()))
    promtool("test", "rules", DEPLOY / "rules_test.yaml")


def test_prometheus_can_read_all_queries_of_the_dashboard(tmp_path: Path) -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    rules = [{"record": f"a:{panel['id']}", "expr": panel["targets"][0]["expr"]} for panel in panels]
    write_json(tmp_path / "rules.yaml", {"groups": [{"name": "a", "rules": rules}]})
    promtool("check", "rules", tmp_path / "rules.yaml")


@pytest.mark.slow
def test_a_real_prometheus_reports_an_alert_and_its_end(server: tuple[str, Path], tmp_path: Path) -> None:
    programs = {name: shutil.which(name) for name in ("prometheus", "prometheus-alertmanager")}
    if None in programs.values():
        pytest.skip("apt-get install prometheus prometheus-alertmanager")
    url, home = server
    look(home, **dict.fromkeys(METRICS, 0.0))
    heard: list[dict[str, Any]] = []

    class Receiver(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.extend(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    hook = HTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    ports = [free_port(), free_port()]
    changes = {"127.0.0.1:8000": url.removeprefix("http://"), "127.0.0.1:9093": f"127.0.0.1:{ports[1]}"}
    changes |= {"127.0.0.1:9094": f"127.0.0.1:{hook.server_port}", ": 15s": ": 1s", "group_wait: 30s": "group_wait: 1s"}
    changes |= {"repeat_interval: 12h": "group_interval: 1s\n  repeat_interval: 12h"}
    for path in DEPLOY.glob("*.yaml"):
        text = path.read_text()
        for old, new in changes.items():
            text = text.replace(old, new)
        (tmp_path / path.name).write_text(text)

    def start(name: str, port: int, *options: str) -> subprocess.Popen:
        config = tmp_path / f"{name.removeprefix('prometheus-')}.yaml"
        folder = "tsdb.path" if name == "prometheus" else "path"
        command = [programs[name], f"--config.file={config}", f"--web.listen-address=127.0.0.1:{port}"]
        command += [f"--storage.{folder}={tmp_path / name}", *options]
        return subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)

    def ask(query: str) -> list[dict[str, Any]]:
        answer = httpx.get(f"http://127.0.0.1:{ports[0]}/api/v1/query", params={"query": query}, timeout=30).json()
        assert answer["status"] == "success", answer
        return answer["data"]["result"]

    def states() -> list[tuple[str, str]]:
        return [
            (one["status"], one["labels"]["rule"]) for one in heard if one["labels"]["alertname"] == "CelestialAlert"
        ]

    processes = [start("prometheus-alertmanager", ports[1], "--cluster.listen-address="), start("prometheus", ports[0])]
    try:
        for port in ports:
            until(lambda port=port: not socket.socket().connect_ex(("127.0.0.1", port)), 60, 0.1)
        until(lambda: ask('up{job="celestial"} == 1'), 60, 0.2)
        assert not states()
        look(home, harm_alarms=1.0)
        until(lambda: ("firing", "harm") in states(), 60, 0.2)
        look(home, harm_alarms=0.0)
        until(lambda: ("resolved", "harm") in states(), 60, 0.2)
        httpx.post(f"{url}/predict", files={"image": neptune()}, timeout=60)
        panels = json.loads(DASHBOARD.read_text())["panels"]
        silent = [one["description"] for one in panels if not ask(one["targets"][0]["expr"])]
        assert not [
            name
            for name in silent
            if not name.startswith(("celestial_monitor", "celestial_alerts_waiting", "celestial_shadow"))
        ], silent
    finally:
        for process in processes:
            process.terminate()
        assert [process.wait(30) for process in processes] == [0, 0]
        hook.shutdown()
        hook.server_close()
