"""The mathematics domain: seeded documents of word and number problems with worked steps.

A document holds 5 to 12 problems of mixed templates, blank lines between them, each in the form

    Question: ...
    Answer: first step
    next step
    #### answer

All arithmetic is exact. A question never comes twice, neither inside a split nor across splits. The texts are learnable
(fixed forms, honest carries) but not trivial (the digits must be computed). Limit: the space of questions is finite;
several hundred megabytes use up the smaller templates and leave the larger ones.
"""

import random
from collections.abc import Callable, Iterator

from megabts.corpora import math_algebra, math_arithmetic, math_measures, math_words
from megabts.corpora.math_text import Problem
from megabts.errors import UserError

TEMPLATES: dict[str, Callable[[random.Random], Problem]] = {
    **math_arithmetic.TEMPLATES,
    **math_algebra.TEMPLATES,
    **math_words.TEMPLATES,
    **math_measures.TEMPLATES,
}
MAX_DRAWS = 1000


def draw_problem(rng: random.Random, seen: set[str]) -> Problem:
    """A problem whose question is not in `seen`, which then holds it.

    Raises:
        UserError: the templates seem to have no new question left.
    """
    names = list(TEMPLATES)
    for _ in range(MAX_DRAWS):
        problem = TEMPLATES[rng.choice(names)](rng)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise UserError(
        f"math corpus: no new question in {MAX_DRAWS} draws after {len(seen)} questions; ask for fewer megabytes"
    )


def generate_documents(seed: int, split: str, num_bytes: int, seen: set[str]) -> Iterator[str]:
    """Documents of one split until they hold at least `num_bytes` of UTF-8 text.

    The stream depends on (seed, split) and on `seen`, the questions that other splits have used; a larger `num_bytes`
    only makes it longer.
    """
    rng, written = random.Random(f"megabts math {seed} {split}"), 0
    while written < num_bytes:
        document = "\n\n".join(draw_problem(rng, seen).text() for _ in range(rng.randint(5, 12)))
        written += len(document.encode())
        yield document
