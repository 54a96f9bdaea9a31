"""Every route to a task's rows gives the same rows, labels and task: parquet, save_to_disk, GLUE download, files."""

import csv
import json
import logging
import os
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from loralib.errors import InputError
from loralib.glue import sources
from loralib.glue.data import GlueData, load
from loralib.glue.tasks import GLUE, Task

# What the formats could trip over: quotes that open and never close, commas, words that mean "missing" elsewhere,
# spaces at the ends (SST-2 has them in every row), unicode line separators, numbers, backslashes.
ODD = [
    'He said " no .', '" The pie business does not fit .', "plain, with a comma", "NA", "null", "None", "nan",
    "a space at the end ", " and one at the start", "caf\u00e9 \u2028 \u0085 \u4f60\u597d \U0001f600", "2012",
    'C:\\new\\table "x"',
]  # fmt: skip
SPLITS = {
    "mnli": ("train", "validation_matched", "validation_mismatched", "test_matched", "test_mismatched"),
    "ax": ("test",),
}
ALL = sorted(GLUE)


def make(task: Task) -> dict[str, list[dict]]:
    """Rows of all splits in the hub's columns, with the labels of the test splits hidden (MRPC's are public)."""
    splits = {}
    for s, split in enumerate(SPLITS.get(task.name, ("train", "validation", "test"))):
        rows = []
        for i in range(len(ODD)):
            texts = {name: f"{ODD[(i + 3 * k) % len(ODD)]}{'' if i else s}" for k, name in enumerate(task.text_columns)}
            label = float(i % 6) + 0.25 * (i % 2) * (i < 5) if task.label_names is None else i % task.num_labels
            hidden = split.startswith("test") and task.name != "mrpc"
            rows.append({**texts, "label": -1 if hidden else label, "idx": i})
        splits[split] = rows
    return splits


def as_dataset(task: Task, rows: list[dict]) -> Dataset:
    label = Value("float32") if task.label_names is None else ClassLabel(names=list(task.label_names))
    texts = {name: Value("string") for name in task.text_columns}
    return Dataset.from_list(rows, features=Features({**texts, "label": label, "idx": Value("int32")}))


def write_parquet(folder: Path, task: Task, splits: dict[str, list[dict]]) -> Path:
    for split, rows in splits.items():
        folder.mkdir(parents=True, exist_ok=True)
        as_dataset(task, rows).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def write_download(folder: Path, task: Task, splits: dict[str, list[dict]]) -> Path:
    """The folder that GLUE's own download script makes, in each task's documented columns."""
    folder.mkdir(parents=True)
    names, hidden_names = {
        "cola": (None, "index sentence"),
        "sst2": ("sentence label", "index sentence"),
        "mrpc": ("Quality|#1 ID|#2 ID|#1 String|#2 String", "index|#1 ID|#2 ID|#1 String|#2 String"),
        "qnli": ("index question sentence label", "index question sentence"),
        "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "id question1 question2"),
        "rte": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
        "wnli": ("index sentence1 sentence2 label", "index sentence1 sentence2"),
        "stsb": ("index genre filename year old_index source1 source2 sentence1 sentence2 score",
                 "index genre filename year old_index source1 source2 sentence1 sentence2"),
        "mnli": ("index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
                 "sentence2_parse sentence1 sentence2 label1 gold_label",
                 "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse "
                 "sentence2_parse sentence1 sentence2"),
        "ax": (None, "index sentence1 sentence2"),
    }[task.name]  # fmt: skip
    words = {"rte", "qnli", "mnli"}  # the others write 0 and 1

    def line(row: dict, i: int, columns: list[str]) -> str:
        texts = [row[name] for name in task.text_columns]
        label = row["label"]
        if task.label_names is None:
            label = f"{label:.9g}"  # enough for a float32
        elif task.name in words:
            label = task.label_names[label]
        cells = {"label": label, "gold_label": label, "is_duplicate": label, "score": label, "Quality": label,
                 "#1 String": texts[0], "#2 String": texts[-1], "sentence1": texts[0], "sentence2": texts[-1],
                 "question1": texts[0], "question2": texts[-1], "question": texts[0], "sentence": texts[-1],
                 "index": i, "id": i, "#1 ID": 1000 + i, "#2 ID": 2000 + i}  # fmt: skip
        return "\t".join(str(cells.get(name, f'( filler "{name}')) for name in columns)

    for split, rows in splits.items():
        test = split.startswith("test")
        file = "diagnostic.tsv" if task.name == "ax" else split.replace("validation", "dev") + ".tsv"
        if task.name == "cola" and not test:
            lines = [f"gj04\t{row['label']}\t{'' if row['label'] else '*'}\t{row['sentence']}" for row in rows]
        else:
            columns = (hidden_names if test else names).split("|" if task.name == "mrpc" else " ")
            lines = ["\t".join(columns), *(line(row, i, columns) for i, row in enumerate(rows))]
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    return folder


def write_msr(folder: Path, splits: dict[str, list[dict]]) -> Path:
    """Microsoft's files: a byte order mark, CRLF, validation rows strewn over the training file."""
    folder.mkdir(parents=True)
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    pool = [("train", row) for row in splits["train"]]
    for k, row in enumerate(splits["validation"]):
        pool.insert(2 * k, ("validation", row))
    for name, rows in (("train", pool), ("test", [("test", row) for row in splits["test"]])):
        lines = [header] + [
            f"{r['label']}\t{100 + i}\t{200 + i}\t{r['sentence1']}\t{r['sentence2']}" for i, (_, r) in enumerate(rows)
        ]
        (folder / f"msr_paraphrase_{name}.txt").write_text("\r\n".join(lines) + "\r\n", "utf-8-sig", newline="")
    ids = [f"{100 + i}\t{200 + i}" for i, (split, _) in enumerate(pool) if split == "validation"]
    (folder / "dev_ids.tsv").write_text("\n".join(ids) + "\n", newline="\n")
    return folder


def write_files(folder: Path, task: Task, splits: dict[str, list[dict]], suffix: str) -> dict[str, str]:
    """train/validation/test files in the hub's columns; text formats have label names, tsv and csv as strings."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split, rows in splits.items():
        path = folder / f"{split}.{suffix}"
        columns = list(rows[0])
        if suffix == "parquet":
            as_dataset(task, rows).to_parquet(path)
        elif suffix in ("json", "jsonl"):
            lines = [json.dumps(row) for row in rows]
            path.write_text("[" + ",".join(lines) + "]" if suffix == "json" else "\n".join(lines))
        else:
            names = dict(enumerate(task.label_names or ()))
            named = [{**row, "label": names.get(row["label"], row["label"])} for row in rows]
            with open(path, "w", newline="", encoding="utf-8") as file:
                if suffix == "csv":
                    writer = csv.DictWriter(file, columns)
                    writer.writeheader()
                    writer.writerows(named)
                else:
                    lines = [columns, *(row.values() for row in named)]
                    file.write("\n".join("\t".join(map(str, line)) for line in lines) + "\n")
        files[f"{split}_file"] = str(path)
    return files


def everything(**arguments) -> GlueData:
    return load(do_train=True, do_eval=True, do_predict=True, **arguments)


def check(loaded: GlueData, task: Task, splits: dict[str, list[dict]], public_test: bool | None = None) -> None:
    """The same task, and in every split exactly the rows that were written, in their order."""
    assert loaded.task is task
    got = {"train": loaded.train}
    for kind, keyed in (("validation", loaded.evals), ("test", loaded.tests)):
        got |= {f"{kind}": keyed.get(task.name)} if task.name != "mnli" else {
            f"{kind}_matched": keyed["mnli"], f"{kind}_mismatched": keyed["mnli-mm"]}  # fmt: skip
    for split, rows in splits.items():
        assert got[split].column_names == [*task.text_columns, "label"], split
        for name in task.text_columns:
            assert list(got[split][name]) == [row[name] for row in rows], (split, name)
        hidden = split == "test" and public_test is False
        assert list(got[split]["label"]) == [-1 if hidden else row["label"] for row in rows], split
        assert got[split].features["label"].dtype == ("float32" if task.label_names is None else "int64")


@pytest.mark.parametrize("name", ALL)
def test_hub_layout_is_recognised_by_folder_name_and_by_task_name(name, tmp_path):
    task, splits = GLUE[name], make(GLUE[name])
    folder = write_parquet(tmp_path / name, task, splits)
    flags = {"do_train": "train" in splits, "do_eval": name != "ax", "do_predict": True}
    check(load(dataset_name=str(folder), **flags), task, splits)
    renamed = write_parquet(tmp_path / "some data", task, splits)
    check(load(dataset_name=str(renamed), task_name=name, **flags), task, splits)
    # a snapshot of the whole repository, one folder a task
    check(load(dataset_name=str(tmp_path), task_name=name, **flags), task, splits)
    check(load(dataset_name=str(tmp_path), dataset_config_name=name, **flags), task, splits)


@pytest.mark.parametrize("name", ALL)
def test_save_to_disk(name, tmp_path):
    task, splits = GLUE[name], make(GLUE[name])
    saved = DatasetDict({split: as_dataset(task, rows) for split, rows in splits.items()})
    saved.save_to_disk(tmp_path / name)
    flags = {"do_train": "train" in splits, "do_eval": name != "ax", "do_predict": True}
    before = sorted(tmp_path.rglob("*"))
    check(load(dataset_name=str(tmp_path / name), **flags), task, splits)
    assert sorted(tmp_path.rglob("*")) == before  # nothing appears in the user's folder


@pytest.mark.parametrize("name", ALL)
def test_glue_download(name, tmp_path):
    task, splits = GLUE[name], make(GLUE[name])
    flags = {"do_train": "train" in splits, "do_eval": name != "ax", "do_predict": True}
    folder = write_download(tmp_path / "glue_data" / task.folder, task, splits)
    check(load(dataset_name=str(folder), **flags), task, splits, public_test=False)
    check(load(dataset_name=str(tmp_path / "glue_data"), task_name=name, **flags), task, splits, public_test=False)


def test_msr_paraphrase_files_are_split_by_dev_ids_and_have_the_test_labels(tmp_path):
    task, splits = GLUE["mrpc"], make(GLUE["mrpc"])
    check(everything(dataset_name=str(write_msr(tmp_path / "MRPC", splits))), task, splits, public_test=True)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "parquet"])
@pytest.mark.parametrize("name", sorted(set(ALL) - {"mnli", "ax"}))
def test_files_of_a_known_task(name, suffix, tmp_path):
    task, splits = GLUE[name], make(GLUE[name])
    check(everything(task_name=name, **write_files(tmp_path, task, splits, suffix)), task, splits)


def test_a_permuted_class_label_comes_back_in_glue_order(tmp_path):
    task = GLUE["rte"]
    features = Features({"sentence1": Value("string"), "sentence2": Value("string"),
                         "label": ClassLabel(names=["not_entailment", "entailment"])})  # fmt: skip
    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], "label": [0, 1]}
    (tmp_path / "rte").mkdir()
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "rte" / "train.parquet")
    loaded = load(dataset_name=str(tmp_path / "rte"), do_train=True)
    assert loaded.task is task and list(loaded.train["label"]) == [1, 0]


def test_path_spellings(tmp_path, monkeypatch):
    task, splits = GLUE["cola"], make(GLUE["cola"])
    folder = write_parquet(tmp_path / "home" / "cola", task, splits)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "home")
    link = tmp_path / "a link\nwith a line end"
    link.symlink_to(folder)
    for spelling in (f"{folder}/", "~/cola", "cola", "./cola/", "../home/cola", str(link)):
        check(everything(dataset_name=spelling), task, splits)


def test_a_folder_is_never_sent_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sources, "_hub_splits", lambda *_: pytest.fail("asked the hub"))
    write_parquet(tmp_path / "nyu-mll" / "glue" / "cola", GLUE["cola"], make(GLUE["cola"]))
    assert load(dataset_name="nyu-mll/glue", task_name="cola", do_train=True).task is GLUE["cola"]
    for missing in ("/no/where", "./nowhere", "~/no-such-folder", "a/b/c"):
        with pytest.raises(InputError, match="does not exist"):
            load(dataset_name=missing, do_train=True)


def test_hub_route_maps_splits_and_keeps_the_data_when_it_is_cached(monkeypatch):
    task, splits = GLUE["mnli"], make(GLUE["mnli"])
    asked = []

    def fake(name, config, **_):
        asked.append((name, config))
        return DatasetDict({split: as_dataset(task, rows) for split, rows in splits.items()})

    monkeypatch.setattr(sources.huggingface_hub.HfApi, "dataset_info", lambda *a, **k: None)
    monkeypatch.setattr(datasets, "load_dataset", fake)
    check(everything(task_name="mnli"), task, splits)
    check(everything(dataset_name="someone/glue", dataset_config_name="mnli"), task, splits)
    assert asked == [("nyu-mll/glue", "mnli"), ("someone/glue", "mnli")]


def test_unreachable_hub_is_one_sentence(monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(sources.huggingface_hub.HfApi, "dataset_info", unreachable)
    before = sources.huggingface_hub.constants.HF_HUB_OFFLINE
    for arguments in ({"task_name": "mrpc"}, {"dataset_name": "someone/some-data"}):
        with pytest.raises(InputError, match="The hub was not reachable") as refusal:
            load(**arguments, do_train=True, cache_dir=str(tmp_path))
        assert "\n" not in str(refusal.value)
    assert sources.huggingface_hub.constants.HF_HUB_OFFLINE == before


def test_mnli_without_mismatched_says_so(tmp_path, caplog):
    task, splits = GLUE["mnli"], make(GLUE["mnli"])
    del splits["validation_mismatched"]
    folder = write_parquet(tmp_path / "mnli", task, splits)
    with caplog.at_level(logging.WARNING):
        loaded = load(dataset_name=str(folder), do_train=True, do_eval=True)
    assert list(loaded.evals) == ["mnli"] and "validation_matched" in caplog.text


def test_only_the_splits_of_the_run_are_read_and_samples_are_cut(tmp_path):
    folder = write_parquet(tmp_path / "mrpc", GLUE["mrpc"], make(GLUE["mrpc"]))
    os.remove(folder / "test-00000-of-00001.parquet")
    (folder / "test-00000-of-00001.parquet").write_bytes(b"not parquet")
    loaded = load(dataset_name=str(folder), do_train=True, do_eval=True, max_train_samples=3, max_eval_samples=10**6)
    assert len(loaded.train) == 3 and len(loaded.evals["mrpc"]) == len(ODD) and loaded.tests == {}


def test_qqp_rows_cut_in_two_are_left_out_of_training_only(tmp_path, caplog):
    task, splits = GLUE["qqp"], make(GLUE["qqp"])
    folder = write_download(tmp_path / "QQP", task, splits)
    lines = (folder / "train.tsv").read_text("utf-8").split("\n")
    lines[3:3] = ["77\t1\t2\tthe first half", "", "the second half\tanother question\t0"]
    (folder / "train.tsv").write_text("\n".join(lines), "utf-8", newline="\n")
    with caplog.at_level(logging.WARNING):
        check(everything(dataset_name=str(folder)), task, splits, public_test=False)
    assert "2 rows" in caplog.text
    with open(folder / "dev.tsv", "a") as file:
        file.write("cut\n")
    with pytest.raises(InputError, match=rf"dev.tsv, line {len(ODD) + 2}: 1 columns where 6"):
        load(dataset_name=str(folder), do_eval=True)


def test_shards_are_joined_in_order_and_a_missing_one_is_refused(tmp_path):
    task, rows = GLUE["cola"], make(GLUE["cola"])["train"]
    folder = tmp_path / "cola" / "data"
    folder.mkdir(parents=True)
    for k in range(3):
        as_dataset(task, rows[4 * k : 4 * k + 4]).to_parquet(folder / f"train-0000{k}-of-00003-0a1b{k}.parquet")
    loaded = load(dataset_name=str(tmp_path / "cola"), do_train=True)
    assert list(loaded.train["sentence"]) == [row["sentence"] for row in rows]
    os.remove(folder / "train-00001-of-00003-0a1b1.parquet")
    with pytest.raises(InputError, match="has 2 files for the split train and their names promise 3"):
        load(dataset_name=str(tmp_path / "cola"), do_train=True)
