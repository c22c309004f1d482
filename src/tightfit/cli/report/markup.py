"""HTML and SVG elements whose text and attributes are escaped unless they are markup already.

Names of models and devices come from files of others: what is not `Markup` can never become a tag.
"""

from html import escape

VOID = frozenset({"meta", "link", "br", "rect", "line", "path", "use"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, *children: object, **attributes: object) -> Markup:
    """One element.

    Attributes that are None or False are left out, True ones stand alone; `class_` is `class`, and
    other underscores become hyphens, as in `stroke_width`.
    """
    written = []
    for name, value in attributes.items():
        if value is None or value is False:
            continue
        name = "class" if name == "class_" else name.replace("_", "-")
        written.append(f" {name}" if value is True else f' {name}="{escape(str(value))}"')
    opening = f"<{tag}{''.join(written)}"
    if tag in VOID:
        return Markup(f"{opening}/>")
    return Markup(f"{opening}>{join(children)}</{tag}>")


def join(children: object) -> Markup:
    """Children one after another; sequences are flattened, None is nothing."""
    if children is None:
        return Markup()
    if isinstance(children, Markup):
        return children
    if isinstance(children, list | tuple):
        return Markup("".join(join(child) for child in children))
    return Markup(escape(_printable(str(children))))


def _printable(text: str) -> str:
    """Characters that XML forbids would make a picture unreadable."""
    return "".join(
        c if c in "\t\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text
    )
