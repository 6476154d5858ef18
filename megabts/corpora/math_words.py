"""Word problems: people, trips, work, shops, mixtures, averages; exact, one `Problem` each."""

import random
from collections.abc import Callable
from fractions import Fraction

from megabts.corpora.math_text import NAMES, THINGS, Problem, decimal, money, people, pick, plural, show


def ages(rng: random.Random) -> Problem:
    """Two ages from their sum and difference, some years on."""
    younger, gap, later = rng.randint(3, 60), rng.randint(1, 35), rng.randint(1, 20)
    (a, b), total = people(rng, 2), 2 * younger + gap
    question = pick(
        rng,
        f"{a} is {gap} years older than {b}. Together they are {total}. How old will {b} be in {later} years?",
        f"There are {gap} years between {a} and the younger {b}, and their ages add up to {total}. "
        f"What is the age of {b} {later} years from now?",
    )
    steps = [
        f"Let x be the age of {b}: x + (x + {gap}) = {total}",
        f"2x = {total} - {gap} = {2 * younger}",
        f"x = {2 * younger} / 2 = {younger}",
        f"In {plural(later, 'year')}: {younger} + {later} = {younger + later}",
    ]
    return Problem(question, steps, str(younger + later))


def distance(rng: random.Random) -> Problem:
    """Two legs of a trip and their average speed."""
    speed_1, speed_2 = rng.randint(3, 120), rng.randint(3, 120)
    hours_1, hours_2 = rng.randint(1, 9), rng.randint(1, 9)
    name = rng.choice(NAMES)
    question = pick(
        rng,
        f"{name} travels {plural(hours_1, 'hour')} at {speed_1} km/h, then {plural(hours_2, 'hour')} at "
        f"{speed_2} km/h. What is the average speed in km/h?",
        f"A boat makes one leg of {plural(hours_1, 'hour')} at {speed_1} km/h and one of "
        f"{plural(hours_2, 'hour')} at {speed_2} km/h. Find its mean speed in km/h.",
    )
    leg_1, leg_2, hours = speed_1 * hours_1, speed_2 * hours_2, hours_1 + hours_2
    steps = [
        f"First leg: {speed_1} * {hours_1} = {leg_1}",
        f"Second leg: {speed_2} * {hours_2} = {leg_2}",
        f"Whole way: {leg_1} + {leg_2} = {leg_1 + leg_2}",
        f"Whole time: {hours_1} + {hours_2} = {hours}",
        f"Speed: {leg_1 + leg_2} / {hours} = {show(Fraction(leg_1 + leg_2, hours))}",
    ]
    return Problem(question, steps, show(Fraction(leg_1 + leg_2, hours)))


def meeting(rng: random.Random) -> Problem:
    """Two travellers that come towards each other."""
    speed_1, speed_2, hours = rng.randint(4, 130), rng.randint(4, 130), rng.randint(2, 12)
    way, (a, b) = (speed_1 + speed_2) * hours, people(rng, 2)
    question = pick(
        rng,
        f"{a} and {b} are {way} km apart and start towards each other at {speed_1} and {speed_2} km/h. "
        f"How many km has {a} gone when they meet?",
        f"Two trains, {way} km apart, run towards each other, one at {speed_1} km/h, the other at {speed_2} km/h. "
        "How many km does the first run until they meet?",
    )
    steps = [
        f"They close in by: {speed_1} + {speed_2} = {speed_1 + speed_2}",
        f"Hours until they meet: {way} / {speed_1 + speed_2} = {hours}",
        f"Way of the first: {speed_1} * {hours} = {speed_1 * hours}",
    ]
    return Problem(question, steps, str(speed_1 * hours))


def work_rate(rng: random.Random) -> Problem:
    """Two workers or pipes together."""
    slow, fast = rng.randint(2, 60), rng.randint(2, 60)
    a, b = people(rng, 2)
    jobs = ("paints the fence", "mows the field", "sorts the archive", "bakes the order", "fills the pool")
    job = rng.choice(jobs)
    question = pick(
        rng,
        f"{a} alone {job} in {slow} hours and {b} alone in {fast} hours. How many hours do they need together?",
        f"One pump empties a basin in {slow} hours, another in {fast}. How many hours do both need together?",
    )
    rate = Fraction(1, slow) + Fraction(1, fast)
    steps = [f"Share done in an hour: 1/{slow} + 1/{fast} = {rate}", f"Hours for the whole: 1 / ({rate}) = {1 / rate}"]
    return Problem(question, steps, show(1 / rate))


def shopping(rng: random.Random) -> Problem:
    """Two kinds of goods and the change from a note."""
    first, second = rng.sample(THINGS, 2)
    count_1, count_2 = rng.randint(2, 15), rng.randint(2, 15)
    price_1, price_2 = 5 * rng.randint(5, 240), 5 * rng.randint(5, 240)
    cost_1, cost_2 = count_1 * price_1, count_2 * price_2
    paid, name = ((cost_1 + cost_2) // 1000 + rng.randint(1, 3)) * 1000, rng.choice(NAMES)
    question = pick(
        rng,
        f"{name} buys {count_1} {first} at ${money(price_1)} each and {count_2} {second} at ${money(price_2)} "
        f"each and pays with ${money(paid)}. How much change is due?",
        f"What is left after {count_1} {first} for ${money(price_1)} apiece and {count_2} {second} for "
        f"${money(price_2)} apiece are bought from ${money(paid)}?",
    )
    steps = [
        f"For the {first}: {count_1} * {money(price_1)} = {money(cost_1)}",
        f"For the {second}: {count_2} * {money(price_2)} = {money(cost_2)}",
        f"Together: {money(cost_1)} + {money(cost_2)} = {money(cost_1 + cost_2)}",
        f"Change: {money(paid)} - {money(cost_1 + cost_2)} = {money(paid - cost_1 - cost_2)}",
    ]
    return Problem(question, steps, money(paid - cost_1 - cost_2))


def sharing(rng: random.Random) -> Problem:
    """Gains, losses, then equal parts."""
    groups, each = rng.randint(2, 12), rng.randint(3, 90)
    lost, left = rng.randint(1, 80), groups * each
    given = rng.randint(1, left + lost - 1)
    start, name, thing = left + lost - given, rng.choice(NAMES), rng.choice(THINGS)
    question = pick(
        rng,
        f"{name} has {start} {thing}, gets {given} more and loses {lost}. The rest goes into {groups} equal "
        "boxes. How many are in each box?",
        f"A store has {start} {thing}. It receives {given}, sells {lost}, and puts the others on {groups} shelves, "
        "as many on each. How many lie on one shelf?",
    )
    steps = [
        f"{start} + {given} = {start + given}",
        f"{start + given} - {lost} = {left}",
        f"{left} / {groups} = {each}",
    ]
    return Problem(question, steps, str(each))


def ratio_split(rng: random.Random) -> Problem:
    """A total in a given ratio."""
    a, b, unit = rng.randint(1, 15), rng.randint(1, 15), rng.randint(2, 120)
    first, second = people(rng, 2)
    total, thing = unit * (a + b), rng.choice(THINGS)
    question = pick(
        rng,
        f"{first} and {second} share {total} {thing} in the ratio {a}:{b}. How many does {first} get?",
        f"Split {total} in the ratio {a}:{b}. What is the first part?",
    )
    steps = [
        f"Parts: {a} + {b} = {a + b}",
        f"One part: {total} / {a + b} = {unit}",
        f"First share: {unit} * {a} = {unit * a}",
    ]
    return Problem(question, steps, str(unit * a))


def average(rng: random.Random) -> Problem:
    """The mean of a list."""
    values = [rng.randint(1, 400) for _ in range(rng.randint(3, 6))]
    shown, name = ", ".join(map(str, values)), rng.choice(NAMES)
    question = pick(
        rng,
        f"What is the mean of {shown}?",
        f"{name} scores {shown} in a game. What is the average score?",
        f"Find the average of the numbers {shown}.",
    )
    total, mean = sum(values), Fraction(sum(values), len(values))
    steps = [f"Sum: {' + '.join(map(str, values))} = {total}", f"Mean: {total} / {len(values)} = {mean}"]
    return Problem(question, steps, show(mean))


def missing_score(rng: random.Random) -> Problem:
    """What the next value must be for a wanted mean."""
    values = [rng.randint(40, 99) for _ in range(rng.randint(3, 5))]
    count = len(values) + 1
    goal = rng.randint(sum(values) // count + 1, 95)
    shown, name = ", ".join(map(str, values)), rng.choice(NAMES)
    question = pick(
        rng,
        f"{name} has the scores {shown} and wants a mean of {goal} after one more. What must the next score be?",
        f"Which number must follow {shown} to make the mean {goal}?",
    )
    have, need = sum(values), goal * count
    steps = [
        f"Needed in all: {goal} * {count} = {need}",
        f"There already: {' + '.join(map(str, values))} = {have}",
        f"Missing: {need} - {have} = {need - have}",
    ]
    return Problem(question, steps, str(need - have))


def mixture(rng: random.Random) -> Problem:
    """Two solutions poured together."""
    litres_1, litres_2 = rng.randint(1, 40), rng.randint(1, 40)
    percent_1, percent_2 = rng.sample(range(2, 96), 2)
    kind = rng.choice(("salt", "sugar", "acid", "alcohol"))
    question = pick(
        rng,
        f"{litres_1} litres with {percent_1}% {kind} and {litres_2} litres with {percent_2}% {kind} are mixed. "
        f"What percent of the mixture is {kind}?",
        f"Pour {litres_1} l of a {percent_1} percent {kind} solution to {litres_2} l of a {percent_2} percent one. "
        "What is the strength in percent?",
    )
    part_1, part_2 = Fraction(litres_1 * percent_1, 100), Fraction(litres_2 * percent_2, 100)
    volume, strength = litres_1 + litres_2, 100 * (part_1 + part_2) / (litres_1 + litres_2)
    steps = [
        f"First {kind}: {litres_1} * {percent_1} / 100 = {decimal(part_1)}",
        f"Second {kind}: {litres_2} * {percent_2} / 100 = {decimal(part_2)}",
        f"Together: {decimal(part_1)} + {decimal(part_2)} = {decimal(part_1 + part_2)}",
        f"Volume: {litres_1} + {litres_2} = {volume}",
        f"Strength in percent: {decimal(part_1 + part_2)} * 100 / {volume} = {show(strength)}",
    ]
    return Problem(question, steps, show(strength))


TEMPLATES: dict[str, Callable[[random.Random], Problem]] = {
    "ages": ages,
    "distance": distance,
    "meeting": meeting,
    "work_rate": work_rate,
    "shopping": shopping,
    "sharing": sharing,
    "ratio_split": ratio_split,
    "average": average,
    "missing_score": missing_score,
    "mixture": mixture,
}
