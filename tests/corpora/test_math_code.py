"""Programs of word problems: valid Python whose assertions hold, seeded, with questions of their own."""

import ast
import random

from megabts.corpora.math_code import function_text, generate_programs
from megabts.corpora.math_problems import draw_problem


def test_programs_run_and_hold_what_they_assert() -> None:
    for document in generate_programs(3, "train", 20_000, set()):
        exec(compile(ast.parse(document), "document", "exec"), {})


def test_the_question_is_the_docstring_and_steps_are_comments() -> None:
    problem = draw_problem(random.Random(1), set())
    text = function_text(problem, 7)
    function = ast.parse(text).body[0]
    assert isinstance(function, ast.FunctionDef)
    assert function.name == "problem_7"
    assert ast.get_docstring(function) == problem.question
    assert [line.removeprefix("    # ") for line in text.splitlines() if line.startswith("    # ")] == problem.steps


def test_same_seed_same_text_and_no_question_twice() -> None:
    assert list(generate_programs(3, "train", 5_000, set())) == list(generate_programs(3, "train", 5_000, set()))
    seen: set[str] = set()
    train = "".join(generate_programs(3, "train", 20_000, seen))
    valid = "".join(generate_programs(3, "valid", 20_000, seen))
    questions = [{line for line in text.splitlines() if '"""' in line} for text in (train, valid)]
    assert questions[0]
    assert not questions[0] & questions[1]
