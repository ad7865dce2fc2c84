"""The reference pages, written from what they describe whenever the site is built: nothing here can go stale.

Part of mkdocs.yml's hook and no part of the package. Each function returns a page in Markdown.
"""

import json
import re
from functools import cache
from inspect import cleandoc
from pathlib import Path
from typing import Any

ROOMS = (  # from the ground up
    *("core", "data", "planets", "model", "package", "registry", "serve", "batch", "demo"),
    *("monitor", "label", "flow", "reports", "workbench", "cli"),
)
METHODS = ("get", "post", "put", "patch", "delete")


def bar(text: object) -> str:
    "Text for a cell of a Markdown table."
    return str(text).replace("|", "\\|").replace("\n", " ")


def code(value: object) -> str:
    "A value as JSON, for a cell of a Markdown table; shortened where it is a long one."
    text = json.dumps(value, ensure_ascii=False)
    return f"`{bar(text if len(text) <= 60 else text[:57] + '…')}`"


@cache
def heading(notebook: Path) -> tuple[str, str]:
    "The title and the subtitle of a notebook."
    first = next(c for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    found = re.match(r"# (.+)\n\n> ((?:.+\n?)+)", "".join(first["source"]))
    return (found[1], found[2].replace("\n> ", " ").strip()) if found else (notebook.stem, "")


def notebooks(root: Path, room: str) -> dict[str, Path]:
    "The notebooks of a room by the module that each becomes, in order."
    found = {}
    for path in sorted((root / "nbs" / room).glob("[0-9]*.ipynb")):
        if name := re.search(r'"#\| default_exp ([\w.]+)', path.read_text(encoding="utf-8")):
            found[f"celestial_ml.{name[1]}"] = path
    return found


def rooms(root: Path) -> list[str]:
    "The rooms that there are."
    return [room for room in ROOMS if (root / "nbs" / room).is_dir()]


# ---------------------------------------------------------------- library
def library_page(root: Path, room: str) -> str:
    "A room of the package: every public name, with its signature and the notebook that explains it."
    parts = [
        f"# celestial_ml.{room}",
        "",
        "Every public name of this room. Each links to the notebook that shows it at work.",
    ]
    for module, path in notebooks(root, room).items():
        about = f"Explained and tested in the notebook [{heading(path)[0]}](../../{room}/{path.name})."
        parts += [
            "",
            f"## {module} {{ #{module} data-toc-label='{module.rpartition('.')[2]}' }}",
            "",
            about,
            "",
            f"::: {module}",
        ]
    return "\n".join(parts) + "\n"


# ---------------------------------------------------------------- parameters
def parameters_page(root: Path) -> str:
    "Every parameter of a run, from the schema; and what each file in params/ changes."
    from celestial_ml.core.params import Params, allowed, known_keys, load_params, parse_yaml

    keys = known_keys()
    sections = Params.model_json_schema(by_alias=True)["properties"]
    defaults = Params().model_dump(by_alias=True)
    parts = [
        PARAMETERS,
        "## The run {#run}",
        "",
        *_parameter_rows({k: v for k, v in keys.items() if "." not in k}, defaults, allowed, root),
    ]
    docs = {
        name: Params.model_json_schema()["$defs"][f["$ref"].rpartition("/")[2]]["description"]
        for name, f in sections.items()
        if "$ref" in f
    }
    for section, about in docs.items():
        own = {key: field for key, field in keys.items() if key.startswith(f"{section}.")}
        parts += ["", f"## {section} {{ #{section} }}", "", about, "", _used_by(section, root), ""]
        parts += _parameter_rows(own, defaults, allowed, root)
    parts += ["", "## Files in params/ {#files}", "", "A file says only what differs from [the defaults](#run)."]
    for path in sorted((root / "params").glob("*.yaml")):
        if path.stem == "default":
            continue
        load_params(path.stem, folder=root / "params")  # what is described is valid
        text = path.read_text(encoding="utf-8")
        about = " ".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
        parts += [
            "",
            f"### {path.stem} {{ #file-{path.stem} }}",
            "",
            about,
            "",
            "| parameter | here | default |",
            "|---|---|---|",
        ]
        for key, value in _flat(parse_yaml(text, path.name) or {}).items():
            parts.append(f"| [`{key}`](#{key}) | {code(value)} | {code(_at(defaults, key))} |")
        parts += ["", f"`celestial run {path.stem}`"]
    return "\n".join(parts) + "\n"


PARAMETERS = """# Parameters

All that a run depends on, from the schema in [`celestial_ml.core.params`](../core/04_params.ipynb). A file in `params/`
is an overlay of `params/default.yaml`; `--set` changes a value for one run:

```sh
celestial run guide --set train.lr=0.001 --set model.width=48
```

A key that isn't here, or a value that isn't allowed, is refused before anything starts, with the nearest key that
there is.
"""


def _used_by(section: str, root: Path) -> str:
    "Which steps are told the parameters of a section, as links."
    from celestial_ml.flow.steps import SECTIONS

    files = {re.sub(r"^\d+_", "", path.stem): path.name for path in (root / "nbs/steps").glob("*.ipynb")}
    steps = [f"[{step}](../steps/{files[step]})" for step, told in SECTIONS.items() if section in told]
    return f"Used by {', '.join(steps)}." if steps else "Read by every step."


def _parameter_rows(keys: dict[str, Any], defaults: dict[str, Any], allowed: Any, root: Path) -> list[str]:
    "A table of parameters."
    rows = ["| parameter | default | allowed | meaning |", "|---|---|---|---|"]
    for key, field in keys.items():
        row = (
            f'<code id="{key}">{key}</code>',
            code(_at(defaults, key)),
            bar(allowed(field)).replace("][", "]\\["),  # a pattern is not a reference
            bar(field.get("description", "")),
        )
        rows.append("| " + " | ".join(row) + " |")
    return rows if len(keys) else []


def _flat(values: dict[str, Any], depth: int = 2, before: str = "") -> dict[str, Any]:
    "A nested mapping by dotted keys, as deep as parameters are."
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= (
            _flat(value, depth - 1, f"{before}{key}.")
            if depth > 1 and isinstance(value, dict)
            else {before + key: value}
        )
    return flat


def _at(values: dict[str, Any], key: str) -> Any:
    "The value of a dotted key."
    for part in key.split("."):
        values = values[part]
    return values


# ---------------------------------------------------------------- command line
def commands() -> dict[str, Any]:
    "Every command by its name, in the order of --help."
    import typer

    from celestial_ml.cli.app import app

    found = {}

    def walk(command: Any, name: str) -> None:
        found[name] = command
        for key, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{name} {key}")

    walk(typer.main.get_command(app), "celestial")
    return found


def cli_page() -> str:
    "Every command, from the code."
    known = commands()
    parts = [CLI, "| command | what it does |", "|---|---|"]
    parts += [
        f"| [`{n}`](#{_slug(n)}) | {bar(cleandoc(c.help or '').partition(chr(10) * 2)[0])} |"
        for n, c in known.items()
        if not hasattr(c, "commands")
    ]
    for name, command in known.items():
        if name == "celestial":
            continue
        group = hasattr(command, "commands")
        level = 2 if group or name.count(" ") == 1 else 3
        parts += ["", f"{'#' * level} {name} {{ #{_slug(name)} }}", "", cleandoc(command.help or "")]
        if group:
            parts += ["", "Commands: " + ", ".join(f"[`{k}`](#{_slug(f'{name} {k}')})" for k in command.commands) + "."]
            continue
        parts += ["", "```sh", _usage(name, command), "```"]
        if command.epilog:
            parts += ["", f"Example: `{command.epilog.removeprefix('Example:').strip()}`"]
        if command.params:
            parts += ["", "| | takes | default | |", "|---|---|---|---|", *map(_option_row, command.params)]
    return "\n".join(parts) + "\n"


CLI = """# Command line

`celestial COMMAND --help` says the same in a terminal. What reports something does it as JSON with `--json`.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | the job ran to its end, and the answer is no: a check failed, the gate refused, a step broke |
| 2 | the request was wrong; standard error says what, where, and how to mend it |
| 130 | stopped by Ctrl-C; finished work is kept |

"""
WORDS = {"str": "text", "int": "a whole number", "float": "a number", "bool": "", "Path": "a path"}


def _slug(name: str) -> str:
    return name.replace(" ", "-")


def _usage(name: str, command: Any) -> str:
    "How a command is called."
    words = [name, "[OPTIONS]"] if any(p.opts[0].startswith("-") for p in command.params) else [name]
    for p in command.params:
        if not p.opts[0].startswith("-"):
            word = (p.metavar or p.opts[0].upper()) + ("…" if p.nargs == -1 else "")
            words.append(word if p.required else f"[{word}]")
    return " ".join(words)


def _option_row(p: Any) -> str:
    "An option or argument as a row of a table."
    argument = not p.opts[0].startswith("-")
    names = p.opts[0].upper() if argument else ", ".join([*p.opts, *p.secondary_opts])
    kind = getattr(p, "type_descriptor", None) and p.type_descriptor.annotation
    word = WORDS.get(getattr(kind, "__name__", ""), str(kind))
    if getattr(kind, "__origin__", None) is list:
        word = "several: " + WORDS.get(kind.__args__[0].__name__, kind.__args__[0].__name__)
    if getattr(p, "min", None) is not None or getattr(p, "max", None) is not None:
        word += f", {p.min if p.min is not None else '…'} to {p.max if p.max is not None else '…'}"
    default = "required" if p.required else "" if p.default in (None, False, [], ()) else f"`{bar(p.default)}`"
    return f"| `{names}` | {bar(word)} | {default} | {bar(p.help or '')} |"


# ---------------------------------------------------------------- HTTP
def openapi() -> dict[str, Any]:
    "The description of the API that the service gives under /openapi.json."
    from fastapi import FastAPI

    from celestial_ml.serve.api import api

    app = FastAPI(title="celestial")
    app.include_router(api)
    return app.openapi()


def routes() -> list[tuple[str, str, dict[str, Any]]]:
    "Method, path and description of every route."
    paths = openapi()["paths"].items()
    return [(method, path, one[method]) for path, one in paths for method in METHODS if method in one]


def http_page() -> str:
    "Every route of the service, from its OpenAPI description."
    schemas = openapi()["components"]["schemas"]
    parts = [HTTP, "| | what it does |", "|---|---|"]
    parts += [f"| [`{m.upper()} {p}`](#{_anchor(m, p)}) | {bar(one['summary'])} |" for m, p, one in routes()]
    for method, path, one in routes():
        parts += ["", f"## {method.upper()} {path} {{ #{_anchor(method, path)} }}", "", one["description"], ""]
        body = next(iter(one.get("requestBody", {}).get("content", {}).items()), None)
        parts += ["```sh", _curl(method, path, body, schemas), "```"]
        if body:
            parts += ["", *_fields(body[1]["schema"], schemas)]
        parts += ["", *_answer(one["responses"]["200"], schemas)]
        if errors := _errors(one["responses"]):
            parts += ["", "| status | `code` | for example |", "|---|---|---|", *errors]
    return "\n".join(parts) + "\n"


HTTP = """# HTTP

`celestial serve` answers on <http://127.0.0.1:8000>; `/docs` there lets you try every route, `/openapi.json` is for
programs, and `/` is the demo. Answers are JSON and carry an `X-Request-ID`, which `/feedback` and the logs know.
Where the service has [keys](cli.md#celestial-keys), every request but those of `/health` and `/ready` needs
`Authorization: Bearer KEY`. The routes under `/v2` are those of the
[Open Inference Protocol](../operations.md#the-open-inference-protocol).

A mistake is never a traceback, but this, with the status that fits:

```json
{"error": {"code": "not_an_image", "message": "what is wrong", "hint": "what to do about it"}}
```

"""


def _anchor(method: str, path: str) -> str:
    return f"{method}{path.replace('/', '-')}"


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    return schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema


def _curl(method: str, path: str, body: tuple[str, Any] | None, schemas: dict[str, Any]) -> str:
    "A request that works."
    url = f"http://127.0.0.1:8000{path}"
    if body is None:
        return f"curl {url}"
    kind, content = body
    schema = _resolve(content["schema"], schemas)
    if kind == "application/json":
        return f"curl {url} -H 'Content-Type: application/json' \\\n  -d '{json.dumps(schema['example'])}'"
    files = []
    for field, about in schema["properties"].items():
        files += [
            f"-F {field}=@{name}.jpg" for name in (("saturn", "mars") if about["type"] == "array" else ("saturn",))
        ]
    return f"curl {' '.join(files)} {url}"


def _type(field: dict[str, Any]) -> str:
    "What a field of a body holds, as words."
    if "anyOf" in field:
        return " or ".join(_type(option) for option in field["anyOf"])
    if "$ref" in field:
        return field["$ref"].rpartition("/")[2]
    if field.get("type") == "array":
        return "files" if field["items"].get("format") == "binary" else f"a list of {_type(field['items'])}"
    words = {
        "string": "text",
        "integer": "whole number",
        "number": "number",
        "boolean": "true or false",
        "null": "null",
    }
    words |= {"object": "mapping"}
    said = "file" if field.get("format") == "binary" else words.get(field.get("type", ""), "anything")
    return said + (f", at most {field['maxLength']} letters" if "maxLength" in field else "")


def _fields(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    "What a body holds."
    schema = _resolve(schema, schemas)
    rows = ["| field | holds | |", "|---|---|---|"]
    for name, field in schema["properties"].items():
        about = field.get("description") or field.get("items", {}).get("description", "")
        rows.append(
            f"| `{name}` | {_type(field)} | {'required' if name in schema.get('required', ()) else 'may be left out'}{'. ' + about if about else ''} |"
        )
    return rows


def _answer(response: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    "What comes back when all is well."
    content = response.get("content", {})
    schema = content.get("application/json", {}).get("schema")
    if schema is None:
        return [f"Answers with {'HTML' if 'text/html' in content else 'plain text'}."]
    name, schema = schema["$ref"].rpartition("/")[2], _resolve(schema, schemas)
    parts = [f"Answers with [`{name}`]({_told(name)}): {', '.join(f'`{key}`' for key in schema['properties'])}."]
    if "example" in schema:
        parts += ["", "```json", json.dumps(schema["example"], indent=2, ensure_ascii=False), "```"]
    return parts


def _told(name: str) -> str:
    "Where one reads what an answer holds: in the library reference if it's public, in the notebook if not."
    from importlib import import_module

    from celestial_ml.serve import api

    module = getattr(api, name).__module__
    if name in import_module(module).__all__:
        return f"library/serve.md#{module}.{name}"
    return f"../serve/{notebooks(Path(__file__).parents[2], 'serve')[module].name}"


def _errors(responses: dict[str, Any]) -> list[str]:
    "The mistakes that a route answers to."
    rows = []
    for status, response in sorted(responses.items()):
        for example in response.get("content", {}).get("application/json", {}).get("examples", {}).values():
            error = example["value"]["error"]
            rows.append(f"| {status} | `{error['code']}` | {bar(error['message'])} |")
    return rows


# ---------------------------------------------------------------- find your way
def rooms_list(root: Path) -> str:
    "Every notebook of every room: its module, and what it says of itself."
    parts = []
    for room in rooms(root):
        parts += [f"### {room} {{ #room-{room} }}", "", "| notebook | module | what it is about |", "|---|---|---|"]
        for module, path in notebooks(root, room).items():
            title, subtitle = heading(path)
            target = f"[`{module.removeprefix('celestial_ml.')}`](reference/library/{room}.md#{module})"
            parts.append(f"| [{bar(title)}]({room}/{path.name}) | {target} | {bar(subtitle)} |")
        parts.append("")
    return "\n".join(parts)


def tests_list(root: Path) -> str:
    "Every file of tests, with its first sentence."
    parts = ["| file | what it holds us to |", "|---|---|"]
    for path in sorted((root / "tests").glob("test_*.py")):
        about = re.match(r'"{1,3}(.+?)("{1,3}|\n)', path.read_text(encoding="utf-8"))
        parts.append(f"| `tests/{path.name}` | {bar(about[1]) if about else ''} |")
    return "\n".join(parts)


def pages(root: Path) -> dict[str, str]:
    "All pages that are written from the code, by their place in the site."
    written = {f"reference/library/{room}.md": library_page(root, room) for room in rooms(root)}
    written["reference/parameters.md"] = parameters_page(root)
    written["reference/cli.md"] = cli_page()
    written["reference/http.md"] = http_page()
    written["changelog.md"] = (root / "CHANGELOG.md").read_text(encoding="utf-8")
    return written
