"""What people write into params files and behind --set: taken as it stands, or refused with a way out"""

import random
from pathlib import Path

import pytest

from celestial_ml.core.params import ParamsError, default_yaml, load_params, parse_yaml
from celestial_ml.flow.grid import parse_grid


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "default.yaml").write_text(default_yaml(), encoding="utf-8")
    return tmp_path


def written(folder: Path, content: str | bytes) -> Path:
    path = folder / "own.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def refusal(folder: Path, content: str | bytes) -> ParamsError:
    with pytest.raises(ParamsError) as e:
        load_params(written(folder, content), folder=folder)
    assert "own.yaml" in e.value.message
    return e.value


TEXTS = ["010", "016", "1:30", "2024-01-01", "on", "yes", "1e-3", "0x10", "1_000", ".inf", "12", "true", "=", "a#b"]


@pytest.mark.parametrize(
    "text", [*TEXTS, "a #b", "#b", "a: b", "*a", "&a", "!a", "[a", "{a", "it's", "- a", "%", "@", "`"]
)
def test_text_behind_set_is_taken_literally(folder: Path, text: str) -> None:
    params = load_params("default", [f"data.folder={text}", f"tune.study={text}"], folder)
    assert (params.data.folder, params.tune.study) == (text, text)
    assert params.tune.storage is None, "what was not set stays null"


@pytest.mark.parametrize("text", TEXTS)
def test_text_in_a_file_is_taken_literally(folder: Path, text: str) -> None:
    params = load_params(written(folder, f"track: {{experiment: {text}}}\ndata:\n  folder: {text}\n"), folder=folder)
    assert (params.track.experiment, params.data.folder) == (text, text)


def test_quotes_give_text_and_null_gives_none(folder: Path) -> None:
    for text, value in {"null": None, "~": None, "": None, "'null'": "null", '"a b "': "a b ", "''": ""}.items():
        assert load_params("default", [f"data.folder={text}"], folder).data.folder == value


@pytest.mark.parametrize(
    ("text", "instead"),
    [
        ("010", "10"),
        ("016", "16"),
        ("-01", "-1"),
        ("1_000", "1000"),
        ("0x10", "16"),
        ("0o10", "8"),
        ("0b11", "3"),
        ("'7'", "7"),
        ("7.0", "7"),
        ("1e1", "10"),
        ("1:30", "decimal"),
        (".inf", "finite"),
        ("nan", "finite"),
    ],
)
def test_whole_numbers_are_decimal(folder: Path, text: str, instead: str) -> None:
    for error in (refusal(folder, f"train: {{epochs: {text}}}\nseed: {text}\n"), refusal(folder, f"seed: {text}\n")):
        assert instead in error.hint.rpartition("Write")[2]
    with pytest.raises(ParamsError) as e:
        load_params("default", [f"seed={text}"], folder)
    assert instead in e.value.hint.rpartition("Write")[2]


@pytest.mark.parametrize("text", ["01.5", "1,5", "inf", "-.inf", ".nan", "1e999", "1:30", "0x1", "5%", "9" * 5000, "٣"])
def test_numbers_are_decimal_and_finite(folder: Path, text: str) -> None:
    with pytest.raises(ParamsError) as e:
        load_params("default", [f"register.max_ms={text}"], folder)
    assert "register.max_ms" in e.value.message and len(e.value.message) < 6000


@pytest.mark.parametrize(("text", "value"), [("1e-3", 1e-3), ("+.5", 0.5), ("1", 1), ("1.", 1.0), ("5E-1", 0.5)])
def test_decimal_numbers_of_every_form_are_read(folder: Path, text: str, value: float) -> None:
    assert load_params("default", [f"train.lr={text}"], folder).train.lr == value
    assert load_params(written(folder, f"train: {{lr: {text}}}"), folder=folder).train.lr == value


@pytest.mark.parametrize("text", ["yes", "no", "on", "off", "True", "FALSE", "'true'", "1", "y"])
def test_booleans_are_true_or_false(folder: Path, text: str) -> None:
    assert "true or false" in refusal(folder, f"prepare: {{grayscale: {text}}}").hint
    with pytest.raises(ParamsError):
        load_params("default", [f"prepare.grayscale={text}"], folder)
    assert load_params("default", ["prepare.grayscale=false"], folder).prepare.grayscale is False


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("seed: 1\ntrain:\n  lr: 0.1\n  lr: 0.2\n", 4),
        ("train: {lr: 0.1}\nseed: 1\ntrain: {epochs: 3}\n", 3),
        (b"# K\xf6ln\nseed: 1\n", 1),
        (b"seed: 1\ndata:\n  folder: caf\xe9\n", 3),
        ("seed: 1\n".encode("utf-16"), 1),
        (b"seed: 1\nrun: \x00\n", 2),
        ("train:\n\tlr: 0.1\n", 2),
        ("seed: 1\ndata: {folder: " + "[" * 50 + "]" * 50 + "}\n", 2),
        ("seed: " + "[" * 200_000, 1),
        ("a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{f'*{a},' * 10}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)), 5),
        ("a: &a [*a]\n", 1),
        ("seed: !!python/object/apply:os.system [ls]\n", 1),
        ("seed: 1\n---\nseed: 2\n", 2),
        ("? [a]\n: 1\n", 1),
        ("seed: 1\ntrain: [1,\n", 3),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_by_file_and_line(folder: Path, content: str | bytes, line: int) -> None:
    assert f"line {line}" in refusal(folder, content).message


def test_a_file_that_is_not_yaml_parameters_is_refused(folder: Path) -> None:
    for content in ("- a\n- b\n", "text", "train: [1]\n", "train: 3\n", "12: 3\n", "<<: {seed: 3}\n"):
        refusal(folder, content)
    refusal(folder, b"# " + bytes(2_000_000))


@pytest.mark.parametrize(
    "content", ["", "# nothing\n", "\ufeffseed: 3\n", "seed: 3\r\ntrain:\r\n  lr: 0.1\r\n", "train:\n"]
)
def test_harmless_forms_are_read(folder: Path, content: str) -> None:
    assert load_params(written(folder, content), folder=folder).seed in (3, 7)


def test_the_file_of_defaults_reads_as_the_defaults(folder: Path) -> None:
    from celestial_ml.core.params import Params

    assert load_params("default", folder=folder) == Params()
    aliased = "train: &t {epochs: 3}\n"
    assert load_params(written(folder, aliased), folder=folder).train.epochs == 3


def test_grids_and_spaces_take_values_as_set_does(folder: Path) -> None:
    assert parse_grid("data.folder=010,on,a #b,'c,d',it's") == ("data.folder", ["010", "on", "a #b", "c,d", "it's"])
    assert parse_grid("train.lr=1e-3,0.1")[1] == [0.001, 0.1]
    assert parse_grid("register.must_beat=[trivial],[]")[1] == [["trivial"], []]
    assert parse_grid("seed=010")[1] == ["010"], "which the schema refuses"
    space = 'tune.space={"train.schedule": [constant, cosine], "train.lr": {low: 1e-4, high: 1e-2, log: true}}'
    params = load_params("default", [space], folder)
    assert params.tune.space["train.schedule"] == ["constant", "cosine"]
    with pytest.raises(ParamsError):
        load_params("default", ['tune.space={"train.lr": {low: 1e-4, high: 0x10}}'], folder)


def test_random_text_gives_a_value_or_an_error(folder: Path) -> None:
    rng = random.Random(7)
    for _ in range(2000):
        text = "".join(rng.choice("ab:1 -[]{}#&*!|>'\"%@`,?\n\t\\=.é") for _ in range(rng.randrange(30)))
        try:
            parse_yaml(text, "-")
        except ParamsError as e:
            assert e.message.startswith("-")
