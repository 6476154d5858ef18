"""The page of a comparison read back; figures' numbers against positions worked out from what the SVG says."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from megabts.viz.comparison import ranked, write_page
from megabts.viz.comparison_figures import Levels, Line, Point, bar_figure, cost_figure, family, position_figure
from megabts.viz.labels import spread_out
from tests.viz.comparison_fakes import DOMAINS, METHODS, realistic_result, with_studies
from tests.viz.pages import Page, check_offline
from tests.viz.test_figures import texts_of

MAIN = [name for name in METHODS if "," not in name]


def page_of(result: dict[str, Any], folder: Path) -> tuple[str, Page]:
    path = folder / "new" / "comparison.html"
    write_page(json.loads(json.dumps(result)), path)
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def table(page: Page, place: int) -> dict[str, list[str]]:
    """The rows of the n-th table by method, with the number before its name cut off."""
    starts = [i for i, row in enumerate(page.rows) if row[0] == "method"] + [len(page.rows)]
    return {row[0].lstrip("0123456789"): row[1:] for row in page.rows[starts[place] + 1 : starts[place + 1]]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return page_of(realistic_result(), tmp_path_factory.mktemp("page"))


def test_page_is_whole_in_order_and_offline(whole: tuple[str, Page]) -> None:
    text, page = whole
    assert not page.broken
    assert not page.open
    assert page.headings == [
        *("Losses", "What a method's own training buys", "Domain by domain", "Losses by position", "Ablations", "Costs")
    ]
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 2 + (len(DOMAINS) + 2) + 2
    check_offline(text, page)
    assert "var(--ink)" in text
    assert "#0a0b0" not in text


def test_losses_ranked_with_spread_and_difference(whole: tuple[str, Page]) -> None:
    result, rows = realistic_result(), table(whole[1], 0)
    methods = result["methods"]
    assert list(rows) == [*sorted(MAIN, key=lambda name: methods[name]["average"]), "oracle"]
    seed, bts = methods["seed"], methods["bts"]
    assert rows["seed"][:4] == [f"{seed['losses'][domain]:.3f}" for domain in DOMAINS]
    for place, domain in enumerate(DOMAINS):
        loss, start = bts["losses"][domain], seed["losses"][domain]
        assert rows["bts"][place].replace("−", "-") == f"{loss:.3f} {100 * (loss / start - 1):+.1f}%"
    change = 100 * (bts["average"] / seed["average"] - 1)
    assert rows["bts"][4].replace("−", "-") == f"{bts['average']:.3f} ± {bts['spread']:.3f} {change:+.1f}%"
    assert rows["bts"][5].startswith(f"{bts['mixed']:.3f} ± {bts['mixed_spread']:.3f} ")
    assert rows["oracle"][4].startswith(f"{result['oracle']['average']:.3f} ± 0.008")
    assert rows["oracle"][5] == "–"


def test_the_best_of_each_column_is_bold(whole: tuple[str, Page]) -> None:
    methods = realistic_result()["methods"]
    body = whole[0].split("<tbody>")[1].split("</tbody>")[0]
    bold = re.findall(r'<td class="best"[^>]*>([\d.]+)', body)
    best = [min(methods[name]["losses"][domain] for name in MAIN) for domain in DOMAINS]
    best += [min(methods[name][key] for name in MAIN) for key in ("average", "mixed")]
    assert sorted(bold) == sorted(f"{loss:.3f}" for loss in best)


def test_lead_names_the_best_and_its_margins(whole: tuple[str, Page]) -> None:
    result, text = realistic_result(), " ".join(whole[1].text.split())
    methods, oracle = result["methods"], result["oracle"]["average"]
    best, following = (methods[name]["average"] for name in ("bts-mixture", "bts"))
    assert f"by average loss is bts-mixture with {best:.3f} ±" in text
    for name, loss in (("the next, bts", following), ("btm", methods["btm"]["average"]), ("hindsight", oracle)):
        side = "better" if best <= loss else "worse"
        assert f"{abs(best - loss):.3f} nats ({100 * abs(best / loss - 1):.1f}%) {side} than" in text
        assert f"{name}: {loss:.3f}" in text
    assert "Preset tiny, 60 minutes; means over the seeds 1, 2, 3;" in text


def test_ablations_are_a_table_of_their_own(whole: tuple[str, Page]) -> None:
    ablations = [name for name in METHODS if "," in name]
    methods = realistic_result()["methods"]
    rows = table(whole[1], 1)
    assert list(rows) == [
        *sorted([*ablations, "bts", "bts-mixture", "seed"], key=lambda name: methods[name]["average"]),
        "oracle",
    ]
    assert sorted(table(whole[1], 2)) == sorted(ablations)
    labels = [attributes["aria-label"] or "" for tag, attributes in whole[1].tags if "aria-label" in attributes]
    assert labels
    assert not any("token gates" in label for label in labels)


def test_costs(whole: tuple[str, Page]) -> None:
    rows = table(whole[1], 3)
    assert rows["bts"] == ["530k", "17.3M", "17.3M", "4.1M", "1.51 × 10¹⁴", "5 min 50 s"]
    assert rows["btm"] == ["0", "16.8M", "16.8M", "0", "0", "1.4 s"]
    assert set(rows) == set(MAIN)


def test_studies_have_sections_of_their_own(tmp_path: Path) -> None:
    result = with_studies(realistic_result())
    _, page = page_of(result, tmp_path)
    assert not page.broken
    assert page.headings[5:] == ["A task for two experts", "Experts taken out and put in", "Costs"]
    cross, changes = table(page, 3), table(page, 4)
    seed = result["cross-capability"]["seed"]["average"]
    assert next(iter(cross)) == "bts with some"
    assert [cell.replace("−", "-") for cell in cross["bts with some"]] == [f"1.900 ± 0.010 {190 / seed - 100:+.1f}%"]
    assert list(changes) == list(result["changes"])
    change = 230 / result["changes"]["bts"]["losses"]["code"] - 100
    assert changes["bts without code"][1] == f"2.300 {change:+.1f}%"
    assert "%" not in "".join(changes["bts"])
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 2 + (len(DOMAINS) + 2) + 2 + 1


def test_one_seed_has_no_spread(tmp_path: Path) -> None:
    _, page = page_of(realistic_result(1), tmp_path)
    assert "±" not in page.text
    assert "one seed (1), so there is no spread" in page.text


def test_markup_in_names_stays_text(tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x_$&amp;'
    result = realistic_result(1)
    for entry in (*result["methods"].values(), result["oracle"]):
        entry["losses"][evil] = entry["losses"].pop("code")
    result |= {"domains": ["general", evil, "math", "stories"], "preset": evil}
    result["methods"][evil] = result["methods"].pop("btx-soft")
    result["methods"][f"bts, {evil}"] = result["methods"].pop("bts, K = 1")
    markup, page = page_of(result, tmp_path)
    assert not page.broken
    assert "<script" not in markup
    # Table heads, lead, preset, its rows, the legend, the bars' panel and a name in each bar figure.
    assert page.text.count(evil) > 12


def test_what_diverged_comes_last_and_is_said(tmp_path: Path) -> None:
    result = realistic_result()
    broken = result["methods"]["bts-mixture"]
    broken |= {"average": math.nan, "mixed": math.inf, "losses": dict.fromkeys(DOMAINS, math.nan)}
    broken["by_position"] = [(place, math.nan) for place, _ in broken["by_position"]]
    assert list(ranked(result)[0])[-1] == "bts-mixture"
    _, page = page_of(result, tmp_path)
    assert "by average loss is bts with" in " ".join(page.text.split())
    assert all(cell.startswith("diverged") for cell in table(page, 0)["bts-mixture"])


def test_families() -> None:
    found = {name: family(name, DOMAINS) for name in MAIN}
    assert found["expert-code"] == found["seed"] == "members"
    assert found["expert-routing"] == "expert routing"
    assert {found[name] for name in ("btx-soft", "sparse-upcycling", "bam-adapters")} == {"upcycled mixtures"}
    assert family("something new", DOMAINS) == "other"


def marks_of(svg: str, colour: str) -> list[tuple[float, float]]:
    found = re.findall(rf'<use xlink:href="#\w+" x="([\d.]+)" y="([\d.]+)" style="fill: {colour.lower()}', svg)
    return [(float(x), float(y)) for x, y in found]


def test_marks_stand_at_the_logarithm_of_their_cost_and_untrained_ones_left() -> None:
    losses_and_costs = [(2.0, 1e3), (2.1, 1e5), (2.2, 1e6), (2.3, 0.0)]
    points = [Point(i, f"dense-{i}", "dense", cost, loss, 0.01) for i, (loss, cost) in enumerate(losses_and_costs, 1)]
    svg = cost_figure(points, Levels(2.4, 1.9), "trained parameters")
    (x1, y1), (x2, y2), (x3, _), (x4, y4) = marks_of(svg, "#E69F00")
    assert (x2 - x1) / (x3 - x1) == pytest.approx(2 / 3, abs=1e-3)
    assert x4 < x1
    assert (y1 - y2) / (y1 - y4) == pytest.approx(1 / 3, abs=1e-3)
    assert {"1", "2", "3", "4", "none", "seed", "oracle"} <= set(texts_of(svg))


def test_a_loss_much_worse_than_the_seed_stands_at_the_edge() -> None:
    points = [
        Point(1, "bts", "stitched", 1e6, 2.0),
        Point(2, "soup", "other", 0, 9.0),
        Point(3, "x", "other", 0, math.nan),
    ]
    texts = texts_of(cost_figure(points, Levels(2.4), "trained parameters"))
    assert "2 (at 9.00)" in texts
    assert "3" not in texts
    assert not any(text.startswith(("5.", "8.")) for text in texts)


def test_labels_cover_no_mark_and_not_one_another() -> None:
    points = [Point(i, f"m{i}", "stitched", 1e6, 2.0 + 0.004 * i) for i in range(1, 13)]
    svg = cost_figure(points, Levels(2.4, 1.9), "trained parameters")
    labels = {
        text: (float(x), float(y))
        for x, y, text in re.findall(r'<text [^>]*?x="([\d.]+)" y="([\d.]+)"[^>]*>(\d+)</text>', svg)
        if "." not in text
    }
    numbers = [labels[str(point.number)] for point in points]
    marks = marks_of(svg, "#0072B2")
    assert len(marks) == 12
    # Baselines' middles; a digit is about 5 points wide and 6 high.
    for i, (x, y) in enumerate(numbers):
        assert all(abs(x - u) > 5 or abs(y - v) > 5 for u, v in numbers[:i])
        assert all(abs(x - u) > 4 or abs(y - 3 - v) > 4 for u, v in marks)


def test_bars_begin_at_the_seed_and_long_ones_are_cut() -> None:
    losses = {"bts": 1.8, "dense-a": 1.9, "expert-code": 7.0, "soup": math.nan}
    points = [Point(i, name, "stitched", 0, loss) for i, (name, loss) in enumerate(losses.items(), 1)]
    svg = bar_figure(points, Levels(2.0, 1.7), "code")
    bars = re.findall(r'<path d="M ([\d.]+) [\d.]+ \nL ([\d.]+) [^"]*" clip-path[^>]*style="fill: #0072b2([^"]*)"', svg)
    (start, end, _), (start2, end2, _), (start3, end3, style) = bars
    assert start == start2 == start3
    unit = float(start2) - float(end2)
    assert (float(start) - float(end)) / unit == pytest.approx(2, abs=1e-3)
    # Cut at half the longest distance to the left, the oracle's.
    assert (float(end3) - float(start3)) / unit == pytest.approx(1.5, abs=1e-3)
    assert "opacity" in style
    texts = texts_of(svg)
    assert {"1.800", "1.900", "7.000", "diverged", *losses} <= set(texts)


def test_losses_by_position_are_minus_the_seeds_on_a_log_axis() -> None:
    seed = [(1, 5.0), (2, 4.0), (8, 3.0)]
    line = Line("btm", "put together without training", [(1, 4.9), (2, 3.8), (8, 2.6)])
    svg = position_figure([line], seed, "Mixed texts")
    (x1, y1), (x2, y2), (x3, y3) = marks_of(svg, "#56B4E9")
    assert (x2 - x1) / (x3 - x1) == pytest.approx(1 / 3, abs=1e-3)
    assert (y2 - y1) / (y3 - y1) == pytest.approx(1 / 3, abs=1e-3)
    assert {"1", "2", "8", "btm", "seed"} <= set(texts_of(svg))


def test_names_at_line_ends_move_apart_no_more_than_needed() -> None:
    assert spread_out([0.0, 50.0, 100.0], 10, 0, 100) == [0, 50, 100]
    assert spread_out([40.0, 40.0, 80.0], 10, 0, 100) == [35, 45, 80]
    assert spread_out([1.0, 1.0, 1.0], 10, 0, 100) == [0, 10, 20]
    assert spread_out([99.0, 99.0], 10, 0, 100) == [90, 100]
    assert spread_out([], 10, 0, 100) == []
