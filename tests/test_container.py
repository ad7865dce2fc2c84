"""The image of the demo: what is written in it, and a container that is really built and run.

The container needs Buildah, Podman and a Python base image on this machine (`CELESTIAL_PYTHON_IMAGE` names another
one); it installs from the package index. Run it alone: `pytest -m container`.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from time import monotonic, sleep

import pytest
from packaging.requirements import Requirement
from serving import neptune, tiny_model
from test_three_ways import same_products

from celestial_ml.core.files import read_json
from celestial_ml.flow.pipeline import Plan
from celestial_ml.serve.server import why_no_demo
from celestial_ml.serve.settings import ServeSettings

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
OPEN_DEMO = "CELESTIAL_SERVE_OPEN_DEMO=true"
COPIED = ("LICENSE", "README.md", "pyproject.toml", "requirements.lock", "celestial_ml", "params", "nbs", "dvc.yaml")
SINGLE = (
    "deploy/gpu.lock",
    "deploy/requirements.py",
    "deploy/slim.py",
    "data/raw.dvc",
)  # of their folders, and into the builder too
PACKAGE = (  # what of a run is served
    "model.json",
    "model.onnx",
    "model.int8.onnx",
    "model_card.html",
    "data_card.html",
    "reference.npz",
    "held_out.npz",
    "selftest.npz",
    "performance.*",
)
NOT_SERVED = {"test_predictions.npz", "monitor.npz"}  # what the gate compares versions by, and the monitor traffic
HEAVY = r"tensorflow|keras|mlflow|ploomber|jupyter|ipykernel|ipython|papermill|nbdev|dvc|pytest|scikit-learn|pip$"


def instructions(dockerfile: str = DOCKERFILE) -> list[tuple[str, str]]:
    "The instructions of a Dockerfile, each with its arguments."
    text = re.sub(r"^\s*#.*\n", "", dockerfile, flags=re.MULTILINE).replace("\\\n", " ")
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word
    ]


def test_image_is_built_in_stages_and_the_last_one_only_gets_results():
    words = instructions()
    stages = [i for i, (word, _) in enumerate(words) if word == "FROM"]
    assert len(stages) >= 2
    last = words[stages[-1] :]
    assert any(word == "COPY" and "--from=" in rest for word, rest in last)
    assert not [rest for word, rest in last if word == "RUN" and "pip" in rest]
    assert not [rest for word, rest in words if word == "COPY" and rest.split()[0] == "."]


def test_image_names_its_base_and_doesnt_float():
    arguments = dict(rest.split("=", 1) for word, rest in instructions() if word == "ARG" and "=" in rest)
    assert re.search(r"python:3\.1[1-3]-slim$", arguments["PYTHON_IMAGE"])
    stages = set(re.findall(r" AS ([\w-]+)$", DOCKERFILE, re.MULTILINE))
    bases = {rest.split()[0] for word, rest in instructions() if word == "FROM"}
    assert bases - stages == {"${PYTHON_IMAGE}"}


def test_image_has_three_targets_and_serve_is_the_default():
    stages = re.findall(r"^FROM \S+ AS ([\w-]+)$", DOCKERFILE, re.MULTILINE)
    assert {"serve", "train", "lab"} <= set(stages) and stages[-1] == "serve"
    for name in ("train", "lab"):  # neither as root, nor with a date
        stage = DOCKERFILE[DOCKERFILE.index(f" AS {name}\n") :].split("\nFROM ")[0]
        assert "\nUSER 10001:10001\n" in stage and "-environment /opt/celestial" in stage
    assert not re.search(
        r"useradd|image\.created|\bdate\b .*>", "\n".join(rest for word, rest in instructions() if word == "RUN")
    )


def test_dockerfile_is_clean():
    done = subprocess.run(
        [Path(sys.executable).with_name("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_image_installs_by_hash_from_the_one_lock_file():
    assert "PIP_REQUIRE_HASHES=1" in DOCKERFILE
    for rest in (rest for word, rest in instructions() if word == "RUN"):
        for command in re.findall(r"pip[^&]* install [^&]*", rest):
            assert re.search(r"-c requirements\.lock|-r pip\.txt|--no-deps dist/", command), command
    assert re.search(r"pip==[\d.]+ --hash=sha256:[0-9a-f]{64}\b", DOCKERFILE)


def test_gpu_lock_has_what_tensorflow_wants_there():
    "Beyond the one lock: its other build, and NVIDIA's libraries in versions that it takes, each by hash."
    text = (ROOT / "deploy/gpu.lock").read_text(encoding="utf-8")
    locked = dict(re.findall(r"^([\w-]+)==([\w.]+) \\\n    --hash=sha256:[0-9a-f]{64}\b", text, re.MULTILINE))
    try:
        wanted = [Requirement(one) for one in requires("tensorflow-cpu") or () if "and-cuda" in one]
    except PackageNotFoundError:
        pytest.skip("no tensorflow-cpu on this machine")
    assert len(wanted) > 5 and locked.keys() == {"tensorflow", *(one.name for one in wanted)}
    assert all(one.specifier.contains(locked[one.name]) for one in wanted)
    assert locked["tensorflow"] == version("tensorflow-cpu")


def test_image_has_a_user_and_a_health_check():
    last = dict(instructions())  # of each kind the last
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", last["USER"])
    assert "/health" in last["HEALTHCHECK"] and "python" in last["HEALTHCHECK"]
    assert json.loads(last["CMD"])[:2] == ["celestial", "serve"]
    assert last["EXPOSE"] == "8000"


def test_image_has_the_demo_only_on_request():
    "It listens to everybody, so whoever runs it says so; the words that show how publish it to this machine alone."
    assert json.loads(dict(instructions())["CMD"])[2:] == ["--host", "0.0.0.0"]
    assert not [rest for word, rest in instructions() if word in ("ARG", "ENV") and "OPEN_DEMO" in rest]
    assert why_no_demo(ServeSettings(), "0.0.0.0") and not why_no_demo(ServeSettings(open_demo=True), "0.0.0.0")
    for text in (DOCKERFILE, (ROOT / "README.md").read_text(encoding="utf-8")):
        shown = re.findall(r"docker run .*", text)
        assert shown and all("-p 127.0.0.1:" in line for line in shown if OPEN_DEMO in line)
        assert any(OPEN_DEMO in line for line in shown)


def test_image_holds_no_secret():
    given = " ".join(rest for word, rest in instructions() if word in ("ARG", "ENV", "COPY", "ADD"))
    assert not re.search(r"(?i)secret|token|password|credential|api_?key|\.env\b|\.netrc", given)
    assert not [rest for word, rest in instructions() if word == "ADD"]


def test_context_is_a_list_of_what_is_allowed():
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert rules[0] == "*"
    allowed = {rule[1:] for rule in rules if rule.startswith("!")}
    places = {"output": "output/*", ".celestial/models": ".celestial/models/*/*"}  # of a run, and of a version
    packages = {f"{place}/{name}" for place in places.values() for name in PACKAGE}
    assert allowed == {*COPIED, *SINGLE, "pipeline*.yaml", *places, *packages}
    for root, place in places.items():
        first = min(rules.index(f"!{place}/{name}") for name in PACKAGE)
        assert rules.index(f"!{root}") < rules.index(f"{place}/*") < first


def test_context_has_the_whole_package(smoke: Plan) -> None:
    "Every file that a packaged model.json names, and nothing that training left beside it."
    files = read_json(Path("output/smoke/model.json"))["files"]
    assert set(files) <= {path.name for name in PACKAGE for path in Path("output/smoke").glob(name)} | NOT_SERVED


# From here on with real containers.

TRUSTED = "/etc/ssl/certs/ca-certificates.crt"  # what this machine trusts, for networks with a certificate of their own
LIMITS = ("--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024")
LOCKED_DOWN = ("--network", "none", "--read-only", "--tmpfs", "/tmp", "--cap-drop", "all", *LIMITS)


def sh(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    "Run a command; an error shows what it said."
    done = subprocess.run([str(c) for c in command], capture_output=True, timeout=1800, **options)  # type: ignore[call-overload]
    if check and done.returncode:
        raise AssertionError(f"{' '.join(map(str, command))}\n{(done.stdout + done.stderr).decode()[-4000:]}")
    return done


def podman(*command: object, **options: object) -> subprocess.CompletedProcess:
    "Podman, with runc where it is: it asks the least of the machine."
    runtime = ("--runtime", "runc") if shutil.which("runc") else ()
    return sh("podman", *runtime, *command, **options)  # type: ignore[arg-type]


def build(context: Path, image: str, *options: object) -> None:
    "Build an image without pulling anything."
    trust = ("-v", f"{TRUSTED}:{TRUSTED}:ro") if Path(TRUSTED).is_file() else ()
    sh(
        "buildah",
        "bud",
        "--isolation=chroot",
        "--format=docker",
        "--pull=never",
        *trust,
        *options,
        "-t",
        image,
        context,
    )


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What a builder gets of a clone with a tiny model, among things that must not reach it."
    if missing := [tool for tool in ("buildah", "podman") if shutil.which(tool) is None]:
        pytest.skip(f"no {' and no '.join(missing)} on this machine")
    folder = tmp_path_factory.mktemp("context")
    for name in ("Dockerfile", ".dockerignore", *COPIED, *SINGLE, *(path.name for path in ROOT.glob("pipeline*.yaml"))):
        (folder / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        copy(ROOT / name, folder / name)
    tiny_model(folder / "output" / "tiny")
    tiny_model(folder / ".celestial" / "models" / "planets" / "7")
    for name in (
        ".env",
        ".git/config",
        "deploy/.env",
        ".celestial/mlflow.db",
        ".celestial/models/champion.json",
        ".celestial/models/planets/7/test_predictions.npz",
        "nbs/.ipynb_checkpoints/a.ipynb",
        "output/tiny/model.keras",
        "output/tiny/plots/a.png",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("not for the builder")
    (folder / "celestial_ml" / "__pycache__").mkdir(exist_ok=True)
    (folder / "celestial_ml" / "__pycache__" / "a.pyc").write_text("not for the builder")
    return folder


@pytest.fixture(scope="module")
def base() -> str:
    "A Python image that is on this machine."
    offered = [os.environ.get("CELESTIAL_PYTHON_IMAGE"), "docker.io/library/python:3.13-slim"]
    offered += [f"localhost/python:3.{minor}-slim" for minor in (13, 12, 11)]
    bases = [name for name in offered if name and not podman("image", "exists", name, check=False).returncode]
    if not bases:
        pytest.skip("no Python base image on this machine: podman pull docker.io/library/python:3.13-slim")
    return bases[0]


def built(context: Path, base: str, *options: str) -> Iterator[str]:
    "An image, built and removed."
    name = f"localhost/celestial-test:{uuid.uuid4().hex[:8]}"
    build(context, name, "--layers", "--build-arg", f"PYTHON_IMAGE={base}", *options)
    yield name
    podman("rmi", "--force", name, check=False)


SERVED = ("--build-arg", "MODEL=output/tiny", "--timestamp", "0")


@pytest.fixture(scope="module")
def image(context: Path, base: str) -> Iterator[str]:
    "The image of the service."
    yield from built(context, base, *SERVED)


@pytest.fixture(scope="module")
def train_image(context: Path, base: str) -> Iterator[str]:
    "The image of the pipeline."
    yield from built(context, base, "--target", "train")


@pytest.fixture(scope="module")
def lab_image(context: Path, base: str) -> Iterator[str]:
    "The image of JupyterLab."
    yield from built(context, base, "--target", "lab")


@pytest.fixture(scope="module")
def container(image: str) -> Iterator[str]:
    "The container, alive: no network, no rights, nothing to write to but /tmp."
    name = f"celestial-test-{uuid.uuid4().hex[:8]}"
    podman("run", "--detach", "--name", name, "--env", OPEN_DEMO, *LOCKED_DOWN, image)
    try:
        end = monotonic() + 90
        while podman("healthcheck", "run", name, check=False).returncode:
            logs = podman("logs", name, check=False)
            assert monotonic() < end, (logs.stdout + logs.stderr).decode()
            sleep(0.5)
        yield name
    finally:
        podman("rm", "--force", name, check=False)


ASK = """
import sys
from http.client import HTTPConnection
connection = HTTPConnection("127.0.0.1", 8000, timeout=20)
body = sys.stdin.buffer.read()
method, path = sys.argv[1:]
connection.request(method, path, body or None, {"Content-Type": "multipart/form-data; boundary=b"} if body else {})
answer = connection.getresponse()
print(answer.status, answer.read().decode())
"""


def ask(container: str, method: str, path: str, body: bytes = b"") -> tuple[int, str]:
    "A request from inside, as there is no network."
    said = podman("exec", "-i", container, "python", "-c", ASK, method, path, input=body).stdout.decode()
    status, _, text = said.partition(" ")
    return int(status), text


@pytest.mark.container
def test_builder_gets_only_what_is_allowed(context: Path, tmp_path: Path):
    (tmp_path / "Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    name = f"localhost/celestial-test:{uuid.uuid4().hex[:8]}"
    build(context, name, "-f", tmp_path / "Dockerfile", "-o", f"type=local,dest={tmp_path / 'got'}")
    podman("rmi", "--force", name, check=False)
    got = {path.relative_to(tmp_path / "got").as_posix() for path in (tmp_path / "got").rglob("*") if path.is_file()}
    wanted = {name for name in COPIED if (ROOT / name).is_file()} | {*SINGLE}
    wanted |= {path.name for path in ROOT.glob("pipeline*.yaml")}
    for place in ("output/tiny", ".celestial/models/planets/7"):
        wanted |= {f"{place}/{path.name}" for path in (context / place).iterdir() if "test_pred" not in path.name}
    wanted -= {f"output/tiny/{name}" for name in ("model.keras", "plots")}
    assert {name for name in got if not re.match("celestial_ml/|nbs/|params/", name)} == wanted
    assert "nbs/steps/04_train.ipynb" in got and not [name for name in got if "checkpoints" in name]
    assert not [name for name in got if name.endswith(".pyc")] and "celestial_ml/serve/api.py" in got


@pytest.mark.container
def test_image_has_the_locked_versions_and_nothing_to_train_with(image: str):
    listing = "import importlib.metadata as m; print(*(f'{d.name}=={d.version}' for d in m.distributions()), sep='\\n')"
    # Isolated, and of our own environment only: what the base image brings is not ours.
    said = podman("run", "--rm", *LOCKED_DOWN, image, "python", "-I", "-c", listing).stdout.decode().split()
    installed = {re.sub(r"[-_.]+", "-", line.partition("==")[0].lower()): line.partition("==")[2] for line in said}
    assert "celestial-ml" in installed and len(installed) > 20
    assert not [name for name in installed if re.match(HEAVY, name)]
    locked = set(re.findall(r"^([a-z0-9-]+==[^\s;]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))
    assert {f"{name}=={version}" for name, version in installed.items()} - locked == {
        f"celestial-ml=={installed['celestial-ml']}"
    }


def size(image: str) -> int:
    "Bytes, unpacked."
    return int(podman("image", "inspect", image, "--format", "{{.Size}}").stdout)


@pytest.mark.container
def test_image_is_small(image: str, base: str):
    "With room for a model of 22 MB, as the default run makes it: 450 MB on a base of 150."
    assert size(image) - size(base) < 300e6 - 22e6


POLL = """
from http.client import HTTPConnection
from time import sleep
while True:
    try:
        connection = HTTPConnection("127.0.0.1", 8000, timeout=5)
        connection.request("GET", "/ready")
        raise SystemExit(connection.getresponse().status != 200)
    except OSError:
        sleep(0.02)
"""


@pytest.mark.container
def test_container_is_ready_in_three_seconds(image: str):
    "From `podman run` to an answer of /ready; the quickest of three, as the machine may be busy."
    seconds = []
    for _ in range(3):
        start = monotonic()
        told = 'celestial serve --host 0.0.0.0 --open-demo & exec python -c "$0"'
        podman("run", "--rm", *LOCKED_DOWN, image, "sh", "-c", told, POLL)
        seconds.append(monotonic() - start)
    assert min(seconds) < 3, seconds


@pytest.mark.container
def test_image_is_reproducible(image: str, context: Path, base: str):
    "Built once more, and nothing of it from a cache, it has the very same layers, digest by digest."
    digests = "{{json .RootFS.Layers}}"
    first = podman("image", "inspect", image, "--format", digests).stdout
    for second in built(context, base, *SERVED, "--no-cache"):
        assert podman("image", "inspect", second, "--format", digests).stdout == first


@pytest.mark.container
def test_image_says_what_is_in_it(image: str):
    labels = json.loads(podman("image", "inspect", image, "--format", "{{json .Labels}}").stdout)
    wanted = {"title", "description", "source", "licenses", "version", "revision"}
    assert wanted <= {name.removeprefix("org.opencontainers.image.") for name in labels}
    bill = json.loads(podman("run", "--rm", *LOCKED_DOWN, image, "cat", "/opt/celestial/bom.cdx.json").stdout)
    names = {component["name"] for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX" and {"celestial-ml", "onnxruntime", "gradio"} <= names
    assert "hf-xet" not in names and bill["metadata"]["timestamp"].startswith("1980-01-01")  # SOURCE_DATE_EPOCH


@pytest.mark.container
def test_container_answers(container: str):
    assert ask(container, "GET", "/health")[0] == 200
    status, ready = ask(container, "GET", "/ready")
    assert status == 200 and json.loads(ready)["model_version"] == "tiny/7"
    form = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.jpg"\r\n\r\n%s\r\n--b--\r\n'
    status, answer = ask(container, "POST", "/predict", form % neptune("JPEG"))
    assert status == 200 and json.loads(answer)["label"] == "Neptune"
    status, page = ask(container, "GET", "/")
    assert status == 200 and "gradio" in page


@pytest.mark.container
def test_container_has_the_demo_only_on_request(image: str):
    told = 'celestial serve --host 0.0.0.0 & sleep 15; exec python -c "$0" GET /'
    said = podman("run", "--rm", *LOCKED_DOWN, image, "sh", "-c", told, ASK, check=False).stdout.decode()
    assert "The demo is off" in said and "\n404 " in said


@pytest.mark.container
def test_container_runs_without_rights_and_cannot_write(container: str):
    assert podman("exec", container, "id", "-u").stdout.strip() == b"10001"
    for place in ("/x", "/model/model.json", "/opt/celestial/x", "/home/x"):
        assert podman("exec", container, "sh", "-c", f": >> {place}", check=False).returncode


@pytest.mark.container
def test_container_stops_on_sigterm(image: str, container: str):
    start = monotonic()
    podman("stop", "--time", 10, container)
    assert monotonic() - start < 8
    assert podman("inspect", container, "--format", "{{.State.ExitCode}}").stdout.strip() == b"0"


@pytest.mark.container
def test_pipeline_in_its_image_gives_the_same_metrics(train_image: str, smoke: Plan, tmp_path: Path):
    "The whole chain at smoke size, without a network, without rights and read-only; what it leaves is on the volumes."
    volumes = []
    for name, target in (("state", "/state"), ("output", "/project/output"), ("data", "/project/data")):
        (tmp_path / name).mkdir()
        (tmp_path / name).chmod(0o777)
        volumes += ["-v", f"{tmp_path / name}:{target}"]
    tmp_path.chmod(0o755)
    podman("run", "--rm", *LOCKED_DOWN, *volumes, train_image, "celestial", "run", "smoke")
    same_products(Path("output/smoke"), tmp_path / "output/smoke")
    assert (tmp_path / "state/mlflow.db").is_file()
    assert read_json(tmp_path / "output/smoke/model.json")["lineage"]["code_revision"] == "unknown"
    done = podman("run", "--rm", *LOCKED_DOWN, *volumes, train_image, "celestial", "monitor", "check", check=False)
    assert done.returncode in (0, 1) and b"Traceback" not in done.stderr


OPEN = """
import json
from urllib.request import Request, urlopen
from jupyter_client import BlockingKernelClient, find_connection_file
from jupyter_server.serverapp import list_running_servers

[server] = list_running_servers()

def ask(where, /, **body):
    data = json.dumps(body).encode() if body else None
    request = Request(f"http://127.0.0.1:8888/{where}", data, {"Authorization": f"token {server['token']}"})
    return urlopen(request, timeout=60).read()

assert b"JupyterLab" in ask("lab/workspaces/celestial")
step = "nbs/steps/01_acquire.ipynb"
assert json.loads(ask(f"api/contents/{step}"))["content"]["cells"]
kernel = json.loads(ask("api/sessions", path=step, name=step, type="notebook", kernel={"name": "python3"}))["kernel"]["id"]
client = BlockingKernelClient(connection_file=find_connection_file(f"kernel-{kernel}.json"))
client.load_connection_file()
client.start_channels()
client.execute_interactive("import celestial_ml.flow.pipeline, tensorflow; print('trains')", timeout=120)
"""


@pytest.mark.container
def test_lab_opens_a_step_and_runs_a_cell(lab_image: str, tmp_path: Path):
    name = f"celestial-test-{uuid.uuid4().hex[:8]}"
    tmp_path.chmod(0o777)
    podman("run", "--detach", "--name", name, *LOCKED_DOWN, "-v", f"{tmp_path}:/state", lab_image)
    try:
        end = monotonic() + 90
        while (done := podman("exec", "-i", name, "python", "-c", OPEN, check=False)).returncode:
            logs = podman("logs", name, check=False)
            assert monotonic() < end, (done.stderr + logs.stdout + logs.stderr).decode()
            sleep(0.5)
        assert done.stdout.split() == [b"trains"]
        assert podman("exec", name, "id", "-u").stdout.strip() == b"10001"
    finally:
        podman("rm", "--force", name, check=False)
