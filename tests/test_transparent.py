"A cut-out has one ground, black or white, wherever its picture is decoded; an opaque picture is what it was."

import json
from pathlib import Path

import httpx
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageDraw
from serving import encoded, running, tiny_model

from celestial_ml.batch.job import batch
from celestial_ml.core.params import Prepare
from celestial_ml.data.images import decode_image, read_costly
from celestial_ml.data.prepare import Preparer, prepare_images
from celestial_ml.package.graph import Graph
from celestial_ml.serve.predictor import Predictor


def cutout(colour: tuple[int, int, int], side: int = 60) -> Image.Image:
    "A disc on transparent ground, with a soft edge."
    image = Image.new("RGBA", (side, side), (*colour, 0))
    draw, at = ImageDraw.Draw(image), side // 4
    draw.ellipse((at - 2, at - 2, side - at + 2, side - at + 2), (*colour, 128))
    draw.ellipse((at, at, side - at, side - at), (*colour, 255))
    return image


def forms(image: Image.Image) -> dict[str, bytes]:
    "One picture in every way that a file says what is transparent, with hard edges."
    alpha = image.getchannel("A").point(lambda a: 255 * (a > 200))
    hard = Image.merge("RGBA", (*image.convert("RGB").split(), alpha))
    key = (1, 254, 3)  # a colour that stands for nothing
    keyed = Image.composite(hard.convert("RGB"), Image.new("RGB", hard.size, key), alpha)
    palette = keyed.quantize(8, dither=Image.Dither.NONE)
    index = palette.getpixel((0, 0))
    gray = Image.composite(hard.convert("L"), Image.new("L", hard.size, 254), alpha)
    return {
        "RGBA": encoded(hard),
        "LA": encoded(hard.convert("LA")),
        "RGB, one colour transparent": encoded(keyed, transparency=key),
        "L, one level transparent": encoded(gray, transparency=254),
        "palette, one entry transparent": encoded(palette, transparency=index),
        "palette, alpha of each": encoded(palette, transparency=bytes([0 if i == index else 255 for i in range(8)])),
        "WebP": encoded(hard, "WEBP", lossless=True),
    }


@pytest.mark.parametrize("kind", forms(cutout((0, 0, 0))))
@pytest.mark.parametrize(("level", "ground"), [(0, 255), (20, 255), (90, 0), (240, 0)])
def test_every_form_of_transparency_has_the_ground_that_it_stands_out_from(kind: str, level: int, ground: int) -> None:
    content = forms(cutout((level,) * 3))[kind]
    pixels = decode_image(content)
    assert (pixels[0, 0] == ground).all() and abs(pixels[30, 30].astype(int) - level).max() <= 1
    for name, other in (("black", 0), ("white", 255)):
        assert (decode_image(content, background=name)[0, 0] == other).all()


def test_soft_edges_are_mixed_with_the_ground() -> None:
    edge = (30, 14)
    assert abs(int(decode_image(encoded(cutout((0, 0, 0))))[edge][0]) - 127) <= 1
    assert abs(int(decode_image(encoded(cutout((200, 200, 200))))[edge][0]) - 100) <= 1


def test_opaque_pictures_are_the_same_on_every_ground() -> None:
    pixels = np.random.default_rng(0).integers(0, 60, (40, 50, 3), np.uint8)  # as dark as a drawing in ink
    picture = Image.fromarray(pixels)
    for content in (encoded(picture), encoded(picture.convert("RGBA")), encoded(picture, "WEBP", lossless=True)):
        for ground in ("auto", "black", "white"):
            assert (decode_image(content, background=ground) == pixels).all()
    scan = encoded(np.full((20, 20), 5 * 257, np.uint16))
    assert (decode_image(scan, background="white") == 5).all()


def test_nothing_but_transparency_is_black() -> None:
    assert (decode_image(encoded(Image.new("RGBA", (20, 20)))) == 0).all()


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_a_large_drawing_has_one_ground(kind: str) -> None:
    "Reduced in strips, in another process: all of the picture decides, though its upper half is bright."
    image = cutout((10, 10, 10), 3000)
    ImageDraw.Draw(image).rectangle((1400, 0, 1600, 100), (250, 250, 250, 255))
    content = encoded(image, kind, **({"lossless": True, "method": 0} if kind == "WEBP" else {"compress_level": 1}))
    pixels = decode_image(content)
    assert pixels.shape == (1500, 1500, 3) and (pixels[[0, -1], 0] == 255).all()
    assert (read_costly(content, background="black").pixels[[0, -1], 0] == 0).all()


@pytest.mark.parametrize("background", [None, "auto", "white"])
def test_the_answer_is_the_same_wherever_it_is_given(tmp_path: Path, background: str | None) -> None:
    "Of a package without the field (an older one) the ground is black."
    model = tiny_model(tmp_path / "model")
    about = json.loads((model / "model.json").read_text())
    if background:
        (model / "model.json").write_text(json.dumps(about | {"background": background}))
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name, image in {
        "ink": cutout((5, 5, 10)),
        "large": cutout((5, 5, 10), 2100),
        "red": cutout((220, 60, 60)),
    }.items():
        (pictures / f"{name}.png").write_bytes(encoded(image))
    predictor = Predictor(model)
    assert predictor.background == predictor.manifest.background == (background or "black")

    scores = {}
    for path in sorted(pictures.iterdir()):
        picture = decode_image(path, background=background or "black")
        assert (picture[0, 0] == {"auto": 0 if path.stem == "red" else 255, "white": 255}.get(background, 0)).all()
        scores[path.stem] = float(Graph(model).run(picture)["ood_score"])
        assert abs(predictor.predict(path).ood_score - scores[path.stem]) < 1e-4
        assert (predictor.see(path).picture[0, 0] == picture[0, 0]).all(), "and what is explained is that picture"
    table = pq.read_table(batch(str(pictures), tmp_path / "out.parquet", predictor).where.out).to_pydict()
    assert {Path(p).stem: pytest.approx(scores[Path(p).stem], abs=1e-4) for p in table["path"]} == dict(
        zip((Path(p).stem for p in table["path"]), table["ood_score"], strict=True)
    )
    with running(model, tmp_path / "server.log", demo=False) as url:
        for path in pictures.iterdir():
            answer = httpx.post(f"{url}/predict", files={"image": path.read_bytes()}, timeout=60).json()
            assert answer["ood_score"] == pytest.approx(scores[path.stem], abs=1e-4), path.name


@pytest.mark.parametrize("background", ["auto", "black", "white"])
def test_training_sees_the_same_ground(tmp_path: Path, background: str) -> None:
    (tmp_path / "ink.png").write_bytes(content := encoded(cutout((0, 0, 0))))
    row = {"path": "ink.png", "label": "a", "split": "train", "sha256": "", "error": None, "format": "PNG", "bytes": 1}
    p = Prepare(size=32, background=background)
    pixels, _ = prepare_images(pd.DataFrame([row]), p, tmp_path)
    assert (pixels[0] == Preparer(p)(decode_image(content, background=background))).all()
    assert pixels[0][0, 0, 0] == (0 if background == "black" else 255)


def test_every_step_that_knows_the_ground_decodes_with_it() -> None:
    "The first step has no parameters of the preparation; its contact sheet is `auto`."
    for path in (Path(__file__).resolve().parent.parent / "nbs/steps").glob("*.ipynb"):
        cells = json.loads(path.read_text())["cells"]
        lines = [line for cell in cells if cell["cell_type"] == "code" for line in "".join(cell["source"]).splitlines()]
        bare = [line for line in lines if "decode_image(" in line and "background=" not in line]
        assert not bare or path.stem == "01_acquire", path.name
