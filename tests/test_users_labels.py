"""The labels of a model are its own: whatever their order, every route answers as the model was trained."""

import json
import shutil
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import export_adapter
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, pipeline

from loralib.errors import InputError

CASES = Path(__file__).parent / "cases"
MNLI = ("entailment", "neutral", "contradiction")
LORA = {"apply_lora": True, "lora_r": 4, "lora_alpha": 8}
METHODS: dict[str, dict[str, Any]] = {
    "AdaLoRA": {},
    "SoRA": {"train_sparse": True, "sparse_lambda_2": 1e-4},
    "RM-LoRA": {"lora_type": "v1", "random_rank": 2},
}


def pairs(rows: int, labels: tuple[Any, ...]) -> list[tuple[str, str, Any]]:
    """Premise, hypothesis and one of three labels, which the hypothesis shows by its verb."""
    verbs, who, what = ("sold", "praised", "delayed"), ("the firm", "the bank", "the union"), ("the plan", "the tower")
    return [
        (f"{who[i % 3]} bought {what[i % 2]} .", f"{who[i % 3]} {verbs[i * 7 % 3]} {what[i % 2]} .", labels[i * 7 % 3])
        for i in range(rows)
    ]


def write(file: Path, header: str, rows: list[tuple[Any, ...]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    separator = "\t" if file.suffix == ".tsv" else ","
    lines = [header.replace(" ", separator), *(separator.join(map(str, row)) for row in rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


class World:
    """What was trained once for all tests of this file, and a way to call the entry points."""

    def __init__(self, entry_point: Callable[[str], Any], base: Path, folder: Path) -> None:
        self.entry_point, self.base, self.folder = entry_point, base, folder
        self.count = 0
        data = folder / "mnli"
        for split, rows in (("train", 96), ("validation_matched", 24), ("validation_mismatched", 12)):
            write(data / f"{split}.csv", "premise hypothesis label", pairs(rows, (0, 1, 2)))
        for split in ("test_matched", "test_mismatched"):
            write(data / f"{split}.csv", "premise hypothesis label", [(p, h, -1) for p, h, _ in pairs(9, MNLI)])
        write(folder / "ax" / "test.csv", "premise hypothesis label", [(p, h, -1) for p, h, _ in pairs(9, MNLI)])
        self.mnli, self.ax = data, folder / "ax"

    def __call__(self, method: str = "AdaLoRA", **flags: Any) -> dict[str, Any]:
        """Run an entry point; `out` names the output folder, fresh where it is not given."""
        self.count += 1
        usual: dict[str, Any] = {
            "model_name_or_path": self.base, "max_seq_length": 32, "report_to": "none", "disable_tqdm": True,
            "per_device_train_batch_size": 8, "learning_rate": 0.01, "save_strategy": "no", "eval_strategy": "no",
            "output_dir": self.folder / f"out-{self.count}",
        }  # fmt: skip
        given = {k: v for k, v in (usual | flags).items() if v is not None}
        metrics: dict[str, Any] = self.entry_point(method).main(
            [str(x) for name, value in given.items() for x in (f"--{name}", value)]
        )
        return metrics

    @property
    def last(self) -> Path:
        return self.folder / f"out-{self.count}"


@pytest.fixture(scope="module")
def world(entry_point: Callable[[str], Any], tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(entry_point, tiny_model_dir, tmp_path_factory.mktemp("labels"))
    train = {"dataset_name": world.mnli, "do_train": True, "do_eval": True}
    for method, own in METHODS.items():
        world(method, **LORA, **own, **train, max_steps=60, output_dir=world.folder / method)
    world(**train, max_steps=80, output_dir=world.folder / "full", learning_rate=0.002)
    return world


def permuted(source: Path, out: Path, order: tuple[int, ...], spelled: Callable[[str], str] = str) -> Path:
    """A copy of a model or adapter folder whose head has its outputs and their names in another order."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        state = load_file(file)
        keys = [key for key in state if key.endswith(("classifier.weight", "classifier.bias"))]
        assert keys
        save_file(
            {k: t[list(order)].contiguous() if k in keys else t for k, t in state.items()}, file, {"format": "pt"}
        )
    config = json.loads((out / "config.json").read_text())
    names = [spelled(config["id2label"][str(i)]) for i in order]
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    (out / "config.json").write_text(json.dumps(config))
    file = out / "adapter.json"
    if file.is_file():
        file.write_text(json.dumps(json.loads(file.read_text()) | {"label_names": names}))
    return out


def scores(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in metrics.items() if k in ("eval_accuracy", "eval_accuracy_mm", "eval_f1")}


def answers(world: World, method: str, **flags: Any) -> tuple[dict[str, Any], list[str], list[str], list[str]]:
    """Scores on MNLI, the words predicted for its test split, and both submissions."""
    out = world.folder / f"submission-{world.count}"
    metrics = world(method, **flags, dataset_name=world.mnli, do_eval=True, do_predict=True, glue_submission=out)
    words = (world.last / "predict_results_mnli.txt").read_text().splitlines()
    world(method, **flags, dataset_name=world.ax, task_name="ax", do_predict=True, glue_submission=out)
    return scores(metrics), words, *((out / f"{n}.tsv").read_text().splitlines() for n in ("MNLI-m", "AX"))  # type: ignore[return-value]


# ---- every order, every route ----


@pytest.fixture(scope="module")
def right(world: World) -> dict[str, Any]:
    """What the unpermuted models answer. They must be good enough for a wrong order to be seen."""
    found = {"full": answers(world, "AdaLoRA", model_name_or_path=world.folder / "full")}
    for method, own in METHODS.items():
        found[method] = answers(world, method, **LORA, **own, lora_path=world.folder / method)
    for accuracy, words, submission, ax in found.values():
        assert accuracy["eval_accuracy"] > 0.9
        assert len({w.split("\t")[1] for w in words[1:]}) == 3 and words == submission == ax  # all three classes
    return found


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_every_order_of_mnlis_names_gives_the_same_answers_on_every_route(
    world: World, right: dict[str, Any], order: tuple[int, ...], tmp_path: Path
) -> None:
    full = permuted(world.folder / "full", tmp_path / "full", order)
    assert answers(world, "AdaLoRA", model_name_or_path=full) == right["full"]
    for number, (method, own) in enumerate(METHODS.items()):
        run = permuted(world.folder / method, tmp_path / method, order)
        routes = {to: export_adapter.main([str(run), "--to", to]) for to in ("lora", "peft", "merged")} | {"run": run}
        # each method has its own folder; what was exported from it goes round
        for to in ("run", ("lora", "peft", "merged")[(number + sum(order[:2])) % 3]):
            flags = {"model_name_or_path": routes[to]} if to == "merged" else LORA | own | {"lora_path": routes[to]}
            assert answers(world, method, **flags) == right[method]


@pytest.mark.parametrize("spelled", [str.upper, lambda name: f" {name.capitalize()} "], ids=["upper", "spaces"])
def test_names_agree_whatever_their_case_and_spaces(
    world: World, right: dict[str, Any], tmp_path: Path, spelled: Callable[[str], str]
) -> None:
    full = permuted(world.folder / "full", tmp_path / "full", (2, 0, 1), spelled)
    accuracy, words, submission, ax = answers(world, "AdaLoRA", model_name_or_path=full)
    assert (accuracy, submission, ax) == (right["full"][0], right["full"][2], right["full"][3])
    assert [w.split("\t")[1].strip() for w in words[1:]] == [spelled(w.split("\t")[1]).strip() for w in submission[1:]]


def test_f1_is_of_glues_positive_class_whatever_the_order(world: World, mrpc_dir: Path, tmp_path: Path) -> None:
    data = {"dataset_name": mrpc_dir, "do_eval": True}
    world(**data, do_train=True, max_steps=20, output_dir=tmp_path / "run")
    expected = scores(world(**data, model_name_or_path=tmp_path / "run"))
    turned = permuted(tmp_path / "run", tmp_path / "turned", (1, 0), lambda name: name.replace("_", " ").title())
    assert scores(world(**data, model_name_or_path=turned)) == expected
    assert expected["eval_f1"] not in (0, expected["eval_accuracy"])


@pytest.mark.parametrize("order", [(1, 2, 0), (2, 1, 0)])
def test_training_goes_on_from_a_permuted_head_with_the_same_losses(
    world: World, order: tuple[int, ...], tmp_path: Path
) -> None:
    """The first loss is that of the trained model, from a model folder and from an adapter."""
    flags = {"dataset_name": world.mnli, "do_train": True, "max_steps": 3, "logging_steps": 1, "do_eval": True}
    for model, own in (
        ({"model_name_or_path": world.folder / "full"}, {}),
        ({"lora_path": world.folder / "RM-LoRA"}, METHODS["RM-LoRA"] | LORA),
    ):
        method = "RM-LoRA" if own else "AdaLoRA"
        seen = []
        for source in (next(iter(model.values())), permuted(next(iter(model.values())), tmp_path / method, order)):
            accuracy = world(method, **own, **flags, **{next(iter(model)): source})["eval_accuracy"]
            history = json.loads((world.last / "trainer_state.json").read_text())["log_history"]
            seen.append([log["loss"] for log in history if "loss" in log] + [accuracy])
        assert seen[1] == pytest.approx(seen[0], rel=1e-4) and seen[0][0] < 0.4


def test_a_resumed_run_keeps_the_order_of_its_checkpoint(world: World, tmp_path: Path) -> None:
    """Data whose ClassLabel has another order by now: mapped by name, and the run ends as the undisturbed one."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    def saved(names: tuple[str, ...], folder: Path) -> Path:
        features = Features({"text": Value("string"), "label": ClassLabel(names=list(names))})
        rows = pairs(24, MNLI)
        table = {"text": [f"{p} {h}" for p, h, _ in rows], "label": [names.index(label) for *_, label in rows]}
        DatasetDict({"train": Dataset.from_dict(table, features=features)}).save_to_disk(str(folder))
        return folder

    flags = LORA | {
        "do_train": True,
        "num_train_epochs": 2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
    }
    world(**flags, dataset_name=saved(MNLI, tmp_path / "data"), output_dir=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole" / "checkpoint-3", tmp_path / "whole-resumed" / "checkpoint-3")
    saved((MNLI[2], MNLI[0], MNLI[1]), tmp_path / "turned")
    world(**flags, dataset_name=tmp_path / "turned", output_dir=tmp_path / "whole-resumed")
    ends = [load_file(tmp_path / run / "adapter.safetensors") for run in ("whole", "whole-resumed")]
    assert all((ends[0][key] == ends[1][key]).all() for key in ends[0])
    manifest = json.loads((tmp_path / "whole" / "checkpoint-3" / "checkpoint.json").read_text())
    assert manifest["settings"]["label_names"] == ", ".join(MNLI)


# ---- where the labels differ ----


def test_other_labels_are_refused_without_training_and_start_a_new_head_with_it(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = write(tmp_path / "other.csv", "text label", [(f"{p} {h}", v) for p, h, v in pairs(24, ("a", "b", "c"))])
    for flags in ({"model_name_or_path": world.folder / "full"}, LORA | {"lora_path": world.folder / "AdaLoRA"}):
        with pytest.raises(InputError, match="contradiction") as refused:
            world(**flags, validation_file=other, do_eval=True)
        assert "\n" not in str(refused.value)
        with pytest.raises(InputError, match="--ignore_mismatched_sizes needs --do_train"):
            world(**flags, validation_file=other, do_eval=True, ignore_mismatched_sizes=True)
        caplog.clear()
        world(**flags, train_file=other, do_train=True, max_steps=1, logging_steps=1)
        assert "training starts with a new, random head" in caplog.text
        history = json.loads((world.last / "trainer_state.json").read_text())["log_history"]
        assert 0.8 < history[0]["loss"] < 1.6  # near ln 3: nothing of the old head is left
        config = json.loads((world.last / "config.json").read_text())
        assert list(config["id2label"].values()) == ["a", "b", "c"]
    two = write(tmp_path / "two.csv", "text label", [(f"{p} {h}", v) for p, h, v in pairs(24, ("a", "b", "a"))])
    world(model_name_or_path=world.folder / "full", train_file=two, do_train=True, max_steps=1)  # no flag needed
    floats = write(tmp_path / "floats.csv", "text label", [(f"{p} {h}", v) for p, h, v in pairs(24, (0.5, 1.5, 2.5))])
    with pytest.raises(InputError, match="contradiction"):
        world(model_name_or_path=world.folder / "full", validation_file=floats, do_eval=True)


def test_numbers_count_by_the_index_of_a_named_head_and_the_log_says_so(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    order = (1, 2, 0)
    full = permuted(world.folder / "full", tmp_path / "full", order)
    rows = [(p, h, order.index(v)) for p, h, v in pairs(24, (0, 1, 2))]
    file = write(tmp_path / "numbers.csv", "text1 text2 label", rows)
    caplog.clear()
    assert world(model_name_or_path=full, validation_file=file, do_eval=True)["eval_accuracy"] > 0.9
    assert "are read as indices into neutral, contradiction, entailment" in caplog.text
    caplog.clear()
    floats = write(tmp_path / "floats.csv", "text1 text2 label", [(p, h, float(v)) for p, h, v in rows])
    assert world(model_name_or_path=full, validation_file=floats, do_eval=True)["eval_accuracy"] > 0.9
    assert "are read as indices into neutral, contradiction, entailment" in caplog.text
    caplog.clear()
    world(model_name_or_path=full, train_file=file, do_train=True, max_steps=1, logging_steps=1)
    assert "are read as indices into neutral, contradiction, entailment" in caplog.text
    history = json.loads((world.last / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] < 0.4


def test_heads_whose_names_are_numbers_count_by_name(world: World, tmp_path: Path) -> None:
    """Training goes on from the trained loss whatever the order of the names 0, 1 and 2 in the model's config."""
    data = write(tmp_path / "train.csv", "text1 text2 label", pairs(96, (0, 1, 2)))
    flags = {"train_file": data, "do_train": True, "logging_steps": 1}
    plain, turned = (
        permuted(world.folder / "full", tmp_path / name, order, lambda word: str(MNLI.index(word)))
        for name, order in (("plain", (0, 1, 2)), ("turned", (2, 0, 1)))
    )
    losses = []
    for model in (plain, turned):
        world(**flags, max_steps=2, model_name_or_path=model)
        history = json.loads((world.last / "trainer_state.json").read_text())["log_history"]
        losses.append([log["loss"] for log in history if "loss" in log])
        config = json.loads((world.last / "config.json").read_text())
        assert list(config["id2label"].values()) == (["2", "0", "1"] if model == turned else ["0", "1", "2"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3) and losses[0][0] < 0.4


def test_placeholders_mean_nothing(
    world: World, right: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As of a hub model by its authors' own script: LABEL_0 to LABEL_2 in GLUE's order."""
    full = shutil.copytree(world.folder / "full", tmp_path / "full")
    (full / "run.json").unlink()
    config = json.loads((full / "config.json").read_text())
    del config["finetuning_task"], config["label2id"]
    config["id2label"] = {str(i): f"LABEL_{i}" for i in range(3)}
    (full / "config.json").write_text(json.dumps(config))
    assert answers(world, "AdaLoRA", model_name_or_path=full) == right["full"]
    words = write(tmp_path / "words.csv", "text label", [(f"{p} {h}", v) for p, h, v in pairs(9, MNLI)])
    for flags in ({"validation_file": words, "do_eval": True}, {"train_file": words, "do_train": True, "max_steps": 1}):
        caplog.clear()
        world(model_name_or_path=full, **flags)
        assert "has no names for its outputs 0 to 2: they count as contradiction, entailment, neutral" in caplog.text
    rows = [(p, h) for p, h, _ in pairs(9, MNLI)]
    world(model_name_or_path=full, test_file=write(tmp_path / "test.csv", "a b", rows), do_predict=True)
    words = (world.last / "predict_results_classification.txt").read_text().splitlines()
    assert [MNLI[int(w.split("\t")[1])] for w in words[1:]] == [w.split("\t")[1] for w in right["full"][1][1:]]


def _as_safetensors(model: Path, folder: Path) -> Path:
    state = torch.load(model / "pytorch_model.bin", weights_only=True)
    save_file({k: t.float().contiguous() for k, t in state.items()}, folder / "base.safetensors")
    return folder / "base.safetensors"


def test_an_adapter_without_a_head_takes_the_models_and_is_refused_where_there_is_none(
    world: World, tmp_path: Path
) -> None:
    state = {k: t for k, t in load_file(world.folder / "AdaLoRA" / "adapter.safetensors").items() if "lora_" in k}
    save_file(state, tmp_path / "factors.safetensors")
    flags = LORA | {"lora_path": tmp_path / "factors.safetensors", "dataset_name": world.mnli, "do_eval": True}
    with pytest.raises(InputError, match="holds a trained head, so the answers would be random"):
        world(**flags)
    merged = permuted(
        export_adapter.main([str(world.folder / "AdaLoRA"), "--to", "merged", "--out", str(tmp_path / "m")]),
        tmp_path / "t",
        (1, 2, 0),
    )
    model = load_file(merged / "model.safetensors")
    base = {k: t for k, t in load_file(_as_safetensors(world.base, tmp_path)).items()}
    save_file(model | {k: t for k, t in base.items() if k in model}, merged / "model.safetensors", {"format": "pt"})
    expected = scores(world(**LORA, lora_path=world.folder / "AdaLoRA", dataset_name=world.mnli, do_eval=True))
    assert scores(world(**flags, model_name_or_path=merged)) == expected


# ---- users' own files: tests/cases ----


def predicted(world: World, task: str = "classification") -> list[str]:
    """The answers of the last run, row by row."""
    rows = (world.last / f"predict_results_{task}.txt").read_text().splitlines()[1:]
    return [row.split("\t")[1] for row in rows]


def test_a_trained_folder_labels_files_that_lack_classes(world: World, tmp_path: Path) -> None:
    """Trained on three words; a file that lacks one of them, and one without labels; both need only the folder."""
    words = CASES / "words"
    header, *lacking = (words / "one_class_missing.csv").read_text().splitlines()
    everything = [*lacking, *(words / "all_three_classes.csv").read_text().splitlines()[1:]]
    (tmp_path / "everything.csv").write_text("\n".join([header, *everything]) + "\n")
    files = {"lacking": (words / "one_class_missing.csv", lacking), "all": (tmp_path / "everything.csv", everything)}
    usual = {"max_seq_length": 64, "train_file": words / "train.csv", "do_train": True}
    full = tmp_path / "full"  # all weights first: low-rank factors learn nothing on random ones
    world(**usual, num_train_epochs=15, learning_rate=0.003, output_dir=full)
    starts: list[tuple[str, dict[str, Any]]] = [("AdaLoRA", {"model_name_or_path": full})]
    for method, own in METHODS.items():
        run, flags = tmp_path / method, LORA | own | {"model_name_or_path": full}
        world(method, **flags, **usual, num_train_epochs=1, output_dir=run)
        merged = export_adapter.main([str(run), "--to", "merged"])
        starts += [(method, flags | {"lora_path": run}), (method, {"model_name_or_path": merged})]
    for method, start in starts:
        start |= {"max_seq_length": 64}
        answers = {}
        for name, (file, rows) in files.items():
            metrics = world(method, **start, validation_file=file, test_file=file, do_eval=True, do_predict=True)
            answers[name] = predicted(world)
            right = sum(row.rpartition(",")[2] == a for row, a in zip(rows, answers[name], strict=True)) / len(rows)
            assert metrics["eval_accuracy"] == pytest.approx(right) and right > 0.8
        assert answers["lacking"] == answers["all"][: len(lacking)]
        assert set(answers["all"]) == {"bad", "good", "meh"}
        world(method, **start, test_file=words / "no_labels.csv", do_predict=True)
        assert len(predicted(world)) == 9 and set(predicted(world)) <= {"bad", "good", "meh"}


def test_a_regression_stays_one_on_whole_numbers(world: World, tmp_path: Path) -> None:
    """A regression stays one when the file at hand has whole numbers only, and the config says that it is one."""
    flags = {"train_file": CASES / "ratings_train.csv", "do_train": True, "max_steps": 40}
    world(**flags, **LORA, output_dir=tmp_path / "run")
    world(**flags, output_dir=tmp_path / "full")
    merged = export_adapter.main([str(tmp_path / "run"), "--to", "merged"])
    whole = CASES / "ratings_whole_numbers_only.csv"
    texts, labels = zip(*(row.rsplit(",", 1) for row in whole.read_text().splitlines()[1:]), strict=True)
    for start in (
        LORA | {"lora_path": tmp_path / "run"},
        {"model_name_or_path": merged},
        {"model_name_or_path": tmp_path / "full"},
    ):
        metrics = world(**start, validation_file=whole, test_file=whole, do_eval=True, do_predict=True)
        values = [float(answer) for answer in predicted(world, "regression")]
        mse = sum((value - float(label)) ** 2 for value, label in zip(values, labels, strict=True)) / len(labels)
        assert metrics["eval_mse"] == pytest.approx(mse, rel=1e-2) and "eval_accuracy" not in metrics
        if "model_name_or_path" in start:
            assert json.loads((start["model_name_or_path"] / "config.json").read_text())["problem_type"] == "regression"
            said = pipeline("text-classification", model=str(start["model_name_or_path"]))(list(texts))
            assert [answer["score"] for answer in said] == pytest.approx(values, abs=2e-3)
            assert max(values) > 1  # no sigmoid


def test_a_stale_problem_type_is_replaced(world: World, tmp_path: Path) -> None:
    def base(name: str, **changes: Any) -> Path:
        folder = shutil.copytree(world.base, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))
        return folder

    ratings = {"train_file": CASES / "ratings_train.csv", "do_train": True, "max_steps": 1}
    three = {"0": "x", "1": "y", "2": "z"}
    stale = base("classes", problem_type="single_label_classification", id2label=three)
    world(**ratings, model_name_or_path=stale)
    config = json.loads((world.last / "config.json").read_text())
    assert config["problem_type"] == "regression" and len(config["id2label"]) == 1
    stale = base("regression", problem_type="regression", id2label={"0": "score"})
    world(dataset_name=world.mnli, do_train=True, max_steps=1, model_name_or_path=stale)
    config = json.loads((world.last / "config.json").read_text())
    assert config["problem_type"] == "single_label_classification" and list(config["id2label"].values()) == list(MNLI)


def test_a_head_that_cannot_be_used_is_refused_and_replaced_in_training(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"0": "entailment", "1": "neutral", "2": "contradiction"}
    for number, (change, said) in enumerate(
        [
            ({"problem_type": "regression"}, "problem_type regression with 3 output"),
            ({"id2label": names | {"1": "entailment"}}, "two outputs of one name"),
        ]
    ):
        full = shutil.copytree(world.folder / "full", tmp_path / str(number))
        config = json.loads((full / "config.json").read_text())
        (full / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=said):
            world(model_name_or_path=full, dataset_name=world.mnli, do_eval=True)
        caplog.clear()
        world(model_name_or_path=full, dataset_name=world.mnli, do_train=True, max_steps=1, logging_steps=1)
        assert said in caplog.text and "training starts with a new, random head" in caplog.text
        history = json.loads((world.last / "trainer_state.json").read_text())["log_history"]
        assert 0.8 < history[0]["loss"] < 1.6
    for number, labels in enumerate(({"0": "a", "2": "b", "3": "c"}, ["a", "b", "c"])):
        full = shutil.copytree(world.folder / "full", tmp_path / f"gap{number}")
        config = json.loads((full / "config.json").read_text())
        (full / "config.json").write_text(json.dumps(config | {"id2label": labels}))
        with pytest.raises(InputError, match="id2label that does not map 0, 1 and on"):
            world(model_name_or_path=full, dataset_name=world.mnli, do_eval=True)


def test_an_adapter_that_names_two_outputs_alike_is_refused(world: World, tmp_path: Path) -> None:
    run = shutil.copytree(world.folder / "AdaLoRA", tmp_path / "run")
    adapter = json.loads((run / "adapter.json").read_text())
    for names, said in ((["neutral", "neutral", "entailment"], "two outputs of one name"), (["a", "b"], "3 output")):
        (run / "adapter.json").write_text(json.dumps(adapter | {"label_names": names}))
        with pytest.raises(InputError, match=said):
            world(**LORA, lora_path=run, dataset_name=world.mnli, do_eval=True)


def test_names_in_a_config_count_without_its_architectures(world: World, right: dict[str, Any], tmp_path: Path) -> None:
    full = permuted(world.folder / "full", tmp_path / "full", (1, 2, 0))
    config = json.loads((full / "config.json").read_text())
    for architectures in (None, 5):
        (full / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        assert answers(world, "AdaLoRA", model_name_or_path=full)[0] == right["full"][0]


def test_an_adapter_in_the_place_of_a_model_and_the_other_way_round(world: World) -> None:
    flags = {"dataset_name": world.mnli, "do_eval": True}
    with pytest.raises(InputError, match="holds an adapter: give it as --lora_path"):
        world(**flags, model_name_or_path=world.folder / "AdaLoRA")
    with pytest.raises(InputError, match="a whole model is given as --model_name_or_path"):
        world(**flags, **LORA, lora_path=world.folder / "full")


def test_several_labels_a_row_are_refused_by_name(world: World, tmp_path: Path) -> None:
    full = shutil.copytree(world.folder / "full", tmp_path / "full")
    config = json.loads((full / "config.json").read_text())
    (full / "config.json").write_text(json.dumps(config | {"problem_type": "multi_label_classification"}))
    with pytest.raises(InputError, match="multi_label_classification"):
        world(model_name_or_path=full, dataset_name=world.mnli, do_eval=True)
    with pytest.raises(InputError, match="multi_label_classification"):
        world(config_name=full, dataset_name=world.mnli, do_train=True)


# ---- a model of the hub ----

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub_model(folder: Path, cache: Path) -> dict[str, Any]:
    """The flags of a model in a cache as huggingface_hub makes it: refs/main names the commit, snapshots/COMMIT holds
    the files."""
    store = cache / "models--some--deberta"
    (store / "refs").mkdir(parents=True)
    (store / "refs" / "main").write_text(COMMIT)
    shutil.copytree(folder, store / "snapshots" / COMMIT)
    return {"model_name_or_path": "some/deberta", "cache_dir": cache}


def test_the_base_models_revision_is_the_commit_of_its_snapshot(world: World, tmp_path: Path) -> None:
    hub = hub_model(world.base, tmp_path / "cache")
    world(**LORA, **hub, dataset_name=world.mnli, do_train=True, max_steps=1)
    adapter = json.loads((world.last / "adapter.json").read_text())
    assert (adapter["base_model"], adapter["base_model_revision"]) == ("some/deberta", COMMIT)


def test_a_hub_that_fails_once_does_not_lose_the_order_of_the_labels(
    world: World, right: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without the config the labels would be counted in the task's order, while the head has another one."""
    folder = permuted(world.folder / "full", tmp_path / "permuted", (1, 2, 0))
    hub = hub_model(folder, tmp_path / "cache")
    read, failed = PreTrainedConfig.get_config_dict, []

    def fails_once(name: str, **asked: Any) -> Any:
        if name == "some/deberta" and not failed:
            failed.append(name)
            raise OSError("503 Service Unavailable")
        return read(name, **asked)

    monkeypatch.setattr(PreTrainedConfig, "get_config_dict", fails_once)
    with pytest.raises(InputError, match="some/deberta cannot be loaded .* not have been reachable.*: 503 Service"):
        world(**hub, dataset_name=world.mnli, do_eval=True)
    assert failed
    assert scores(world(**hub, dataset_name=world.mnli, do_eval=True)) == right["full"][0]
