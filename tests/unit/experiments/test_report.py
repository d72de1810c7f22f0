"""The report: its order, its words, its files, and that nothing in it is markup that should not be."""

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from synthetic import Synthetic, change

from trimtab.errors import InputError, OutputError
from trimtab.experiments import report, words
from trimtab.experiments.document import Bullets, Diff, Heading, Notice, Paragraph, Table, escape, to_markdown
from trimtab.experiments.report_html import to_html
from trimtab.experiments.report_tables import plan_table

SECTIONS = ["Idea", "Plan", "Results", "Benchmark results", "Recommended configuration changes", "Conclusion"]
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags are closed in order; keeps headings, attributes and text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headings, self.images, self.links, self.tags, self.words = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "img":
            self.images.append(dict(attrs))
        self.links += [value for name, value in attrs if name in ("href", "src", "action", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = Synthetic().write(tmp_path_factory.mktemp("study"))
    assert report.write(out) == out / "report.html"
    return out


@pytest.fixture(scope="module")
def page(folder):
    return Page((folder / "report.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def markdown(folder):
    return (folder / "report.md").read_text(encoding="utf-8")


def test_sections_are_in_order(page, markdown):
    assert page.headings == SECTIONS
    assert re.findall(r"^## (.*)$", markdown, re.M) == SECTIONS


def test_html_is_one_file_without_network_or_script(page, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert "script" not in page.tags
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert "@import" not in text
    assert "url(" not in text
    assert "prefers-color-scheme: dark" in text
    assert '<meta name="viewport"' in text
    assert len(page.images) == 5
    assert all(len(image["alt"]) > 40 for image in page.images)
    anchors = {link[1:] for link in page.links if link.startswith("#")}
    assert anchors == set(re.findall(r'<h2 id="([^"]+)"', text))


def test_tables_scroll_and_carry_the_cost(page, folder):
    text = (folder / "report.html").read_text(encoding="utf-8")
    tables = text.count("<table>")
    assert tables == text.count('<div class="scroll"') == 10  # with those of several rates
    assert text.count(">cost before use<") == tables - 1  # all but the plan
    assert "learned in 20 runs, 13,200 steps" in text
    assert "tuned in 9 runs, 5,940 steps" in text


def test_names_that_trainers_use_are_there(markdown):
    for name in ("eval_loss", "eval_accuracy", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second"):
        assert f"| {name} |" in markdown


def test_what_no_seed_or_not_every_seed_reaches_is_said(markdown):
    assert "| constant | none | not reached | not reached |" in markdown
    assert re.search(r"\| tuned-cosine \| tuned in 9 runs, 5,940 steps \| reached by [1-4] of 5 \|", markdown)


def test_the_users_words_are_escaped(folder, markdown, page):
    assert r"\<digits\> & co?" in markdown
    assert "&lt;digits&gt; &amp; co?" in (folder / "report.html").read_text(encoding="utf-8")
    assert any("<digits> & co?" in text for text in page.words)


def test_markup_in_every_place_stays_text(tmp_path):
    evil = '<img src=x onerror="alert(1)">|`*_'
    out = Synthetic(arms=["constant"], tuned=False, n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    change(out / "study.json", idea=evil, study=evil, environment={evil: evil}, user_config={evil: evil},
           left_out=[{"task": evil, "why": evil}])  # fmt: skip
    run = next((out / "runs").rglob("result.json"))
    change(run, status="failed", error=evil, notes=[evil])
    report.write(out)
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert not [image for image in page.images if "onerror" in image]
    assert sum(evil in text for text in page.words) >= 5
    prose = (out / "report.md").read_text(encoding="utf-8").split("```")[::2]
    assert not any(re.search(r"(?<!\\)<img", text) for text in prose)


def test_pictures_of_the_markdown_exist(markdown, folder):
    places = re.findall(r"\]\(<([^>]+)>\)", markdown)
    assert len(places) == 5
    assert all((folder / place).is_file() for place in places)


def test_recommendation_is_a_diff_of_the_users_configuration(markdown):
    assert "```diff\n optimizer: adam\n-lr: 0.001\n+lr: 0.01\n-schedule: constant\n+schedule: cosine\n```" in markdown


def test_written_again_it_says_the_same(folder, tmp_path):
    names = ("results.json", "report.md", "report.html")
    before = {name: (folder / name).read_bytes() for name in names}
    shutil.copytree(folder, tmp_path / "copy")
    report.write(tmp_path / "copy")
    assert before == {name: (tmp_path / "copy" / name).read_bytes() for name in names}


def test_no_second_data_set_is_said(markdown):
    assert "The study names no second data set, so there are no benchmark results." in markdown


def test_an_unfinished_study_says_what_is_missing_on_top(tmp_path):
    arms = ["constant", "q_learning", "tuned-cosine"]
    out = Synthetic(arms=arms, n_seeds=2, benchmark={"titanic-fcnn": "titanic"}).write(tmp_path)
    shutil.rmtree(out / "runs/digits-mlp/q_learning")
    shutil.rmtree(out / "runs/titanic-fcnn")
    report.write(out)
    text = (out / "report.md").read_text(encoding="utf-8")
    planned = 3 * 2 + 2 * 2 * 2 + 9 + 3 * 2
    lost = 2 + 2 * 2 + 6
    assert f"> **Unfinished: {planned - lost} of {planned} runs have a result. Missing:**" in text
    assert "> - q_learning on digits-mlp, report runs: 0 of 2" in text
    assert text.index("Unfinished") < text.index("## Idea")
    assert "No run on this task has begun." in text


def test_a_study_that_has_just_begun(tmp_path):
    out = Synthetic().write(tmp_path)
    shutil.rmtree(out / "runs")
    report.write(out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "Unfinished: 0 of 95 runs have a result." in text
    assert "no run has a test loss yet" in text


def test_every_prefix_of_a_run_makes_a_report(tmp_path):
    out = Synthetic(arms=["constant", "q_learning"], tuned=False, n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    run = out / "runs/digits-mlp/q_learning/report-0.001-0"
    for name in ("result.json", "decisions.jsonl", "series.jsonl", "run.json"):
        (run / name).unlink()
        report.write(out)
    assert "Unfinished: 1 of 2 runs" in (out / "report.md").read_text(encoding="utf-8")


def test_failed_runs_are_named_with_their_reason(tmp_path):
    out = Synthetic(arms=["constant", "uwhg"], tuned=False, n_seeds=2, sensitivity_lrs=()).write(tmp_path)
    change(out / "runs/digits-mlp/uwhg/report-0.001-1/result.json", status="failed", error="the loss is not finite")
    report.write(out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "- uwhg on digits-mlp, report, seed 1: the loss is not finite" in text
    assert "1 of 2 done, 1 failed" in text


def test_the_edge_of_the_tuning_grid_is_pointed_out(tmp_path):
    out = Synthetic(arms=["constant", "tuned-cosine"], n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    tuning = json.loads((out / "study.json").read_text())["tuning"]
    change(out / "study.json", tuning={**tuning, "chosen": {"digits-mlp": 0.1}})
    report.write(out)
    assert "It lies at the edge of the rates tried" in (out / "report.md").read_text(encoding="utf-8")


def test_final_info_of_a_language_model(tmp_path):
    tasks = {"shakespeare-gpt": "shakespeare_char", "enwik8-gpt": "enwik8"}
    out = Synthetic(arms=["constant", "q_learning", "yoked:q_learning"], tasks=tasks, tuned=False, n_seeds=3,
                    sensitivity_lrs=(), plan={"left_out": []}).write(tmp_path)  # fmt: skip
    report.write(out)
    merged = json.loads((out / "final_info.json").read_text())
    assert list(merged) == ["constant", "q_learning", "yoked:q_learning"]
    one = json.loads((out / "arms/yoked:q_learning/final_info.json").read_text())
    assert one == merged["yoked:q_learning"]
    assert list(one) == ["shakespeare_char", "enwik8"]
    entry = one["enwik8"]
    keys = ["final_train_loss", "best_val_loss", "total_train_time", "avg_inference_tokens_per_second"]
    assert [list(entry[part]) for part in ("means", "stderrs", "final_info_dict")] == [keys] * 3
    values = entry["final_info_dict"]["best_val_loss"]
    assert len(values) == 3
    mean = sum(values) / 3
    assert entry["means"]["best_val_loss"] == pytest.approx(mean)
    spread = (sum((value - mean) ** 2 for value in values) / 2) ** 0.5
    assert entry["stderrs"]["best_val_loss"] == pytest.approx(spread / 3**0.5)


def test_final_info_with_one_seed_has_no_standard_error(tmp_path):
    out = Synthetic(arms=["constant"], tasks={"t": "text8"}, tuned=False, n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    report.write(out)
    entry = json.loads((out / "final_info.json").read_text())["constant"]["text8"]
    assert set(entry["stderrs"].values()) == {None}
    assert entry["means"]["best_val_loss"] == entry["final_info_dict"]["best_val_loss"][0]


def test_final_info_only_where_it_is_asked_for(folder, tmp_path):
    assert not (folder / "final_info.json").exists()
    out = Synthetic(arms=["constant"], tuned=False, n_seeds=1, sensitivity_lrs=(), plan={"final_info": True})
    report.write(out.write(tmp_path))
    assert list(json.loads((tmp_path / "final_info.json").read_text())["constant"]) == ["digits"]


def test_a_folder_that_is_no_study(tmp_path):
    with pytest.raises(InputError, match=re.escape(f"no study in {tmp_path}: expected the file study.json there")):
        report.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    out = Synthetic(arms=["constant"], tuned=False, n_seeds=1, sensitivity_lrs=()).write(tmp_path)
    (out / "results.json").mkdir()
    with pytest.raises(OutputError, match=re.escape(f"cannot write {out / 'results.json'}")):
        report.write(out)


def test_the_report_needs_no_torch():
    code = "import sys, trimtab.experiments.report; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_markdown_of_each_block(tmp_path):
    table = Table("T", ["a|b", "c"], [["1", "x\ny"]])
    blocks = [Heading(2, "H"), Paragraph("# no heading"), Bullets(["- a", "b"]), Notice("N", ["i"]), table]
    assert to_markdown(blocks, tmp_path) == (
        "## H\n\n\\# no heading\n\n- \\- a\n- b\n\n> **N**\n> - i\n\n**T**\n\n| a\\|b | c |\n|---|---|\n| 1 | x y |\n"
    )


def test_html_of_a_diff():
    text = to_html("t", [Diff([" a: 1", "-b: <2>", "+b: 3"])])
    assert (
        '<pre><code> a: 1\n<span class="minus">-b: &lt;2&gt;</span>\n<span class="plus">+b: 3</span></code></pre>'
        in text
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [("q_learning", "q_learning"), ("_x_", r"\_x\_"), ("1. a", r"\1. a"), ("&lt;", r"\&lt;"), ("a\n# b", "a # b")],
)
def test_escape(text, expected):
    assert escape(text) == expected


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (-0.5, "−0.5000"), (1234567.0, "1,234,567"), (3.0, "3"), (0.00012345, "0.000123"), (None, "–"),
     (99999.5, "100,000"), (1e-12, "1e-12")],
)  # fmt: skip
def test_numbers(value, text):
    assert words.number(value) == text


def test_few_seeds_are_shown_as_values_and_range():
    entry = {"n": 2, "mean": 1.5, "values": [1.0, None, 2.0], "interval": None, "min": 1.0, "max": 2.0}
    assert words.summary(entry) == "1 to 2 (1, 2)"


def test_identical_arms_are_said_to_be_identical():
    entry = {"n": 5, "verdict": "no difference shown", "identical": True, "mean": 0.0, "interval": [0.0, 0.0]}
    assert words.difference(entry) == "identical to the bit over 5 seeds, that is no difference shown"


def test_knobs_and_their_options_stand_in_the_plan():
    arms = [
        {"id": "a", "kind": "learned", "knobs": ["lr", "units"], "knob_options": {"units": {"high": 128}}},
        {"id": "b", "kind": "baseline", "knobs": ["lr"]},
    ]
    table = plan_table(arms, ["digits-mlp"], {})
    assert [row[table.columns.index("knobs")] for row in table.rows] == ["lr, units (high=128)", "lr"]
    assert "knobs" not in plan_table(arms[1:], ["digits-mlp"], {}).columns
