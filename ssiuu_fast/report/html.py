"""One HTML page that needs nothing but itself: no network, no script, no server.

Every function but `page` and `picture` takes plain text and escapes it. What they return is markup.
"""

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

_CSS = """
:root { color: #1c1c1c; background: #fff; font: 17px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans",
  Arial, sans-serif; }
body { margin: 0 auto; max-width: 1120px; padding: 24px 20px 64px; }
h1 { font-size: 1.75em; line-height: 1.2; margin: 0 0 .2em; }
h2 { font-size: 1.3em; margin: 2.2em 0 .4em; padding-top: .5em; border-top: 2px solid #1c1c1c; }
h3 { font-size: 1.05em; margin: 1.6em 0 .3em; }
p { max-width: 68ch; margin: .4em 0 .8em; }
.quiet { color: #555; }
.verdicts { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 16px; margin: 1.2em 0; }
.verdict { background: #f5f3ee; border-left: 6px solid #1c1c1c; padding: 14px 18px; min-width: 0; }
.verdict .word { font-size: 1.6em; font-weight: 700; line-height: 1.15; margin: 0 0 .3em; }
.verdict p { margin: .3em 0; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: .6em 0 1em; }
table { border-collapse: collapse; font-size: .94em; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: #555; padding-bottom: .3em; }
th, td { text-align: left; padding: .38em 1.1em .38em 0; border-bottom: 1px solid #ddd; vertical-align: top; }
thead th { border-bottom: 2px solid #1c1c1c; }
tbody th { font-weight: 400; }
thead th + th, td.number { text-align: right; white-space: nowrap; }
tr.group th { font-weight: 700; padding-top: 1.1em; }
.pictures { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 28px 36px; align-items: start; }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 500px; height: auto; }
figcaption { max-width: 500px; font-size: .94em; }
figcaption .of { font-weight: 700; }
code { font-size: .92em; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1.2em; font-size: .94em; }
dt { color: #555; } dd { margin: 0; min-width: 0; overflow-wrap: anywhere; }
@media (max-width: 760px) {
  body { padding: 16px 14px 48px; }
  .pictures { grid-template-columns: minmax(0, 1fr); }
  table { font-size: .85em; } th, td { padding-right: .7em; } .wraps td.number { white-space: normal; }
  dl { display: block; } dd { margin: 0 0 .5em; }
  h2 { margin-top: 1.7em; }
}
@media print { figure, .verdict { break-inside: avoid; } }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """A whole document; parts are markup."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # a browser asks the server for a picture of the page unless it is told that there is none
        f'<link rel="icon" href="data:,">\n<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def element(tag: str, text: str, kind: str | None = None) -> str:
    """One element around plain text; kind is its class."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<{tag}{attribute}>{escape(text)}</{tag}>"


def group(kind: str, parts: Iterable[str]) -> str:
    """Markup in a box of this class."""
    return f'<div class="{escape(kind)}">\n' + "\n".join(parts) + "\n</div>"


def listing(items: Iterable[str]) -> str:
    return "<ul>\n" + "\n".join(element("li", item) for item in items) + "\n</ul>"


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Names with what they stand for."""
    return "<dl>\n" + "\n".join(element("dt", name) + element("dd", text) for name, text in pairs) + "\n</dl>"


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, wraps: bool = False) -> str:
    """A table that scrolls sideways where a screen is narrow. A row of one cell is a heading inside it.

    wraps: its cells may be broken into lines there instead.
    """
    body = []
    for first, *cells in rows:
        if not cells:
            heading = f'<th colspan="{len(header)}" scope="rowgroup">{escape(first)}</th>'
            body.append(f'<tr class="group">{heading}</tr>')
            continue
        filled = "".join(element("td", cell, "number") for cell in cells)
        body.append(f'<tr><th scope="row">{escape(first)}</th>{filled}</tr>')
    kind = ' class="wraps"' if wraps else ""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    return (
        f'<div class="scroll"><table{kind}>\n<caption>{escape(caption)}</caption>\n'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody></table></div>"
    )


def picture(path: Path, of: str, text: str, described: str) -> str:
    """An svg file of ours as part of the page, with a caption. of: whose it is; described: for who doesn't see it."""
    caption = f'<span class="of">{escape(of)}.</span> {escape(text)}'
    return f"<figure>\n{_inline(path, described)}\n<figcaption>{caption}</figcaption>\n</figure>"


def _inline(path: Path, described: str) -> str:
    """The svg element of a file, with ids that no other picture of the page has: the file's name goes before each."""
    svg = path.read_text(encoding="utf-8")
    svg = svg[svg.index("<svg") :]
    # who drew it and with what: of no use here, and the only addresses in the file
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    prefix = re.sub(r"[^A-Za-z0-9]+", "-", path.stem)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}-\1)", svg)
    # lines are drawn to more digits than a screen shows: half of the page
    svg = re.sub(r'\b(?:d|x|y)="[^"]+"', lambda drawn: re.sub(r"(\.\d{2})\d+", r"\1", drawn[0]), svg)
    label = escape(described, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
