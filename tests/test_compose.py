"""deploy/compose.yaml: valid, locked down, and each name in it is one of something. No Docker engine has run it here."""

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from check_jsonschema.builtin_schemas import get_builtin_schema
from settings import ROOT, check_command, check_settings

FOLDER = ROOT / "deploy"
TEXT = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
EXAMPLE = dict(
    line.split("=", 1)
    for line in (FOLDER / "compose.env.example").read_text(encoding="utf-8").splitlines()
    if line and not line.startswith("#")
)
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
WRITABLE = {"label-studio", "prometheus", "alertmanager"}  # each says why


def filled(value: object) -> str:
    "A value with the example's variables, or the defaults, filled in."
    pattern = r"\$\{(\w+)(?::?-([^}]*)|:\?)?\}"
    return re.sub(pattern, lambda match: EXAMPLE[match[1]] or match[2] or "", str(value))


def test_compose_is_valid():
    schema = get_builtin_schema("vendor.compose-spec")
    jsonschema.validate(COMPOSE, schema)
    wrong = copy.deepcopy(COMPOSE)
    wrong["services"]["serve"]["read_onli"] = True
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, schema)


def test_compose_has_the_whole_team():
    assert {"serve", "mlflow", "postgres", "prometheus", "alertmanager", "grafana", "label-studio"} <= set(SERVICES)


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_locked_down(name: str):
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert service["read_only"] is (name not in WRITABLE)
    assert not {"privileged", "network_mode", "pid", "devices", "cap_add"} & set(service)
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert "healthcheck" in service or name == "train"
    # Compose copies a secret of the environment into the container, and refuses one that is read-only.
    assert not (service["read_only"] and {"secrets", "configs"} & set(service))
    repository, _, tag = service["image"].partition(":")
    ours = repository in ("celestial", "celestial-train")
    assert ours == ("build" in service)
    assert tag == "${CELESTIAL_VERSION:?}" if ours else re.match(r"v?\d+\.\d+", tag)


def test_what_is_named_is_there():
    stages = set(re.findall(r"^FROM .* AS ([\w-]+)$", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE))
    mounted: set[str] = set()
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (
                (FOLDER / source).exists() and volume.endswith(":ro")
                if source[0] == "."
                else source in COMPOSE["volumes"]
            )
            mounted.add(source)
        for needed, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"} and "healthcheck" in SERVICES[needed]
        assert set(service.get("secrets", [])) <= set(COMPOSE["secrets"])
        if "build" in service:
            assert service["build"]["target"] in stages and (FOLDER / service["build"]["context"]).resolve() == ROOT
    assert set(COMPOSE["volumes"]) <= mounted
    ports = {name: {port.split(":")[2] for port in service.get("ports", [])} for name, service in SERVICES.items()}
    texts = [TEXT, *(path.read_text(encoding="utf-8") for path in (FOLDER / "compose").iterdir())]
    for host, port in re.findall(rf"\b({'|'.join(SERVICES)}):(\d{{4}})\b", "\n".join(texts)):
        assert port in ports[host]
    databases = set(re.findall(r"CREATE DATABASE (\w+);", (FOLDER / "compose/databases.sql").read_text()))
    assert databases == {"mlflow", SERVICES["label-studio"]["environment"]["POSTGRE_NAME"]}


def test_example_has_each_variable_and_no_secret():
    used = set(re.findall(r"\$\{(\w+)", TEXT)) | {one["environment"] for one in COMPOSE["secrets"].values()}
    assert set(EXAMPLE) == used
    assert {name for name, value in EXAMPLE.items() if value} == {"CELESTIAL_VERSION", "CELESTIAL_MODEL", "MODEL"}
    for name in ("deploy/.env", "deploy/kubernetes/overlays/prod/secret.env"):
        done = subprocess.run(["git", "check-ignore", "--no-index", "-q", name], cwd=ROOT)
        assert done.returncode == 0, f"{name} could be committed"


def test_variables_are_settings_and_words_are_commands(monkeypatch: pytest.MonkeyPatch):
    for name in ("serve", "train"):
        values = {key: filled(value) for key, value in SERVICES[name]["environment"].items()}
        check_settings(values, monkeypatch)
        assert values["CELESTIAL_HOME"] + ":" in "".join(f"{one.split(':')[1]}:" for one in SERVICES[name]["volumes"])
    check_command(SERVICES["train"]["command"])


@pytest.mark.slow  # MLflow takes seconds to import
def test_mlflow_takes_its_options():
    from mlflow.cli import cli

    _, name, *words = SERVICES["mlflow"]["command"]
    server = cli.commands[name]
    variable = next(parameter.envvar for parameter in server.params if parameter.name == "backend_store_uri")
    assert variable in SERVICES["mlflow"]["environment"]
    assert server.make_parser(server.context_class(server)).parse_args(words)[1] == []


def test_prometheus_and_alertmanager_take_their_files(tmp_path: Path):
    if missing := [tool for tool in ("promtool", "amtool") if shutil.which(tool) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    prometheus = (FOLDER / "compose/prometheus.yaml").read_text(encoding="utf-8")
    alertmanager = (FOLDER / "compose/alertmanager.yaml").read_text(encoding="utf-8")
    assert "/run/secrets/prometheus_key" in prometheus and "/run/secrets/alert_webhook" in alertmanager
    (tmp_path / "key").write_text("key")
    (tmp_path / "prometheus.yaml").write_text(prometheus.replace("/run/secrets/prometheus_key", str(tmp_path / "key")))
    shutil.copy(FOLDER / "prometheus/rules.yaml", tmp_path)
    # The one of Debian 12 is older than url_file.
    (tmp_path / "alertmanager.yaml").write_text(
        alertmanager.replace("url_file: /run/secrets/alert_webhook", 'url: "http://a/"')
    )
    for command in (
        ("promtool", "check", "config", "prometheus.yaml"),
        ("amtool", "check-config", "alertmanager.yaml"),
    ):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
