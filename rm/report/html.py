"""Building blocks of a self-contained HTML page: no scripts, no fonts, no external resources.

Plain text is escaped by every function, also what would turn the writing round; `parts` and `body` are HTML already.
"""

import html
from collections.abc import Callable, Iterable

from rm.terminal import printable

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; max-width: 1080px; margin: 0 auto;
       padding: 1rem; overflow-wrap: anywhere; }}
h1 {{ font-size: 1.5rem; margin: 0.5rem 0; }} h2 {{ font-size: 1.2rem; margin: 2.2rem 0 0.4rem; }}
h3 {{ font-size: 1rem; margin: 1.4rem 0 0.3rem; }}
.note {{ color: #5b626c; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; overflow-wrap: normal; }}
th, td {{ padding: 0.25rem 0.7rem; border-bottom: 1px solid #e4e6ea; text-align: right; white-space: nowrap; }}
th {{ font-weight: 600; }} th:first-child, td:first-child {{ text-align: left; padding-left: 0; }}
.grid {{ display: grid; gap: 1rem 1.5rem; margin: 1rem 0;
        grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }}
.grid > *, .pair > * {{ min-width: 0; }}
svg {{ width: 100%; height: auto; font-family: system-ui, sans-serif; }}
details {{ border-top: 1px solid #e4e6ea; padding: 0.5rem 0; }} summary {{ cursor: pointer; }}
.pair {{ display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }}
.turn {{ white-space: pre-wrap; margin: 0.5rem 0; padding: 0.4rem 0.7rem; background: #f3f4f6; border-radius: 6px;
        max-height: 24rem; overflow-y: auto; }}
.better {{ background: #e8f1fb; }} .worse {{ background: #fbecea; }}
@media (max-width: 30rem) {{ th, td {{ padding: 0.2rem 0.35rem; font-size: 0.8rem; }} }}
.who {{ font-size: 0.8rem; font-weight: 600; color: #5b626c; display: block; }}
</style>
</head>
<body>
{body}
</body>
</html>
"""
NO_FIGURES = (
    '<p class="note">Figures need matplotlib: <code>pip install matplotlib</code> (the extra <code>report</code>), '
    "then generate this page again.</p>"
)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: plain text.
        parts: the body, as HTML.
    """
    return PAGE.format(title=escape(title), body="\n".join([f"<h1>{escape(title)}</h1>", *parts]))


def escape(text: str) -> str:
    return html.escape(printable(text, keep="\n\t"))


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def table(headers: list[str], rows: list[list]) -> str:
    """A table that scrolls horizontally on narrow screens; cells are formatted by `format_value`."""
    head = "".join(f"<th>{escape(name)}</th>" for name in headers)
    body = ""
    for row in rows:
        cells = "".join(f"<td>{escape(format_value(cell))}</td>" for cell in row)
        body += f"<tr>{cells}</tr>"
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def figures(*draw_functions: Callable[[], str]) -> str:
    """Figures side by side where the width allows; without matplotlib, a note on how to install it.

    Args:
        draw_functions: functions of `rm.report.figures` with their arguments bound; each returns SVG.
    """
    try:
        drawn = "".join(f"<div>{draw()}</div>" for draw in draw_functions)
    except ImportError:
        return NO_FIGURES
    return f'<div class="grid">{drawn}</div>'


def details(summary: str, body: str) -> str:
    """A collapsed section that opens when its summary is clicked. `body` is HTML."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def turn(who: str, text: str, kind: str = "") -> str:
    """One message of a dialogue. Of a message over 6,000 characters only the beginning and the end are kept.

    Args:
        who: the line above the message, such as its role.
        kind: a further CSS class, "better" or "worse".
    """
    if len(text) > 6000:
        text = f"{text[:4000]}\n[... {len(text) - 6000:,} characters omitted ...]\n{text[-2000:]}"
    return f'<div class="turn {kind}"><span class="who">{escape(who)}</span>{escape(text)}</div>'


def format_value(value) -> str:
    """Format a value for display: four decimals, an interval as "a to b", None (undefined) as a dash."""
    if value is None:
        return "–"
    if isinstance(value, (tuple, list)):
        return f"{format_value(value[0])} to {format_value(value[1])}"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        very_small, very_large = 0 < abs(value) < 5e-4, abs(value) >= 1e6
        return f"{value:.2e}" if very_small or very_large else f"{value:.4f}"
    return str(value)


def text_table(headers: list[str], rows: list[list]) -> list[str]:
    """The lines of a table for a terminal: the first column left-aligned, the others right-aligned."""
    lines = [headers, *([printable(format_value(cell)) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for first, *others in lines:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        aligned.append("  ".join(cells))
    return aligned


def markdown_table(headers: list[str], rows: Iterable[Iterable]) -> str:
    """A table for a Markdown page: the first column left-aligned, the others right-aligned."""
    cells = [[escape(format_value(cell)).replace("|", "\\|") for cell in row] for row in rows]
    lines = [headers, ["---", *["---:"] * (len(headers) - 1)], *cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
