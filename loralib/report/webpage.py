"""The report as one HTML file that opens anywhere: figures inside as SVG, tables that sort, no external resources."""

import base64
import hashlib
import re
from collections.abc import Mapping
from html import escape, unescape

from markdown import Markdown

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 80rem; margin: 0 auto;
  padding: 1rem 1.5rem; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
p, li { max-width: 50rem; }
.toc ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; }
.toc > ul > li > a { display: none; }
.wide { overflow-x: auto; margin: 1rem 0; background: no-repeat right / 3rem 100% local
  linear-gradient(to left, #fff 40%, #fff0), no-repeat right / 1rem 100% linear-gradient(to left, #0004, #0000); }
table { border-collapse: separate; border-spacing: 0; font-size: .875rem; font-variant-numeric: tabular-nums;
  overflow-wrap: normal; }
th, td { white-space: nowrap; padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #555; vertical-align: bottom; }
td:first-child { white-space: normal; min-width: 9rem; }
td[style*=left] { white-space: normal; overflow-wrap: anywhere; min-width: 16rem; }
tbody tr:hover td { background: #f3f6fa; }
th button { all: unset; cursor: pointer; }
th button:focus-visible { outline: 2px solid #0072B2; }
th button::after { content: " \\2195"; color: #888; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
figure { margin: 1.5rem 0; }
figure img { max-width: 100%; height: auto; }
figcaption { font-size: .875rem; color: #555; }
code { background: #f2f2f2; padding: 0 .2rem; }
@media (max-width: 40rem) {
  body { padding: .5rem .75rem; }
  th, td { padding: .3rem .4rem; }
  td:first-child, th:first-child { min-width: 6.5rem; max-width: 8rem; overflow-wrap: break-word; white-space: normal; }
}
@media print { th button::after { content: none; } figure { break-inside: avoid; } }
"""

# Sorts a table by the first number in each cell, or by the text if a column has none; cells without a number go last.
SCRIPT = r"""
for (const table of document.querySelectorAll("table")) table.querySelectorAll("thead th").forEach((head, column) => {
  const button = document.createElement("button");
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down === 1 ? "ascending" : "descending");
    const body = table.tBodies[0], rows = [...body.rows], text = row => row.cells[column].textContent.trim();
    const number = row => { const found = text(row).replaceAll(",", "").match(/^[+-]?\d+(\.\d+)?(e[+-]?\d+)?/i);
      return found ? parseFloat(found[0]) : NaN; };
    const numeric = rows.some(row => !isNaN(number(row)));
    rows.sort((a, b) => { if (!numeric) return down * text(a).localeCompare(text(b));
      const [x, y] = [number(a), number(b)];
      return isNaN(x) || isNaN(y) ? isNaN(x) - isNaN(y) : down * (x - y); });
    body.append(...rows);
  });
});
"""


def webpage(report: str, figures: Mapping[str, str]) -> str:
    """The page of a report.

    Args:
        report: the report as Markdown; the user's names are escaped in it.
        figures: SVG text by the file name under which the report shows the figure.
    """
    reader = Markdown(extensions=["tables", "toc"], output_format="html")
    reader.ESCAPED_CHARS = [*reader.ESCAPED_CHARS, "$", "~", "|"]
    body = reader.convert(report)
    body = body.replace("<table>", '<div class="wide" tabindex="0"><table>').replace("</table>", "</table></div>")

    def inside(image: re.Match[str]) -> str:
        name = unescape(image[1])
        if name not in figures:
            return image[0]
        shown, data = escape(name.removesuffix(".png")), base64.b64encode(figures[name].encode()).decode()
        picture = f'<img alt="{shown}" src="data:image/svg+xml;base64,{data}">'
        return f"<figure>{picture}<figcaption>{shown}</figcaption></figure>"

    body = re.sub(r'<p><img alt="[^"]*" src="([^"]*)"\s*/?></p>', inside, body)
    script = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{script}'"
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>Results</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n{reader.toc}\n{body}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
