"""The report for papers and for people: LaTeX, one HTML file, figures as PDF; whatever a user named is text there."""

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report import HOSTILE, make_run, no_figures, text_of  # noqa: F401 - a fixture

from loralib.report import webpage
from loralib.report.latex import latex_text
from loralib.report.tables import code, escape, table

SVG = '<svg xmlns="http://www.w3.org/2000/svg"><text>a & b</text></svg>'


class Page(HTMLParser):
    """Text of a page by the element that it stands in, and every attribute; elements have to close as they opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def of(self, *tags: str) -> str:
        return " ".join("".join(text if tag in tags else " " for tag, text in self.texts).split())


NAMES = st.text(st.characters(codec="utf-8", exclude_categories=("C", "Z")), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_a_name_is_the_same_text_in_the_page(name: str) -> None:
    text = f"# Results\n\n{table(['method', 'score'], [[escape(name), '1']])}\n\n- {code(name)}: {escape(name)}."
    page = Page(webpage.webpage(text, {}))
    assert page.of("td") == f"{name} 1"
    assert page.of("code") == name and page.of("li").endswith(f": {name}.")


def test_the_page_holds_its_figures_and_asks_nothing_of_anybody(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"a{seed}", HOSTILE, seed=seed)
    markdown = text_of(tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    images = [value for tag, name, value in page.attributes if (tag, name) == ("img", "src")]
    assert len(images) == len(re.findall(r"!\[", markdown)) > 2
    for image in images:
        head, _, data = image.partition(",")
        assert head == "data:image/svg+xml;base64" and base64.b64decode(data).startswith(b"<?xml")
    named = [value for _, name, value in page.attributes if name in ("src", "href")]
    assert all(value.startswith(("data:", "#")) for value in named)
    policy = next(value for tag, name, value in page.attributes if name == "content" and "default-src" in value)
    (script,) = (text for tag, text in page.texts if tag == "script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy
    assert HOSTILE in page.of("td") and page.of("h1") == "Results"
    targets = {value for _, name, value in page.attributes if name == "id"}
    assert targets >= {value[1:] for tag, name, value in page.attributes if name == "href"}
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (tmp_path / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_only_figures_of_the_report_are_put_in() -> None:
    text = webpage.webpage("# R\n\n![a.png](a.png)\n\n![b.png](b.png)", {"a.png": SVG})
    assert base64.b64encode(SVG.encode()).decode() in text and text.count("<figure>") == 1


@pytest.mark.usefixtures("no_figures")
@pytest.mark.parametrize(
    ("sora", "bold"),
    [((0.9, 0.91, 0.93), "sora"), ((0.9, 0.91, 0.52), None), ((0.9, 0.91), None), ((0.9, 0.91, 0.92), None)],
)
def test_latex_is_bold_where_the_paired_intervals_say_so(
    tmp_path: Path, sora: tuple[float, ...], bold: str | None
) -> None:
    for seed, (lora, full) in enumerate(((0.5, 0.6), (0.51, 0.6), (0.52, 0.6))):
        make_run(tmp_path / "lora" / f"{seed}", "lora", seed=seed, accuracies=[lora])
        make_run(tmp_path / "full" / f"{seed}", "full", seed=seed, accuracies=[full])
    for seed, score in enumerate(sora):
        make_run(tmp_path / "sora" / f"{seed}", "sora", seed=seed, accuracies=[score])
    text_of(tmp_path)
    text = (tmp_path / "report.tex").read_text()
    assert re.findall(r"(\S+) & \\textbf", text) == ([bold] if bold else [])
    assert r"lora & 51.00$_{\pm 1.00}$" in text and text.count(r"\\") == 5
    assert text.index(r"\toprule") < text.index(r"\midrule") < text.index(r"\bottomrule")
    assert ("over 3 seeds" in text) == (len(sora) == 3)


@pytest.mark.usefixtures("no_figures")
def test_latex_of_nine_tasks_stands_in_blocks_that_fit(tmp_path: Path) -> None:
    """No block is wider than five numbers; a score of one class is marked; a metric that no run has is no column."""
    for task in ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb", "wnli"):
        metric = {"cola": "matthews_correlation", "stsb": "combined_score"}.get(task, "accuracy")
        more = {"eval_f1": 0.9} if task in ("mrpc", "qqp") else {}
        score = 0.0 if task == "cola" else 0.8
        make_run(tmp_path / task, "lora", task, accuracies=[score], metrics={f"eval_{metric}": score} | more)
    text_of(tmp_path)
    text = (tmp_path / "report.tex").read_text()
    widths = [len(columns) - 1 for columns in re.findall(r"\\begin\{tabular\}\{(l\w+)\}", text)]
    assert len(widths) > 1 and max(widths) <= 5 and sum(widths) == 11 and "mismatched" not in text
    assert r"lora & 0.00$^\dagger$" in text and r"$\dagger$: the score of one answer for every row" in text
    for head, rules, row in re.findall(r"\\toprule\n(.*)\n(.*)\nmethod.*\n\\midrule\n(lora.*)", text):
        spans = [int(n) for n in re.findall(r"multicolumn\{(\d)\}", head)]
        ends = [int(n) for n in re.findall(r"-(\d)\}", rules)]
        assert ends == [1 + sum(spans[: i + 1]) for i in range(len(spans))] and row.count("&") == sum(spans)


@pytest.mark.usefixtures("no_figures")
def test_a_squared_error_is_no_percentage(tmp_path: Path) -> None:
    for seed in (1, 2):
        make_run(tmp_path / f"mine{seed}", "lora", "mine", seed, accuracies=[0.5], metrics={"eval_mse": 2.25})
    text = text_of(tmp_path)
    for said in (text, (tmp_path / "report.tex").read_text()):
        assert "in percent, squared errors as they are" in said and "2.25" in said and "225" not in said


@settings(max_examples=100, deadline=None)
@given(NAMES)
def test_a_name_is_text_in_latex(name: str) -> None:
    """Without the commands that stand for a character no special one is left."""
    left = re.sub(r"\\text(backslash|asciitilde|asciicircum)\{\}|\\[{}$&#_%]|\$\\pm\$", "", latex_text(name))
    assert not set(left) & set("\\{}$&#^_~%")
