"""Tells mkdocstrings what a comment behind a parameter, a field or an arrow means, and which notebook explains a name.

An extension of Griffe, which reads the package without importing it; used by mkdocs.yml and no part of the package.
"""

import ast
import json
import re
import tokenize
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import griffe
from mkdocs_jupyter.utils import slugify

# What nbdev writes above each cell of a module: the notebook, as seen from the module, and the cell's id.
CELL = re.compile(r"^# %% (\S+\.ipynb) #(\S+)$")


@cache
def comments(path: Path) -> dict[int, str]:
    "The comments behind code in a module, by their line."
    with path.open("rb") as f:
        found = [t for t in tokenize.tokenize(f.readline) if t.type == tokenize.COMMENT]
    return {t.start[0]: t.string.lstrip("# ") for t in found if t.line[: t.start[1]].strip()}


@cache
def cells(path: Path) -> list[tuple[int, Path, str]]:
    "Where each cell of a notebook begins in its module: line, notebook, anchor of the heading above it."
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    marks = [(line, (path.parent / m[1]).resolve(), m[2]) for line, text in lines if (m := CELL.match(text))]
    return [(line, notebook, anchors(notebook).get(cell, "")) for line, notebook, cell in marks]


@cache
def anchors(notebook: Path) -> dict[str, str]:
    "The anchor of the last heading above each cell of a notebook, by the cell's id."
    found, last, seen = {}, "", Counter[str]()
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        heads = re.findall(r"^(#+) (.+)$", "".join(cell["source"]), re.M) if cell["cell_type"] == "markdown" else []
        for level, title in heads:
            slug = slugify(title.replace("`", ""))
            last = "" if level == "#" else numbered(slug, seen[slug])
            seen[slug] += 1
        found[cell["id"]] = last
    return found


def numbered(slug: str, before: int) -> str:
    "The anchor of a heading, of which there were some before on its page; as Markdown's table of contents has it."
    return f"{slug}_{before}" if before else slug


def explained(path: Path, line: int) -> str:
    "A link from a page in reference/library to where a notebook explains what a module has on this line."
    above = [(notebook, anchor) for start, notebook, anchor in cells(path) if start < line]
    if not above:
        return ""
    notebook, anchor = above[-1]
    target = f"../../{notebook.parent.name}/{notebook.name}" + (f"#{anchor}" if anchor else "")
    return f"\n\n[shown in the notebook]({target}){{ .notebook }}"


class Docments(griffe.Extension):
    "Reads docments."

    def on_function_instance(self, *, node: Any, func: griffe.Function, agent: Any, **kwargs: Any) -> None:
        "The comments behind parameters and behind the arrow."
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        said, a = comments(agent.filepath), node.args
        given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
        lines = [arg.lineno for arg in given]  # a line with several parameters has a comment of none of them
        about = {arg.arg: said[arg.lineno] for arg in given if lines.count(arg.lineno) == 1 and arg.lineno in said}
        text = func.docstring.value if func.docstring else ""
        if about:
            text += "\n\nArgs:\n" + "\n".join(f"    {name}: {words}" for name, words in about.items())
        if node.returns and (words := said.get(node.returns.end_lineno or 0)) and node.returns.end_lineno not in lines:
            text += f"\n\nReturns:\n    {words}"
        self._say(
            agent, func, text, "" if func.parent and func.parent.is_class else explained(agent.filepath, node.lineno)
        )

    def on_class_instance(self, *, node: Any, cls: griffe.Class, agent: Any, **kwargs: Any) -> None:
        "Where the class is explained."
        self._say(agent, cls, cls.docstring.value if cls.docstring else "", explained(agent.filepath, cls.lineno or 0))

    def on_attribute_instance(self, *, node: Any, attr: griffe.Attribute, agent: Any, **kwargs: Any) -> None:
        "The comment behind a field, or the description that pydantic's `Field` has."
        words = comments(agent.filepath).get(node.end_lineno, "")
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Call):
            words = next((k.value.value for k in node.value.keywords if k.arg == "description"), words)  # type: ignore[attr-defined]
        of_module = attr.parent is not None and attr.parent.is_module
        self._say(agent, attr, words, explained(agent.filepath, node.lineno) if of_module else "")

    def on_module_members(self, *, node: Any, mod: griffe.Module, agent: Any, **kwargs: Any) -> None:
        "Two names on one line, `SIDE, COLUMNS = 72, 20`, which Griffe passes over."
        for line in getattr(node, "body", ()):
            pair = line.targets[0] if isinstance(line, ast.Assign) else None
            for name in pair.elts if isinstance(pair, ast.Tuple) else ():
                if isinstance(name, ast.Name) and name.id not in mod.members:
                    attr = griffe.Attribute(name.id, lineno=line.lineno, endlineno=line.end_lineno, parent=mod)
                    mod.set_member(name.id, attr)
                    self.on_attribute_instance(node=line, attr=attr, agent=agent)

    def on_class(self, *, cls: griffe.Class, loader: Any, **kwargs: Any) -> None:
        "What pydantic keeps for itself isn't shown."
        if "model_config" in cls.members:
            cls.del_member("model_config")

    @staticmethod
    def _say(agent: Any, obj: griffe.Object, text: str, link: str) -> None:
        if text or link:
            said = {"parser": agent.docstring_parser, "parser_options": agent.docstring_options}
            obj.docstring = griffe.Docstring(text + link, lineno=obj.lineno, parent=obj, **said)
