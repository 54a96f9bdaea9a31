"""The entry points as a user calls them: what moves, what stays, what is left behind."""

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from loralib.errors import InputError

SIX = "query,key,value,intermediate,layer.output,attention.output"
ADALORA = ["--lora_type", "svd", "--apply_adalora", "--target_rank", "2", "--init_warmup", "0", "--final_warmup", "1"]
METHODS = {
    "lora": ("AdaLoRA", ["--lora_type", "frd"]),
    "lora-orth": ("AdaLoRA", ["--lora_type", "frd", "--reg_orth_coef", "0.1"]),
    "svd-lora": ("AdaLoRA", ["--lora_type", "svd", "--reg_orth_coef", "0.1"]),
    "adalora": (
        "AdaLoRA",
        [*ADALORA, "--mask_interval", "1", "--reg_orth_coef", "0.1"],
    ),
    "sora": ("SoRA", ["--train_sparse", "True", "--sparse_lambda", "0.1", "--sparse_lambda_2", "0.1"]),
    "rm-lora-v1": ("RM-LoRA", ["--lora_type", "v1", "--random_rank", "2", "--reg_orth_coef", "0.1"]),
    "rm-lora-v2": ("RM-LoRA", ["--lora_type", "v2", "--random_rank", "2", "--reg_orth_coef", "0.1"]),
}


@pytest.fixture
def usual(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> list[str]:
    """Flags of a run of three steps."""
    flags = {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_module": SIX,
        "per_device_train_batch_size": 8,
        "max_steps": 3,
        "learning_rate": 0.01,
        "max_seq_length": 32,
        "logging_steps": 1,
        "save_strategy": "no",
        "output_dir": tmp_path / "out",
        "disable_tqdm": True,
    }
    return ["--do_train", "--apply_lora", *(str(x) for name, value in flags.items() for x in (f"--{name}", value))]


def trained(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_what_should_move_moves_and_nothing_else(method: str, usual, entry_point, tmp_path, monkeypatch) -> None:
    """Three steps; the model before and after is caught around the Trainer's own training."""
    from loralib.trainer import LoRATrainer

    folder, flags = METHODS[method]
    states: dict[str, dict[str, torch.Tensor]] = {}
    train = LoRATrainer.train

    def watched(self, *args, **kwargs):
        states["before"] = {k: v.clone() for k, v in self.model.state_dict().items()}
        result = train(self, *args, **kwargs)
        states["after"] = {k: v.clone() for k, v in self.model.state_dict().items()}
        return result

    monkeypatch.setattr(LoRATrainer, "train", watched)
    entry_point(folder).main([*usual, *flags])
    moved = {k for k, v in states["after"].items() if not torch.equal(v, states["before"][k])}
    head = {"pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"}
    should = head | {k for k in states["after"] if k.rpartition(".")[2].startswith("lora_")}
    assert moved == should
    assert all(v.dtype == torch.float32 for k, v in states["after"].items() if v.is_floating_point())
    kinds = {"svd-lora": 3, "adalora": 3, "sora": 3}.get(method, 2)
    assert len(should) == 4 + 6 * kinds  # one layer, six matrices
    saved = trained(tmp_path / "out")
    assert set(saved) == should | {k for k in states["after"] if k.endswith("ranknum")}
    assert all(torch.equal(saved[k], states["after"][k]) for k in saved)


def test_full_fine_tuning_builds_nothing_of_lora(usual, entry_point, tmp_path) -> None:
    for folder in ("AdaLoRA", "SoRA", "RM-LoRA"):
        flags = [f for f in usual if f != "--apply_lora"]
        entry_point(folder).main([*flags, "--overwrite_output_dir", "--max_steps", "1"])
        assert not (tmp_path / "out" / "adapter.safetensors").exists()
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert not [k for k in file.keys() if "lora" in k or "ranknum" in k]
        run = json.loads((tmp_path / "out" / "run.json").read_text())
        assert run["method"] == "full" and run["parameters"]["trainable"] == run["parameters"]["total"]


def test_fresh_adapted_model_equals_the_base_model(usual, entry_point, tmp_path) -> None:
    """Evaluation before any step gives what the unadapted model gives, for every layer kind."""
    losses = {}
    flags = [f for f in usual if f not in ("--do_train",)]
    for method in ("lora", "svd-lora", "sora"):
        folder, own = METHODS[method]
        losses[method] = entry_point(folder).main([*flags, *own, "--do_eval"])["eval_loss"]
    base = [f for f in flags if f != "--apply_lora"]
    losses["base"] = entry_point("AdaLoRA").main([*base, "--do_eval"])["eval_loss"]
    assert len(set(losses.values())) == 1, losses


@pytest.mark.parametrize("method", ["lora-orth", "adalora", "sora", "rm-lora-v1"])
def test_one_batch_of_8_equals_two_of_4_accumulated(method: str, usual, entry_point, tmp_path, tiny_model_dir) -> None:
    folder, flags = METHODS[method]
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    exact = ["--train_sampling_strategy", "sequential", "--config_name", str(tmp_path)]
    entry_point(folder).main([*usual, *flags, *exact])
    whole = trained(tmp_path / "out")
    split = ["--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "2"]
    entry_point(folder).main([*usual, *flags, *exact, *split, "--output_dir", str(tmp_path / "two")])
    for key, value in trained(tmp_path / "two").items():
        torch.testing.assert_close(value, whole[key], rtol=0, atol=2e-5, msg=key)


def scalars(folder: Path) -> dict[str, list[float]]:
    (events,) = folder.glob("runs/*")
    reader = EventAccumulator(str(events))
    reader.Reload()
    return {tag: [e.value for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def test_results_of_adalora(usual, entry_point, tmp_path, caplog) -> None:
    folder, flags = METHODS["adalora"]
    with caplog.at_level(logging.INFO, logger="loralib"):
        metrics = entry_point(folder).main([*usual, *flags, "--do_eval", "--report_to", "tensorboard"])
    out = tmp_path / "out"
    for name in ("all_results.json", "train_results.json", "eval_results.json", "trainer_state.json", "config.json"):
        assert (out / name).is_file(), name
    assert json.loads((out / "all_results.json").read_text()).keys() >= {"eval_accuracy", "eval_f1", "train_loss"}
    assert metrics["eval_combined_score"] == pytest.approx((metrics["eval_accuracy"] + metrics["eval_f1"]) / 2)

    run = json.loads((out / "run.json").read_text())
    assert run["status"] == "finished" and run["method"] == "adalora" and run["task"] == "mrpc"
    assert run["steps"] == 3 and run["effective_batch"] == 8 and run["world_size"] == 1 and run["wall_seconds"] > 0
    assert run["command"][1:] == [*usual, *flags, "--do_eval", "--report_to", "tensorboard"]
    assert {"python", "torch", "transformers"} <= run["versions"].keys() and "gpus" in run["hardware"]
    saved = trained(out)
    ranks = {k.removesuffix(".lora_E"): int(v.count_nonzero()) for k, v in saved.items() if k.endswith("lora_E")}
    assert run["ranks"] == ranks and sum(ranks.values()) == 12 == run["total_rank"]
    elements = sum(v.numel() for k, v in saved.items() if not k.endswith("ranknum"))
    assert run["parameters"]["trainable"] == elements
    assert run["parameters"]["lora"] == sum(v.numel() for k, v in saved.items() if ".lora_" in k)
    assert run["metrics"]["eval_accuracy"] == metrics["eval_accuracy"]

    shown = scalars(out)
    assert {"Budget/total_rank", "Budget/mask_threshold", "Budget/sum_param", "train/orth_regu_loss"} <= shown.keys()
    assert shown["Budget/total_rank"][-1] == 12
    assert len([tag for tag in shown if tag.startswith("Ranknum/")]) == 6
    for loss, task, penalty in zip(
        *(shown[f"train/{k}"] for k in ("loss", "task_loss", "orth_regu_loss")), strict=True
    ):
        assert loss == pytest.approx(task + 0.1 * penalty, abs=1e-5)
    text = caplog.text
    for said in (
        "method: adalora",
        "6 matrices",
        "trainable parameters",
        "effective batch: 8",
        "3 optimizer steps in all",
        "24 singular values until step 0, then falling to 12 at step 2 of 3",
    ):
        assert said in text, said


def test_results_of_sora_and_rm_lora(usual, entry_point, tmp_path) -> None:
    folder, flags = METHODS["sora"]
    entry_point(folder).main([*usual, *flags, "--report_to", "tensorboard"])
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    gates = {k: v for k, v in trained(tmp_path / "out").items() if k.endswith("lora_gate")}
    assert run["gates"] == {k.removesuffix(".lora_gate"): int(v.count_nonzero()) for k, v in gates.items()}
    shown = scalars(tmp_path / "out")
    share = sum(run["gates"].values()) / 24
    assert 0 < share < 1 and shown["Gates/nonzero_share"][-1] == pytest.approx(share)
    assert shown["Gates/remaining_parameters"][-1] == run["remaining"]

    folder, flags = METHODS["rm-lora-v2"]
    out = tmp_path / "rm"
    entry_point(folder).main([*usual, *flags, "--report_to", "tensorboard", "--output_dir", str(out)])
    assert json.loads((out / "run.json").read_text())["directions_per_step"] == 2 * 6 * 2
    shown = scalars(out)
    before, after = shown["train/grad_norm_before_mask"], shown["train/grad_norm_after_mask"]
    assert len(before) == 3 and all(0 < b < a for a, b in zip(before, after, strict=True))
    assert "train/orth_regu_loss" in shown and "train/task_loss" in shown


def test_eval_loss_is_the_task_loss_without_the_penalty(usual, entry_point) -> None:
    """Ledger L8: a huge penalty does not show in eval_loss."""
    folder, flags = METHODS["svd-lora"]
    no_step = ["--learning_rate", "0", "--max_steps", "1", "--do_eval", "--overwrite_output_dir"]
    small = entry_point(folder).main([*usual, *flags, *no_step, "--reg_orth_coef", "0"])
    large = entry_point(folder).main([*usual, *flags, *no_step, "--reg_orth_coef", "1000"])
    assert small["eval_loss"] == large["eval_loss"] and large["train_loss"] > 100 * small["train_loss"]


def test_train_sparse_off_is_plain_lora(usual, entry_point, tmp_path, caplog) -> None:
    """Ledger S6."""
    with caplog.at_level(logging.INFO, logger="loralib"):
        entry_point("SoRA").main(usual)
    assert "train_sparse is off: plain LoRA without gates" in caplog.text
    assert not [k for k in trained(tmp_path / "out") if "gate" in k]
    entry_point("AdaLoRA").main([*usual, "--output_dir", str(tmp_path / "lora")])
    one, two = trained(tmp_path / "out"), trained(tmp_path / "lora")
    assert all(torch.equal(one[k], two[k]) for k in two)


def test_what_is_refused_removes_no_earlier_run(usual, entry_point, tmp_path) -> None:
    """--overwrite_output_dir with a mistake beside it."""
    main, out = entry_point("AdaLoRA").main, tmp_path / "out"
    main([*usual, "--save_strategy", "steps"])
    before = sorted(p.name for p in out.iterdir())
    late = [*ADALORA, "--final_warmup", "3"]  # known once the model and the data are loaded
    for wrong in (["--dataset_name", "/no/data"], ["--model_name_or_path", "/no/model"], late):
        with pytest.raises(InputError):
            main([*usual, *wrong, "--overwrite_output_dir"])
        assert sorted(p.name for p in out.iterdir()) == before
    main([*usual, "--overwrite_output_dir"])
    assert not list(out.glob("checkpoint-*")) and (out / "adapter.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--apply_lora", "False"], "--lora_r or --lora_alpha is given without --apply_lora: this is full fine-tuning"),
        (["--target_rank", "2"], "apply_adalora is off: no budget is allocated"),
        (["--do_train", "False", "--do_eval"], "neither --do_train nor --lora_path is given"),
    ],
)
def test_flags_without_effect_are_reported(flags: list[str], said: str, usual, entry_point, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="loralib"):
        entry_point("AdaLoRA").main([*usual, *flags])
    assert said in caplog.text


def test_mask_resample_epoch_draws_once_an_epoch(usual, entry_point, monkeypatch) -> None:
    """Ledger R3: keyed on the number of completed epochs; 64 rows are 8 steps per epoch."""
    from loralib.masking import RandomMask

    keys = []
    draw = RandomMask.draw
    monkeypatch.setattr(RandomMask, "draw", lambda self, key: (keys.append(key), draw(self, key))[1])
    folder, flags = METHODS["rm-lora-v1"]
    entry_point(folder).main([*usual, *flags, "--max_steps", "20", "--mask_resample", "epoch"])
    assert keys == [0, 1, 2]
    keys.clear()
    entry_point(folder).main([*usual, *flags, "--overwrite_output_dir"])
    assert keys == [0, 1, 2]


# ---- command line ----


def test_older_names_and_files_mean_the_same(usual, entry_point, tmp_path) -> None:
    """Flags, JSON and YAML; evaluation_strategy, warmup_ratio, logging_dir, group_by_length, no_cuda, --flag True."""
    old = {
        "evaluation_strategy": "epoch",
        "warmup_ratio": 0.5,
        "logging_dir": str(tmp_path / "tb"),
        "group_by_length": True,
        "no_cuda": True,
        "overwrite_output_dir": True,
        "tb_writer_loginterval": 7,
    }
    from loralib.glue.arguments import DataArguments, GlueTrainingArguments, ModelArguments, parse

    module = entry_point("AdaLoRA")
    classes = (ModelArguments, DataArguments, module.AdaLoRAArguments, GlueTrainingArguments)
    argv = [*usual, *(str(x) for k, v in old.items() for x in (f"--{k}", v))]
    names = [a.removeprefix("--") for a in argv if a.startswith("--")]
    values = dict(zip(names, [None] * len(names), strict=True))
    for name, following in zip(argv, [*argv[1:], "--"], strict=True):
        if name.startswith("--"):
            values[name[2:]] = True if following.startswith("--") else yaml.safe_load(following)
    (tmp_path / "a.json").write_text(json.dumps(values))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**values, "learning_rate": "1e-2"}))
    for call in (argv, [str(tmp_path / "a.json")], [str(tmp_path / "a.yaml")]):
        model, data, lora, training = parse(classes, call)
        assert training.eval_strategy == "epoch" and training.do_eval
        assert training.get_warmup_steps(100) == 50
        assert training.train_sampling_strategy == "group_by_length" and training.use_cpu
        assert training.overwrite_output_dir is True and training.learning_rate == 0.01
        assert lora.tb_writter_loginterval == 7 and lora.lora_r == 4 and lora.apply_lora is True
    (tmp_path / "a.json").write_text(json.dumps({**values, "report_to": "tensorboard", "max_steps": 8}))
    module.main([str(tmp_path / "a.json")])
    history = json.loads((tmp_path / "out" / "run.json").read_text())["history"]
    assert [entry["step"] for entry in history if "eval_accuracy" in entry] == [8, 8]  # the epoch's and the final one
    assert list((tmp_path / "tb").glob("events.out.tfevents.*")) and not (tmp_path / "out" / "runs").exists()
    assert "TENSORBOARD_LOGGING_DIR" not in os.environ  # nothing of a run stays with the process


def test_abbreviations_and_both_spellings_of_booleans(entry_point) -> None:
    from loralib.glue.arguments import DataArguments, GlueTrainingArguments, ModelArguments, parse

    module = entry_point("SoRA")
    classes = (ModelArguments, DataArguments, module.SoRAArguments, GlueTrainingArguments)
    base = ["--model_name_or_path", "m", "--output_dir", "o", "--lora_r", "2", "--lora_alpha", "2"]
    for flags in (["--apply_lora", "--train_sparse"], ["--apply_lora", "True", "--train_sparse", "True"]):
        _, _, lora, training = parse(classes, [*base, *flags, "--logging_step", "10"])
        assert lora.apply_lora is True and lora.train_sparse is True and training.logging_steps == 10
    assert parse(classes, [*base, "--apply_lora", "False"])[2].apply_lora is False


@pytest.mark.parametrize("folder", ["AdaLoRA", "SoRA", "RM-LoRA"])
def test_help_groups_and_explains(folder: str, entry_point, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        entry_point(folder).main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for part in ("model:", "data:", "training (transformers.TrainingArguments):", "--evaluation_strategy", "--lora_r"):
        assert part in text, part
    symbol = {"AdaLoRA": "t_i:", "SoRA": "eta", "RM-LoRA": "lambda:"}[folder]
    assert symbol in text


# ---- output folder ----


def test_output_folder_is_resumed_refused_or_cleared(usual, entry_point, tmp_path, caplog) -> None:
    from loralib.errors import InputError

    main, out = entry_point("AdaLoRA").main, tmp_path / "out"
    with_saves = [*usual, "--save_strategy", "steps", "--save_steps", "1"]
    main([*with_saves, "--save_total_limit", "2"])
    (out / "notes.txt").write_text("mine")
    (out / "checkpoint-mine").mkdir()
    straight = trained(out)
    with caplog.at_level(logging.INFO, logger="loralib"):
        main(with_saves)  # no flag: goes on from checkpoint-3, which is the end
    assert "going on from" in caplog.text and "checkpoint-3" in caplog.text
    assert all(torch.equal(straight[k], v) for k, v in trained(out).items())

    caplog.clear()
    with caplog.at_level(logging.INFO, logger="loralib"):
        main([*usual, "--overwrite_output_dir", "--max_steps", "1"])
    assert "removed" in caplog.text and "checkpoint-3" in caplog.text and "README.md of an earlier" in caplog.text
    assert sorted(p.name for p in out.glob("checkpoint*")) == ["checkpoint-mine"]
    assert (out / "notes.txt").read_text() == "mine"
    assert json.loads((out / "run.json").read_text())["steps"] == 1

    with pytest.raises(InputError, match="holds a finished run and no checkpoint .* --overwrite_output_dir"):
        main(usual)


def test_evaluation_in_the_folder_of_a_training_keeps_its_record(usual, entry_point, tmp_path) -> None:
    main, out = entry_point("AdaLoRA").main, tmp_path / "out"
    main([*usual, "--do_eval"])
    record, adapter = (out / "run.json").read_text(), trained(out)
    again = [x for x in usual if x != "--do_train"] + ["--lora_path", str(out)]
    found = main([*again, "--do_eval", "--do_predict"])
    assert (out / "run.json").read_text() == record and list(out.glob("predict_results*"))
    assert found["eval_loss"] == json.loads((out / "eval_results.json").read_text())["eval_loss"]
    assert all(torch.equal(adapter[k], v) for k, v in trained(out).items())
    alone = tmp_path / "alone"  # elsewhere an evaluation has a record of its own, which the next one replaces
    for rows in (8, 4):
        main([*again, "--do_eval", "--output_dir", str(alone), "--max_eval_samples", str(rows)])
        assert json.loads((alone / "run.json").read_text())["metrics"]["eval_samples"] == rows


def test_tiny_learning_rate_in_half_precision_file_trains_in_float32(
    usual, entry_point, tiny_model_dir, tmp_path
) -> None:
    """Ledger G2: the checkpoint is stored in half precision; steps far below its resolution are not lost."""
    stored = torch.load(tiny_model_dir / "pytorch_model.bin", weights_only=True)
    assert {v.dtype for v in stored.values() if v.is_floating_point()} == {torch.float16}
    assert any("lm_predictions" in k or "mask_predictions" in k for k in stored)
    entry_point("AdaLoRA").main([*usual, "--learning_rate", "1e-7"])
    assert {v.dtype for v in trained(tmp_path / "out").values()} == {torch.float32}


def test_ways_of_padding_evaluate_the_same(usual, entry_point, tmp_path) -> None:
    """Real tokens see the same numbers however a batch is padded."""
    from loralib.errors import InputError

    flags = [f for f in usual if f != "--do_train"]
    losses = [
        entry_point("AdaLoRA").main([*flags, "--do_eval", *way])["eval_loss"]
        for way in ([], ["--pad_to_max_length", "False"], ["--padding", "longest"], ["--padding", "unpadded"])
    ]
    assert losses == pytest.approx([losses[0]] * 4, abs=1e-6)
    with pytest.raises(InputError, match="--padding unpadded needs a DeBERTa.*--attention fast"):
        entry_point("AdaLoRA").main([*flags, "--do_eval", "--padding", "unpadded", "--attention", "stock"])


def test_unpadded_training_equals_padded(usual, entry_point, tmp_path, tiny_model_dir) -> None:
    """Without dropout three steps end with the same adapter, however batches are padded."""
    config = json.loads((tiny_model_dir / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pooler_dropout": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    folder, flags = METHODS["adalora"]
    ends = []
    for way in ("fixed", "longest", "unpadded"):
        out = tmp_path / way
        more = ["--padding", way, "--config_name", str(tmp_path), "--output_dir", str(out)]
        entry_point(folder).main([*usual, *flags, *more])
        ends.append(trained(out))
    for other in ends[1:]:
        for key, value in other.items():
            torch.testing.assert_close(value, ends[0][key], rtol=0, atol=2e-5, msg=key)
