"""The HTML report in a real browser: offline, by keyboard, on a phone; model text is shown, never run."""

import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evalkit.store import Run
from reports.compare import Comparison
from reports.report import read_report, save_report
from tests.reports.realistic import realistic_run, saved
from tests.reports.test_report import checkpoint_runs

ATTACK = (
    '</script><script>document.title = "run"</script><img src=x onerror="document.title=\'run\'">'
    "<a href=javascript:alert(1)>&amp; <!-- {{ 7 * 7 }}"
)


def attacked(run: Run) -> Run:
    """``run`` with script wherever a model or a benchmark puts text."""
    records = run.records("letters")
    for item, record in list(records.items()):
        records[item] = replace(record, prompts={"open": f"{ATTACK}\n\n{record.prompts['open']}"})
    for at, (item, record) in enumerate(list(records.items())[:3]):
        ll, gen = record.outcomes
        reply = f"{ATTACK} so 7 {at}"
        span = (len(ATTACK) + 4, len(reply))
        records[item] = replace(
            record,
            choices=(ATTACK, *record.choices[1:]),
            stratum=ATTACK,
            prompts={"open": f"{ATTACK}\n\n{ATTACK} {at}"},
            outcomes=(replace(ll, choice=0, answer=ATTACK), replace(gen, reply=reply, span=span)),
        )
    return run


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory, altair: None) -> Path:
    folder = tmp_path_factory.mktemp("page") / "compare"
    sides = (("teacher", (0.8, 0.75), 1), (f"student {ATTACK}", (0.75, 0.5), 2))
    runs = []
    for who, (name, skill, seed) in zip(("teacher", "student"), sides, strict=True):
        made = realistic_run(("letters", "numbers"), 80, name=name, skill=skill, seed=seed, shots=2)
        runs.append(saved(attacked(made), folder / who))
    Comparison(*runs).save(folder)
    save_report(read_report([folder]), folder, ["html"])
    return folder / "report.html"


class Visit:
    """A page that is open, what it logged, and what it asked of the network."""

    def __init__(self, page: Any) -> None:
        self.page = page
        self.log: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.log.append(message.text))
        page.on("pageerror", lambda error: self.log.append(str(error)))
        page.on("dialog", lambda dialog: self.log.append(dialog.message))
        page.on("request", lambda request: self.requests.append(request.url))

    def open(self, path: Path) -> None:
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-items=ready][data-charts=drawn]")

    def count(self) -> int:
        self.page.wait_for_timeout(250)  # the search waits for the end of typing
        return int(self.page.inner_text("#count").split(" of ")[0].replace(",", ""))

    def listed(self) -> list[str]:
        return list(self.page.locator("#list .id").all_inner_texts())


@pytest.fixture
def visit(browser: Any) -> Iterator[Visit]:
    context = browser.new_context(viewport={"width": 1280, "height": 900}, offline=True)
    yield Visit(context.new_page())
    context.close()


def test_it_opens_offline_without_an_error_and_draws_every_chart(visit: Visit, report: Path) -> None:
    visit.open(report)
    assert visit.log == []
    assert [url for url in visit.requests if not url.startswith(("file:", "data:", "blob:"))] == []
    assert len([url for url in visit.requests if url.startswith("file:")]) == 1, "one file is all there is"
    charts = visit.page.locator(".chart")
    assert charts.count() == 8
    for at in range(8):
        assert charts.nth(at).locator("svg .mark-symbol path, svg .mark-rect path").count() > 0
    json_told = json.loads((report.parent / "compare.json").read_text())
    gap = json_told["overall"]["hidden_gap"]
    assert f"{100 * gap['mean']:+.1f}" in visit.page.inner_text(".lead")


def test_a_script_in_model_text_is_shown_and_never_run(visit: Visit, report: Path) -> None:
    visit.open(report)
    visit.page.fill("#search", "so 7 1")
    assert visit.count() == 1
    shown = visit.page.inner_text("#detail")
    assert shown.count("<img src=x onerror=") >= 5, "prompt, choice, stratum and both replies"
    visit.page.click("#detail summary")
    assert visit.page.title() != "run" and visit.log == []
    assert visit.page.locator("img, #detail a, #detail script").count() == 0
    assert visit.page.locator("#detail mark").all_inner_texts() == ["7 1", "7 1"], "the extracted span"


def test_the_policy_forbids_whatever_else_would_run(visit: Visit, report: Path) -> None:
    """A second line of defence: even text that was put into the page as HTML could not run."""
    visit.open(report)
    visit.page.evaluate("html => { document.querySelector('footer').innerHTML = html }", ATTACK)
    visit.page.wait_for_timeout(200)
    assert visit.page.title() != "run"
    policy = visit.page.get_attribute("meta[http-equiv=Content-Security-Policy]", "content")
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    assert re.search(r"script-src ('sha256-[^']+' ?)+;", policy), "scripts by hash alone"


def test_search_and_filters_find_what_the_records_say(visit: Visit, report: Path) -> None:
    rows = [json.loads(line) for line in (report.parent / "items.jsonl").read_text().splitlines()]
    visit.open(report)
    assert visit.count() == len(rows) == 160

    def expect(right: list[dict[str, Any]]) -> None:
        assert visit.count() == len(right)
        assert visit.listed() == [row["item"] for row in right][:50]

    visit.page.select_option("#task", label="numbers")
    expect([row for row in rows if row["task"] == "numbers"])
    visit.page.select_option("#generation", "truncated")
    visit.page.select_option("#model", label=visit.page.locator("#model option").nth(2).inner_text())
    expect([row for row in rows if row["task"] == "numbers" and row["student_generation"] == "truncated"])
    visit.page.click("button[type=reset]")
    visit.page.select_option("#model", "1")
    visit.page.select_option("#pattern", "hidden")
    hidden = [r for r in rows if r["student_loglikelihood"] == "correct" and r["student_generation"] != "correct"]
    assert hidden
    expect(hidden)
    visit.page.select_option("#pattern", "lost")
    expect([r for r in rows if r["teacher_generation"] == "correct" and r["student_generation"] != "correct"])
    visit.page.click("#show-flipped")
    modes = ("loglikelihood", "generation")
    expect(
        [r for r in rows if any((r[f"teacher_{m}"] == "correct") != (r[f"student_{m}"] == "correct") for m in modes)]
    )
    visit.page.click("button[type=reset]")
    word = rows[100]["choices"][0][:12].upper()
    visit.page.fill("#search", word)
    assert 0 < visit.count() < 160
    assert rows[100]["item"] in visit.listed(), "search does not mind the case"
    visit.page.fill("#search", "no such words")
    assert visit.count() == 0 and "No item matches" in visit.page.inner_text("#detail")
    assert visit.log == []


def test_an_item_shows_prompt_choices_and_both_replies(visit: Visit, report: Path) -> None:
    rows = [json.loads(line) for line in (report.parent / "items.jsonl").read_text().splitlines()]
    row = next(r for r in rows[10:] if r["student_generation"] == "wrong" and r["student_loglikelihood"] == "correct")
    visit.open(report)
    visit.page.fill("#search", row["item"])
    assert visit.count() == 1
    shown = visit.page.inner_text("#detail")
    assert row["teacher_reply"] in shown and row["student_reply"] in shown and "3 parts before it" in shown
    assert all(choice in shown for choice in row["choices"])
    assert all(f"{value:.3f}" in shown for who in ("teacher", "student") for value in row[f"{who}_logprobs"])
    low, high = row["student_span"]
    assert row["student_reply"][low:high] in visit.page.locator("#detail mark").all_inner_texts()


def test_pages_and_keys_lead_through_the_list(visit: Visit, report: Path) -> None:
    visit.open(report)
    first = visit.listed()
    assert len(first) == 50 and visit.page.is_disabled("#previous")
    visit.page.click("#next")
    assert visit.listed()[0] not in first
    visit.page.click("#previous")
    assert visit.listed() == first
    visit.page.keyboard.press("/")
    visit.page.keyboard.type("letters-0000")
    assert visit.count() == 10
    visit.page.locator("#list button").first.focus()
    visit.page.keyboard.press("ArrowDown")
    assert "letters-00001" in visit.page.inner_text("#detail h3")
    assert visit.page.get_attribute("#list button >> nth=1", "aria-current") == "true"


def test_copy_buttons_give_latex_csv_and_a_citation(visit: Visit, report: Path) -> None:
    visit.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    visit.open(report)
    for name, begins in (("LaTeX", "% needs"), ("CSV", "task,version,n,mode"), ("citation", "@misc{evalkit-")):
        visit.page.click(f"[data-copy={name}]")
        visit.page.wait_for_selector(f"#copied:text('Copied {name}.')")
        assert visit.page.evaluate("navigator.clipboard.readText()").startswith(begins)


def test_tab_stops_at_the_list_once_and_every_menu_has_a_name(visit: Visit, report: Path) -> None:
    visit.open(report)
    assert visit.page.locator("#list button").count() == 50
    assert visit.page.locator('#list button[tabindex="0"]').count() == 1
    visit.page.locator("#list button").first.focus()
    visit.page.keyboard.press("ArrowDown")
    assert visit.page.locator('#list button[tabindex="0"]').inner_text() == visit.page.evaluate(
        "document.activeElement.innerText"
    )
    visit.page.keyboard.press("Tab")
    assert visit.page.evaluate("document.activeElement.id") == "next"
    assert visit.page.locator('.vega-embed summary[aria-label="Save this chart"]').count() == 8


CLIPPED = """[...document.querySelectorAll(".chart svg")].flatMap((svg) => {
  const box = svg.getBoundingClientRect();
  return [...svg.querySelectorAll("text")].filter((text) => {
    const own = text.getBoundingClientRect();
    return own.width && (own.left < box.left - 1 || own.right > box.right + 1);
  }).map((text) => text.textContent);
})"""


@pytest.mark.parametrize("width", [360, 1280])
def test_no_word_of_a_chart_is_cut_off(browser: Any, tmp_path: Path, width: int) -> None:
    """Not with long names either, whose end says n."""
    tasks = ("a_benchmark_whose_name_is_much_longer_than_most", "another_benchmark_with_a_long_name")
    sides = (("teacher", (0.8, 0.75), 1), ("student", (0.75, 0.5), 2), ("third", (0.5, 0.3), 3))
    runs = [
        realistic_run(tasks, 40, name=name, skill=skill, seed=seed, folder=tmp_path / name)
        for name, skill, seed in sides
    ]
    Comparison(*runs[:2]).save(tmp_path / "compare")
    context = browser.new_context(viewport={"width": width, "height": 800})
    visit = Visit(context.new_page())
    for folders in ([tmp_path / "compare"], [tmp_path / name for name, *_ in sides]):
        save_report(read_report(folders), tmp_path, ["html"])
        visit.open(tmp_path / "report.html")
        assert visit.page.evaluate(CLIPPED) == []
        labels = visit.page.locator("#losses .role-axis-label text, #slopes .role-axis-label text").all_text_contents()
        if len(folders) == 1:
            assert sum(label.endswith("(n = 40)") for label in labels) == 4, labels
        else:
            assert {"1", "2", "3", "log-likelihood", "generation"} == set(labels)
    context.close()


def test_paper_shows_every_table_whole(visit: Visit, report: Path) -> None:
    visit.page.set_viewport_size({"width": 720, "height": 1000})  # A4
    visit.open(report)
    visit.page.emulate_media(media="print")
    visit.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert visit.page.locator("#tables").evaluate("details => details.open")
    assert visit.page.evaluate("document.documentElement.scrollWidth") <= 720


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_and_both_colour_schemes(browser: Any, report: Path, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 780}, color_scheme=scheme)
    visit = Visit(context.new_page())
    visit.open(report)
    assert visit.page.evaluate("document.documentElement.scrollWidth") == 360, "nothing is wider than the page"
    paper, ink = visit.page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    label = visit.page.evaluate("getComputedStyle(document.querySelector('.chart .role-axis-label text')).fill")
    dark = [sum(map(int, re.findall(r"\d+", colour)[:3])) < 384 for colour in (paper, ink, label)]
    assert dark == ([False, True, True] if scheme == "light" else [True, False, False])
    context.close()


def test_a_ranking_opens_as_well(visit: Visit, tmp_path: Path) -> None:
    runs = checkpoint_runs(tmp_path)
    save_report(read_report([run.path for run in runs]), tmp_path, ["html"])  # type: ignore[list-item]
    visit.open(tmp_path / "report.html")
    assert visit.log == [] and visit.page.locator(".chart svg.marks").count() == 3 and visit.count() == 400


@pytest.mark.slow
def test_twenty_thousand_items_open_in_three_seconds_and_fifteen_megabytes(visit: Visit, tmp_path: Path) -> None:
    tasks = [f"task{k}" for k in range(10)]
    sides = (("teacher", (0.8, 0.75), 1), ("student", (0.75, 0.5), 2))
    runs = [
        realistic_run(tasks, 2000, name=name, skill=skill, seed=seed, folder=tmp_path / name)
        for name, skill, seed in sides
    ]
    Comparison(*runs).save(tmp_path)
    save_report(read_report([tmp_path]), tmp_path, ["html"])
    size = (tmp_path / "report.html").stat().st_size
    took = []
    for _ in range(3):  # the machine may be busy with something else once
        began = time.monotonic()
        visit.open(tmp_path / "report.html")
        took.append(time.monotonic() - began)
    assert visit.count() == 20_000 and size < 15_000_000
    assert min(took) < 3, f"opened in {took} s, {size / 1e6:.1f} MB"
