"""Templates about percentages, money that grows, unknowns and sequences; exact, one `Problem` each."""

import random
from collections.abc import Callable
from fractions import Fraction

from megabts.corpora.math_text import NAMES, THINGS, Problem, decimal, money, pick, plural, show, signed


def percent_of(rng: random.Random) -> Problem:
    """A percentage of a number."""
    percent, whole = rng.randint(2, 180), rng.randrange(20, 4000)
    thing = rng.choice(THINGS)
    question = pick(
        rng,
        f"What is {percent}% of {whole}?",
        f"Find {percent} percent of {whole}.",
        f"A report gives {percent}% of a base of {whole} {thing} as its target. What is the target?",
    )
    part = Fraction(percent * whole, 100)
    steps = [
        f"1 percent: {whole} / 100 = {decimal(Fraction(whole, 100))}",
        f"{percent} percent: {decimal(Fraction(whole, 100))} * {percent} = {decimal(part)}",
    ]
    return Problem(question, steps, decimal(part))


def percent_change(rng: random.Random) -> Problem:
    """The change from one number to another, in percent."""
    old = 20 * rng.randint(2, 200)
    percent = 5 * rng.choice([n for n in range(-18, 41) if n])
    new = old + old * percent // 100
    question = pick(
        rng,
        f"A price goes from {old} to {new}. By how many percent does it change?",
        f"The number of visitors was {old} last year and is {new} now. What is the change in percent?",
        f"What is the percent change from {old} to {new}?",
    )
    steps = [
        f"Difference: {new} - {old} = {new - old}",
        f"Share of the old value: {new - old} / {old} = {show(Fraction(new - old, old))}",
        f"In percent: {show(Fraction(new - old, old))} * 100 = {percent}",
    ]
    return Problem(question, steps, f"{percent}%")


def percent_reverse(rng: random.Random) -> Problem:
    """The whole, from a part and its percentage."""
    percent, unit = rng.randint(3, 95), rng.randint(2, 90)
    part, name, thing = percent * unit, rng.choice(NAMES), rng.choice(THINGS)
    question = pick(
        rng,
        f"{percent}% of a number is {part}. What is the number?",
        f"{name} sold {percent} percent of the {thing}, which is {part} {thing}. How many were there at first?",
        f"If {percent}% equals {part}, how much is the whole?",
    )
    steps = [f"1 percent: {part} / {percent} = {unit}", f"100 percent: {unit} * 100 = {100 * unit}"]
    return Problem(question, steps, str(100 * unit))


def discount(rng: random.Random) -> Problem:
    """A price after a discount."""
    price, percent = 100 * rng.randint(4, 400), rng.randint(3, 75)
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    cut = price * percent // 100
    question = pick(
        rng,
        f"A coat costs ${money(price)} and is sold with {percent}% off. What does it cost now?",
        f"{name} buys {thing} worth ${money(price)} with a discount of {percent}%. How much does {name} pay?",
        f"The list price is ${money(price)}. The shop takes off {percent} percent. Find the new price.",
    )
    steps = [
        f"Discount: {money(price)} * {percent} / 100 = {money(cut)}",
        f"New price: {money(price)} - {money(cut)} = {money(price - cut)}",
    ]
    return Problem(question, steps, money(price - cut))


def simple_interest(rng: random.Random) -> Problem:
    """Interest that is not added to the principal."""
    principal, rate, years = 100 * rng.randint(2, 200), rng.randint(1, 12), rng.randint(2, 12)
    name = rng.choice(NAMES)
    question = pick(
        rng,
        f"{name} lends ${principal} at {rate}% simple interest a year for {years} years. What comes back in all?",
        f"${principal} lie at {rate}% simple yearly interest for {years} years. What is the final amount?",
    )
    yearly = principal * rate // 100
    steps = [
        f"Interest in a year: {principal} * {rate} / 100 = {yearly}",
        f"Interest in {years} years: {yearly} * {years} = {yearly * years}",
        f"Together: {principal} + {yearly * years} = {principal + yearly * years}",
    ]
    return Problem(question, steps, str(principal + yearly * years))


def compound_interest(rng: random.Random) -> Problem:
    """Two or three years of interest on interest, exact to the last digit."""
    principal, rate, years = 100 * rng.randint(2, 200), rng.randint(1, 12), rng.choice((2, 2, 3))
    name = rng.choice(NAMES)
    question = pick(
        rng,
        f"{name} saves ${principal} at {rate}% a year, compounded yearly, for {years} years. How much is it then?",
        f"${principal} grow by {rate} percent every year for {years} years. What is the exact final amount?",
    )
    amount, steps = Fraction(principal), []
    for year in range(1, years + 1):
        gain = amount * rate / 100
        steps.append(f"Interest of year {year}: {decimal(amount)} * {rate} / 100 = {decimal(gain)}")
        steps.append(f"After year {year}: {decimal(amount)} + {decimal(gain)} = {decimal(amount + gain)}")
        amount += gain
    return Problem(question, steps, decimal(amount))


def _times_x(factor: int, unknown: str = "x") -> str:
    return {1: unknown, -1: f"-{unknown}"}.get(factor, f"{factor}{unknown}")


def linear_one_unknown(rng: random.Random) -> Problem:
    """a x + b = c."""
    x, a, b = rng.randint(-25, 40), rng.randint(2, 19), rng.choice([n for n in range(-60, 90) if n])
    c = a * x + b
    equation = f"{a}x {signed(b)} = {c}"
    question = pick(rng, f"Solve {equation} for x.", f"Find x if {equation}.", f"Which x satisfies {equation}?")
    moved = f"{'Add' if b < 0 else 'Subtract'} {abs(b)} on both sides"
    steps = [f"{moved}: {a}x = {c} {signed(-b)} = {c - b}", f"Divide by {a}: x = {c - b} / {a} = {x}"]
    return Problem(question, steps, f"x = {x}")


def linear_both_sides(rng: random.Random) -> Problem:
    """a x + b = c x + d."""
    x, c = rng.randint(-15, 30), rng.randint(1, 12)
    a = c + rng.randint(1, 11)
    b = rng.choice([n for n in range(-50, 60) if n])
    d = a * x + b - c * x
    equation = f"{a}x {signed(b)} = {_times_x(c)} {signed(d)}"
    question = pick(rng, f"Solve {equation} for x.", f"Find x if {equation}.", f"Which x satisfies {equation}?")
    steps = [
        f"Subtract {_times_x(c)}: {_times_x(a - c)} {signed(b)} = {d}",
        f"Move the constant: {_times_x(a - c)} = {d} {signed(-b)} = {d - b}",
        f"Divide by {a - c}: x = {d - b} / {a - c} = {x}",
    ]
    return Problem(question, steps, f"x = {x}")


def linear_two_unknowns(rng: random.Random) -> Problem:
    """Two equations in x and y, solved by elimination of y."""
    x, y = rng.randint(-12, 20), rng.randint(-12, 20)
    while True:
        a, b, d, e = (rng.randint(1, 9) for _ in range(4))
        if a * e != b * d:
            break
    c, f = a * x + b * y, d * x + e * y
    first, second = f"{_times_x(a)} + {_times_x(b, 'y')} = {c}", f"{_times_x(d)} + {_times_x(e, 'y')} = {f}"
    question = pick(rng, f"Solve the system {first} and {second}.", f"Find x and y with {first} and {second}.")
    steps = [
        f"First times {e}: {_times_x(a * e)} + {_times_x(b * e, 'y')} = {c * e}",
        f"Second times {b}: {_times_x(b * d)} + {_times_x(b * e, 'y')} = {b * f}",
        f"Subtract: {_times_x(a * e - b * d)} = {c * e} {signed(-b * f)} = {c * e - b * f}",
        f"Divide: x = {c * e - b * f} / ({a * e - b * d}) = {x}",
        f"Put x into the first: {_times_x(b, 'y')} = {c} {signed(-a * x)} = {c - a * x}",
        f"Divide: y = {c - a * x} / {b} = {y}",
    ]
    return Problem(question, steps, f"x = {x}, y = {y}")


def consecutive_numbers(rng: random.Random) -> Problem:
    """Three numbers in a row with a known sum."""
    first, step = rng.randint(3, 900), rng.choice((1, 2))
    total, name = 3 * first + 3 * step, rng.choice(NAMES)
    kind = "consecutive numbers" if step == 1 else f"consecutive {'odd' if first % 2 else 'even'} numbers"
    question = pick(
        rng,
        f"The sum of three {kind} is {total}. What is the smallest of them?",
        f"{name} adds three {kind} and gets {total}. Which is the smallest?",
    )
    steps = [
        f"Let x be the smallest: x + (x + {step}) + (x + {2 * step}) = {total}",
        f"Collect: 3x = {total} - {3 * step} = {3 * first}",
        f"Divide by 3: x = {3 * first} / 3 = {first}",
    ]
    return Problem(question, steps, str(first))


def arithmetic_sequence(rng: random.Random) -> Problem:
    """The n-th term and the sum up to it."""
    first, step, count = rng.randint(-20, 60), rng.choice([n for n in range(-9, 16) if n]), rng.randint(6, 40)
    shown = ", ".join(str(first + step * n) for n in range(4))
    last = first + step * (count - 1)
    question = pick(
        rng,
        f"A sequence begins {shown} and goes on evenly. What is the sum of its first {count} terms?",
        f"Add up the arithmetic sequence {shown}, ... to its term number {count}.",
    )
    steps = [
        f"Difference: {first + step} - ({first}) = {step}",
        f"Term {count}: {first} + {count - 1} * ({step}) = {last}",
        f"Sum: {count} * ({first} {signed(last)}) / 2 = {count * (first + last) // 2}",
    ]
    return Problem(question, steps, str(count * (first + last) // 2))


def geometric_sequence(rng: random.Random) -> Problem:
    """A later term of a geometric sequence."""
    first, ratio = rng.randint(2, 60), rng.choice((2, 2, 3, 4, 5, 10, -2, -3))
    index = rng.randint(5, 8)
    shown = ", ".join(str(first * ratio**n) for n in range(3))
    question = pick(
        rng,
        f"The geometric sequence {shown} goes on. What is its term number {index}?",
        f"Each term of {shown}, ... is the same multiple of the one before. Find term {index}.",
    )
    steps = [f"Ratio: {first * ratio} / {first} = {ratio}"]
    value = first * ratio**2
    for term in range(4, index + 1):
        steps.append(f"Term {term}: {value} * ({ratio}) = {value * ratio}")
        value *= ratio
    return Problem(question, steps, str(value))


def pattern_growth(rng: random.Random) -> Problem:
    """Something that grows by a fixed amount; when does it reach a goal."""
    start, gain, periods = rng.randint(5, 400), rng.randint(3, 60), rng.randint(3, 40)
    goal, name = start + gain * periods, rng.choice(NAMES)
    unit = rng.choice(("day", "week", "month"))
    question = pick(
        rng,
        f"{name} has ${start} and saves ${gain} every {unit}. After how many {unit}s are there ${goal}?",
        f"A tank holds {start} litres and gains {gain} litres a {unit}. When, in {unit}s, does it hold {goal}?",
    )
    steps = [
        f"Let x count the {unit}s: {start} + {gain}x = {goal}",
        f"Still missing: {goal} - {start} = {goal - start}",
        f"{goal - start} / {gain} = {periods}; that is {plural(periods, unit)}.",
    ]
    return Problem(question, steps, str(periods))


TEMPLATES: dict[str, Callable[[random.Random], Problem]] = {
    "percent_of": percent_of,
    "percent_change": percent_change,
    "percent_reverse": percent_reverse,
    "discount": discount,
    "simple_interest": simple_interest,
    "compound_interest": compound_interest,
    "linear_one_unknown": linear_one_unknown,
    "linear_both_sides": linear_both_sides,
    "linear_two_unknowns": linear_two_unknowns,
    "consecutive_numbers": consecutive_numbers,
    "arithmetic_sequence": arithmetic_sequence,
    "geometric_sequence": geometric_sequence,
    "pattern_growth": pattern_growth,
}
