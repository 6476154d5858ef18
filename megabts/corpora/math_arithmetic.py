"""Templates that compute with bare numbers: columns of digits, fractions, divisors, powers.

Every template is a function of a random generator alone and returns a `Problem` whose arithmetic is exact
(int and Fraction). All wordings of one template name their numbers in the same order.
"""

import random
from collections.abc import Callable
from fractions import Fraction
from math import gcd, lcm, prod

from megabts.corpora.math_text import Problem, pick, show

Expression = int | tuple[str, "Expression", "Expression"]
PLACES = ("Ones", "Tens", "Hundreds", "Thousands", "Ten thousands", "Hundred thousands")


def addition(rng: random.Random) -> Problem:
    """Column addition of two or three numbers, every carry spelled out."""
    terms = [rng.randrange(10, 10 ** rng.randint(2, 5)) for _ in range(rng.choice((2, 2, 3)))]
    expression, total = " + ".join(map(str, terms)), sum(terms)
    question = pick(rng, f"What is {expression}?", f"Compute {expression}.", f"Find the sum {expression}.")
    steps, carry = [], 0
    for place in range(len(str(max(terms)))):
        digits = [term // 10**place % 10 for term in terms if term >= 10**place]
        column = sum(digits) + carry
        shown = " + ".join(map(str, digits + [carry] * (carry > 0)))
        steps.append(f"{PLACES[place]}: {shown} = {column}; write {column % 10}, carry {column // 10}.")
        carry = column // 10
    return Problem(question, [*steps, f"{expression} = {total}"], str(total))


def subtraction(rng: random.Random) -> Problem:
    """Column subtraction with borrowing."""
    small, large = sorted(rng.randrange(10, 10 ** rng.randint(3, 5)) for _ in range(2))
    expression, result = f"{large} - {small}", large - small
    question = pick(rng, f"What is {expression}?", f"Compute {expression}.", f"Work out {expression}.")
    steps, borrow = [], 0
    for place in range(len(str(large))):
        top, bottom = large // 10**place % 10 - borrow, small // 10**place % 10
        borrow = int(top < bottom)
        note = "; borrow 1." if borrow else ""
        steps.append(f"{PLACES[place]}: {top + 10 * borrow} - {bottom} = {top + 10 * borrow - bottom}{note}")
    return Problem(question, [*steps, f"{expression} = {result}"], str(result))


def multiplication(rng: random.Random) -> Problem:
    """Long multiplication through partial products."""
    left, right = rng.randrange(12, 2000), rng.randrange(11, 400)
    question = pick(rng, f"What is {left} * {right}?", f"Multiply {left} by {right}.", f"Compute {left} * {right}.")
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(right))) if digit != "0"]
    steps = [f"{right} = {' + '.join(map(str, reversed(parts)))}"] if len(parts) > 1 else []
    steps += [f"{left} * {part} = {left * part}" for part in parts]
    total = parts[0] * left
    for part in parts[1:]:
        steps.append(f"{total} + {left * part} = {total + left * part}")
        total += left * part
    return Problem(question, steps, str(total))


def division(rng: random.Random) -> Problem:
    """Long division with a remainder, one digit at a time."""
    divisor, dividend = rng.randrange(3, 40), rng.randrange(100, 100000)
    question = pick(
        rng,
        f"Divide {dividend} by {divisor} and give the quotient and the remainder.",
        f"What are the quotient and remainder of {dividend} / {divisor}?",
        f"How many times does {dividend} hold {divisor}, and what is left over?",
    )
    steps: list[str] = []
    rest = 0
    for digit in str(dividend):
        current = 10 * rest + int(digit)
        if steps or current >= divisor:
            steps.append(f"Take {current}: {divisor} * {current // divisor} + {current % divisor} = {current}")
        rest = current % divisor
    quotient = dividend // divisor
    steps.append(f"Check: {divisor} * {quotient} + {rest} = {dividend}")
    return Problem(question, steps, f"{quotient} remainder {rest}")


def _random_expression(rng: random.Random, operations: int) -> Expression:
    """A random tree with that many operations, each +, - or *."""
    if operations == 0:
        return rng.randint(2, 20)
    left = rng.randrange(operations)
    children = _random_expression(rng, left), _random_expression(rng, operations - 1 - left)
    return rng.choice("+-*"), *children


def _render(tree: Expression, outer: int = 0) -> str:
    """Infix text with only the parentheses it needs; `outer` is the precedence around it."""
    if isinstance(tree, int):
        return f"({tree})" if tree < 0 and outer else str(tree)
    rank = 2 if tree[0] == "*" else 1
    text = f"{_render(tree[1], rank)} {tree[0]} {_render(tree[2], rank + 1)}"
    return f"({text})" if rank < outer else text


def _reduce_once(tree: Expression) -> Expression:
    """Carry out the leftmost innermost operation."""
    assert not isinstance(tree, int)
    sign, left, right = tree
    if not isinstance(left, int):
        return sign, _reduce_once(left), right
    if not isinstance(right, int):
        return sign, left, _reduce_once(right)
    return {"+": left + right, "-": left - right, "*": left * right}[sign]


def order_of_operations(rng: random.Random) -> Problem:
    """An expression with parentheses, reduced one operation a line."""
    tree = _random_expression(rng, rng.randint(3, 5))
    text = _render(tree)
    question = pick(rng, f"Evaluate {text}.", f"What is the value of {text}?", f"Simplify {text}.")
    steps = []
    while not isinstance(tree, int):
        smaller = _reduce_once(tree)
        steps.append(f"{_render(tree)} = {_render(smaller)}")
        tree = smaller
    return Problem(question, steps, str(tree))


def _lowest(numerator: int, denominator: int) -> list[str]:
    """The lines that bring a positive fraction to lowest terms."""
    common = gcd(numerator, denominator)
    if common == 1:
        return [f"gcd({numerator}, {denominator}) = 1; it is in lowest terms."]
    lowest = show(Fraction(numerator, denominator))
    return [f"gcd({numerator}, {denominator}) = {common}", f"{numerator}/{denominator} = {lowest}"]


def _fraction(rng: random.Random) -> Fraction:
    denominator = rng.randint(2, 24)
    return Fraction(rng.randrange(1, 2 * denominator), denominator)


def _proper_pair(rng: random.Random) -> tuple[Fraction, Fraction]:
    """Two different positive fractions that are not integers, the larger first."""
    while True:
        high, low = sorted((_fraction(rng), _fraction(rng)), reverse=True)
        if high != low and high.denominator > 1 and low.denominator > 1:
            return high, low


def _fraction_sum(rng: random.Random, sign: str, wordings: Callable[[Fraction, Fraction], tuple[str, ...]]) -> Problem:
    """Fractions over a common denominator, added or subtracted."""
    a, b = _proper_pair(rng)
    if sign == "+" and rng.random() < 0.5:
        a, b = b, a
    base = lcm(a.denominator, b.denominator)
    top_a, top_b = int(a * base), int(b * base)
    top = top_a + top_b if sign == "+" else top_a - top_b
    steps = [
        f"lcm({a.denominator}, {b.denominator}) = {base}",
        f"{a} = {top_a}/{base}",
        f"{b} = {top_b}/{base}",
        f"{a} {sign} {b} = ({top_a} {sign} {top_b})/{base} = {top}/{base}",
    ]
    return Problem(pick(rng, *wordings(a, b)), steps + _lowest(top, base), show(Fraction(top, base)))


def fraction_add(rng: random.Random) -> Problem:
    """The sum of two fractions."""
    return _fraction_sum(
        rng, "+", lambda a, b: (f"What is {a} + {b}?", f"Add {a} and {b}.", f"Find the sum of {a} and {b}.")
    )


def fraction_subtract(rng: random.Random) -> Problem:
    """The difference of two fractions."""
    return _fraction_sum(
        rng, "-", lambda a, b: (f"What is {a} - {b}?", f"Compute {a} minus {b}.", f"By how much is {a} more than {b}?")
    )


def fraction_multiply(rng: random.Random) -> Problem:
    """The product of two fractions."""
    a, b = _proper_pair(rng)
    question = pick(rng, f"What is {a} * {b}?", f"Multiply {a} by {b}.", f"Find the product of {a} and {b}.")
    top, base = a.numerator * b.numerator, a.denominator * b.denominator
    steps = [
        f"Numerators: {a.numerator} * {b.numerator} = {top}",
        f"Denominators: {a.denominator} * {b.denominator} = {base}",
        *_lowest(top, base),
    ]
    return Problem(question, steps, show(a * b))


def fraction_divide(rng: random.Random) -> Problem:
    """The quotient of two fractions, through the reciprocal."""
    a, b = _proper_pair(rng)
    question = pick(rng, f"What is ({a}) / ({b})?", f"Divide {a} by {b}.", f"What is {a} divided by {b}?")
    top, base = a.numerator * b.denominator, a.denominator * b.numerator
    steps = [
        f"Multiply by the reciprocal: ({a}) / ({b}) = ({a}) * ({b.denominator}/{b.numerator}) = {top}/{base}",
        *_lowest(top, base),
    ]
    return Problem(question, steps, show(a / b))


def greatest_common_divisor(rng: random.Random) -> Problem:
    """Euclid's algorithm."""
    common = rng.randint(1, 60)
    a, b = common * rng.randint(10, 99), common * rng.randint(3, 60)
    question = pick(rng, f"Find gcd({a}, {b}).", f"What is the greatest common divisor of {a} and {b}?")
    steps = []
    while b:
        steps.append(f"{a} = {b} * {a // b} + {a % b}")
        a, b = b, a % b
    return Problem(question, [*steps, "The last divisor that left no rest is the answer."], str(a))


def least_common_multiple(rng: random.Random) -> Problem:
    """Least common multiple through the greatest common divisor."""
    common = rng.randint(1, 12)
    a, b = common * rng.randint(2, 40), common * rng.randint(2, 40)
    question = pick(
        rng,
        f"What is the least common multiple of {a} and {b}?",
        f"Find lcm({a}, {b}).",
        f"Two lights flash every {a} and {b} seconds, together now. In how many seconds will both flash again?",
    )
    steps = [
        f"gcd({a}, {b}) = {gcd(a, b)}",
        f"{a} * {b} = {a * b}",
        f"{a * b} / {gcd(a, b)} = {lcm(a, b)}",
    ]
    return Problem(question, steps, str(lcm(a, b)))


def prime_factors(rng: random.Random) -> Problem:
    """Prime factorisation by trial division."""
    number = prod(rng.choice((2, 2, 2, 3, 3, 5, 7, 11, 13, 17, 19, 23)) for _ in range(rng.randint(3, 6)))
    question = pick(
        rng,
        f"Write {number} as a product of primes.",
        f"Factor {number}.",
        f"What is the prime factorisation of {number}?",
    )
    factors, rest, steps, divisor = [], number, [], 2
    while rest > 1:
        if rest % divisor:
            divisor += 1
            continue
        steps.append(f"{rest} / {divisor} = {rest // divisor}")
        factors.append(divisor)
        rest //= divisor
    answer = " * ".join(map(str, factors))
    return Problem(question, [*steps, f"{number} = {answer}"], answer)


def powers(rng: random.Random) -> Problem:
    """A power by repeated multiplication, sometimes with something added."""
    base = rng.randint(2, 25)
    exponent, extra = rng.randint(3, 7 if base < 7 else 4), rng.randint(1, 500)
    expression = f"{base}^{exponent} + {extra}"
    question = pick(rng, f"What is {expression}?", f"Compute {expression}.", f"Find the value of {expression}.")
    steps = [f"{base}^{n} = {base ** (n - 1)} * {base} = {base**n}" for n in range(2, exponent + 1)]
    total = base**exponent + extra
    return Problem(question, [*steps, f"{base**exponent} + {extra} = {total}"], str(total))


def square_roots(rng: random.Random) -> Problem:
    """The root of a perfect square, squeezed between multiples of ten and settled by squaring."""
    root, factor = rng.randint(11, 499), rng.randint(2, 30)
    square, low = root * root, root // 10 * 10
    question = pick(
        rng,
        f"What is the square root of {square}, multiplied by {factor}?",
        f"Find the positive number whose square is {square}, then multiply it by {factor}.",
        f"A square has the area {square}. How long are {factor} of its sides together?",
    )
    steps = [
        f"Too small or just right: {low}^2 = {low**2}",
        f"Too large: {low + 10}^2 = {(low + 10) ** 2}",
        f"Between them: {root}^2 = {square}; the root is {root}.",
        f"{root} * {factor} = {root * factor}",
    ]
    return Problem(question, steps, str(root * factor))


TEMPLATES: dict[str, Callable[[random.Random], Problem]] = {
    "addition": addition,
    "subtraction": subtraction,
    "multiplication": multiplication,
    "division": division,
    "order_of_operations": order_of_operations,
    "fraction_add": fraction_add,
    "fraction_subtract": fraction_subtract,
    "fraction_multiply": fraction_multiply,
    "fraction_divide": fraction_divide,
    "greatest_common_divisor": greatest_common_divisor,
    "least_common_multiple": least_common_multiple,
    "prime_factors": prime_factors,
    "powers": powers,
    "square_roots": square_roots,
}
