"""Pieces of the page; every text of a result folder passes through `text`."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

from sqakd_fx.diagnostics.wording import printable


def text(value: Any) -> str:
    """A text that HTML and Plotly show as it is: no element, link, style or line comes of it."""
    return html.escape(printable(str(value)), quote=True)


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading; nothing where it has no content."""
    content = "\n".join(part for part in parts if part)
    return f"<section><h2>{text(title)}</h2>\n{content}\n</section>" if content else ""


def paragraph(words: str, kind: str = "note") -> str:
    """A sentence below or above what it explains."""
    return f'<p class="{kind}">{text(words)}</p>' if words else ""


def code(content: str) -> str:
    """Lines to copy; an end of a line is one, as nothing else is."""
    return f"<pre>{chr(10).join(map(text, content.splitlines()))}</pre>"


def folded(title: str, content: str) -> str:
    """Content that a click shows."""
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def table(titles: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table that a click on a title sorts; numbers stand on the right."""
    if not rows:
        return ""
    head = "".join(f'<th><button type="button">{text(title)}</button></th>' for title in titles)
    body = "\n".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(value: Any) -> str:
    if value is None:
        return '<td class="number" data-value="">–</td>'
    if isinstance(value, Number):
        return f'<td class="number" data-value="{value.value!r}">{text(value.shown)}</td>'
    return f"<td>{text(value)}</td>"


class Number:
    """A number in a cell: it is sorted by its value and shown as a text."""

    def __init__(self, value: float, shown: str) -> None:
        self.value, self.shown = float(value), shown


def number(value: float | None, form: str = "{:g}") -> Number | None:
    """A cell with a number in a form; None stands for what is not known."""
    return None if value is None else Number(value, form.format(value))


def pairs(rows: Sequence[tuple[str, Any]]) -> str:
    """Labels and texts, one below the other; those without a text are left out."""
    known = [(label, value) for label, value in rows if value not in (None, "")]
    items = "".join(f"<dt>{text(label)}</dt><dd>{text(value)}</dd>" for label, value in known)
    return f"<dl>{items}</dl>" if items else ""
