"""What MkDocs has to be told of our notebooks: their order, and how a page does without the internet.

It is a hook of mkdocs.yml and no part of the package.
"""

import re
from html import escape, unescape
from pathlib import Path
from posixpath import dirname, join, normpath

from matplotlib import rc_context
from matplotlib.textpath import TextPath
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.plugins import get_plugin_logger
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

log = get_plugin_logger("site")  # an error of it ends a strict build, even a quiet one

# Every folder of notebooks has its place here; the notebooks in it are ordered by their numbers.
TITLES = {"guides": "Guides", "steps": "The pipeline"}
ROOMS = ("core", "data", "model", "registry", "serve", "monitor", "label", "flow", "cli")
STYLES: dict[str, None] = {}  # of all pages; they are the same ones, so the site needs them once


def on_config(config: MkDocsConfig) -> None:
    "List every notebook that there is."
    there = {file.parent.name for file in Path(config.docs_dir).glob("[!.]*/*.ipynb")}  # no checkpoints
    if unknown := there - {*TITLES, *ROOMS}:
        raise PluginError(f"nbs/docs-assets/site.py doesn't know where to put {', '.join(sorted(unknown))}")
    config.nav = ["index.ipynb"]
    for folder in filter(there.__contains__, (*TITLES, *ROOMS)):
        files = sorted((Path(config.docs_dir) / folder).glob("*.ipynb"))
        config.nav.append({TITLES.get(folder, folder): [f"{folder}/{file.name}" for file in files]})
    config.nav.append({"Operations": "operations.md"})


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    "A page without scripts from elsewhere, with links that lead somewhere and formulas that are drawn."
    STYLES.update(dict.fromkeys(re.findall(r"<style.*?>(.*?)</style>", html, flags=re.DOTALL)))
    html = re.sub(r"<style.*?</style>", "", html, flags=re.DOTALL)
    # MathJax and Mermaid, which would come from a CDN; what copies code is ours and stays.
    html = re.sub(r'<script (?:src=""|type="(?:module|text/x-mathjax-config)")>.*?</script>', "", html, flags=re.DOTALL)
    html = re.sub(
        r'(<(?:a|img)\b[^>]*?\s(?:href|src)=")([^"]+)', lambda m: m[1] + _url(m[2], page, config, files), html
    )
    parts = re.split(r'(<pre.*?</pre>|<code.*?</code>|<div class="clipboard-copy-txt".*?</div>)', html, flags=re.DOTALL)
    parts[::2] = [
        re.sub(r"(?<![\\$\w])\$(?=\S)([^$<>]{1,200}?)(?<=\S)\$(?![\d$])", _formula, part) for part in parts[::2]
    ]
    return "".join(parts)


def on_post_build(config: MkDocsConfig) -> None:
    "Write the pages' style sheet."
    (Path(config.site_dir) / "notebooks.css").write_text("\n".join(STYLES), encoding="utf-8")


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
