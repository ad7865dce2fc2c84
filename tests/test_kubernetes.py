"""The manifests in deploy/kubernetes: valid, whole, and as strict as they promise. No cluster has run them here.

kubectl renders them; without one they are skipped.
"""

import copy
import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from settings import ROOT, check_command, check_settings

from celestial_ml.serve.api import api
from celestial_ml.serve.open_inference import open_inference
from celestial_ml.serve.service_metrics import ServiceMetrics
from celestial_ml.serve.settings import ServeSettings

FOLDER = ROOT / "deploy" / "kubernetes"
PARTS = ("overlays/dev", "overlays/prod", "train", "train-gpu", "kserve")
CRDS = json.loads((ROOT / "tests/reference/crds.json").read_text(encoding="utf-8"))
USER = 10001  # of our images
IMAGES = {"ghcr.io/celestial-ml/celestial", "ghcr.io/celestial-ml/celestial-train"}
Object = dict[str, Any]

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl on this machine")
every_part = pytest.mark.parametrize("part", PARTS)


@cache
def render(part: str) -> str:
    "What kustomize makes of a folder."
    done = subprocess.run(["kubectl", "kustomize", str(FOLDER / part)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def objects(part: str, *kinds: str) -> list[Object]:
    "The objects of these kinds, or all."
    return [one for one in yaml.safe_load_all(render(part)) if not kinds or one["kind"] in kinds]


def pod_specs(part: str) -> Iterator[tuple[Object, Object]]:
    "Each pod's specification, and the object that makes it."
    for one in objects(part):
        for path in (("template",), ("jobTemplate", "spec", "template"), ("predictor",)):
            spec = one.get("spec", {})
            for step in path:
                spec = spec.get(step, {})
            if spec := (spec if one["kind"] == "InferenceService" else spec.get("spec", {})):
                yield one, spec


def validate(one: Object) -> None:
    "Raise for an object that a cluster would refuse, or whose keys it would drop."
    schema = CRDS.get(one["kind"])
    if schema is None:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)
        return
    jsonschema.validate(one, schema)
    if one["kind"] == "InferenceService":
        own = schema["properties"]["spec"]["properties"]["predictor"]["properties"]
        spec = {key: value for key, value in one["spec"]["predictor"].items() if key not in own}
        validate({"apiVersion": "v1", "kind": "Pod", "metadata": one["metadata"], "spec": spec})


def environment(part: str, spec: Object) -> dict[str, str | None]:
    "The variables of a pod's first container; None for what a secret holds."
    container = spec["containers"][0]
    maps = {one["metadata"]["name"]: one["data"] for one in objects(part, "ConfigMap")}
    values: dict[str, str | None] = {}
    for source in container.get("envFrom", []):
        values |= maps[source["configMapRef"]["name"]] if "configMapRef" in source else {}
    return values | {one["name"]: one.get("value") for one in container.get("env", [])}


@every_part
def test_manifests_are_valid(part: str):
    assert objects(part)
    for one in objects(part):
        validate(one)


@pytest.mark.parametrize("part, kind", [("overlays/prod", kind) for kind in
    ("Deployment", "CronJob", "HorizontalPodAutoscaler", "NetworkPolicy", "PodDisruptionBudget", "Ingress", "ServiceMonitor")]
    + [("train", "Job"), ("kserve", "InferenceService")])  # fmt: skip
def test_a_misspelt_key_is_not_valid(part: str, kind: str):
    wrong = copy.deepcopy(objects(part, kind)[0])
    wrong["spec"]["replicass"] = 1
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        validate(wrong)


def test_a_misspelt_key_of_a_predictor_is_not_valid():
    wrong = copy.deepcopy(objects("kserve")[0])
    wrong["spec"]["predictor"]["maxReplica"] = 1
    with pytest.raises(kubernetes_validate.ValidationError):
        validate(wrong)


@every_part
def test_pods_have_the_least_rights(part: str):
    assert list(pod_specs(part))
    for _, spec in pod_specs(part):
        assert spec["automountServiceAccountToken"] is False and spec["enableServiceLinks"] is False
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert all({"emptyDir", "persistentVolumeClaim"} & set(volume) for volume in spec["volumes"])
        for container in spec["containers"]:
            context = spec.get("securityContext", {}) | container["securityContext"]
            assert context["runAsNonRoot"] is True and context["runAsUser"] == USER
            assert context["readOnlyRootFilesystem"] is True and context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]} and "privileged" not in context
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}


@every_part
def test_pods_have_limits_and_images_have_versions(part: str):
    for _, spec in pod_specs(part):
        assert all("sizeLimit" in volume["emptyDir"] for volume in spec["volumes"] if "emptyDir" in volume)
        for container in spec["containers"]:
            assert {"cpu", "memory"} <= set(container["resources"]["requests"]) & set(container["resources"]["limits"])
            name, _, tag = container["image"].rpartition(":")
            assert name in IMAGES and tag[0].isdigit()


@every_part
def test_environment_has_real_settings(part: str, monkeypatch: pytest.MonkeyPatch):
    for _, spec in pod_specs(part):
        check_settings(environment(part, spec), monkeypatch)


def test_example_of_the_secret_has_real_settings(monkeypatch: pytest.MonkeyPatch):
    lines = (FOLDER / "overlays/prod/secret.env.example").read_text(encoding="utf-8").splitlines()
    values = dict(line.split("=", 1) for line in lines)
    assert {"CELESTIAL_DATABASE_URL", "CELESTIAL_SERVE_API_KEYS"} <= set(values)
    check_settings(values, monkeypatch)


@every_part
def test_arguments_are_commands(part: str):
    for _, spec in pod_specs(part):
        check_command(spec["containers"][0]["args"])


@every_part
def test_probes_ask_real_routes(part: str):
    routes = {route.path for router in (api, open_inference) for route in router.routes}
    for one, spec in pod_specs(part):
        container = spec["containers"][0]
        probes = {name: container[name]["httpGet"] for name in container if name.endswith("Probe")}
        if one["kind"] == "Deployment":
            assert set(probes) == {"startupProbe", "readinessProbe", "livenessProbe"}
            assert probes["readinessProbe"]["path"] == "/ready" and probes["livenessProbe"]["path"] == "/health"
        for probe in probes.values():
            assert probe["path"] in routes
            ports = {port["containerPort"] for port in container["ports"]} | {
                port["name"] for port in container["ports"]
            }
            assert probe["port"] in ports


@pytest.mark.parametrize("part", ["overlays/dev", "overlays/prod"])
def test_what_is_named_is_there(part: str):
    there = {(one["kind"], one["metadata"]["name"]) for one in objects(part)}
    templates = [one["spec"]["template"] for one in objects(part, "Deployment")]
    assert {one["metadata"].get("namespace") for one in objects(part) if one["kind"] != "Namespace"} == {
        one["metadata"]["name"] for one in objects(part, "Namespace")
    }
    for _, spec in pod_specs(part):
        assert ("ServiceAccount", spec["serviceAccountName"]) in there
        claims = [v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v]
        assert all(("PersistentVolumeClaim", claim) in there for claim in claims)
        mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
    for selector in (
        *(one["spec"]["selector"] for one in objects(part, "Service")),
        *(one["spec"]["selector"]["matchLabels"] for one in objects(part, "PodDisruptionBudget")),
        *(spread["labelSelector"]["matchLabels"] for template in templates
          for spread in template["spec"]["topologySpreadConstraints"]),
    ):  # fmt: skip
        assert any(selector.items() <= template["metadata"]["labels"].items() for template in templates)
    for one in objects(part, "HorizontalPodAutoscaler"):
        target = one["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in there
    for one in objects(part, "Ingress"):
        backend = one["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
        assert ("Service", backend["name"]) in there
    for one in objects(part, "ServiceMonitor"):
        labels = objects(part, "Service")[0]["metadata"]["labels"]
        assert one["spec"]["selector"]["matchLabels"].items() <= labels.items()


def test_trainings_use_what_production_has():
    there = {(one["kind"], one["metadata"]["name"]) for one in objects("overlays/prod")}
    for part in ("train", "train-gpu"):
        assert objects(part)[0]["metadata"]["namespace"] == objects("overlays/prod", "Namespace")[0]["metadata"]["name"]
        for _, spec in pod_specs(part):
            claim = next(
                v["persistentVolumeClaim"]["claimName"] for v in spec["volumes"] if "persistentVolumeClaim" in v
            )
            assert {("ServiceAccount", spec["serviceAccountName"]), ("PersistentVolumeClaim", claim)} <= there
    limits = [next(pod_specs(part))[1]["containers"][0]["resources"]["limits"] for part in ("train", "train-gpu")]
    assert "nvidia.com/gpu" not in limits[0] and limits[1]["nvidia.com/gpu"] == "1"


def test_service_follows_the_registry_and_cannot_write_it():
    _, spec = next(pod for pod in pod_specs("overlays/prod") if pod[0]["kind"] == "Deployment")
    values = environment("overlays/prod", spec)
    assert values["CELESTIAL_MODEL"] == ""
    mounts = {mount["mountPath"]: mount for mount in spec["containers"][0]["volumeMounts"]}
    assert mounts[f"{values['CELESTIAL_HOME']}/models"]["readOnly"] is True
    jobs = [pod for pod in pod_specs("overlays/prod") if pod[0]["kind"] == "CronJob"]
    shared = {
        mount["subPath"] for _, pod in jobs for mount in pod["containers"][0]["volumeMounts"] if "subPath" in mount
    }
    assert "state" in shared and mounts[f"{values['CELESTIAL_HOME']}/models"]["subPath"] == "state/models"


def test_cron_jobs_look_and_retrain_one_at_a_time():
    jobs = {one["metadata"]["name"]: one["spec"] for one in objects("overlays/prod", "CronJob")}
    commands = {
        name: job["jobTemplate"]["spec"]["template"]["spec"]["containers"][0]["args"][1:] for name, job in jobs.items()
    }
    assert commands["celestial-monitor"] == ["monitor", "check"]
    assert commands["celestial-retrain"][0] == "retrain" and "--if-triggered" in commands["celestial-retrain"]
    assert all(job["concurrencyPolicy"] == "Forbid" for job in jobs.values())
    assert all(job["jobTemplate"]["spec"]["backoffLimit"] == 0 for job in jobs.values())


def test_update_drops_no_request():
    for part in ("overlays/dev", "overlays/prod"):
        deployment, settings = objects(part, "Deployment")[0]["spec"], ServeSettings()
        assert deployment["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}
        spec = deployment["template"]["spec"]
        before = int(spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][1])
        assert spec["terminationGracePeriodSeconds"] > before + settings.patience + settings.body_seconds + 1


def test_network_is_closed_but_for_what_is_named():
    policies = {one["metadata"]["name"]: one["spec"] for one in objects("overlays/prod", "NetworkPolicy")}
    all_pods = policies["celestial"]
    assert all_pods["podSelector"] == {} and set(all_pods["policyTypes"]) == {"Ingress", "Egress"}
    assert "ingress" not in all_pods
    # kustomize must not have put our label on the name server's.
    assert all_pods["egress"][0]["to"][0]["podSelector"] == {
        "matchExpressions": [{"key": "k8s-app", "operator": "In", "values": ["kube-dns"]}]
    }
    assert all(rule.get("from") and rule.get("ports") for rule in policies["celestial-serve"]["ingress"])
    assert all(rule.get("ports") for spec in policies.values() for rule in spec.get("egress", []))


def test_autoscaler_scales_by_a_gauge_that_the_service_has(tmp_path: Path):
    rule = yaml.safe_load((FOLDER / "prometheus_adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"][0]
    metric = objects("overlays/prod", "HorizontalPodAutoscaler")[0]["spec"]["metrics"][0]
    assert metric["type"] == "Pods"
    name = metric["pods"]["metric"]["name"]
    assert f"# TYPE {name} gauge" in ServiceMetrics().page().decode()
    assert rule["name"]["as"] == name and rule["seriesQuery"].startswith(name + "{")
    if shutil.which("promtool") is None:
        pytest.skip("no promtool on this machine")
    query = rule["metricsQuery"].replace("<<.Series>>", name).replace("<<.GroupBy>>", "pod")
    query = query.replace("<<.LabelMatchers>>", 'namespace="celestial",pod=~"a|b"')
    series = [
        (f'{name}{{namespace="celestial",pod="{pod}"}}', values) for pod, values in (("a", "4x9"), ("b", "0x4 10x4"))
    ]
    series.append((f'{name}{{namespace="other",pod="a"}}', "99x9"))
    test = {
        "expr": query,
        "eval_time": "1m",
        "exp_samples": [{"labels": '{pod="a"}', "value": 4}, {"labels": '{pod="b"}', "value": 5}],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump({"tests": [{"interval": "6s", "promql_expr_test": [test],
        "input_series": [{"series": one, "values": values} for one, values in series]}]}))  # fmt: skip
    done = subprocess.run(["promtool", "test", "rules", str(tmp_path / "test.yaml")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
