"""What MkDocs has to be told of our notebooks: their order, the pages made from the code, and how to do without a network.

It is a hook of mkdocs.yml and no part of the package. `reference.py` writes pages, `drawings.py` draws.
"""

import json
import re
from collections import Counter
from functools import cache
from html import escape, unescape
from pathlib import Path
from posixpath import dirname, join, normpath
from typing import Any

import mkdocstrings_handlers.python._internal.rendering as signatures
from docments import numbered
from drawings import DRAWINGS, needed, notebook_count, rooms_table
from matplotlib import rc_context
from matplotlib.textpath import TextPath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import event_priority, get_plugin_logger
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs_jupyter import nbconvert2
from nbconvert.exporters import HTMLExporter, MarkdownExporter, TemplateExporter
from nbconvert.filters.widgetsdatatypefilter import WidgetsDataTypeFilter
from reference import ROOMS, notebooks, pages, rooms, rooms_list, tests_list

log = get_plugin_logger("site")  # an error of it ends a strict build, even a quiet one

# Every folder of notebooks has its place here; the notebooks in it are ordered by their numbers.
FOLDERS = ("guides", "steps", *ROOMS)
# The theme puts a <nav> into each block of code when it's shown, all without a name.
_NAMES = """let blocks = 0;
new MutationObserver(() => document.querySelectorAll("nav.md-code__nav:not([aria-label])")
  .forEach(one => one.setAttribute("aria-label", `Code ${++blocks}`))).observe(document.body, {subtree: true, childList: true});"""
STYLES: dict[str, None] = {}  # of all pages; they are the same ones, so the site needs them once
SYMBOLS: dict[str, str] = {}  # where the library reference tells of a public name that only one module has
# How a page gets outputs that no run of these very cells has left; by folder, or by notebook.
HOW_TO_RUN = {
    "guides": "make guides",
    "steps": "make run",
    "steps/stress.ipynb": "celestial run --with stress",
    "steps/tune.ipynb": "celestial tune",
    "steps/score.ipynb": "papermill nbs/steps/score.ipynb output/default/score.ipynb",
}
# `<!-- made: NAME -->` on a page stands for what these make.
MADE = {
    "needed": lambda root: ", ".join(f"`{name}`" for name in needed(root)),
    "notebooks": notebook_count,
    "rooms-list": rooms_list,
    "rooms-table": rooms_table,
    "tests-list": tests_list,
}


def root_of(config: MkDocsConfig) -> Path:
    "The project's folder."
    return Path(config.config_file_path).parent


def on_config(config: MkDocsConfig) -> None:
    "List every page that there is."
    root, nbs = root_of(config), Path(config.docs_dir)
    there = {file.parent.name for file in nbs.glob("[!.]*/*.ipynb")}  # no checkpoints
    if unknown := there - set(FOLDERS):
        raise PluginError(f"nbs/docs-assets/site.py doesn't know where to put {', '.join(sorted(unknown))}")

    def listed(folder: str) -> list[str]:
        return [f"{folder}/{file.name}" for file in sorted((nbs / folder).glob("*.ipynb"))]

    def written(*names: str) -> list[Any]:
        return [{title: name} for title, _, name in (n.rpartition("=") for n in names) if (nbs / name).is_file()]

    library = [{room: f"reference/library/{room}.md"} for room in rooms(root)]
    config.nav = [
        {"Home": "index.ipynb"},
        {
            "Find your way": written(
                *("Which command?=commands.md", "Find your way=find-your-way.md"),
                *("FAQ=faq.md", "Glossary=glossary.md"),
            )
        },
        {"Guides": [*written("JupyterLab=lab.md", "Label with a team=label-with-a-team.md"), *listed("guides")]},
        {"Pipeline": listed("steps")},
        {"Notebooks": [{room: listed(room)} for room in rooms(root)]},
        {
            "Reference": [
                {"Parameters": "reference/parameters.md"},
                {"Command line": "reference/cli.md"},
                {"HTTP": "reference/http.md"},
                {"Library": library},
            ]
        },
        {
            "Operations": written(
                "Operations=operations.md", "Benchmarks=benchmarks.md", "Versions of the data=versions.md"
            )
        },
        {"About": [*written("Architecture=architecture.md", "Comparison=comparison.md"), {"Changes": "changelog.md"}]},
    ]
    config.nav = [section for section in config.nav if next(iter(section.values()))]
    for room in rooms(root):
        for module in notebooks(root, room):
            _note_symbols(module, room, root / f"{module.replace('.', '/')}.py")


def _note_symbols(module: str, room: str, path: Path) -> None:
    "Where the public names of a module are told of; a name that two modules have is nobody's."
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    public = re.search(r"^__all__ = \[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    for name in re.findall(r"'(\w+)'", public[1] if public else ""):
        target = f"reference/library/{room}.md#{module}.{name}"
        SYMBOLS[name] = "" if name in SYMBOLS else target


@event_priority(-100)  # after mkdocs-jupyter has made the notebooks its own
def on_files(files: Files, config: MkDocsConfig) -> Files:
    "Add the pages that are made from the code; show a notebook as a run has left it, where that is up to date."
    for uri, text in pages(root_of(config)).items():
        files.append(File.generated(config, uri, content=text))
    for file in files:
        if file.src_uri.endswith(".ipynb") and (done := _executed(root_of(config), Path(file.src_uri))):
            file.abs_src_path = str(done)
    return files


def _executed(root: Path, page: Path) -> Path | None:
    "A copy of a step or guide with its outputs, None where no run of these very cells is there."
    name = re.sub(r"^\d+_", "", page.stem) if page.parts[0] == "steps" else page.stem
    run = root / "output" / {"steps": "default", "guides": "guides"}.get(page.parts[0], "?") / f"{name}.ipynb"
    if not run.is_file():
        return None
    done = json.loads(run.read_text(encoding="utf-8"))
    done["cells"] = [c for c in done["cells"] if "injected-parameters" not in c["metadata"].get("tags", ())]
    wanted = json.loads((root / "nbs" / page).read_text(encoding="utf-8"))["cells"]
    said = [["".join(cell["source"]).strip() for cell in cells] for cells in (done["cells"], wanted)]
    outputs = [output for cell in done["cells"] for output in cell.get("outputs", ())]
    if said[0] != said[1] or any(output["output_type"] == "error" for output in outputs):
        return None
    for cell in done["cells"]:
        _calm(cell.get("outputs", []))
    copy = root / ".cache" / "docs" / page
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_text(json.dumps(done), encoding="utf-8")
    return copy


def _calm(outputs: list[dict[str, Any]]) -> None:
    "Of a progress bar, its end; as a terminal shows it."
    for i in reversed(range(1, len(outputs))):
        one, other = outputs[i - 1 : i + 1]
        if one["output_type"] == other["output_type"] == "stream" and one["name"] == other["name"]:
            one["text"] = "".join(one["text"]) + "".join(outputs.pop(i)["text"])
    for output in outputs:
        if output["output_type"] == "stream":
            lines = "".join(output["text"]).split("\n")
            output["text"] = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)


def on_env(env: Any, config: MkDocsConfig, files: Files) -> None:
    "The first tab is called Home, and not after the notebook's heading."
    page = files.get_file_from_path("index.ipynb")
    if page and page.page:
        page.page.title = "Home"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "Fill in what is made from the code."
    return re.sub(r"<!-- made: ([\w-]+) -->", lambda m: MADE[m[1]](root_of(config)), markdown)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "A page that needs no network and no mouse, with links that lead somewhere and formulas that are drawn."
    html = re.sub(r"<!-- drawing: (\w+) -->", lambda m: _drawing(m[1], root_of(config)), html)
    if page.file.src_uri.endswith(".ipynb"):
        html = _notebook(html, page, config, files)
    else:
        html = _linked(html, page, config, files, r'[^"]+\.ipynb[^"]*')
    html = re.sub(r"<table\b.*?</table>", r'<div class="wide" tabindex="0">\g<0></div>', html, flags=re.DOTALL)
    return re.sub(r"<pre(?= id=|>)", '<pre tabindex="0"', html)


def _notebook(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "A notebook's page as one of this site's."
    STYLES.update(dict.fromkeys(re.findall(r"<style.*?>(.*?)</style>", html, flags=re.DOTALL)))
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    # MathJax and Mermaid, which would come from a CDN; what copies code is ours and stays.
    html = re.sub(r'<script (?:src=""|type="(?:module|text/x-mathjax-config)")>.*?</script>', "", html, flags=re.DOTALL)
    html = re.sub(r'<span class="(?:n|p|w|)">([^<]*)</span>', r"\1", html)  # no colour of their own, and most of a page
    # Names are found by way of the library reference; with all code in it, the index would be three times as large.
    html = re.sub(r'class="(clipboard-copy-txt|highlight-ipynb [^"]*)"', r"\g<0> data-search-exclude", html)
    html = re.sub(r"<img (?![^>]*\balt=)", '<img alt="what the cell above shows" ', html)
    if page.file.abs_src_path != str(Path(config.docs_dir) / page.file.src_uri):
        html = _without_own_files(html, page, config)
    elif how := HOW_TO_RUN.get(page.file.src_uri) or HOW_TO_RUN.get(page.file.src_uri.partition("/")[0]):
        note = f"Shown without outputs: <code>{how}</code>, then <code>make docs</code>, adds them."
        html = html.replace("</blockquote>", f'</blockquote><div class="admonition note"><p>{note}</p></div>', 1)
    html = _linked(html, page, config, files, r'[^"]+')
    html = _own_anchors(html)
    whole = r'<pre.*?</pre>|<a .*?</a>|<code.*?</code>|<div [^>]*class="clipboard-copy-txt".*?</div>'
    parts = re.split(f"({whole})", html, flags=re.DOTALL)
    parts[::2] = [
        re.sub(r"(?<![\\$\w])\$(?=\S)([^$<>]{1,200}?)(?<=\S)\$(?![\d$])", _formula, part) for part in parts[::2]
    ]
    parts[1::2] = [re.sub(r"^<code>(\w+)(?:\(\))?</code>$", lambda m: _symbol(m, page, files), p) for p in parts[1::2]]
    return "".join(parts)


def _own_anchors(html: str) -> str:
    "Two headings of the same words get two anchors: those that the table of contents leads to."
    seen: Counter[str] = Counter()

    def own(match: re.Match[str]) -> str:
        slug = numbered(match[2], seen[match[2]])
        seen[match[2]] += 1
        return match[0].replace(f'id="{match[2]}"', f'id="{slug}"').replace(f'href="#{match[2]}"', f'href="#{slug}"')

    return re.sub(r'<h([1-6]) [^>]*?id="([^"]+)".*?</h\1>', own, html, flags=re.DOTALL)


def on_post_page(html: str, page: Page, config: MkDocsConfig) -> str:
    "What screen readers want: a name for the theme's search, no empty headers, names for blocks of code."
    html = re.sub(r"<th([^>]*)>(?:\s|&nbsp;)*</th>", r"<td\1></td>", html)
    html = html.replace("</body>", f"<script>{_NAMES}</script></body>")
    return html.replace(
        'data-md-component="search" role="dialog"', 'data-md-component="search" role="dialog" aria-label="Search"'
    )


def on_post_build(config: MkDocsConfig) -> None:
    "Write the pages' style sheet."
    (Path(config.site_dir) / "notebooks.css").write_text("\n".join(STYLES), encoding="utf-8")


@cache
def _drawing(name: str, root: Path) -> str:
    return DRAWINGS[name](root)


def _linked(html: str, page: Page, config: MkDocsConfig, files: Files, which: str) -> str:
    "The page with those of its links mended that match."
    there = rf'(<(?:a|img)\b[^>]*?\s(?:href|src)=")({which})"'
    return re.sub(there, lambda m: f'{m[1]}{_url(m[2], page, config, files)}"', html)


def _without_own_files(html: str, page: Page, config: MkDocsConfig) -> str:
    "The page of a run, without links to what lies beside it in the run's folder and isn't on the site."
    here = (Path(config.docs_dir) / page.file.src_uri).parent

    def known(match: re.Match[str]) -> str:
        return match[0] if (here / unescape(match[1]).partition("#")[0]).exists() else match[2]

    return re.sub(r'<a\b[^>]*\shref="(?![a-z]+:|#)([^"]+)"[^>]*>(.*?)</a>', known, html, flags=re.DOTALL)


def _url(link: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "Where a notebook's link leads on the site: to a page, or into the repository for what isn't on it."
    if re.match(r"[a-z]+:|[#/]", link):
        return link
    path, mark, anchor = link.partition("#")
    source = normpath(join(dirname(page.file.src_uri), unescape(path)))
    if file := files.get_file_from_path(source):
        return file.url_relative_to(page.file) + mark + anchor
    if source.startswith("../") and (Path(config.docs_dir) / source).exists():
        return f"{config.extra['repository']}/blob/main/{source[3:]}{mark}{anchor}"
    log.error(f"{page.file.src_uri} links to {link}, which isn't there")
    return link


def _symbol(match: re.Match[str], page: Page, files: Files) -> str:
    "A public name of the package, as a link to the library reference."
    path, _, anchor = SYMBOLS.get(match[1], "").partition("#")
    file = files.get_file_from_path(path) if path else None
    return f'<a href="{file.url_relative_to(page.file)}#{anchor}">{match[0]}</a>' if file else match[0]


def _formula(match: re.Match[str]) -> str:
    "TeX as a drawing in the colour of the text."
    tex, size = unescape(match[1]), 16
    try:
        with rc_context({"mathtext.fontset": "stix"}):
            path = TextPath((0, 0), f"${tex}$", size=size)
    except ValueError as e:
        log.error(f"${tex}$ can't be drawn: {e}")
        return match[0]
    drawn = " ".join(
        "MLQC"[code - 1] + " ".join(f"{x:.2f} {-y:.2f}" for x, y in points.reshape(-1, 2)) if code < 5 else "Z"
        for points, code in path.iter_segments(simplify=False)
    )
    box = path.get_extents()
    left, width, height = box.x0 - 0.5, box.width + 1, box.height + 1
    return (
        f'<svg class="formula" role="img" aria-label="{escape(tex)}" fill="currentColor" '
        f'viewBox="{left:.2f} {-box.y1 - 0.5:.2f} {width:.2f} {height:.2f}" '
        f'style="width:{width / size:.3f}em;height:{height / size:.3f}em;vertical-align:{(box.y0 - 0.5) / size:.3f}em">'
        f'<path d="{drawn}"/></svg>'
    )


# Half of the time of a build went into compiling the same templates for every notebook, into parsing each page once
# more, and into asking ruff for the lines of every signature in a process of its own. What follows saves that.
class _Once:
    "An exporter that compiles its templates once for all notebooks."

    def _create_environment(self) -> Any:
        if "_kept" not in type(self).__dict__:
            type(self)._kept = super()._create_environment()  # type: ignore[misc, attr-defined]
        return type(self)._kept  # type: ignore[attr-defined]


class QuickHTML(_Once, HTMLExporter):
    "nbconvert's, but for the second look at the page, which only adds what `on_page_content` does."

    def from_notebook_node(self, nb: Any, resources: Any = None, **kw: Any) -> Any:
        resources = self._init_resources(resources)
        widgets = WidgetsDataTypeFilter(notebook_metadata=self._nb_metadata, parent=self, resources=resources)
        self.register_filter("highlight_code", self.filters["highlight_code"])
        self.register_filter("filter_data_type", widgets)
        return TemplateExporter.from_notebook_node(self, nb, resources, **kw)


class QuickMarkdown(_Once, MarkdownExporter):
    "nbconvert's."


def _signature(code: str, width: int) -> str:
    "`def name(parameters): pass` with a line for each parameter."
    first = code.find("(")
    depth, last, given, end = 0, first + 1, [], len(code)
    for i, letter in enumerate(code[first:], first):
        depth += (letter in "([{") - (letter in ")]}")
        if depth == 0 or (depth == 1 and letter == ","):
            given.append(code[last:i].strip())
            last = i + 1
        if depth == 0:
            end = i
            break
    if first < 0 or not any(given):
        return code
    return code[: first + 1] + "\n" + "".join(f"    {one},\n" for one in given if one) + code[end:]


signatures._get_formatter = lambda: _signature
nbconvert2.HTMLExporter, nbconvert2.MarkdownExporter = QuickHTML, QuickMarkdown
