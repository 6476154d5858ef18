"""The page read back by an HTML parser; the results file and the printed table against numbers worked out here."""

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from megabts.errors import UserError
from megabts.viz.report import GateTable, Report, results_json, results_table, write_report
from tests.viz.fakes import DOMAINS, MEMBERS
from tests.viz.pages import Page, check_offline


def page_of(report: Report, folder: Path) -> tuple[str, Page]:
    path = folder / "new" / "report.html"
    write_report(report, path)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def bare(report: Report) -> Report:
    """The report before anything ran."""
    nothing = GateTable([], [], [], [])
    return replace(
        report, models={}, seconds={}, tokens={}, curves=[], sweep=[], gates=nothing, texts=[], settings={}, checks=[]
    )


def test_page_is_whole_and_in_order(report: Report, tmp_path: Path) -> None:
    _, page = page_of(report, tmp_path)
    assert not page.broken
    assert not page.open
    assert page.headings == [
        *("Checks", "Losses", "Loss curves", "Learning rates of the dense model", "What the gates do"),
        *("Who speaks where", "Where the time went", "Settings"),
    ]
    figures = [attributes for tag, attributes in page.tags if tag == "svg" and attributes.get("role") == "img"]
    assert len(figures) == 4 + 4
    for claim, _, numbers in report.checks:
        assert claim in page.text
        assert numbers in page.text
    assert page.text.count("✗ does not hold") == 1
    assert page.text.count("✓ holds") == 2


def test_page_needs_nothing_from_outside(report: Report, tmp_path: Path) -> None:
    text, page = page_of(report, tmp_path)
    check_offline(text, page)


def test_the_same_report_is_the_same_page(report: Report, tmp_path: Path) -> None:
    assert page_of(report, tmp_path / "a")[0] == page_of(report, tmp_path / "b")[0]


def test_losses_on_the_page(report: Report, tmp_path: Path) -> None:
    _, page = page_of(report, tmp_path)
    columns = [*DOMAINS, "average"]
    seed = report.models["seed"]
    assert page.row("seed")[1:] == [f"{seed[column]:.3f}" for column in columns]
    for name in set(report.models) - {"seed"}:
        expected = [
            f"{report.models[name][column]:.3f} {100 * (report.models[name][column] / seed[column] - 1):+.1f}%"
            for column in columns
        ]
        assert [cell.replace("−", "-") for cell in page.row(name)[1:]] == expected
    for point in report.sweep:
        row = page.row(f"{point.learning_rate:g}{' (chosen)' if point.chosen else ''}")
        assert row[1:] == [f"{loss:.3f}" for loss in (*(point.losses[domain] for domain in DOMAINS), point.average)]


def test_the_oracle_takes_the_best_member_of_each_domain(report: Report, tmp_path: Path) -> None:
    _, page = page_of(report, tmp_path)
    members = [row for name, row in report.models.items() if name.split("-")[0] in ("seed", "expert")]
    assert len(members) == 4
    best = [min(row[domain] for row in members) for domain in DOMAINS]
    losses = [cell.split()[0] for cell in page.row("oracle (best member per domain)")[1:]]
    assert losses == [f"{loss:.3f}" for loss in [*best, sum(best) / 3]]


def test_times_on_the_page(report: Report, tmp_path: Path) -> None:
    _, page = page_of(report, tmp_path)
    assert page.row("expert-code")[0] == "expert-code"
    rows = {
        row[0]: row[2:] for row in page.rows[page.rows.index(["stage", "", "time", "share", "tokens", "tokens/s"]) :]
    }
    assert rows["dense-data-matched"] == ["14 min 26 s", "57%", "25.8M", "29.8k"]
    assert rows["expert-code"] == ["91.7 s", "6%", "2.46M", "26.8k"]
    assert rows["evaluation"] == ["41.5 s", "3%", "–", "–"]
    for key, value in report.settings.items():
        assert key in page.text
        assert value in page.text


def test_markup_in_names_and_texts_stays_text(report: Report, tmp_path: Path) -> None:
    evil = '<script>alert("1")</script>$x_$&amp;'
    text = replace(report.texts[0], domain=evil, tokens=[evil, *report.texts[0].tokens[1:]])
    domains = [evil, *DOMAINS[1:]]
    models = {name: {evil: row["code"], **row} for name, row in report.models.items()}
    models[f"expert-{evil}"] = models["expert-code"]
    gates = replace(
        report.gates, domains=domains, members=[evil, *MEMBERS[1:]], layers=[evil, *report.gates.layers[1:]]
    )
    sweep = [replace(point, losses={evil: 1.0, **point.losses}) for point in report.sweep]
    report = replace(report, title=evil, domains=domains, models=models, gates=gates, sweep=sweep, texts=[text])
    report = replace(report, settings={evil: evil}, checks=[(evil, True, evil)], seconds={evil: 1.0})
    report.curves.append(replace(report.curves[0], name=evil, valid={evil: [(0, 2.0)]}))
    markup, page = page_of(report, tmp_path)
    assert not page.broken
    assert not any(tag == "script" for tag, _ in page.tags)
    assert "<script" not in markup
    # Title twice, loss table's and sweep's headings, heatmaps, coloured text and so on: always the characters given.
    assert page.text.count(evil) > 15


@pytest.mark.parametrize("part", ["models", "seconds", "tokens", "curves", "sweep", "texts", "settings", "checks"])
def test_each_part_may_be_empty(report: Report, tmp_path: Path, part: str) -> None:
    empty = replace(report, **{part: type(getattr(report, part))()})
    _, page = page_of(empty, tmp_path)
    assert not page.broken
    hidden = {"models": 1, "curves": 1, "sweep": 1, "texts": 1, "seconds": 1, "settings": 1, "checks": 1, "tokens": 0}
    assert len(page.headings) == 8 - hidden[part]


def test_a_report_of_nothing_is_a_page(report: Report, tmp_path: Path) -> None:
    _, page = page_of(bare(report), tmp_path)
    assert page.headings == []
    assert not page.broken
    assert results_table(bare(report)).row_count == 0


def test_a_failed_write_leaves_the_old_page(report: Report, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(report, path)
    before = path.read_text(encoding="utf-8")
    with pytest.raises(UnicodeEncodeError):
        write_report(replace(report, title="\ud800"), path)
    assert path.read_text(encoding="utf-8") == before
    assert list(tmp_path.iterdir()) == [path]


def test_results_json_is_exactly_this(report: Report) -> None:
    results = json.loads(json.dumps(results_json(report)))
    assert results == {
        "domains": DOMAINS,
        "models": report.models,
        "seconds": report.seconds,
        "tokens": report.tokens,
    }
    assert list(results["models"]) == [
        *("seed", "expert-code", "expert-math", "expert-stories", "soup", "dense-data-matched", "bts")
    ]


def test_results_table_rows_and_bold(report: Report) -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, color_system="standard")
    console.print(results_table(report))
    assert isinstance(console.file, io.StringIO)
    output = console.file.getvalue()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in plain.splitlines() if line[:1] == "│"]
    assert [row[0] for row in rows] == [*results_json(report)["models"], "oracle (best member per domain)"]
    for row in rows[:-1]:
        assert row[1:] == [f"{report.models[row[0]][column]:.3f}" for column in [*DOMAINS, "average"]]
    bold = re.findall(r"\x1b\[1m *([\d.]+)", output)
    best = [min(row[column] for row in report.models.values()) for column in [*DOMAINS, "average"]]
    assert sorted(bold) == sorted(f"{loss:.3f}" for loss in best)


def test_a_diverged_model_is_never_the_best(report: Report, tmp_path: Path) -> None:
    report.models["soup"] = dict.fromkeys([*DOMAINS, "average"], float("nan"))
    _, page = page_of(report, tmp_path)
    assert page.row("soup")[1:] == ["diverged"] * 4
    best = [attributes for tag, attributes in page.tags if tag == "td" and attributes.get("class") == "best"]
    assert len(best) == 4


def test_report_without_a_seed_shows_no_differences(report: Report, tmp_path: Path) -> None:
    del report.models["seed"]
    _, page = page_of(report, tmp_path)
    assert page.row("bts")[1:] == [f"{report.models['bts'][column]:.3f}" for column in [*DOMAINS, "average"]]


def test_json_round_trip(report: Report) -> None:
    again = Report.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again == report


def test_records_say_what_is_wrong(report: Report) -> None:
    with pytest.raises(UserError, match="unknown or missing fields: checks, extra"):
        Report.from_dict({**{k: v for k, v in report.to_dict().items() if k != "checks"}, "extra": 1})
    with pytest.raises(UserError, match="curve 'seed': 300 steps, 1 token counts"):
        replace(report.curves[0], tokens=[1])
    with pytest.raises(UserError, match="not 4 layers x 4 members x 3 domains"):
        replace(report.gates, values=report.gates.values[1:])
    with pytest.raises(UserError, match="not 4 layers x 4 members x 2 domains"):
        replace(report.gates, domains=DOMAINS[1:])
    with pytest.raises(UserError, match="text from 'code': 1 tokens but"):
        replace(report.texts[0], tokens=["x"])
    with pytest.raises(UserError, match="one weight for each of 4 members"):
        replace(report, texts=[replace(report.texts[0], tokens=["x"], weights=[[1.0]])])
    with pytest.raises(UserError, match="model 'bts' has no loss for math, average"):
        replace(report, models={"bts": {"code": 1.0, "stories": 1.0}})
    with pytest.raises(UserError, match=r"sweep '0.0003' has no loss for stories"):
        replace(report, sweep=[replace(report.sweep[0], losses={"code": 1.0, "math": 1.0})])
