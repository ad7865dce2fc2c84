"Faults, planted into a copy of a folder of class folders: what `data check` must find."

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter

from celestial_ml.data.checks import Finding
from celestial_ml.data.images import decode_image, find_pictures

Changed = Callable[[Image.Image, np.random.Generator], Image.Image]


def _jpeg(image: Image.Image, quality: int) -> bytes:
    image.convert("RGB").save(file := io.BytesIO(), "JPEG", quality=quality)
    return file.getvalue()


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    return Image.fromarray((np.asarray(image, np.float32) * factor).clip(0, 255).astype(np.uint8))


def _near(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    "A copy that a person makes: saved again, and brighter, smaller, sharper or a pixel aside."
    ways: list[Callable[[], Image.Image]] = [
        lambda: image,
        lambda: ImageEnhance.Brightness(image).enhance(0.9),
        lambda: image.resize((max(24, image.width * 4 // 5), max(24, image.height * 4 // 5)), Image.Resampling.LANCZOS),
        lambda: ImageEnhance.Contrast(image).enhance(0.92),
        lambda: Image.fromarray(np.roll(np.asarray(image), max(1, image.width // 64), axis=1)),
    ]
    return Image.open(io.BytesIO(_jpeg(ways[rng.integers(len(ways))](), 80)))


def _noise(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return Image.fromarray(rng.integers(0, 256, (image.height, image.width, 3), np.uint8))


def _foreign(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    "A page of bars and circles in strong colours."
    page = Image.new("RGB", image.size, tuple(rng.integers(120, 256, 3).tolist()))
    draw = ImageDraw.Draw(page)
    for _ in range(14):
        box = np.sort(rng.integers(0, min(image.size), (2, 2)), axis=0).ravel().tolist()
        (draw.rectangle if rng.random() < 0.5 else draw.ellipse)(box, fill=tuple(rng.integers(0, 256, 3).tolist()))
    return page


PICTURES: dict[str, Changed] = {  # a new picture of what is wrong → made from a good one
    "blank": lambda image, rng: Image.new("RGB", image.size, tuple(rng.integers(0, 256, 3).tolist())),
    "black": lambda image, rng: Image.new("RGB", image.size),
    "over_exposed": lambda image, rng: _scaled(image, 8),
    "under_exposed": lambda image, rng: _scaled(image, 0.04),
    "blurred": lambda image, rng: image.filter(ImageFilter.GaussianBlur(image.width / 12)),
    "noise": _noise,
    "inverted": lambda image, rng: Image.fromarray(255 - np.asarray(image)),
    "foreign": _foreign,
    "tiny": lambda image, rng: image.resize((10, 10)),
    "huge": lambda image, rng: image.resize((image.width * 5, image.height * 5)),
    "stretched": lambda image, rng: image.resize((image.width * 4, image.height)),
    "cmyk": lambda image, rng: image.convert("CMYK"),
    "one_bit": lambda image, rng: image.convert("1"),
    "near_copy": _near,
}
COPIES = ("copy", "copy_other_label", "near_copy_other_label", "wrong_label")
FILES = ("empty", "text", "truncated", "animated", "passed_over", "no_class")
KINDS = (*PICTURES, *COPIES, *FILES)
CHECKS = {  # kind → the checks that may find it
    **dict.fromkeys(("blank", "black"), ("not_blank",)),
    "under_exposed": ("not_blank", "no_outliers"),
    "over_exposed": ("well_exposed",),
    "blurred": ("in_focus",),
    "noise": ("not_noise", "no_outliers"),
    **dict.fromkeys(("inverted", "foreign"), ("no_outliers", "one_mode")),
    "tiny": ("large_enough", "even_sizes"),
    **dict.fromkeys(("huge", "stretched"), ("even_sizes",)),
    **dict.fromkeys(("cmyk", "one_bit"), ("one_mode",)),
    "near_copy": ("no_near_duplicates", "varied"),
    "copy": ("no_duplicates",),
    "copy_other_label": ("one_label_each",),
    "near_copy_other_label": ("near_duplicates_together",),
    "wrong_label": ("labels_fit",),
    **dict.fromkeys(("empty", "text", "truncated", "animated"), ("readable",)),
    **dict.fromkeys(("passed_over", "no_class"), ("passed_over",)),
}


def plant(
    folder: Path,  # of class folders; changed
    each: int = 5,
    kinds: tuple[str, ...] = KINDS,
    seed: int = 0,
) -> dict[str, list[str]]:  # kind → paths below the folder
    "Plant some of each kind, each made of another good picture."
    rng = np.random.default_rng(seed)
    paths = sorted(Path(p) for p in find_pictures(folder))
    labels = sorted({path.parent.name for path in paths})
    chosen = iter(rng.permutation(len(paths))[: each * len(kinds)].tolist())
    planted: dict[str, list[str]] = {kind: [] for kind in kinds}
    for kind in kinds:
        for _ in range(each):
            good = paths[next(chosen)]
            others = [label for label in labels if label != good.parent.name]
            other = folder / others[rng.integers(len(others))]
            planted[kind].append(_plant_one(kind, good, other, folder, rng).relative_to(folder).as_posix())
    return planted


def found(planted: dict[str, list[str]], findings: list[Finding]) -> dict[str, int]:  # kind → how many
    "How many of each kind are named by a check that is for it; of the files passed over only some are named, all are counted."
    bad = {f.check: f for f in findings if f.status != "pass"}
    passed = bad["passed_over"].counts if "passed_over" in bad else {}
    counts = {"passed_over": passed.get(".bmp", 0), "no_class": passed.get("no_class", 0)}
    for kind in planted.keys() - counts.keys():
        named = {path for check in CHECKS[kind] if check in bad for path in bad[check].images}
        counts[kind] = sum(any(path.endswith(one) for path in named) for one in planted[kind])
    return {kind: counts[kind] for kind in planted}


def _plant_one(kind: str, good: Path, other: Path, folder: Path, rng: np.random.Generator) -> Path:
    "Plant one fault beside, or in place of, a good picture; its path."
    home = other if kind.endswith("other_label") or kind == "wrong_label" else good.parent
    at = home / f"planted_{kind}_{good.parent.name}_{good.stem}"  # files of two classes may have one name
    image = Image.fromarray(decode_image(good))
    if kind in PICTURES or kind == "near_copy_other_label":
        made = PICTURES[kind.removesuffix("_other_label")](image, rng)
        path = at.with_name(at.name + (".png" if made.mode == "1" else ".jpg"))
        made.save(path, quality=95)
        return path
    path = at.with_name(at.name + good.suffix)
    if kind in COPIES:
        (shutil.move if kind == "wrong_label" else shutil.copy)(good, path)
    elif kind == "animated":
        path = at.with_name(at.name + ".webp")
        image.save(path, save_all=True, append_images=[image.rotate(90)])
    elif kind in ("passed_over", "no_class"):
        path = at.with_name(at.name + ".bmp") if kind == "passed_over" else folder / path.name
        image.save(path)
    else:
        content = good.read_bytes()
        path.write_bytes(
            {"empty": b"", "text": b"Dear sir or madam,\n" * 9, "truncated": content[: len(content) * 3 // 5]}[kind]
        )
    return path
