"""What every mathematics template shares: the record it returns and exact ways to write numbers.

Equation convention, which the tests hold every template to: a step that contains "=" is
`[words: ]equation[; words]`, and the equation is plain arithmetic (+ - * / ^, parentheses, gcd, lcm) over
integers, decimals and the unknowns x and y, without units. So every displayed equation can be evaluated exactly.
"""

import random
from fractions import Fraction
from typing import NamedTuple

# fmt: off
NAMES = (
    "Ada", "Ben", "Carla", "Dmitri", "Elena", "Farid", "Grace", "Hana", "Igor", "Jonas", "Kofi", "Lena", "Mateo",
    "Nadia", "Omar", "Priya", "Quentin", "Rosa", "Samir", "Tara", "Uma", "Victor", "Wei", "Ximena", "Yusuf",
    "Zoe",
)
THINGS = (
    "apples", "books", "candles", "eggs", "folders", "lamps", "marbles", "notebooks", "oranges", "pencils",
    "plates", "shirts", "stamps", "tickets",
)
# fmt: on


class Problem(NamedTuple):
    """One question, its worked steps (one line each) and the bare answer."""

    question: str
    steps: list[str]
    answer: str

    def text(self) -> str:
        """The form that the model reads: question, steps, then the answer behind four hashes."""
        steps = "\n".join(self.steps)
        return f"Question: {self.question}\nAnswer: {steps}\n#### {self.answer}"


def pick(rng: random.Random, *wordings: str) -> str:
    """One of several wordings of the same question."""
    return rng.choice(wordings)


def people(rng: random.Random, count: int) -> list[str]:
    """`count` different first names."""
    return rng.sample(NAMES, count)


def show(value: Fraction | int) -> str:
    """An integer, or a fraction in lowest terms such as 3/4."""
    return str(Fraction(value))


def decimal(value: Fraction | int) -> str:
    """A terminating decimal without trailing zeros, exactly.

    Raises:
        ValueError: the value has no finite decimal form of at most 12 places.
    """
    value = Fraction(value)
    for places in range(13):
        scaled = value * 10**places
        if scaled.denominator == 1:
            break
    else:
        raise ValueError(f"{value} has no short finite decimal form")
    sign, digits = "-" if scaled < 0 else "", str(abs(scaled.numerator)).rjust(places + 1, "0")
    return sign + (digits[:-places] + "." + digits[-places:] if places else digits)


def money(cents: int) -> str:
    """An amount given in cents, written in whole units: 1250 -> 12.50, 300 -> 3."""
    return f"{cents // 100}.{cents % 100:02d}" if cents % 100 else str(cents // 100)


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 hour, 2 hours."""
    return f"{count} {noun}" + ("" if count == 1 else "s")


def signed(value: int) -> str:
    """An integer as the tail of a sum: 5 -> "+ 5", -5 -> "- 5"."""
    return f"- {-value}" if value < 0 else f"+ {value}"
