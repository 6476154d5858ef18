"""The page in a browser: against a made-up server, whose every number is known, and once against the real one.

With MEGABTS_SCREENSHOTS=FOLDER set, pictures of it are written there.
"""

import csv
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.serving.fake_server import ANSWER, LAYERS, MEMBERS, MIXTURE, WITHOUT, FakeServer, gates_of, leader
from tests.serving.process import ServerProcess

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[test]'")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
expect = playwright.expect

PROMPT = "def add(a, b): <i>sum</i>"
WORDS = ["def", " add(a,", " b):", " <i>sum</i>"]
Open = Callable[..., "playwright.Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator["playwright.Browser"]:
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def visit(browser: "playwright.Browser") -> Iterator[Open]:
    """Opens the page at an address; afterwards nothing was asked of another host and no script failed."""
    opened, asked, failed = [], [], []

    def visit(url: str, **settings: object) -> "playwright.Page":
        page = browser.new_page(**settings)
        page.set_default_timeout(10_000)
        page.on("request", lambda request: asked.append((url, request.url)))
        page.on("pageerror", lambda error: failed.append(error))
        opened.append(page)
        page.goto(url)
        return page

    yield visit
    for page in opened:
        page.close()
    assert not failed
    assert asked
    assert [there for url, there in asked if not there.startswith((url, "data:", "blob:"))] == []


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.end()


def generate(page: "playwright.Page", *parts: str) -> None:
    """Fill in the prompt's parts and wait for the whole answer."""
    for number, text in enumerate(parts, 1):
        if page.locator(f"#part-{number}").count() == 0:
            page.click("#add")
        page.fill(f"#part-{number}", text)
    page.click("#go")
    expect(page.locator("#status")).to_contain_text("Done")


def members_of(page: "playwright.Page", article: int = 0) -> list[str | None]:
    spans = page.locator("article").nth(article).locator(".tokens > span")
    return spans.evaluate_all("spans => spans.map(span => span.dataset.member)")


def test_every_token_has_its_member_s_colour_in_the_chosen_layer(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, PROMPT)
    assert fake.bodies[-1] == {
        "prompt": PROMPT,
        "stream": True,
        "temperature": 0.8,
        "max_tokens": 48,
        "seed": 0,
        "gates": True,
        "without": [],
    }
    tokens = page.locator(".tokens > span")
    written = [*WORDS, *(text.replace("\u202e", "\\u202e").replace("\n", "↵\n") for text in ANSWER if text)]
    assert tokens.all_text_contents() == written
    places = [place for place, text in enumerate([*WORDS, *ANSWER]) if text]
    seen = []
    for layer in (1, 0):
        page.select_option("#layer", str(layer))
        assert members_of(page) == [leader(place, layer, []) for place in places]
        styles = tokens.evaluate_all(
            "all => all.map(one => [one.style.backgroundColor, one.style.textDecorationStyle])"
        )
        by_member = dict(zip(members_of(page), (tuple(style) for style in styles), strict=True))
        assert len({style for _, style in by_member.values()}) == len(by_member)
        seen.append(set(by_member))
    assert seen == [set(MEMBERS), {"code"}]
    expect(page.locator("article .note").first).to_contain_text(
        f"share of {len(WORDS + ANSWER)} tokens: hub 0 %, code 100 %"
    )


def test_what_a_model_writes_is_text_and_never_markup(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, PROMPT)
    assert page.title() == "made-up"
    assert page.locator(".tokens img, .tokens script, article svg img").count() == 0
    tags = page.locator(".tokens *").evaluate_all("all => [...new Set(all.map(one => one.tagName))].sort()")
    assert tags == ["B", "I", "SPAN"]
    assert page.locator(".tokens > b").all_text_contents() == ["answer"]
    assert page.locator("#spoken").text_content() == "".join(ANSWER)


def test_an_expert_is_switched_off_and_both_answers_are_shown(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, PROMPT)
    page.get_by_role("switch", name="code").click()
    expect(page.locator("article")).to_have_count(2)
    expect(page.locator("#status")).to_contain_text("Done: 3 tokens")
    assert fake.bodies[-1]["without"] == ["code"]
    assert page.locator("article h2").all_text_contents() == ["Without code", "All experts"]
    texts = ["".join(page.locator("article").nth(n).locator(".tokens > span").all_text_contents()) for n in (0, 1)]
    assert texts[0] == PROMPT + "".join(WITHOUT)
    assert texts[1].startswith(PROMPT + ANSWER[0])
    assert members_of(page)[:3] == ["hub", "math", "hub"]
    colours = (
        page.locator("article")
        .first.locator(".tokens > span")
        .evaluate_all("all => all.slice(0, 2).map(one => one.style.textDecorationColor)")
    )
    assert colours == ["rgb(0, 114, 178)", "rgb(0, 158, 115)"]  # the hub's and math's, as with all experts
    page.click("#go")
    expect(page.locator("article h2")).to_have_text(["Without code", "Without code"])


def test_all_of_it_by_keyboard(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    expect(page.locator("#experts input")).to_have_count(2)
    expect(page.locator("#part-1")).to_be_focused()
    press = page.keyboard.press
    page.keyboard.type("one two three")
    press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("Done")
    press("Tab")
    expect(page.locator("#add")).to_be_focused()
    press("Tab")
    expect(page.get_by_role("switch", name="code")).to_be_focused()
    for _ in range(9):  # math, settings, generate, layer, three downloads, the tokens
        press("Tab")
        if page.evaluate("document.activeElement.closest('.tokens') !== null"):
            break
    expect(page.locator(".tokens > span").first).to_be_focused()
    press("ArrowRight")
    press("ArrowRight")
    press("ArrowLeft")
    expect(page.locator("caption")).to_have_text("Token 2: ·two")
    rows = page.locator("tbody tr").all_text_contents()
    assert rows == ["layer 2, Hub-into-Experts–0.8990.699", "layer 4, Experts-into-Hub0.2000.6000.200"]
    expect(page.locator("tr.chosen")).to_have_count(1)
    press("End")
    expect(page.locator("caption")).to_contain_text("Token 12")
    page.get_by_role("switch", name="math").focus()
    press("Space")
    expect(page.locator("article h2").first).to_have_text("Without math")
    expect(page.locator("#status")).to_contain_text("Done")


FAILURES = [
    (
        "busy",
        "The server is busy: 5 completions run or wait, and the server takes 4; try again. It may be free in 3 s.",
    ),
    ("long", "The prompt has 900 tokens, the server takes 512; shorten it."),
    ("failed", "The server failed: The model failed and the server ends; its log says why."),
    ("broken", "The server is shutting down."),
    ("cut", "The server ended the connection before the answer was whole."),
]


def test_errors_are_said_in_words(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    for prompt, words in FAILURES:
        page.fill("#part-1", prompt)
        page.click("#go")
        expect(page.get_by_role("alert")).to_have_text(words)
        expect(page.locator("#stop")).to_be_disabled()
    generate(page, PROMPT)
    expect(page.get_by_role("alert")).to_have_text("")
    page.click("summary")
    page.fill("#temperature", "7")
    asked = len(fake.bodies)
    page.click("#go")
    assert page.locator("#temperature").evaluate("field => field.validity.rangeOverflow")
    assert len(fake.bodies) == asked


def test_a_server_that_is_gone(visit: Open) -> None:
    server = FakeServer()
    page = visit(server.url)
    generate(page, PROMPT)
    server.end()
    page.click("#go")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached. Is it still running?")
    expect(page.locator("article")).to_have_count(1)


def test_stop_ends_the_request_and_keeps_what_came(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    page.fill("#part-1", "slow")
    page.click("#go")
    expect(page.locator(".tokens > span").nth(5)).to_be_attached()
    expect(page.locator("#status")).to_have_text("Generating.")
    expect(page.locator(".tokens > span").nth(400)).to_be_in_viewport()  # the text follows its end
    page.click("#stop")
    expect(page.locator("#status")).to_contain_text("Stopped: ")
    assert fake.left.wait(5)
    assert page.locator(".tokens > span").count() >= 6
    expect(page.get_by_role("alert")).to_have_text("")


def test_settings_reach_the_server(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    page.click("summary")
    for field, value in {"temperature": "0", "most": "7", "seed": "", "stops": "END\n\\n\\n"}.items():
        page.fill(f"#{field}", value)
    generate(page, "")
    expected = {"prompt": "", "stream": True, "temperature": 0, "max_tokens": 7, "stop": ["END", "\n\n"]}
    assert fake.bodies[-1] == {**expected, "gates": True, "without": []}


def test_the_token_that_an_empty_prompt_starts_from_is_not_counted(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, "")
    content = json.loads(saved(page, "JSON"))
    assert [token["text"] for token in content["tokens"]] == ANSWER
    expect(page.locator("article .note").first).to_contain_text(f"share of {len(ANSWER)} tokens")
    page.locator(".tokens > span").first.hover()
    expect(page.locator("caption")).to_contain_text("Token 1: ·<img")


def test_the_output_s_mixture_is_shown_unless_a_stitch_layer_is_chosen(visit: Open) -> None:
    server = FakeServer(mixture=True)
    page = visit(server.url)
    generate(page, PROMPT)
    expect(page.locator("#about")).to_contain_text("3 members, 2 stitch layers and an output mixture, up to")
    expect(page.locator("#layer option:checked")).to_have_text("output mixture")
    assert set(members_of(page)) == {"math"}
    expect(page.locator("article .note").first).to_contain_text("hub 0 %, code 0 %, math 100 %")
    page.locator(".tokens > span").first.hover()
    rows = page.locator("tbody tr")
    assert rows.last.text_content() == "output mixture0.1000.1000.800"
    expect(rows.last).to_have_class("chosen")
    assert page.locator("svg text").first.text_content() == "gate"
    name = page.locator("article svg").get_attribute("aria-label")
    assert name == f"Gate values along {len(WORDS + ANSWER)} tokens, output mixture"
    table = list(csv.reader(io.StringIO(saved(page, "CSV"))))
    assert [row[4:] for row in table[3::3]] == [["output_mixture", "0.1", "0.1", "0.8"]] * len(WORDS + ANSWER)
    content = json.loads(saved(page, "JSON"))
    assert content["gate_places"] == [*LAYERS, MIXTURE]
    assert [token["gates"] for token in content["tokens"]] == [
        gates_of(n, [], True) for n in range(len(content["tokens"]))
    ]
    page.select_option("#layer", "1")
    assert members_of(page)[:3] == MEMBERS
    assert page.locator("svg text").first.text_content() == "mean gate"
    page.select_option("#layer", "2")
    page.get_by_role("switch", name="math").click()
    expect(page.locator("#status")).to_contain_text("Done: 3 tokens")
    assert set(members_of(page)) == {"code"}
    server.end()


def test_a_key_is_asked_for_and_sent(visit: Open) -> None:
    server = FakeServer(key="secret")
    page = visit(server.url)
    alert = page.get_by_role("alert")
    expect(alert).to_have_text("The server asks for an API key.")
    page.fill("#key", "wrong")
    page.keyboard.press("Enter")
    expect(alert).to_have_text("The server does not know this API key.")
    page.fill("#key", "secret")
    page.keyboard.press("Enter")
    expect(page.locator("#name")).to_have_text("made-up")
    expect(alert).to_have_text("")
    generate(page, PROMPT)
    assert page.locator("#experts input").count() == 2
    server.end()


def test_a_model_without_stitches_generates_without_colours(visit: Open) -> None:
    server = FakeServer(method="dense")
    page = visit(server.url)
    generate(page, PROMPT)
    assert "gates" not in server.bodies[-1]
    assert "without" not in server.bodies[-1]
    assert "".join(page.locator(".tokens > span").all_text_contents()).startswith(PROMPT + ANSWER[0])
    for hidden in ("#view", "#experts"):
        expect(page.locator(hidden)).to_be_hidden()
    assert page.locator("article svg, article button, [data-member]").count() == 0
    server.end()


def test_context_switches_are_marked_in_text_and_plot(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, "one two", "three four five")
    assert fake.bodies[-1]["prompt"] == "one two\n\nthree four five"
    chips = page.locator(".tokens > b")
    assert chips.all_text_contents() == ["part 2", "answer"]
    after = chips.evaluate_all("all => all.map(one => one.nextSibling.textContent)")
    assert after == ["↵\n↵\nthree", ANSWER[0]]
    lines = page.locator("svg line[stroke-dasharray]").evaluate_all("all => all.map(one => +one.getAttribute('x1'))")
    points = page.locator("svg polyline").first.evaluate("one => one.getAttribute('points')")
    ends = [float(point.split(",")[0]) for point in points.split()]
    assert lines == pytest.approx([(ends[1] + ends[2]) / 2, (ends[4] + ends[5]) / 2], abs=0.1)
    assert set(page.locator("svg text").all_text_contents()) >= {"part 2", "answer", "hub", "code", "math", "mean gate"}


def saved(page: "playwright.Page", kind: str, model: str = "made-up") -> str:
    with page.expect_download() as waiting:
        page.get_by_role("button", name=f"Download {kind}").click()
    assert waiting.value.suggested_filename == f"{model}.{kind.lower()}"
    return Path(waiting.value.path()).read_text("utf-8")


def test_values_and_plot_are_saved(visit: Open, fake: FakeServer) -> None:
    page = visit(fake.url)
    generate(page, PROMPT)
    texts = [*WORDS, *ANSWER]
    content = json.loads(saved(page, "JSON"))
    assert [token["text"] for token in content["tokens"]] == texts
    assert [token["gates"] for token in content["tokens"]] == [gates_of(place, []) for place in range(len(texts))]
    assert (content["model"], content["members"], content["gate_places"]) == ("made-up", MEMBERS, LAYERS)
    assert (content["parts"], content["without"], content["settings"]["seed"]) == ([PROMPT], [], 0)

    rows = list(csv.reader(io.StringIO(saved(page, "CSV"))))
    assert rows[0] == ["token", "part", "text", "layer", "kind", *(f'"{member}"' for member in MEMBERS)]
    assert len(rows) == 1 + 2 * len(texts)
    for row in rows[1:]:
        place, layer = int(row[0]) - 1, [known["layer"] for known in LAYERS].index(int(row[3]))
        assert json.loads(row[2]) == texts[place]
        assert row[1] == ("prompt" if place < len(WORDS) else "answer")
        assert [float(value) if value else None for value in row[5:]] == gates_of(place, [])[layer]
        assert not row[2].startswith(("=", "+", "-", "@"))

    svg = saved(page, "SVG")
    root = ElementTree.fromstring(svg)
    assert "var(" not in svg
    lines = {line.get("data-member"): line.get("points") for line in root.iter("{http://www.w3.org/2000/svg}polyline")}
    assert set(lines) == set(MEMBERS)
    heights = [float(point.split(",")[1]) for point in lines["hub"].split()]
    leads = [height == min(heights) for height in heights]
    assert leads == [place % 3 == 0 for place in range(len(texts))]


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_and_can_be_read_at_any_width(visit: Open, fake: FakeServer, theme: str) -> None:
    page = visit(fake.url, color_scheme=theme, viewport={"width": 1440, "height": 900})
    generate(page, PROMPT, "and " * 30)
    page.get_by_role("switch", name="code").click()
    expect(page.locator("#status")).to_contain_text("Done: 3 tokens")
    page.locator(".tokens > span").first.hover()
    for width in (1440, 820, 360):
        page.set_viewport_size({"width": width, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == width
        if folder := os.environ.get("MEGABTS_SCREENSHOTS"):
            page.wait_for_timeout(200)
            page.screenshot(path=Path(folder) / f"page-{theme}-{width}.png", full_page=True)
    assert page.evaluate(CONTRAST) >= 4.5


# The lowest contrast (WCAG) of a token's letters with what is behind them.
CONTRAST = """() => {
  const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const box = numbers(getComputedStyle(document.querySelector(".tokens")).backgroundColor);
  return Math.min(...[...document.querySelectorAll(".tokens > span, .letters")].map((span) => {
    const style = getComputedStyle(span), [r, g, b, alpha = 1] = numbers(style.backgroundColor);
    const behind = [r, g, b].map((part, place) => alpha * part + (1 - alpha) * box[place]);
    const [one, two] = [light(behind), light(numbers(style.color))].sort((x, y) => y - x);
    return (one + 0.05) / (two + 0.05);
  }));
}"""


def test_on_the_real_server(visit: Open, server: ServerProcess) -> None:
    page = visit(f"{server.url}/")
    page.click("summary")
    page.fill("#temperature", "0")
    page.fill("#most", "12")
    generate(page, "def f(é):", "1 + 1 =")
    answer = server.complete("def f(é):\n\n1 + 1 =", max_tokens=12, gates=True)["choices"][0]
    assert page.locator("#spoken").text_content() == answer["text"]
    content = json.loads(saved(page, "JSON", "tiny"))
    told = [*answer["prompt_tokens"], *answer["tokens"]]
    assert [token["gates"] for token in content["tokens"]] == [token["gates"] for token in told]
    assert [token["part"] for token in content["tokens"]].count("answer") == len(answer["tokens"])
    prompt = [token for token in content["tokens"] if token["part"] == "prompt"]
    assert "".join(token["text"] for token in prompt) == "def f(é):\n\n1 + 1 ="
    assert [token["segment"] for token in prompt] == [0] * 12 + [1] * 7
    page.get_by_role("switch", name="math").click()
    expect(page.locator("article")).to_have_count(2)
    expect(page.locator("#status")).to_contain_text("Done")
    without = server.complete("def f(é):\n\n1 + 1 =", max_tokens=12, without=["math"])["choices"][0]
    assert page.locator("#spoken").text_content() == without["text"]
    page.get_by_role("switch", name="code").click()
    expect(page.get_by_role("alert")).to_contain_text("leave at least one in")
