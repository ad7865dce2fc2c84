"What the tests of the registry share: packaged models that are tiny, but whole, with answers on file."

from pathlib import Path

import numpy as np
from PIL import Image
from serving import tiny_model

from celestial_ml.core.files import read_json, sha256_of, write_json
from celestial_ml.package.graph import served_answers
from celestial_ml.package.self_test import write_selftest
from celestial_ml.planets.bodies import BODIES
from celestial_ml.planets.renderer import render
from celestial_ml.registry.evidence import EVIDENCE, Evidence, short

LABELS = np.array(["Mars", "Neptune"])


def evidence_of(right: np.ndarray, sha256: list[str], paths: list[str], learned: list[str]) -> Evidence:
    "Answers for pictures of Mars and Neptune in turn, of which these are right."
    n = len(right)
    labels = LABELS[np.arange(n) % 2]
    return Evidence(
        path=np.array(paths),
        sha256=np.array(sha256),
        label=labels,
        predicted=np.where(right, labels, "Moon"),
        baseline=np.full(n, "Moon"),
        probabilities=np.full((n, len(BODIES)), 1 / len(BODIES), np.float32),
        ood_score=np.zeros(n, np.float32),
        learned=short(learned),
    )


def package(
    folder: Path,
    right: np.ndarray | float = 0.95,  # which images it gets right, or the share of 200
    sha256: list[str] | None = None,  # of the images; None: made up
    paths: list[str] | None = None,
    learned: tuple[str, ...] = (),  # SHA-256 of images
    name: str = "tiny",
) -> Path:
    "A package that the gate would let pass, made of a real ONNX file."
    tiny_model(folder)
    right = np.arange(200) < right * 200 if isinstance(right, float) else right
    sha256 = sha256 or [sha256_of(str(i).encode()) for i in range(len(right))]
    images = np.stack([render(body, size=size)[:16, :16] for body in LABELS for size in (32, 48)])
    write_selftest(folder / "selftest.npz", images, *served_answers(folder / "model.onnx", images))
    evidence_of(right, sha256, paths or [f"nowhere/{i}.png" for i in range(len(right))], list(learned)).save(
        folder / EVIDENCE
    )
    accuracy = float(np.mean(right))
    scores = {"precision": accuracy, "recall": accuracy, "f1": accuracy}
    span = {"value": accuracy, "low": accuracy - 0.02, "high": min(1.0, accuracy + 0.02)}
    metrics = {
        "split": "test",
        "images": len(right),
        "images_sha256": sha256_of("".join(sha256).encode()),
        "accuracy": accuracy,
        "macro": scores,
        "intervals": {"accuracy": span, "macro_f1": span, "ece": {"value": 0.02, "low": 0.01, "high": 0.03}},
        "per_class": {str(label): scores | {"images": len(right) // 2} for label in LABELS},
        "fairness": {"worst": None, "best": None, "gap": None},
    }
    about = read_json(folder / "model.json") | {
        "name": name,
        "version": name,
        "input": "uint8 (n, height, width, 3), RGB pictures of any size",
        "file": "model.onnx",
        "temperature": 1.0,
        "parity": 1e-6,
        "metrics": metrics,
        "compression": {"files": {"float32": {"ms": 0.1}}},
        "lineage": {
            "run": name,
            "mlflow_run": "0" * 32,
            "code_revision": "unknown",
            "data_sha256": "0" * 64,
            "source": "render",
            "created": "2026-01-01T00:00:00+00:00",
            "parameters": {"train": {"lr": accuracy}},
        },
    }
    about["files"] |= {file: sha256_of(folder / file) for file in ("selftest.npz", EVIDENCE)}
    write_json(folder / "model.json", about)
    return folder


def photographs(folder: Path, n: int, seed: int = 0) -> tuple[list[str], list[str]]:  # paths, SHA-256
    "Pictures of Mars and Neptune in turn, on the disk."
    folder.mkdir(parents=True, exist_ok=True)
    paths, bodies = [], {label: render(str(label), size=32) // 2 for label in LABELS}
    for i in range(n):
        paths.append(str(folder / f"{i}.png"))
        noise = np.random.default_rng((seed, i)).integers(0, 20, (32, 32, 3)).astype(np.uint8)
        Image.fromarray(bodies[LABELS[i % 2]] + noise).save(paths[-1])
    return paths, [sha256_of(Path(path)) for path in paths]
