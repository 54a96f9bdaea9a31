"""The programs of docs/adapters.md from texts to labels, run as they are shown: their answers agree."""

import ast
import csv
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
from adapter_runs import make_base, make_run
from test_docs import blocks, commands, load
from transformers import AutoTokenizer

from loralib import export_lora, export_merged, export_peft

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adapters.md"
SECTION = PAGE.read_text().split("## From texts to labels")[1].split("\n## ")[0]
WORDS = ["monday", "july", "firm", "road"]
Answer = tuple[str, dict[str, float]]


def train(entry: ModuleType, data: list[str]) -> None:
    """The run output/sst2 in the working folder, with the page's rank and alpha."""
    flags = "--model_name_or_path microsoft/deberta-v3-base --output_dir output/sst2 --do_train --apply_lora "
    flags += "--lora_r 8 --lora_alpha 16 --max_steps 24 --use_cpu --disable_tqdm 1 --report_to none "
    flags += "--per_device_train_batch_size 8 "
    entry.main([*(flags + "--learning_rate 0.02 --padding longest").split(), *data])


def printed(program: str, texts: list[Any], capsys: Any) -> list[Answer]:
    """What a program prints: for each text its label and scores."""
    capsys.readouterr()
    exec(program, {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith("}")]
    rests = [line.removeprefix(f"{text} ") for text, line in zip(texts, lines, strict=True)]
    found = [re.fullmatch(r"(.*?) (\{.*\})", rest) for rest in rests]
    return [(match[1], ast.literal_eval(match[2])) for match in found if match]


def predicted(folder: Path) -> list[Answer]:
    (file,) = folder.glob("predict_results_*.txt")
    with open(file, newline="", encoding="utf-8") as opened:
        rows = list(csv.DictReader(opened, dialect="excel-tab"))
    prefix = "probability_"
    return [
        (r["prediction"], {k.removeprefix(prefix): float(v) for k, v in r.items() if k.startswith(prefix)})
        for r in rows
    ]


@pytest.mark.parametrize("pairs", [False, True])
def test_the_programs_agree(
    pairs: bool,
    tiny_model_dir: Path,
    mrpc_dir: Path,
    entry_point: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of the texts is longer than the run's 128 tokens."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "microsoft").symlink_to(tiny_model_dir.parent)
    singles = [f"the {WORDS[i % 4]} in {WORDS[i // 4 % 4]} {i}" for i in range(32)]
    texts: list[Any] = [*singles[:6], "monday firm " * 200]
    if pairs:
        texts = [(text, f"{WORDS[i % 4]} road") for i, text in enumerate(texts)]
        train(entry_point("AdaLoRA"), ["--dataset_name", str(mrpc_dir)])
        pd.DataFrame(texts, columns=["sentence1", "sentence2"]).to_csv("texts.csv", index=False)
    else:
        labels = ["good" if "monday" in text else "so so" for text in singles]
        pd.DataFrame({"sentence": singles, "label": labels}).to_csv("train.csv", index=False)
        train(entry_point("AdaLoRA"), ["--train_file", "train.csv"])
        pd.DataFrame({"sentence": texts}).to_csv("texts.csv", index=False)
    export = load(ROOT / "scripts" / "export_adapter.py")
    for kind in ("merged", "peft"):
        export.main(["output/sst2", "--to", kind])

    shown = re.findall(r"^```python\n(.*?)^```", SECTION, flags=re.M | re.S)
    assert len(shown) == 3
    answers = []
    for program in shown:
        (line,) = re.findall(r"^texts = \[.*\]$", program, flags=re.M)
        if not pairs:
            assert len(printed(program, ast.literal_eval(line.removeprefix("texts = ")), capsys)) == 2
        program = program.replace(line, f"texts = {texts!r}")
        if pairs:
            (given,) = re.findall(r"`(\[\{.*?\}.*?\])` in place\s+of `texts`", SECTION)
            program = program.replace("classify(texts,", f"classify({given},")
        answers.append(printed(program, texts, capsys))
    for words in commands("".join(blocks(PAGE, "bash"))):
        if words[1].endswith("run_glue.py") and "--test_file" in words:
            entry_point("AdaLoRA").main([*words[2:], "--use_cpu", "--disable_tqdm", "1", "--report_to", "none"])
    answers += [predicted(Path("output/labels")), predicted(Path("output/labels-of-the-adapter"))]

    first = answers[0]
    assert len(answers) == 5 and len({str(scores) for _, scores in first}) > 5
    assert {name for _, scores in first for name in scores} == (
        {"equivalent", "not_equivalent"} if pairs else {"good", "so so"}
    )
    assert pairs or [label for label, _ in first[:6]] == ["good" if "monday" in t else "so so" for t in texts[:6]]
    for answer in answers:
        for (label, scores), (label_here, here) in zip(first, answer, strict=True):
            assert label == label_here == max(here, key=here.__getitem__)
            assert scores == pytest.approx(here, abs=1e-5)


def test_an_export_has_the_tokenizer_of_its_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """From only a config, transformers makes an empty tokenizer, without a word."""
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    own = AutoTokenizer.from_pretrained(base)
    own.add_tokens(["lora"])
    own.save_pretrained(tmp_path / "run")
    make_run(tmp_path / "run" / "checkpoint-3", base)
    for source in ("run", "run/checkpoint-3"):
        for export in (export_lora, export_peft, export_merged):
            out = tmp_path / f"{source.replace('/', '-')}-{export.__name__}"
            export(tmp_path / source, out)
            assert AutoTokenizer.from_pretrained(out).get_vocab() == own.get_vocab(), out
    assert "no tokenizer" not in caplog.text
    make_run(tmp_path / "elsewhere" / "checkpoint-3", base)
    export_peft(tmp_path / "elsewhere" / "checkpoint-3", tmp_path / "bare")
    assert "no tokenizer is at" in caplog.text and not list((tmp_path / "bare").glob("tokenizer*"))
