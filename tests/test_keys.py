"`celestial keys`: what it prints is what the service takes, and what it keeps is no secret."

import os
import pty
import select
import subprocess
import sys
from pathlib import Path

import httpx
from serving import neptune, running, tiny_model

CELESTIAL = str(Path(sys.executable).with_name("celestial"))


def run(*arguments: str, words: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run([CELESTIAL, "keys", *arguments], input=words, capture_output=True, text=True, timeout=120)


def value(printed: str, name: str) -> str:
    "Of a variable, as a shell reads the line."
    [line] = [line.strip() for line in printed.splitlines() if line.strip().startswith(name)]
    shell = subprocess.run(["sh", "-c", f'{line}; printf %s "${name}"'], capture_output=True, text=True, check=True)
    return shell.stdout


def test_a_key_opens_the_service(tmp_path: Path) -> None:
    printed, other = run("new", "observatory").stdout, run("new", "observatory").stdout
    key, kept = printed.split("once:")[1].split()[0], value(printed, "CELESTIAL_SERVE_API_KEYS")
    assert printed.count(key) == 2 and key not in kept and key not in other and kept.startswith("observatory:")
    model = tiny_model(tmp_path / "model")
    with running(model, tmp_path / "log", demo=False, api_keys=kept) as url, httpx.Client(base_url=url) as client:
        assert client.post("/predict", files={"image": neptune()}).status_code == 401
        allowed = client.post("/predict", files={"image": neptune()}, headers={"X-API-Key": key})
        assert allowed.status_code == 200 and allowed.json()["label"] == "Neptune"


def test_a_login_opens_the_demo(tmp_path: Path) -> None:
    result = run("login", "anna", words="per aspera\n")
    kept = value(result.stdout, "CELESTIAL_SERVE_DEMO_LOGIN")
    assert result.returncode == 0 and "per aspera" not in result.stdout + result.stderr and kept.startswith("anna:")
    with running(tiny_model(tmp_path / "model"), tmp_path / "log", demo_login=kept) as url:
        with httpx.Client(base_url=url, timeout=30) as client:
            assert client.post("/login", data={"username": "anna", "password": "ad astra!"}).status_code == 400
            assert client.post("/login", data={"username": "anna", "password": "per aspera"}).status_code == 200


def test_a_terminal_hides_the_password() -> None:
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [CELESTIAL, "keys", "login", "anna"], stdin=theirs, stdout=subprocess.PIPE, stderr=theirs, start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(theirs)
    shown = b""
    for _ in range(2):  # it's asked for twice
        while not shown.endswith(b": "):  # the space comes once nothing is shown any more
            assert select.select([ours], [], [], 60)[0], shown
            shown += os.read(ours, 1000)
        os.write(ours, b"per aspera\n")
        shown += b" > "
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and b"per aspera" not in shown + out, shown
    assert out.startswith(b"CELESTIAL_SERVE_DEMO_LOGIN='anna:")


def test_mistakes_are_errors_without_a_traceback() -> None:
    for arguments, words, expected in (
        (("new", "a b"), "", "can't be the name of a key"),
        (("login", "a,b"), "per aspera\n", "can't be a name"),
        (("login", "anna"), "short\n", "too short"),
        (("login", "anna"), "", "too short"),
    ):
        result = run(*arguments, words=words)
        assert result.returncode == 2 and expected in result.stderr and "Traceback" not in result.stderr
        assert result.stdout == ""
