"""The diagrams of the architecture page, drawn from the code whenever the site is built.

Part of mkdocs.yml's hook and no part of the package. Each drawing is an SVG inside of the page: it takes the page's
colours, by day and by night, and its boxes are links.
"""

import ast
import sys
from collections import Counter
from functools import cache
from html import escape
from pathlib import Path

from reference import heading, notebooks, rooms

HIGH, GAP = 30, 14  # of a box, and between two of them; in the drawing's units, which are pixels on a wide page


def box(x: float, y: float, width: float, title: str, link: str = "", kind: str = "box") -> str:
    "A box with a title; a link where there is one."
    drawn = f'<rect x="{x:.0f}" y="{y:.0f}" width="{width:.0f}" height="{HIGH}" rx="6" class="{kind}"/>'
    drawn += f'<text x="{x + width / 2:.0f}" y="{y + 20:.0f}" text-anchor="middle">{escape(title)}</text>'
    return f'<a href="{escape(link)}">{drawn}</a>' if link else drawn


def note(x: float, y: float, text: str) -> str:
    "Small words."
    return f'<text x="{x:.0f}" y="{y:.0f}" class="note">{escape(text)}</text>'


def curve(points: str, strong: bool = False) -> str:
    "A line that ends in an arrow."
    return f'<path d="{points}" class="{"arrow strong" if strong else "arrow"}" marker-end="url(#tip)"/>'


def svg(width: float, height: float, parts: list[str], words: str) -> str:
    "A drawing that scrolls sideways where the page is narrow."
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    tip += '<path d="M0 0 8 4 0 8z" class="tip"/></marker>'
    return (
        f'<div class="drawing" role="group" aria-label="{escape(words)}" tabindex="0" data-search-exclude>'
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="min-width:{min(0.85 * width, 620):.0f}px;max-width:{width:.0f}px">'
        f"<defs>{tip}</defs>{''.join(parts)}</svg></div>"
    )


@cache
def imports(root: Path) -> dict[str, dict[str, bool]]:
    "What each module of the package imports of it, and whether it does so when it is itself imported."
    from celestial_ml.flow.freshness import imported_modules

    package = root / "celestial_ml"
    found: dict[str, dict[str, bool]] = {}
    for room in rooms(root):
        for module in notebooks(root, room):
            path = root / f"{module.replace('.', '/')}.py"
            if not path.is_file():
                continue
            text = path.read_text(encoding="utf-8")
            everything = imported_modules(text, package, path.parent)
            at_once = imported_modules(_outermost(text), package, path.parent)
            names = {
                p: "celestial_ml." + p.relative_to(package).with_suffix("").as_posix().replace("/", ".")
                for p in everything
            }
            found[module] = {names[p]: p in at_once for p in sorted(everything) if names[p] != module}
    return found


def _outermost(text: str) -> str:
    "The imports that a module makes when it is imported: those outside of functions and of TYPE_CHECKING."
    top = ast.parse(text).body
    return "\n".join(ast.unparse(node) for node in top if isinstance(node, ast.Import | ast.ImportFrom))


def room_imports(root: Path) -> Counter[tuple[str, str]]:
    "How many modules of a room import from which other room."
    pairs: Counter[tuple[str, str]] = Counter()
    for module, others in imports(root).items():
        room = module.split(".")[1]
        pairs.update({(room, other.split(".")[1]) for other in others} - {(room, room)})
    return pairs


def rooms_drawing(root: Path) -> str:
    "The rooms as floors, and who imports from whom."
    names, pairs = rooms(root)[::-1], room_imports(root)
    rows = {room: 12 + i * (HIGH + 34) for i, room in enumerate(names)}
    parts, left, wide = [], 140, 130
    for (upper, lower), count in sorted(pairs.items(), key=lambda p: rows[p[0][1]] - rows[p[0][0]]):
        far = names.index(lower) - names.index(upper)
        y, y2 = rows[upper] + HIGH / 2, rows[lower] + HIGH / 2
        if far == 1:
            parts.append(curve(f"M{left + wide / 2} {rows[upper] + HIGH}V{rows[lower] - 2}", count > 4))
        else:
            side = 1 if (names.index(upper) + far) % 2 else -1
            edge, bend = (left + wide, left + wide + 22 * far) if side > 0 else (left, left - 22 * far)
            parts.append(curve(f"M{edge} {y + 4}C{bend} {y + 4} {bend} {y2 - 4} {edge + 2 * side} {y2 - 4}", count > 4))
    parts += [box(left, rows[r], wide, r, f"reference/library/{r}.html") for r in names]
    words = (
        "The rooms of the package from top to bottom; every arrow leads from a room to one below that it imports from"
    )
    return svg(410, rows[names[-1]] + HIGH + 12, parts, words)


def rooms_table(root: Path) -> str:
    "The same as a table: rows import from columns."
    names, pairs = rooms(root)[::-1], room_imports(root)
    parts = [f"| | {' | '.join(names[1:])} |", f"|---|{'--:|' * (len(names) - 1)}"]
    for room in names[:-1]:
        cells = [str(pairs.get((room, other), "")) for other in names[1:]]
        parts.append(f"| **{room}** | {' | '.join(cells)} |")
    return "\n".join(parts)


def pipeline_drawing(root: Path) -> str:
    "The steps, what each reads of the others, and what it makes."
    from celestial_ml.flow.steps import load_tasks

    tasks = load_tasks(root, "default")
    parts, left, wide, y, middle = [], 150, 120, 12.0, {}
    for name, task in tasks.items():
        made = [path.name for key, path in task.product.items() if key not in ("notebook", "html")]
        lines = _wrapped(made, 52)
        middle[name] = y + HIGH / 2
        parts.append(box(left, y, wide, name, task.source.relative_to("nbs").with_suffix(".html").as_posix()))
        parts += [note(left + wide + 16, y + 13 + 16 * i, line) for i, line in enumerate(lines)]
        y += max(HIGH, 16 * len(lines)) + GAP + 8
    order = list(tasks)
    for name, task in tasks.items():
        for other in task.upstream:
            far = order.index(name) - order.index(other)
            if far == 1:
                parts.append(
                    curve(f"M{left + wide / 2} {middle[other] + HIGH / 2}V{middle[name] - HIGH / 2 - 2}", True)
                )
            else:
                bend = left - 22 * far
                parts.append(
                    curve(
                        f"M{left} {middle[other] + 4}C{bend} {middle[other] + 4} {bend} {middle[name] - 4} {left - 2} {middle[name] - 4}"
                    )
                )
    words = "The steps of the pipeline from top to bottom; every arrow leads from a step to one that reads what it made"
    return svg(660, y, parts, words)


def _wrapped(words: list[str], width: int) -> list[str]:
    "Words in lines of at most this many letters."
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) + 2 > width:
            lines.append("")
        lines[-1] += (", " if lines[-1] else "") + word
    return lines


def serving(root: Path) -> dict[str, int]:
    "The modules that are imported where a request is answered, and how far each is from the API."
    steps, waiting, known = {"celestial_ml.serve.api": 0}, ["celestial_ml.serve.api"], imports(root)
    while waiting:
        module = waiting.pop()
        for other in (name for name, at_once in known.get(module, {}).items() if at_once):
            if steps.get(other, -1) < steps[module] + 1:  # the longest way: nothing is above what imports it
                steps[other] = steps[module] + 1
                waiting.append(other)
    return steps


def needed(root: Path) -> list[str]:
    "The packages of others that the serving path imports."
    found = set()
    for module in serving(root):
        tree = ast.parse(_outermost((root / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            found |= {name.partition(".")[0] for name in names}
    return sorted(found - set(sys.stdlib_module_names) - {"", "celestial_ml", "__future__"})


def serving_drawing(root: Path) -> str:
    "A request's way through the modules that answer it."
    steps, known = serving(root), imports(root)
    rows: dict[int, list[str]] = {}
    for module, step in sorted(steps.items()):
        rows.setdefault(step, []).append(module)
    wide, place, parts = 138, {}, []
    total = max(len(row) for row in rows.values()) * (wide + GAP) + GAP
    for step, row in sorted(rows.items()):
        start = (total - len(row) * (wide + GAP) + GAP) / 2
        for i, module in enumerate(row):
            place[module] = (start + i * (wide + GAP), 58 + step * (HIGH + 34))
    for module in place:
        for other, at_once in known.get(module, {}).items():
            if at_once and other in place:
                (x, y), (x2, y2) = place[module], place[other]
                parts.append(
                    curve(
                        f"M{x + wide / 2:.0f} {y + HIGH}C{x + wide / 2:.0f} {y + HIGH + 22} {x2 + wide / 2:.0f} {y2 - 24} {x2 + wide / 2:.0f} {y2 - 2}",
                        steps[other] == steps[module] + 1,
                    )
                )
    x, y = place["celestial_ml.serve.api"]
    parts.insert(0, curve(f"M{x + wide / 2:.0f} 24V{y - 2}", True))
    parts.insert(0, f'<text x="{x + wide / 2:.0f}" y="16" text-anchor="middle" class="note">a request</text>')
    pages = {
        module: f"{room}/{path.stem}.html" for room in rooms(root) for module, path in notebooks(root, room).items()
    }
    parts += [
        box(
            *place[m], wide, m.removeprefix("celestial_ml."), pages.get(m, ""), "box" if ".serve." in m else "box other"
        )
        for m in place
    ]
    height = 58 + (max(rows) + 1) * (HIGH + 34)
    return svg(
        total,
        height,
        parts,
        "The modules that answer a request; every arrow leads from a module to one that it imports",
    )


def notebook_count(root: Path) -> str:
    "How many notebooks there are, and how many lines they export."
    count = sum(len(notebooks(root, room)) for room in rooms(root))
    return f"{count} library notebooks in {len(rooms(root))} rooms"


DRAWINGS = {"rooms": rooms_drawing, "pipeline": pipeline_drawing, "serving": serving_drawing}
__all__ = ["DRAWINGS", "heading", "needed", "notebook_count", "rooms_table"]
