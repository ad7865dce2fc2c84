"""The default images are the same bytes on every machine: whatever its processor can do, and however many cores it has."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Of three images a body with seed 7, as a run writes them. A change of the renderer changes it, and then the figures of
# README too: `python tests/test_same_bytes.py` prints the new one.
CHECKSUM = "9f317d5e54e23e99c2b718ec1fe39f2d105dd9f24df8850ae58f08158e7635f5"
CODE = "from test_same_bytes import checksum; print(checksum())"


def checksum() -> str:
    "Of the files of a small data set."
    import tempfile

    from celestial_ml.planets.source import write_rendered

    with tempfile.TemporaryDirectory() as folder:
        images = write_rendered(Path(folder) / "images", per_class=3, size=128, seed=7)
        files = sorted(path for path in images.rglob("*") if path.is_file())
        return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def features() -> list[str]:
    "What NumPy uses of this processor beyond what every processor of its kind has."
    code = "from numpy._core._multiarray_umath import __cpu_dispatch__ as d, __cpu_features__ as f; print(*[n for n in d if f.get(n)])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


MACHINES = {
    "this one": {},
    "without wide instructions": {"NPY_DISABLE_CPU_FEATURES": " ".join(features()), "OPENBLAS_CORETYPE": "Prescott"},
    "without the widest": {"NPY_DISABLE_CPU_FEATURES": " ".join(f for f in features() if "512" in f or f == "X86_V4")},
    "one core and a simple JPEG encoder": dict.fromkeys(
        ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "JSIMD_FORCENONE"), "1"
    ),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_images_are_the_same_bytes(machine: str) -> None:
    environment = os.environ | MACHINES[machine] | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    answer = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.strip() == CHECKSUM


if __name__ == "__main__":
    print(checksum())
