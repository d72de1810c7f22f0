"""report.html: one file that needs no network and no script, for a wide screen and a phone, light and dark.

Called by report.py.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from html import escape

from trimtab.experiments.document import Block, Bullets, Diff, Heading, Image, Notice, Paragraph, Table
from trimtab.experiments.plot_style import slug

__all__ = ["to_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6570; --paper: #ffffff; --line: #d9dee3;
  --band: #f4f6f8; --mark: #fff3d6; --edge: #d98e04; --minus: #b3261e; --plus: #17663a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb7; --paper: #15181b; --line: #353c43; --band: #1e2327;
    --mark: #3a2e10; --edge: #d9a441; --minus: #ff8a80; --plus: #7fd6a0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 1.2rem 1rem 4rem; overflow-wrap: break-word; }
p, li { max-width: 46rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .4rem 0 1rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
nav { color: var(--soft); font-size: .9rem; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: inherit; }
aside { background: var(--mark); border-left: 4px solid var(--edge); padding: .7rem 1rem; margin: 1rem 0; }
aside p { margin: 0; font-weight: 600; } aside ul { margin: .4rem 0 0; }
.scroll { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--line); border-radius: 6px; }
.scroll:focus { outline: 2px solid var(--edge); }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; width: 100%; }
.about { color: var(--soft); font-size: .88rem; margin: 1.4rem 0 .4rem; }
.about + .scroll { margin-top: 0; }
th, td { text-align: left; padding: .35rem .7rem; border-top: 1px solid var(--line); white-space: nowrap; }
td.wide { white-space: normal; min-width: 16rem; }
thead th { background: var(--band); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
figure { margin: 1.2rem 0; } figure > div { overflow-x: auto; }
img { display: block; width: auto; max-width: 100%; height: auto; background: #ffffff; border-radius: 6px;
  padding: 6px; }
@media (max-width: 44rem) { img { max-width: none; width: 46rem; } }
figcaption { color: var(--soft); font-size: .88rem; margin-top: .4rem; max-width: 46rem; }
pre { background: var(--band); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; font-size: .9rem; }
.minus { color: var(--minus); } .plus { color: var(--plus); }
"""
_LONG = 44  # characters in a cell from which it may break its line


def to_html(title: str, blocks: Iterable[Block]) -> str:
    """Render as one self-contained page.

    Args:
        title: Of the page.
        blocks: The report; its headings of level 2 become the list of contents.
    """
    parts = list(blocks)
    sections = [block.text for block in parts if isinstance(block, Heading) and block.level == 2]
    contents = " ".join(f'<a href="#{_anchor(text)}">{escape(text)}</a>' for text in sections)
    body = []
    for block in parts:
        body.append(_html(block))
        if isinstance(block, Heading) and block.level == 1:
            body.append(f'<nav aria-label="Sections">{contents}</nav>')
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        anchor = f' id="{_anchor(block.text)}"' if block.level == 2 else ""
        return f"<h{block.level}{anchor}>{escape(block.text)}</h{block.level}>"
    if isinstance(block, Paragraph):
        return f"<p>{escape(block.text)}</p>"
    if isinstance(block, Notice):
        return f"<aside><p>{escape(block.text)}</p>{_items(block.items)}</aside>"
    if isinstance(block, Bullets):
        return _items(block.items)
    if isinstance(block, Image):
        data = base64.b64encode(block.path.read_bytes()).decode()
        return (
            f'<figure><div><img src="data:image/png;base64,{data}" alt="{escape(block.alt)}"></div>'
            f"<figcaption>{escape(block.caption)}</figcaption></figure>"
        )
    if isinstance(block, Diff):
        return "<pre><code>" + "\n".join(_diff_line(line) for line in block.lines) + "</code></pre>"
    return _table(block)


def _items(items: Iterable[str]) -> str:
    lines = "".join(f"<li>{escape(item)}</li>" for item in items)
    return f"<ul>{lines}</ul>" if lines else ""


def _diff_line(line: str) -> str:
    name = {"-": "minus", "+": "plus"}.get(line[:1])
    return f'<span class="{name}">{escape(line)}</span>' if name else escape(line)


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.columns)
    rows = []
    for first, *rest in block.rows:
        cells = "".join(
            f'<td class="wide">{escape(cell)}</td>' if len(cell) > _LONG else f"<td>{escape(cell)}</td>"
            for cell in rest
        )
        rows.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    label = escape(re.split(r"[.,:]", block.caption)[0])
    return (  # the frame scrolls, and can be reached with the keyboard for that
        f'<p class="about">{escape(block.caption)}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _anchor(text: str) -> str:
    return slug(text.lower())
