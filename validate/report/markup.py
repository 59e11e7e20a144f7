"""HTML and SVG as a tree of elements, so that no text of a report can ever become markup."""

from __future__ import annotations

import re
from collections.abc import Iterable
from xml.etree.ElementTree import Element, tostring

# Control characters, lone surrogates, and marks that turn the direction of what follows them.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def element(tag: str, *children: Element | str | None, **attributes: object) -> Element:
    """An element; None among children and attributes is left out.

    Names of attributes are written as Python allows: `class_` is class, `aria_label` is aria-label.
    """
    named = {name.rstrip("_").replace("_", "-"): value for name, value in attributes.items() if value is not None}
    made = Element(tag, {name: visible(str(value)) for name, value in named.items()})
    append(made, children)
    return made


def append(parent: Element, children: Iterable[Element | str | None]) -> None:
    """Add children at the end of an element."""
    for child in children:
        if isinstance(child, Element):
            parent.append(child)
        elif child is not None and len(parent):
            parent[-1].tail = (parent[-1].tail or "") + visible(child)
        elif child is not None:
            parent.text = (parent.text or "") + visible(child)


def to_html(root: Element) -> str:
    """The document of which `root` is the `<html>`."""
    return f"<!doctype html>\n{tostring(root, encoding='unicode', method='html')}\n"


def visible(text: str) -> str:
    """The text with what cannot be seen, or makes other text look otherwise, written as its code point: [U+202E]."""
    return _UNSEEN.sub(lambda found: f"[U+{ord(found[0]):04X}]", text)


def number(value: float | None, digits: int = 3, unit: str = "") -> str:
    """A number of a report as people read it; a dash for None."""
    if value is None:
        return "—"
    small = 0 < abs(value) < 1e-3
    mantissa, _, exponent = (f"{value:.{digits - 1}e}" if small else f"{value:.{digits}g}").partition("e")
    if not exponent:
        return f"{mantissa}{unit}"
    short = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    return f"{short}e{int(exponent)}{unit}"


def count(amount: int, noun: str) -> str:
    """`1 check`, `2 checks`."""
    return f"{amount:,} {noun}" if amount == 1 else f"{amount:,} {noun}s"


def table(
    label: str, head: Iterable[str], rows: Iterable[Element], *, caption: Element | str | None = None, kind: str = ""
) -> Element:
    """A table in a box that scrolls by itself where the table is too wide, also by keyboard.

    Args:
        label: what the table is, for those who hear it.
        head: of the columns.
        rows: `<tr>` each.
        caption: above it.
        kind: a class.
    """
    top = element("thead", element("tr", *(element("th", name, scope="col") for name in head)))
    made = element(
        "table", element("caption", caption) if caption is not None else None, top, element("tbody", *rows),
        class_=kind or None,
    )  # fmt: skip
    return element("div", made, class_="scroll", role="region", tabindex=0, aria_label=label)


def row(first: Element | str, *cells: Element | str, class_: str | None = None) -> Element:
    """A row whose first cell is its head."""
    return element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in cells), class_=class_)


def folded(summary: str, *content: Element | str | None, open_: bool = False) -> Element:
    """Content that is shown on demand, without a script."""
    return element("details", element("summary", summary), *content, open="" if open_ else None)


def foreign(text: str, longest: int = 160) -> Element:
    """Text that somebody gave, isolated in its direction; a long one unfolds."""
    if len(text) <= longest:
        return element("bdi", text)
    # A letter and the marks that sit on it may be parted; the whole text is below.
    more = element("span", f"all {len(text):,} characters", class_="more")
    summary = element("summary", element("bdi", f"{text[:longest]}…"), " ", more)
    return element("details", summary, element("bdi", text), class_="foreign")
