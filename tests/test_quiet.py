"A user's terminal shows what the command has to say, and no messages of the libraries behind it."

import re
import subprocess
import sys
from pathlib import Path

import httpx
from serving import neptune, running, tiny_model

NOISE = re.compile(r"absl|oneDNN|retracing|cuda|GPU|tensorflow|\w*Warning:|^[IWE]\d{4} ", re.IGNORECASE | re.MULTILINE)


def noise(text: str) -> list[str]:
    return [line for line in text.splitlines() if NOISE.search(line)]


def test_tensorflow_is_imported_without_messages() -> None:
    program = "from celestial_ml.core.quiet import quiet_tensorflow; quiet_tensorflow(); import tensorflow, keras"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert noise(done.stdout + done.stderr) == []


def test_a_run_prints_only_its_own_lines(smoke_run: Path) -> None:
    assert noise((smoke_run / "run.err").read_text()) == []


def test_serve_greets_first_and_logs_no_page_files(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with running(tiny_model(tmp_path / "model"), log, fresh=True) as url, httpx.Client(base_url=url) as client:
        assert "Serving" not in log.read_text() and "champion is" not in log.read_text(), "nothing before the greeting"
        page = client.get("/").text
        files = re.findall(r'(?:href|src)="\.?(/?(?:assets|theme)[^"]*\.(?:css|js)[^"]*)"', page)
        assert files and all(client.get("/" + file.lstrip("/")).status_code == 200 for file in files)
        assert client.get("/assets/no-such-file.css").status_code == 404
        assert client.post("/predict", files={"image": neptune()}).status_code == 200
    text = log.read_text()
    paths = re.findall(r'"path": "([^"]*)"', text)
    assert "/predict" in paths and "/" in paths and not set(paths) & {f"/{file.lstrip('/')}" for file in files}
    assert "/assets/no-such-file.css" in paths, "an error is logged"
    assert noise(text) == []
