"""Validation text coloured by the member whose gate weight dominates each token.

Colour: the member with the largest weight. Strength: how far that weight is above uniform (1/members), as a share of
nearly the largest such excess in all texts of the page. Hovering shows every number. Layout is kept (this is often
code), and nothing in a text can reach the page as markup or as an invisible or direction-changing character.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape

from megabts.viz.records import TokenText

STRONGEST = 0.55
# Below this excess over uniform a text would be coloured by noise alone.
SMALLEST_FULL_EXCESS = 0.05


@dataclass
class ColouredText:
    """A text ready for the page: its domain, the tokens as markup, and the share of tokens each member dominates."""

    domain: str
    markup: Markup
    shares: dict[str, float]


def full_excess(texts: Sequence[TokenText], members: int) -> float:
    """The excess over uniform that is drawn in full strength: the 98th percentile over the tokens of all texts."""
    top = [max(row) for text in texts for row in text.weights]
    return max(float(np.quantile(top, 0.98)) - 1 / members, SMALLEST_FULL_EXCESS) if top else SMALLEST_FULL_EXCESS


def colour_text(text: TokenText, colours: dict[str, str], members: Sequence[str], full: float) -> ColouredText:
    """Colour one text. `colours` are hex by member; `full` comes from `full_excess`. Ties go to the earlier member."""
    winners = [max(range(len(members)), key=row.__getitem__) for row in text.weights]
    spans = []
    for token, row, winner in zip(text.tokens, text.weights, winners, strict=True):
        excess = row[winner] - 1 / len(members)
        alpha = STRONGEST * min(max(excess / full, 0.0), 1.0)
        red, green, blue = bytes.fromhex(colours[members[winner]].lstrip("#"))
        numbers = " · ".join(f"{member} {weight:.2f}" for member, weight in zip(members, row, strict=True))
        style = f"background:rgb({red} {green} {blue}/{alpha:.2f})"
        spans.append(Markup('<span style="{}" title="{}">{}</span>').format(style, numbers, visible(token)))
    total = max(len(winners), 1)
    shares = {member: winners.count(i) / total for i, member in enumerate(members)}
    return ColouredText(text.domain, Markup("").join(spans), shares)


def visible(token: str) -> Markup:
    """A token as markup in which everything can be seen.

    A newline gets a mark; what cannot be printed (controls, lone surrogates, direction marks, bytes of cut characters)
    is written as its code.
    """
    return Markup("").join(_visible_character(character) for character in token)


def _visible_character(character: str) -> Markup:
    code = ord(character)
    if character == "\n":
        return Markup('<i class="newline"></i>\n')
    if character == "\t" or not unicodedata.category(character).startswith("C"):
        return escape(character)
    if 0xDC80 <= code <= 0xDCFF:
        return _code(f"\\x{code - 0xDC00:02x}")
    return _code(f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")


def _code(text: str) -> Markup:
    return Markup('<i class="code">{}</i>').format(text)
