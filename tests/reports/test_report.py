"""Reports: their figures are those of compare.json and rank.json, and no text leaves where none may."""

import base64
import csv
import gzip
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evalkit import api_reports
from evalkit.records import GENERATION, LOGLIKELIHOOD, VERDICTS
from evalkit.settings import Settings
from evalkit.store import Run, read_run
from reports import browse
from reports.browse import packed, prompts_of, run_rows
from reports.chart_style import Figure
from reports.charts import comparison_figures
from reports.compare import Comparison
from reports.explain import explain, read_comparison
from reports.export import citation, latex_table
from reports.markdown import sentence
from reports.markup import to_html
from reports.page import page
from reports.rank import Ranks
from reports.rank_charts import rank_figures
from reports.report import read_report, report_markdown, save_report
from tests.reports.realistic import realistic_run
from tests.reports.runs import run_of

pytestmark = pytest.mark.usefixtures("altair")

TASKS = ("letters", "numbers")


def two(folder: Path | None = None, n: int = 80) -> tuple[Run, Run]:
    sides = (("teacher", (0.8, 0.75), 1), ("student", (0.75, 0.5), 2))
    return tuple(  # type: ignore[return-value]
        realistic_run(TASKS, n, name=name, skill=skill, seed=seed, folder=folder and folder / name, words=12, shots=2)
        for name, skill, seed in sides
    )


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison's folder, its runs beside it."""
    folder = tmp_path_factory.mktemp("report") / "compare"
    Comparison(*two(folder)).save(folder)
    return folder


def figures_of(folder: Path) -> tuple[dict[str, Any], dict[str, Figure]]:
    result = json.loads((folder / "compare.json").read_text())
    items = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return result, {figure.name: figure for figure in comparison_figures(result, items)}


def drawn(figure: Figure, row: str, series: str) -> tuple[float, float, float]:
    [found] = [x for x in figure.data if x["row"].startswith(row) and x["series"] == series]
    return found["mean"], found["low"], found["high"]


def hundredfold(cell: dict[str, Any]) -> tuple[float, float, float]:
    return 100 * cell["mean"], 100 * cell["ci95"][0], 100 * cell["ci95"][1]


def test_charts_draw_the_gaps_and_accuracies_of_compare_json(compared: Path) -> None:
    result, figures = figures_of(compared)
    names = {LOGLIKELIHOOD: "log-likelihood", GENERATION: "generation"}
    cells = [("overall", result["overall"]["modes"], result["overall"]["hidden_gap"])]
    cells += [(task["name"], task["modes"], task["hidden_gap"]) for task in result["tasks"]]
    for row, modes, hidden in cells:
        for mode, cell in modes.items():
            assert drawn(figures["losses"], row, names[mode]) == hundredfold(cell["gap"])
        assert drawn(figures["losses"], row, "raw points") == hundredfold(hidden)
        assert drawn(figures["losses"], row, "formula score") == hundredfold(hidden["formula"])
    for task in result["tasks"]:
        for mode, panel in zip((LOGLIKELIHOOD, GENERATION), figures["accuracy"].panels, strict=True):
            rows = {row["series"]: row for row in panel["data"]["values"] if row["row"].startswith(task["name"])}
            for who in ("teacher", "student"):
                cell = task["modes"][mode][who]
                told = (rows[who]["mean"], rows[who]["low"], rows[who]["high"])
                assert told == (100 * cell["accuracy"], *(100 * bound for bound in cell["ci95"]))


def test_the_parts_of_a_flow_bar_add_up_to_generations_loss(compared: Path) -> None:
    result, figures = figures_of(compared)
    bars = figures["flows"].panels[-1]["data"]["values"]
    for task in [*result["tasks"], {"name": "overall", "modes": result["overall"]["modes"]}]:
        parts = [row["mean"] for row in bars if row["row"].startswith(task["name"])]
        assert sum(parts) == pytest.approx(100 * task["modes"][GENERATION]["gap"]["mean"])


def test_the_flip_matrix_counts_what_compare_json_counts(compared: Path) -> None:
    result, figures = figures_of(compared)
    for mode, panel in zip((LOGLIKELIHOOD, GENERATION), figures["flips"].panels, strict=True):
        cells = {(row["teacher"], row["student"]): row["items"] for row in panel["data"]["values"]}
        assert sum(cells.values()) == sum(task["n"] for task in result["tasks"])
        lost = sum(count for (t, s), count in cells.items() if t == "correct" != s)
        gained = sum(count for (t, s), count in cells.items() if s == "correct" != t)
        told = [task["modes"][mode]["flips"] for task in result["tasks"]]
        assert (lost, gained) == (sum(x["lost"] for x in told), sum(x["gained"] for x in told))


def test_each_figure_says_n_and_what_its_interval_is(compared: Path) -> None:
    ranked = rank_figures(Ranks(checkpoint_runs()).result)
    for figure in [*figures_of(compared)[1].values(), *ranked]:
        assert ("n = " in figure.caption or "n: " in figure.caption) and "interval" in figure.caption


class Tables(HTMLParser):
    """The text of every table cell."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self._in = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag in ("td", "th"):
            self._in = True
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in = self._in and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._in:
            self.cells[-1] += data


def test_html_holds_every_table_cell_of_compare_md(compared: Path) -> None:
    lines = (compared / "compare.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| ") and not line.startswith("| ---")]
    cells = [cell.strip() for row in rows for cell in row.replace("&lt;", "<").strip("|").split("|")]
    assert Tables(page(read_report([compared]))).cells == cells


def test_markdown_holds_the_sentence_the_charts_and_every_table(compared: Path, tmp_path: Path) -> None:
    save_report(read_report([compared]), tmp_path, ["md"])
    text, body = (tmp_path / "report.md").read_text(), (compared / "compare.md").read_text()
    assert body.split("\n\n")[1] in text, "opens with compare.md's sentence"
    assert body[body.index("## Outcomes") :].strip() in text
    charts = sorted(path.stem for path in (tmp_path / "report-charts").iterdir())
    assert charts == ["accuracy", "flips", "flows", "losses"]
    assert all(f"(report-charts/{name}.svg)" in text for name in charts) and not (tmp_path / "report.html").exists()
    assert "http" not in (tmp_path / "report-charts" / "losses.svg").read_text().replace("http://www.w3.org/", "")


def checkpoint_runs(folder: Path | None = None) -> list[Run]:
    """The fourth is better by log-likelihood than by generation."""
    rng = np.random.default_rng(0)
    skills = ((0.4, 0.3), (0.5, 0.4), (0.6, 0.5), (0.7, 0.2), (0.8, 0.6))
    base = rng.random(400)
    return [
        run_of(
            {"a": (base < ll, base < gen)},
            name=f"step-{k}",
            fingerprint=f"f{k}",
            checkpoint={"tokens": 1_000_000 * (k + 1), "recipe_sha256": "r" * 64, "seed": 0},
            folder=folder and folder / f"step-{k}",
        )
        for k, (ll, gen) in enumerate(skills)
    ]


def test_rank_charts_draw_rank_json_and_mark_its_reversals() -> None:
    result = Ranks(checkpoint_runs()).result
    figures = {figure.name: figure for figure in rank_figures(result)}
    points = {row["checkpoint"]: row for row in figures["scatter"].panels[0]["data"]["values"]}
    curves = {(row["tokens"], row["mode"]): row["accuracy"] for row in figures["training"].panels[0]["data"]["values"]}
    for told, cell in zip(result["checkpoints"], result["overall"]["accuracy"], strict=True):
        for mode, name in ((LOGLIKELIHOOD, "log-likelihood"), (GENERATION, "generation")):
            row = points[told["label"]]
            assert (row[mode], row[f"{mode}_low"], row[f"{mode}_high"]) == hundredfold(cell[mode])
            assert curves[told["tokens"], name] == 100 * cell[mode]["mean"]
    crossings = [row for row in figures["slopes"].data if row["what"] == "cross"]
    marked = {row["pair"] for row in crossings if row["kind"] == "reversal, resolved in both modes"}
    assert marked == {f"{r['first']} and {r['second']}" for r in result["overall"]["pairs"]["reversals"]} and marked
    ranks = {(row["checkpoint"], row["mode"]): row["rank"] for row in figures["slopes"].data if row["what"] == "line"}
    best = max(result["checkpoints"], key=lambda point: points[point["label"]][LOGLIKELIHOOD])["label"]
    assert ranks[best, "log-likelihood"] == 1


def unpacked(told: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(told)))


def test_the_browser_gets_every_prompt_choice_and_reply_whole() -> None:
    teacher, student = two(n=40)
    odd = "so 😀 the answer </script><b>is</b> 7"
    records = teacher.records("letters")
    first = next(iter(records))
    said = records[first].outcomes[1]
    changed = replace(said, reply=odd, span=(odd.index("7"), odd.index("7") + 1), answer="7")
    records[first] = replace(records[first], outcomes=(records[first].outcomes[0], changed))
    runs = {"teacher": teacher, "student": student}
    told, limit = packed(run_rows(runs), tuple(runs), prompts_of(runs), True)
    data = unpacked(told)
    assert limit is None and len(data["items"]) == 80
    for task, item, _, gold, choices, asked, *sides in data["items"]:
        for side, run in zip(sides, runs.values(), strict=True):
            record = run.records(data["tasks"][task])[item]
            ll, gen = record.outcomes
            assert {label: "\n\n".join(data["blocks"][i] for i in parts) for label, parts, _ in asked} == record.prompts
            assert (tuple(choices), gold) == (record.choices, record.gold)
            assert (VERDICTS[side[0]], side[1], VERDICTS[side[3]]) == (ll.outcome, ll.choice, gen.outcome)
            assert side[2] == pytest.approx(ll.logprobs, abs=6e-4)
            assert side[4] + side[5] + side[6] == gen.reply
            assert side[5] == ("" if gen.span is None else gen.reply[slice(*gen.span)])
    assert [part[5] for part in data["items"][0][6:7]] == ["7"], "the span is cut by code points"


def test_an_items_own_part_of_a_prompt_is_told_from_the_examples_before_it() -> None:
    """Also where the question has blank lines, and where a chat template puts an empty thinking block behind it."""
    run = two(n=40)[0]
    for name in TASKS:
        records = run.records(name)
        for at, (item, record) in enumerate(list(records.items())):
            *shots, question = record.prompts["open"].split("\n\n")
            asked = [*shots, f"Passage {at // 4}", question, "<think>", "</think>", ""]
            records[item] = replace(record, prompts={"open": "\n\n".join(asked)})
    data = unpacked(packed(run_rows({"m": run}), ("m",), prompts_of({"m": run}), True)[0])
    for at, (*_, asked, _) in enumerate(data["items"]):
        [(_, parts, own)] = asked
        assert own == 2 and data["blocks"][parts[own]] == f"Passage {at % 40 // 4}"
        assert data["blocks"][parts[own + 1]].startswith("Question:")


def test_a_prompt_asked_in_two_ways_is_told_for_each_model() -> None:
    teacher, student = two(n=40)
    records = student.records("letters")
    first = next(iter(records))
    records[first] = replace(records[first], prompts={"open": "User: what?"})
    asked = dict(prompts_of({"teacher": teacher, "student": student})["letters", first])
    assert asked == {"open, teacher": teacher.records("letters")[first].prompts["open"], "open, student": "User: what?"}


def test_replies_are_cut_around_the_answer_where_the_file_would_grow_too_large(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = realistic_run(TASKS, 60, name="m", skill=(0.7, 0.7), seed=1, words=900)
    rows, asked = run_rows({"m": run}), prompts_of({"m": run})
    monkeypatch.setattr(browse, "BUDGET", 60_000)
    told, limit = packed(rows, ("m",), asked, True)
    assert len(base64.b64decode(told)) <= 60_000 and limit in (2500, 1000, 400)
    replies = [(side[4], side[5], side[6]) for *_, side in unpacked(told)["items"]]
    assert max(len(before) + len(after) for before, _, after in replies) <= limit + 4
    spans = [row["m_reply"][slice(*row["m_span"])] for row in rows if row["m_span"]]
    assert [span for _, span, _ in replies if span] == spans


def test_no_text_means_no_prompt_choice_or_reply_in_any_file(compared: Path, tmp_path: Path) -> None:
    texts = [row for row in map(json.loads, (compared / "items.jsonl").read_text().splitlines())]
    secret = {text for row in texts for text in (*row["choices"], row["teacher_reply"], row["student_reply"]) if text}
    for text in (True, False):
        out = tmp_path / str(text)
        save_report(read_report([compared], text), out, ["md", "html"])
        html = (out / "report.html").read_text()
        data = html.split('id="item-data">')[1].split("</script>")[0]
        told = "".join(path.read_text() for path in out.rglob("*.*") if path.is_file())
        told += json.dumps(unpacked(data), ensure_ascii=False)
        found = [one for one in secret if one in told]
        assert bool(found) == text and ("Question:" in told) == text
        assert all(row["item"] in told for row in texts)


def test_csv_holds_fractions_unrounded_and_latex_is_escaped(compared: Path) -> None:
    result = json.loads((compared / "compare.json").read_text())
    rows = list(csv.DictReader(io.StringIO(read_report([compared]).csv)))
    for task in result["tasks"]:
        for mode, cell in task["modes"].items():
            [row] = [row for row in rows if (row["task"], row["mode"]) == (task["name"], mode)]
            assert float(row["gap"]) == cell["gap"]["mean"] and int(row["n"]) == task["n"]
            assert [float(row["gap_low"]), float(row["gap_high"])] == cell["gap"]["ci95"]
    table = latex_table(("Task", "n"), [("arc_easy & 50%", "3")], "a_b", left=1)
    assert r"arc\_easy \& 50\% & 3 \\" in table and r"\caption{a\_b}" in table
    assert r"org/model\_1 (f)" in citation([{"name": "org/model_1", "fingerprint": "f"}], ["a"])


def test_our_markdown_becomes_html_with_all_text_escaped() -> None:
    from reports.cells import inline, table_of

    nasty = "a|b <script>x</script> \\ & `code`"
    made = to_html(f"# {inline(nasty)}\n\n{table_of(('h', 'n'), [(nasty, '1')])}\n\n* one\n* {inline(nasty)}")
    shown = "a|b &lt;script&gt;x&lt;/script&gt; \\ &amp; <code>code</code>"
    assert made.count(shown) == 3 and "<script" not in made
    assert '<td class="number">1</td>' in made and "<ul><li>one</li>" in made


def test_names_of_tasks_and_models_are_text_in_every_format(tmp_path: Path) -> None:
    """Also one that is a command's argument: it is quoted for the shell."""
    odd = "<img src=x> a|b"
    for who, share in (("teacher", 0.8), ("student", 0.5)):
        right = np.arange(100) < 100 * share
        run_of({odd: (right, right)}, name=f"<b>{who}", fingerprint=who, folder=tmp_path / who)
    compared = tmp_path / "compare"
    Comparison(*(read_run(tmp_path / who) for who in ("teacher", "student"))).save(compared)
    for folders in ([compared], [tmp_path / "teacher"], [tmp_path / "teacher", tmp_path / "student"]):
        out = tmp_path / f"of-{len(folders)}"
        save_report(read_report(folders), out, ["md", "html"])
        told = re.sub(r"`.*?`", "", (out / "report.md").read_text())
        told += re.sub(r"<script.*?</script>", "", (out / "report.html").read_text(), flags=re.DOTALL)
        assert "<img" not in told and "<b>" not in told and "&lt;img" in told
    assert f"--task '{odd}'" in explain(*read_comparison(compared), "compare")
    assert "<img" not in (compared / "compare.md").read_text()


def test_checks_name_what_should_be_looked_at(compared: Path) -> None:
    checks = {check.name: check for check in read_report([compared]).checks}
    assert checks["Replies read"].fine is False and "of 160" in checks["Replies read"].told
    assert checks["Ties in log-likelihood"].fine and checks["Prompts and template"].fine
    assert checks["A/A floor"].fine is None and "not measured" in checks["A/A floor"].told


def test_a_calibration_beside_the_comparison_gives_the_floor(compared: Path, tmp_path: Path) -> None:
    from reports.gate_output import calibration

    folder = tmp_path / "compare"
    Comparison(*two(n=50)).save(folder)
    run = two(n=50)[0]
    (folder / "calibration.json").write_text(json.dumps(calibration(run, run)))
    told = {check.name: check for check in read_report([folder]).checks}["A/A floor"]
    assert told.fine and "flips at most 0.0 % [0.0, 7.1] of 50 items" in told.told
    other = realistic_run(TASKS, 50, name="third", skill=(0.5, 0.5), seed=1)
    (folder / "calibration.json").write_text(json.dumps(calibration(other, other)))
    with pytest.raises(ValueError, match="is of 'third', which was not compared here"):
        read_report([folder])
    (folder / "calibration.json").write_text("{}")
    with pytest.raises(ValueError, match=r"calibration.json has the schema None"):
        read_report([folder])


def test_runs_that_moved_away_leave_the_report_without_prompts(tmp_path: Path) -> None:
    Comparison(*two(n=40)).save(tmp_path)
    report = read_report([tmp_path])
    assert not report.prompts and "prompts are not shown" in page(report)


def test_one_run_and_several_runs_make_reports(tmp_path: Path) -> None:
    runs = checkpoint_runs(tmp_path)
    one, several = read_report([runs[0].path]), read_report([run.path for run in runs])  # type: ignore[list-item]
    assert [figure.name for figure in one.figures] == ["accuracy"] and one.lead.startswith("a (n = 400): 35.8 % [")
    assert [figure.name for figure in several.figures] == ["scatter", "slopes", "training"]
    assert "| a | step-0 |" in report_markdown(several) and len(several.items) == 400


def damage(folder: Path, what: str) -> str:
    """Spoil the comparison or run at ``folder``; what the message must say."""
    manifest, outcomes = folder / "run.json", folder / "outcomes.jsonl"
    if what == "schema":
        manifest.write_text(manifest.read_text().replace("evalkit.run/1", "evalkit.run/9"))
        return "'evalkit.run/9'"
    if what == "cut off":
        outcomes.write_bytes(outcomes.read_bytes()[:-40])
        return "cut off in the middle"
    if what == "NaN":
        lines = outcomes.read_text().splitlines(keepends=True)
        outcomes.write_text("".join([lines[0].replace("-1.0", "NaN"), *lines[1:]]))
        return "log-probability nan"
    lines = outcomes.read_text().splitlines(keepends=True)
    outcomes.write_text("".join(line.replace('"item":"', '"item":"other-') for line in lines))
    return "no item in common"


@pytest.mark.parametrize("what", ["schema", "cut off", "NaN", "no common items"])
def test_a_bad_run_is_one_line_and_nothing_is_written_over(what: str, tmp_path: Path) -> None:
    folders = [run.path for run in checkpoint_runs(tmp_path / "runs")[:2]]
    out = tmp_path / "out"
    out.mkdir()
    (out / "report.html").write_text("the last one")
    expected = damage(folders[1], what)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected) as caught:
        api_reports.report(folders, out)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert [path.name for path in out.iterdir()] == ["report.html"]
    assert (out / "report.html").read_text() == "the last one"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("compare.json", "evalkit.compare/1", "evalkit.compare/7", "the schema 'evalkit.compare/7'"),
        ("items.jsonl", '"teacher_logprobs": [-', '"teacher_logprobs": [NaN, -', "holds the number NaN"),
        ("items.jsonl", "\n", "\n{", "is damaged"),
        ("items.jsonl", '"task": "letters"', '"task": "numbers"', "items of 'letters', but compare.json says 40"),
    ],
)
def test_a_spoilt_comparison_is_refused_by_name(file: str, old: str, new: str, message: str, tmp_path: Path) -> None:
    Comparison(*two(n=40)).save(tmp_path)
    (tmp_path / file).write_text((tmp_path / file).read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        read_report([tmp_path])


def test_wrong_folders_and_formats_are_named(compared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is no folder"):
        read_report([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"has no compare.json and no run.json; give the folder of"):
        read_report([tmp_path])
    with pytest.raises(ValueError, match="teacher is given twice"):
        read_report([compared / "teacher", compared / "teacher"])
    with pytest.raises(ValueError, match="is a comparison; report takes one comparison, or runs"):
        read_report([compared / "teacher", compared])
    with pytest.raises(ValueError, match="unknown format 'pdf': expected md or html"):
        save_report(read_report([compared]), tmp_path, ["md", "pdf"])
    assert not list(tmp_path.iterdir())


def test_a_missing_chart_package_is_one_line_with_the_fix(compared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ValueError, match=r"a report needs vl_convert: pip install 'evalkit\[report\]'"):
        read_report([compared])


def test_one_mode_alone_and_tasks_without_signal_make_reports(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    right, guessed = rng.random(100) < 0.8, rng.random(100) < 0.25
    said = [run_of({"a": (right, right), "b": (guessed, guessed)}, name=f"m{k}", fingerprint=f"{k}") for k in (0, 1)]
    figures = {figure.name: figure for figure in comparison_figures(*told(Comparison(*said)))}
    faint = {row["row"] for row in figures["losses"].data if not row["signal"]}
    assert faint == {"b (n = 100) ∅"} and "∅, faint: without signal" in figures["losses"].caption
    only = [ll_alone(run) for run in said]
    assert "by log-likelihood: a gap of" in sentence(Comparison(*only).result)
    figures = {figure.name: figure for figure in comparison_figures(*told(Comparison(*only)))}
    assert set(figures) == {"losses", "accuracy", "flips"} and len(figures["losses"].panels) == 1
    no_signal = [run_of({"b": (guessed, guessed)}, name=f"m{k}", fingerprint=f"{k}") for k in (0, 1)]
    assert [figure.name for figure in rank_figures(Ranks(no_signal).result)] == ["scatter", "slopes"]
    Comparison(*no_signal).save(tmp_path)
    assert "nothing can be concluded" in page(read_report([tmp_path]))


def told(made: Comparison) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return made.result, list(made.items)


def ll_alone(run: Run) -> Run:
    records = [
        replace(record, outcomes=record.outcomes[:1]) for task in run.tasks for record in run.records(task).values()
    ]
    return Run(run.manifest.model_copy(update={"settings": Settings(modes=(LOGLIKELIHOOD,))}), records)


def test_runs_scored_anew_since_are_not_asked_for_prompts(tmp_path: Path) -> None:
    folder = tmp_path / "compare"
    Comparison(*two(folder, n=40)).save(folder)
    assert read_report([folder]).prompts
    manifest = folder / "student" / "run.json"
    manifest.write_text(manifest.read_text().replace('"shots": null', '"shots": 3'))
    assert not read_report([folder]).prompts
    (folder / "teacher" / "outcomes.jsonl").write_text("{")
    with pytest.raises(ValueError, match="cut off in the middle"):
        read_report([folder])
