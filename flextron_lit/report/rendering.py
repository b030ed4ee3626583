"""HTML from the templates in this folder; whatever a text or a name says is escaped there, so nothing here has to."""

from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    # a name that nobody gives a value is a mistake, not an empty place
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


class Table(NamedTuple):
    """Of a page."""

    head: list[str]
    rows: list[list[str]]
    caption: str


Section = tuple[str, list[Table]]
"""A heading, and what stands under it."""


def render(template: str, **values: Any) -> str:
    """A page, as HTML in UTF-8.

    Args:
        template: path in this folder.
        values: what it names.
    """
    return TEMPLATES.get_template(template).render(values)


def words(text: str) -> Markup:
    """A text that is shown letter by letter: a bare carriage return would be read as a line feed."""
    return Markup(escape(text).replace("\r", Markup("&#13;")))


TEMPLATES.filters["words"] = words
