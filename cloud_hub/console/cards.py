"""Turns a model card, Markdown that anybody may have written, into HTML that can do no harm.

What comes out has no HTML of the author's, no pictures (they would be fetched from somewhere),
no styles, and links only to the web, which know nothing of this page. Headings go below those
of the page. The metadata at the head of a card is for Hugging Face and is shown as it is.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

LONGEST_CARD = 32 << 10  # bytes; the worst that Markdown can do with them takes under a second
LONGEST_HEAD = 8 << 10
_LEVELS = {"h1": "h3", "h2": "h4", "h3": "h5", "h4": "h5", "h5": "h5", "h6": "h5"}
_WEB = ("http://", "https://", "mailto:")
_HEAD = re.compile(r"\A---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Card:
    """A model card."""

    head: str  # metadata as text; empty if there is none
    body: Markup
    cut: bool  # there is more of it


def read(data: bytes) -> Card:
    """Return the card that ``data`` is, of which at most ``LONGEST_CARD`` bytes are shown."""
    return _read(data[:LONGEST_CARD], len(data) > LONGEST_CARD)


@functools.lru_cache(maxsize=32)  # releases do not change, and people look at the same ones
def _read(data: bytes, cut: bool) -> Card:
    text = data.decode(errors="ignore" if cut else "replace").replace("\r\n", "\n")
    head = ""
    if found := _HEAD.match(text):
        head, text = found[1][:LONGEST_HEAD], text[found.end() :]
    return Card(head, Markup(_rendered(text)), cut)


def _rendered(text: str) -> str:
    from markdown_it import MarkdownIt  # 60 ms, on use

    parser = MarkdownIt("js-default", {"html": False, "maxNesting": 20})
    tokens = parser.parse(text)
    _tame(tokens)
    html: str = parser.renderer.render(tokens, parser.options, {})
    return html


def _tame(tokens: Sequence[Any]) -> None:
    elsewhere: list[bool] = []  # of the links that are open
    for token in tokens:
        match token.type:
            case "heading_open" | "heading_close":
                token.tag = _LEVELS[token.tag]
            case "table_open":
                token.attrs = {"class": "rows", "aria-label": "Table of the model card"}
            case "th_open" | "td_open":
                right = "right" in str(token.attrs.pop("style", ""))
                if right:
                    token.attrs["class"] = "number"
            case "image":
                token.type, token.tag, token.content = "text", "", f"[{token.content}]"
            case "link_open":
                target = str(token.attrs.get("href", ""))
                elsewhere.append(target.lower().startswith(_WEB))
                token.attrs = (
                    {"href": target, "rel": "noopener noreferrer nofollow"} if elsewhere[-1] else {}
                )
                token.tag = "a" if elsewhere[-1] else "span"
            case "link_close":
                token.tag = "a" if elsewhere.pop() else "span"
        if token.children:
            _tame(token.children)
