"""Mathematics in Python: the word problems of the math domain, each as a function that works it out.

A text that neither a model of mathematics nor one of code knows alone: the question is a docstring, the worked steps
are comments, the answer is returned and asserted. Templates and numbers are those of `math_problems`; a document holds
3 to 8 functions.

    def problem_2():
        \"\"\"Lena travels 2 hours at 30 km/h, ...\"\"\"
        # First leg: 30 * 2 = 60
        return "45"

    assert problem_2() == "45"
"""

import random
from collections.abc import Iterator
from textwrap import indent

from megabts.corpora.math_problems import draw_problem
from megabts.corpora.math_text import Problem


def function_text(problem: Problem, number: int) -> str:
    """The problem as a function and an assertion."""
    steps = indent("\n".join(problem.steps), "    # ", lambda line: True)
    return (
        f'def problem_{number}():\n    """{problem.question}"""\n{steps}\n    return "{problem.answer}"\n\n\n'
        f'assert problem_{number}() == "{problem.answer}"'
    )


def generate_programs(seed: int, split: str, num_bytes: int, seen: set[str]) -> Iterator[str]:
    """Documents of one split until they hold at least `num_bytes` of UTF-8 text.

    As `math_problems.generate_documents`: `seen` holds the questions that other splits have used.
    """
    rng, written = random.Random(f"megabts math code {seed} {split}"), 0
    while written < num_bytes:
        problems = [draw_problem(rng, seen) for _ in range(rng.randint(3, 8))]
        document = "\n\n\n".join(function_text(problem, number) for number, problem in enumerate(problems, 1)) + "\n"
        written += len(document.encode())
        yield document
