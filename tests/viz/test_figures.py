"""Figures: what is in the SVG, colours, smoothing; and the coloured texts, read back from their markup."""

import html
import math
import re
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from megabts.viz.figures import (
    INK,
    PALETTE,
    curve_figure,
    gate_figure,
    member_colours,
    run_colour,
    short_count,
    smooth,
    strokes,
)
from megabts.viz.page import format_duration, format_percent, format_power
from megabts.viz.report import Curve, GateTable, Report, TokenText
from megabts.viz.texts import SMALLEST_FULL_EXCESS, STRONGEST, colour_text, full_excess, visible
from tests.viz.fakes import DOMAINS, MEMBERS

COLOURS = member_colours(MEMBERS)


def parsed(svg: str) -> ET.Element:
    """The SVG as XML; inside HTML the xlink prefix needs no declaration, in XML it does."""
    return ET.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="xlink" ', 1))


def texts_of(svg: str) -> list[str]:
    return ["".join(node.itertext()).strip() for node in parsed(svg).iter("text")]


def test_gate_figure_has_every_number_and_hatches_what_has_no_gate(report: Report) -> None:
    for layer, rows in enumerate(report.gates.values):
        svg = gate_figure(report.gates, layer, COLOURS)
        numbers = [f"{value:.2f}" for row in rows for value in row if value is not None]
        missing = sum(value is None for row in rows for value in row)
        assert missing == (3 if "Hub-into-Experts" in report.gates.layers[layer] else 0)
        assert texts_of(svg) == [*DOMAINS, *MEMBERS, *numbers]
        assert len(re.findall(r"fill: ?url\(#", svg)) == missing


def test_gate_rows_have_their_members_colour() -> None:
    gates = GateTable(["layer 1, Experts-into-Hub"], MEMBERS, ["code"], [[[0.4], [0.3], [0.2], [0.1]]])
    svg = gate_figure(gates, 0, COLOURS)
    fills = re.findall(r"fill: (#[0-9a-f]{6}); opacity: ([\d.]+)", svg)
    assert [colour for colour, _ in fills] == [colour.lower() for colour in PALETTE[:4]]
    strengths = [float(strength) for _, strength in fills]
    assert strengths == sorted(strengths, reverse=True)


def test_gate_figure_of_zeros_and_of_nothing() -> None:
    zeros = GateTable(["a"], ["hub"], ["code"], [[[0.0]]])
    assert texts_of(gate_figure(zeros, 0, {"hub": "#000000"})) == ["code", "hub", "0.00"]
    nothing = GateTable(["a"], ["hub"], ["code"], [[[None]]])
    assert texts_of(gate_figure(nothing, 0, {"hub": "#000000"})) == ["code", "hub"]


def test_figures_follow_the_theme(report: Report) -> None:
    for svg in (curve_figure(report.curves[:1], DOMAINS, COLOURS), gate_figure(report.gates, 0, COLOURS)):
        assert "var(--" in svg
        assert "#0a0b0" not in svg
        assert "http" not in svg
        assert "width" not in parsed(svg).attrib


def test_curve_figure_draws_a_mark_per_validation_loss(report: Report) -> None:
    seed = report.curves[0]
    without = curve_figure([replace(seed, valid={})], DOMAINS, COLOURS).count("<use ")
    with_marks = curve_figure([seed], DOMAINS, COLOURS).count("<use ")
    assert with_marks - without == sum(len(points) for points in seed.valid.values()) == 21


def test_validation_marks_stand_at_the_tokens_of_their_step() -> None:
    curve = Curve("seed", [10, 20], [1000, 3000], [2.0, 1.0], {"code": [(0, 2.0), (15, 1.5), (20, 1.0)]})
    svg = curve_figure([curve], ["code"], COLOURS)
    colour = COLOURS["seed"].lower()
    marks = [
        float(x) for x in re.findall(rf'<use xlink:href="#\w+" x="([\d.]+)" y="[\d.]+" style="fill: {colour}', svg)
    ]
    assert len(marks) == 3
    assert (marks[1] - marks[0]) / (marks[2] - marks[0]) == pytest.approx(2000 / 3000, abs=1e-3)


@pytest.mark.parametrize("losses", [[], [2.0], [math.nan, math.nan], [2.0, math.inf, math.nan, 1.0]])
def test_curves_that_are_short_or_diverge_are_drawn(losses: list[float]) -> None:
    steps = list(range(1, len(losses) + 1))
    svg = curve_figure([Curve("bts", steps, steps, losses)], DOMAINS, COLOURS)
    assert "tokens" in texts_of(svg)


def test_long_curves_stay_small() -> None:
    steps = list(range(1, 200_001))
    curve = Curve("seed", steps, steps, [2 + math.sin(step) for step in steps])
    assert len(curve_figure([curve], DOMAINS, COLOURS)) < 100_000


def test_smoothing_keeps_a_constant_and_quietens_noise() -> None:
    assert np.allclose(smooth([2.5] * 90), 2.5)
    noisy = [2 + (-1) ** step for step in range(3000)]
    assert np.abs(smooth(noisy)[500:] - 2).max() < 0.1
    with_gap = smooth([math.nan, 1.0, math.nan, 1.0])
    assert math.isnan(with_gap[0])
    assert with_gap[1:].tolist() == [1.0, 1.0, 1.0]


def test_a_member_has_one_colour_under_all_its_names() -> None:
    assert [run_colour(name, COLOURS) for name in MEMBERS] == list(PALETTE[:4])
    assert [run_colour(f"expert-{name}", COLOURS) for name in MEMBERS] == list(PALETTE[:4])
    assert run_colour("bts", COLOURS) == run_colour("soup", COLOURS) == INK
    assert run_colour("code", member_colours(["hub", "expert-code"])) == PALETTE[1]
    assert run_colour("seed", member_colours(["hub", "expert-code"])) == PALETTE[0]
    # A seed that is no member must not take a member's colour.
    others = member_colours(["code", "math"], ["seed", "expert-code", "bts"])
    assert others == {"code": PALETTE[0], "math": PALETTE[1], "seed": PALETTE[2]}
    assert len(set(member_colours([str(i) for i in range(8)]).values())) == 8


def test_curves_of_one_colour_differ_in_their_strokes(report: Report) -> None:
    dense = [curve for curve in report.curves if curve.name.startswith("dense")]
    assert len(dense) == len(set(strokes(dense, COLOURS))) == 3
    experts = [curve for curve in report.curves if curve.name.startswith("expert")]
    assert {dash for dash, _ in strokes(experts, COLOURS)} == {""}


def spans(markup: str) -> list[tuple[str, float, str, str]]:
    """(r g b, alpha, title, inner markup) of each token."""
    pattern = r'<span style="background:rgb\((\d+ \d+ \d+)/([\d.]+)\)" title="([^"]*)">(.*?)</span>'
    found = re.findall(pattern, markup, flags=re.DOTALL)
    return [(colour, float(alpha), html.unescape(title), inner) for colour, alpha, title, inner in found]


def test_coloured_text_by_the_dominating_member() -> None:
    text = TokenText("code", ["if", " x", "\n", "    y"], [[0.7, 0.3], [0.4, 0.6], [0.5, 0.5], [0.9, 0.1]])
    coloured = colour_text(text, {"hub": "#010203", "code": "#0a0b0c"}, ["hub", "code"], full=0.4)
    found = spans(coloured.markup)
    assert [colour for colour, *_ in found] == ["1 2 3", "10 11 12", "1 2 3", "1 2 3"]
    assert [alpha for _, alpha, *_ in found] == pytest.approx([STRONGEST * s for s in (0.5, 0.25, 0, 1)], abs=0.006)
    assert found[0][2] == "hub 0.70 · code 0.30"
    assert coloured.shares == {"hub": 0.75, "code": 0.25}


def test_coloured_text_keeps_every_character(report: Report) -> None:
    for text in report.texts:
        coloured = colour_text(text, COLOURS, MEMBERS, full_excess(report.texts, len(MEMBERS)))
        plain = html.unescape(re.sub(r"<[^>]*>", "", coloured.markup))
        assert plain == "".join(text.tokens)
        assert sum(coloured.shares.values()) == pytest.approx(1)


def test_full_strength_is_the_largest_excess_but_never_noise(report: Report) -> None:
    top = sorted(max(row) for text in report.texts for row in text.weights)
    full = full_excess(report.texts, 4) + 0.25
    assert 0.97 < sum(weight <= full for weight in top) / len(top) < 0.99
    uniform = TokenText("code", ["a", "b"], [[0.25] * 4, [0.26, 0.25, 0.25, 0.24]])
    assert full_excess([uniform], 4) == SMALLEST_FULL_EXCESS == full_excess([], 4)


@pytest.mark.parametrize(
    "token, shown",
    [
        ("a\tb  c", "a\tb  c"),
        ("<b>&", "&lt;b&gt;&amp;"),
        ("\n\n", '<i class="newline"></i>\n<i class="newline"></i>\n'),
        ("\r", '<i class="code">\\x0d</i>'),
        ("\x00", '<i class="code">\\x00</i>'),
        ("\u202e", '<i class="code">\\u202e</i>'),
        ("\udce2", '<i class="code">\\xe2</i>'),
        ("\ud800", '<i class="code">\\ud800</i>'),
        ("\ufffdü∎", "\ufffdü∎"),
        ("", ""),
    ],
)
def test_tokens_are_shown_safely(token: str, shown: str) -> None:
    assert str(visible(token)) == shown
    visible(token).encode("utf-8")


def test_numbers_for_people() -> None:
    assert [short_count(n) for n in (0, 12, 1536, 2_000_000, 3.2e9)] == ["0", "12", "1.54k", "2M", "3.2B"]
    assert [format_duration(s) for s in (0.04, 42.3, 725, 11520)] == ["0.0 s", "42.3 s", "12 min 05 s", "3 h 12 min"]
    assert [format_percent(c) for c in (-0.0341, 0.1, 0.0, -0.00001)] == ["−3.4%", "+10.0%", "0.0%", "0.0%"]
    assert [format_power(c) for c in (0, 1, 1.234e15, 0.02)] == ["0", "1.00 × 10⁰", "1.23 × 10¹⁵", "2.00 × 10⁻²"]
