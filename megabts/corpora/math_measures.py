"""Word problems about shapes, units, proportions and chance; exact, one `Problem` each."""

import random
from collections.abc import Callable
from fractions import Fraction
from math import comb, gcd

from megabts.corpora.math_text import NAMES, THINGS, Problem, decimal, pick, show

# (larger unit, smaller unit, how many of the smaller make one of the larger)
UNITS = (
    ("kilometres", "metres", 1000),
    ("metres", "centimetres", 100),
    ("kilograms", "grams", 1000),
    ("hours", "minutes", 60),
    ("minutes", "seconds", 60),
    ("days", "hours", 24),
    ("weeks", "days", 7),
    ("feet", "inches", 12),
    ("yards", "feet", 3),
    ("pounds", "ounces", 16),
    ("litres", "millilitres", 1000),
    ("gallons", "pints", 8),
)


def rectangle(rng: random.Random) -> Problem:
    """The area of a rectangle from one side and the perimeter."""
    length, width = rng.randint(3, 150), rng.randint(2, 120)
    around, name = 2 * (length + width), rng.choice(NAMES)
    question = pick(
        rng,
        f"A rectangle has the perimeter {around} and one side {length}. What is its area?",
        f"{name} puts {around} m of fence around a rectangular garden that is {length} m long. Find the area in "
        "square metres.",
    )
    steps = [
        f"Half the perimeter: {around} / 2 = {length + width}",
        f"Other side: {length + width} - {length} = {width}",
        f"Area: {length} * {width} = {length * width}",
    ]
    return Problem(question, steps, str(length * width))


def trapezoid(rng: random.Random) -> Problem:
    """The area of a trapezoid."""
    long, short, height = rng.randint(10, 90), rng.randint(2, 60), rng.randint(2, 50)
    question = pick(
        rng,
        f"The parallel sides of a trapezoid are {long} cm and {short} cm, its height is {height} cm. "
        "What is its area in square centimetres?",
        f"Find the area of a trapezoid with parallel sides {long} and {short} and height {height}.",
    )
    area = Fraction((long + short) * height, 2)
    steps = [f"{long} + {short} = {long + short}", f"{long + short} * {height} / 2 = {decimal(area)}"]
    return Problem(question, steps, decimal(area))


def box(rng: random.Random) -> Problem:
    """The surface of a box."""
    a, b, c = (rng.randint(2, 40) for _ in range(3))
    question = pick(
        rng,
        f"A box measures {a} by {b} by {c}. What is its surface area?",
        f"How much paper covers a box that is {a} cm long, {b} cm wide and {c} cm high, in square centimetres?",
    )
    total = a * b + a * c + b * c
    steps = [
        f"{a} * {b} = {a * b}",
        f"{a} * {c} = {a * c}",
        f"{b} * {c} = {b * c}",
        f"{a * b} + {a * c} + {b * c} = {total}",
        f"Every face twice: 2 * {total} = {2 * total}",
    ]
    return Problem(question, steps, str(2 * total))


def unit_conversion(rng: random.Random) -> Problem:
    """Mixed units to the smaller one, several times over."""
    large, small, factor = rng.choice(UNITS)
    whole, rest, times = rng.randint(2, 60), rng.randint(1, factor - 1), rng.randint(2, 15)
    question = pick(
        rng,
        f"How many {small} are {whole} {large} and {rest} {small}, taken {times} times?",
        f"One part takes {whole} {large} and {rest} {small}. How many {small} do {times} parts take?",
    )
    one = whole * factor + rest
    steps = [
        f"{whole} {large} in {small}: {whole} * {factor} = {whole * factor}",
        f"One part: {whole * factor} + {rest} = {one}",
        f"All parts: {one} * {times} = {one * times}",
    ]
    return Problem(question, steps, str(one * times))


def proportion(rng: random.Random) -> Problem:
    """The rule of three."""
    few, price, many = rng.randint(2, 25), rng.randint(2, 150), rng.randint(2, 40)
    thing = rng.choice(THINGS)
    question = pick(
        rng,
        f"{few} {thing} cost ${price}. What do {many} {thing} cost at the same price, as a fraction if needed?",
        f"A recipe for {few} people takes {price} grams of flour. How many grams does it take for {many} people?",
    )
    result = Fraction(price * many, few)
    steps = [
        f"For one: {price} / {few} = {Fraction(price, few)}",
        f"For {many}: ({Fraction(price, few)}) * {many} = {result}",
    ]
    return Problem(question, steps, show(result))


def draw_one(rng: random.Random) -> Problem:
    """The chance of a colour in one draw."""
    counts = [rng.randint(1, 30) for _ in range(3)]
    first, second, third = rng.sample(("red", "blue", "green", "white", "black", "yellow"), 3)
    question = pick(
        rng,
        f"A bag holds {counts[0]} {first}, {counts[1]} {second} and {counts[2]} {third} balls. "
        f"What is the probability that one drawn ball is not {third}?",
        f"From {counts[0]} {first}, {counts[1]} {second} and {counts[2]} {third} cards one is drawn. "
        f"How likely is a {first} or {second} one?",
    )
    total, good = sum(counts), counts[0] + counts[1]
    steps = [
        f"All: {counts[0]} + {counts[1]} + {counts[2]} = {total}",
        f"Wanted: {counts[0]} + {counts[1]} = {good}",
        f"gcd({good}, {total}) = {gcd(good, total)}",
        f"Probability: {good}/{total} = {show(Fraction(good, total))}",
    ]
    return Problem(question, steps, show(Fraction(good, total)))


def draw_two(rng: random.Random) -> Problem:
    """Two draws without putting back."""
    good, other = rng.randint(2, 40), rng.randint(1, 40)
    colour, rest = rng.sample(("red", "blue", "green", "white", "black", "yellow"), 2)
    total = good + other
    question = pick(
        rng,
        f"Two balls are drawn from {good} {colour} and {other} {rest} ones without putting back. "
        f"What is the probability that both are {colour}?",
        f"A box has {good} {colour} and {other} {rest} pens. Two are taken blindly. How likely are two {colour} ones?",
    )
    chance_1, chance_2 = Fraction(good, total), Fraction(good - 1, total - 1)
    steps = [
        f"All: {good} + {other} = {total}",
        f"First: {good}/{total} = {chance_1}",
        f"Second: {good - 1}/{total - 1} = {chance_2}",
        f"Both: ({chance_1}) * ({chance_2}) = {chance_1 * chance_2}",
    ]
    return Problem(question, steps, show(chance_1 * chance_2))


def choose_team(rng: random.Random) -> Problem:
    """Counting pairs or triples, of two kinds."""
    pool, extra, size = rng.randint(4, 40), rng.randint(2, 30), rng.choice((2, 3))
    place, thing = rng.choice(("club", "class", "choir", "office", "village")), rng.choice(THINGS)
    question = pick(
        rng,
        f"A {place} has {pool} members and {extra} rooms. How many ways are there to choose {size} members and a room?",
        f"There are {pool} {thing} and {extra} bags. "
        f"How many ways are there to choose {size} of the {thing} and a bag?",
    )
    top = " * ".join(str(pool - n) for n in range(size))
    bottom = " * ".join(str(n) for n in range(size, 0, -1))
    ways = comb(pool, size)
    steps = [f"Choices of {size}: ({top}) / ({bottom}) = {ways}", f"With the other: {ways} * {extra} = {ways * extra}"]
    return Problem(question, steps, str(ways * extra))


TEMPLATES: dict[str, Callable[[random.Random], Problem]] = {
    "rectangle": rectangle,
    "trapezoid": trapezoid,
    "box": box,
    "unit_conversion": unit_conversion,
    "proportion": proportion,
    "draw_one": draw_one,
    "draw_two": draw_two,
    "choose_team": choose_team,
}
