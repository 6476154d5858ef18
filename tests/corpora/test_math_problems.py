"""Every displayed equation and every answer of the mathematics templates, recomputed from the text alone."""

import ast
import math
import operator
import random
import re
from collections.abc import Callable, Iterator
from fractions import Fraction

import pytest

from megabts.corpora.math_problems import TEMPLATES, draw_problem, generate_documents
from megabts.corpora.math_text import Problem, decimal, money
from megabts.errors import UserError

SAMPLES = 150
OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: lambda base, exponent: base ** int(exponent),
}
FUNCTIONS = {"gcd": math.gcd, "lcm": math.lcm}


def evaluate(text: str, unknowns: dict[str, Fraction]) -> Fraction:
    """Exact value of an arithmetic expression; 3x means 3 * x and ^ is a power."""
    source = re.sub(r"(\d)([xy])", r"\1*\2", text.strip()).replace("^", "**")

    def walk(node: ast.expr) -> Fraction:
        match node:
            case ast.Constant():
                return Fraction(ast.get_source_segment(source, node))
            case ast.Name(id=name):
                return unknowns[name]
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -walk(operand)
            case ast.BinOp(left=left, op=op, right=right):
                return OPERATORS[type(op)](walk(left), walk(right))
            case ast.Call(func=ast.Name(id=name), args=args):
                return Fraction(FUNCTIONS[name](*(int(walk(arg)) for arg in args)))
        raise AssertionError(f"not plain arithmetic: {text!r}")

    return walk(ast.parse(source, mode="eval").body)


def equations(problem: Problem) -> Iterator[list[str]]:
    """The sides of each displayed equation."""
    for step in problem.steps:
        if "=" in step:
            yield step.split(": ")[-1].split(";")[0].split("=")


def solved_unknowns(problem: Problem) -> dict[str, Fraction]:
    """The last value the steps give to x and to y."""
    found = {}
    for sides in equations(problem):
        if sides[0].strip() in ("x", "y"):
            found[sides[0].strip()] = Fraction(sides[-1].strip())
    if "x" not in found and any("x" in side for sides in equations(problem) for side in sides):
        found["x"] = Fraction(problem.answer)
    return found


def numbers(text: str) -> list[Fraction]:
    return [Fraction(found) for found in re.findall(r"(?<![\w.])-?\d+(?:/\d+|\.\d+)?", text)]


def samples(name: str, count: int = SAMPLES) -> list[Problem]:
    rng = random.Random(f"test {name}")
    return [TEMPLATES[name](rng) for _ in range(count)]


def expression_in(question: str) -> Fraction:
    """The value of the longest stretch of arithmetic in a question."""
    return evaluate(max(re.findall(r"[\d(][\d+*/^() -]*", question), key=len), {})


def total(*products: Fraction) -> Fraction:
    return sum(products, Fraction(0))


def comb(pool: Fraction, size: Fraction) -> int:
    return math.comb(int(pool), int(size))


# What each question asks, as a function of the numbers that stand in it, in order.
ANSWERS: dict[str, Callable[..., Fraction | int]] = {
    "fraction_add": lambda a, b: a + b,
    "fraction_subtract": lambda a, b: a - b,
    "fraction_multiply": lambda a, b: a * b,
    "fraction_divide": lambda a, b: a / b,
    "multiplication": lambda a, b: a * b,
    "greatest_common_divisor": lambda a, b: math.gcd(int(a), int(b)),
    "least_common_multiple": lambda a, b: math.lcm(int(a), int(b)),
    "square_roots": lambda square, factor: math.isqrt(int(square)) * factor,
    "percent_of": lambda percent, whole: percent * whole / 100,
    "percent_change": lambda old, new: (new - old) * 100 / old,
    "percent_reverse": lambda percent, part: part * 100 / percent,
    "discount": lambda price, percent: price * (1 - percent / 100),
    "simple_interest": lambda principal, rate, years: principal * (1 + rate * years / 100),
    "compound_interest": lambda principal, rate, years: principal * (1 + rate / 100) ** int(years),
    "arithmetic_sequence": lambda a, b, _c, _d, n: sum(a + (b - a) * k for k in range(int(n))),
    "geometric_sequence": lambda a, b, _c, n: a * (b / a) ** int(n - 1),
    "pattern_growth": lambda start, gain, goal: (goal - start) / gain,
    "ages": lambda gap, both, later: (both - gap) / 2 + later,
    "distance": lambda h1, v1, h2, v2: (h1 * v1 + h2 * v2) / (h1 + h2),
    "meeting": lambda way, v1, v2: way * v1 / (v1 + v2),
    "work_rate": lambda a, b: a * b / (a + b),
    "shopping": lambda n1, p1, n2, p2, paid: paid - n1 * p1 - n2 * p2,
    "sharing": lambda start, plus, minus, groups: (start + plus - minus) / groups,
    "ratio_split": lambda whole, a, b: whole * a / (a + b),
    "average": lambda *values: total(*values) / len(values),
    "missing_score": lambda *values: values[-1] * len(values) - total(*values[:-1]),
    "mixture": lambda v1, p1, v2, p2: (v1 * p1 + v2 * p2) / (v1 + v2),
    "rectangle": lambda around, side: side * (around / 2 - side),
    "trapezoid": lambda a, b, height: (a + b) / 2 * height,
    "box": lambda a, b, c: 2 * (a * b + b * c + c * a),
    "proportion": lambda few, price, many: price / few * many,
    "draw_one": lambda a, b, c: 1 - c / (a + b + c),
    "draw_two": lambda good, other: Fraction(comb(good, Fraction(2)), comb(good + other, Fraction(2))),
}
EXPRESSIONS = ("addition", "subtraction", "order_of_operations", "powers")
METRIC = {"kilometre": 1000, "hour": 3600, "minute": 60, "second": 1, "day": 86400, "week": 604800, "metre": 1}
METRIC |= {"centimetre": Fraction(1, 100), "kilogram": 1000, "gram": 1, "litre": 1000, "millilitre": 1}
METRIC |= {"yard": 36, "inche": 1, "pound": 16, "ounce": 1, "gallon": 8, "pint": 1}


def expected(name: str, question: str) -> list[Fraction]:
    """The answer's numbers, worked out from the question alone."""
    given = numbers(question.replace("$", "").replace(":", " ").replace("(", " ").replace(")", " "))
    if name in ANSWERS:
        return [Fraction(ANSWERS[name](*given))]
    if name in EXPRESSIONS:
        return [expression_in(question)]
    if name == "division":
        return [Fraction(given[0] // given[1]), given[0] % given[1]]
    if name == "unit_conversion":
        large, small = re.findall(r"\d+ ([a-z]+)s\b|\d+ (feet)", question)[:2]
        sizes = dict(METRIC, feet=12)
        ratio = Fraction(sizes[large[0] or large[1]]) / sizes[small[0] or small[1]]
        whole, rest, times = given
        return [(whole * ratio + rest) * times]
    if name == "choose_team":
        pool, second, *rest = given
        size = rest[0]
        return [Fraction(comb(pool, size) * second)]
    if name == "consecutive_numbers":
        step = 1 if "consecutive numbers" in question else 2
        return [given[-1] / 3 - step]
    raise AssertionError(f"no independent answer for {name}")


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_displayed_equation_is_true(name):
    shown = 0
    for problem in samples(name):
        unknowns = solved_unknowns(problem)
        for sides in equations(problem):
            values = {evaluate(side, unknowns) for side in sides}
            assert len(values) == 1, (sides, problem)
            shown += 1
    assert shown >= SAMPLES


@pytest.mark.parametrize("name", [n for n in TEMPLATES if not n.startswith("linear") and n != "prime_factors"])
def test_the_answer_follows_from_the_question(name):
    for problem in samples(name):
        assert numbers(problem.answer) == expected(name, problem.question), problem


@pytest.mark.parametrize("name", [n for n in TEMPLATES if n.startswith("linear")])
def test_the_solution_satisfies_the_equations_of_the_question(name):
    for problem in samples(name):
        solution = {part.split(" = ")[0]: Fraction(part.split(" = ")[1]) for part in problem.answer.split(", ")}
        found = re.findall(r"[-\d][-+\dxy ]* = [-+\dxy ]*[\dxy]|x [-+\dxy ]* = -?\d+", problem.question)
        assert len(found) == len(solution)
        for equation in found:
            left, right = equation.split(" = ")
            assert evaluate(left, solution) == evaluate(right, solution), problem


def test_the_columns_of_a_sum_and_a_difference_spell_the_answer():
    for problem in samples("addition"):
        columns = [re.findall(r"write (\d), carry (\d+)", step)[0] for step in problem.steps[:-1]]
        assert int(columns[-1][1] + "".join(digit for digit, _ in reversed(columns))) == int(problem.answer), problem
    for problem in samples("subtraction"):
        digits = [step.split(" = ")[1].split(";")[0] for step in problem.steps[:-1]]
        assert int("".join(reversed(digits))) == int(problem.answer), problem


def test_prime_factors_are_prime_and_multiply_to_the_number():
    for problem in samples("prime_factors"):
        factors = [int(factor) for factor in problem.answer.split(" * ")]
        assert math.prod(factors) == numbers(problem.question)[0]
        assert all(factor > 1 and all(factor % d for d in range(2, math.isqrt(factor) + 1)) for factor in factors)


def test_the_table_is_wide_and_each_template_has_several_wordings():
    assert len(TEMPLATES) >= 24
    for name in TEMPLATES:
        wordings = {re.sub(r"[\d\W]+", " ", p.question).split(" ")[0] for p in samples(name)}
        assert len(wordings) >= 2, name
        assert len({p.question for p in samples(name)}) > SAMPLES * 0.8, name


def test_a_document_is_problems_in_the_agreed_form():
    document = next(generate_documents(3, "train", 1000, set()))
    problems = document.split("\n\n")
    assert 5 <= len(problems) <= 12
    for text in problems:
        assert re.fullmatch(r"Question: [^\n]+\nAnswer: [^\n]+\n(?:[^\n]+\n)*#### [^\n]+", text), text


def test_questions_never_repeat_and_streams_are_seeded():
    seen: set[str] = set()
    valid = list(generate_documents(1, "valid", 50_000, seen))
    train = list(generate_documents(1, "train", 400_000, seen))
    questions = re.findall(r"^Question: (.*)$", "\n".join(valid + train), flags=re.MULTILINE)
    assert len(questions) == len(set(questions)) == len(seen)
    assert sum(len(text) for text in train) >= 400_000
    assert valid == list(generate_documents(1, "valid", 50_000, set()))
    assert valid != list(generate_documents(2, "valid", 50_000, set()))


class AlwaysSeen(set):
    def __contains__(self, question: object) -> bool:
        return True


def test_running_out_of_questions_is_one_clear_line():
    with pytest.raises(UserError, match=r"no new question .* ask for fewer megabytes"):
        draw_problem(random.Random(0), AlwaysSeen())


def test_exact_number_forms():
    assert [decimal(Fraction(n, 8)) for n in (1, 8, -12, 800)] == ["0.125", "1", "-1.5", "100"]
    assert [money(n) for n in (5, 250, 300)] == ["0.05", "2.50", "3"]
    with pytest.raises(ValueError, match="no short finite decimal form"):
        decimal(Fraction(1, 3))
