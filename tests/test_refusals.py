"""Bad input is refused before training, in one sentence with the value, the allowed range and the way out."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loralib.errors import InputError, RunError, RunInterrupted

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def usual(tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> dict[str, object]:
    return {
        "model_name_or_path": tiny_model_dir,
        "dataset_name": mrpc_dir,
        "apply_lora": True,
        "lora_r": 4,
        "lora_alpha": 8,
        "do_train": True,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "max_seq_length": 32,
        "output_dir": tmp_path / "out",
        "disable_tqdm": True,
    }


def argv(flags: dict[str, object]) -> list[str]:
    return [str(x) for name, value in flags.items() if value is not None for x in (f"--{name}", value)]


ADALORA = {"lora_type": "svd", "apply_adalora": True, "target_rank": 2, "init_warmup": 0, "final_warmup": 1}
SORA = {"train_sparse": True, "sparse_lambda_2": 0.1}
RM = {"lora_type": "v1", "random_rank": 2}

REFUSED = [
    ("AdaLoRA", {"lora_type": "v1"}, "lora_type is 'v1', it must be frd or svd"),
    ("RM-LoRA", RM | {"lora_type": "svd"}, "lora_type is 'svd', it must be v1 or v2"),
    ("AdaLoRA", {"lora_r": 0}, "lora_r is 0, it must be 1 or more"),
    ("AdaLoRA", {"lora_r": None}, "--apply_lora needs --lora_r"),
    ("AdaLoRA", {"lora_alpha": None}, "--apply_lora needs --lora_alpha"),
    ("AdaLoRA", {"lora_alpha": 0}, "lora_alpha is 0.0, it must be above 0"),
    ("AdaLoRA", {"lora_dropout": 1.0}, "lora_dropout is 1.0, it must be at least 0 and below 1"),
    ("AdaLoRA", {"cls_dropout": -1}, "cls_dropout is -1.0"),
    ("RM-LoRA", {"lora_type": "v1"}, "random_rank is None, it must lie in 1 to 4"),
    ("RM-LoRA", RM | {"random_rank": 0}, "random_rank is 0, it must lie in 1 to 4"),
    ("RM-LoRA", RM | {"random_rank": 5}, "random_rank is 5, it must lie in 1 to 4"),
    ("RM-LoRA", RM | {"mask_resample": "batch"}, "invalid choice: 'batch'"),
    ("AdaLoRA", ADALORA | {"target_rank": 4}, "target_rank is 4, it must lie in 1 to 3"),
    ("AdaLoRA", ADALORA | {"target_rank": None}, "needs a budget"),
    ("AdaLoRA", ADALORA | {"init_warmup": 2}, r"init_warmup 2 \+ final_warmup 1 must stay below the total of 3"),
    ("AdaLoRA", ADALORA | {"init_warmup": -1}, "init_warmup is -1, it must be 0 or more"),
    ("AdaLoRA", ADALORA | {"beta1": 1.0}, "beta1 is 1.0, it must lie between 0 and 1"),
    ("AdaLoRA", ADALORA | {"beta2": 0.0}, "beta2 is 0.0, it must lie between 0 and 1"),
    ("AdaLoRA", ADALORA | {"mask_interval": 0}, "mask_interval is 0, it must be 1 or more"),
    ("AdaLoRA", ADALORA | {"lora_type": "frd"}, "--apply_adalora needs --apply_lora and --lora_type svd"),
    ("AdaLoRA", {"reg_orth_coef": -0.1}, "reg_orth_coef is -0.1, it must be 0 or more"),
    ("SoRA", SORA | {"sparse_lambda": -1}, "sparse_lambda is -1.0, it must be 0 or more"),
    ("SoRA", SORA | {"sparse_lambda_2": -1}, "sparse_lambda_2 is -1.0, it must be 0 or more"),
    ("SoRA", SORA | {"sparse_lr": 0}, "sparse_lr is 0.0, it must be above 0"),
    ("SoRA", SORA | {"optim": "sgd"}, "--optim sgd cannot be used with --train_sparse"),
    ("SoRA", SORA | {"apply_lora": False}, "--train_sparse needs --apply_lora"),
    ("AdaLoRA", {"lora_module": "querry"}, "lora_module 'querry' matches no linear layer .* choose from query, key"),
    ("AdaLoRA", {"model_name_or_path": "/no/such/model"}, "model folder /no/such/model does not exist"),
    ("AdaLoRA", {"model_name_or_path": "nobody/no-model"}, "no-model cannot be loaded .* may not have been reachable"),
    ("AdaLoRA", {"dataset_name": "/no/such/data"}, "/no/such/data"),
    ("AdaLoRA", {"dataset_name": None, "task_name": "mrpc"}, "not reachable"),
    ("AdaLoRA", {"task_name": "mprc"}, "mprc.*mrpc"),
    ("AdaLoRA", {"lora_path": "/no/such/adapter"}, "/no/such/adapter does not exist"),
    ("AdaLoRA", {"lora_rr": 3}, "--lora_rr is not a flag of this program: did you mean --lora_r"),
    ("AdaLoRA", {"lora_r": "four"}, "--lora_r.*: invalid int value: 'four'"),
    ("AdaLoRA", {"eval_strategy": "sometimes"}, "'sometimes'"),
    ("AdaLoRA", {"warmup_ratio": 1.5}, "warmup_ratio is 1.5"),
    ("AdaLoRA", {"max_seq_length": 0}, "max_seq_length is 0"),
    ("AdaLoRA", {"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0, it must be 1 or more"),
    ("AdaLoRA", {"per_device_eval_batch_size": -1}, "per_device_eval_batch_size is -1, it must be 1 or more"),
    ("AdaLoRA", {"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0, it must be 1 or more"),
    ("AdaLoRA", {"learning_rate": "nan"}, "learning_rate is nan, it must be a finite number"),
    ("AdaLoRA", {"report_to": "comet_ml"}, "--report_to comet_ml: no such package .* choose from tensorboard, none"),
    ("AdaLoRA", {"metric_for_best_model": "mcc"}, "'mcc', for mrpc .* loss, accuracy, f1, combined_score"),
    ("AdaLoRA", {"resume_from_checkpoint": "."}, "resume_from_checkpoint . is not a checkpoint: name one folder"),
    ("AdaLoRA", {"output_dir": None}, "--output_dir is missing"),
    ("AdaLoRA", {"deepspeed": "x.json"}, "deepspeed"),
    ("AdaLoRA", {"glue_submission": "sub"}, "--glue_submission needs --do_predict"),
    ("AdaLoRA", {"glue_submission": __file__, "do_predict": True}, "glue_submission .*test_refusals.py is a file"),
    ("AdaLoRA", {"do_train": False}, "nothing to do: give --do_train, --do_eval or --do_predict"),
    ("AdaLoRA", {"weight_decay": -1}, "weight_decay is -1.0, it must be 0 or more"),
    ("AdaLoRA", {"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs is 0.0, it must be above 0"),
    ("AdaLoRA", {"adam_beta2": 1}, "adam_beta2 is 1.0, it must be at least 0 and below 1"),
    ("AdaLoRA", {"torch_compile_mode": "fast"}, "torch_compile_mode is 'fast', it must be one of .*reduce-overhead"),
    ("AdaLoRA", {"torch_compile_backend": "gcc"}, "torch_compile_backend is 'gcc', it must be one of .*inductor"),
    ("AdaLoRA", {"seed": -1}, "seed is -1, it must lie in 0 to 4294967295"),
    ("AdaLoRA", {"heldout_split": -1}, "heldout_split is -1"),
    ("AdaLoRA", {"lora_alpha": "inf"}, "lora_alpha is inf, it must be a finite number"),
    ("AdaLoRA", {"reg_orth_coef": "nan"}, "reg_orth_coef is nan, it must be a finite number"),
    ("SoRA", SORA | {"sparse_lambda_2": "nan"}, "sparse_lambda_2 is nan, it must be a finite number"),
    ("AdaLoRA", {"random_rank": 2}, "--random_rank is not a flag of this program: --help lists all flags"),
]


@pytest.mark.parametrize(("folder", "changes", "said"), REFUSED, ids=lambda v: str(v)[:40])
def test_refused(folder: str, changes: dict, said: str, usual, entry_point, tmp_path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        entry_point(folder).main(argv(usual | changes))
    text = str(caught.value)
    assert "\n" not in text and "Traceback" not in text
    left = [path.name for path in tmp_path.glob("out/*") if path.name != ".lock"]
    assert not left, "nothing is written for a run that does not start"


def test_processes_that_would_train_apart_are_refused(usual, entry_point, monkeypatch) -> None:
    """torchrun on a machine with fewer GPUs than processes, without --use_cpu: each would be a world of its own."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="torchrun started 2 processes and each would train by itself.*--use_cpu"):
        entry_point("AdaLoRA").main(argv(usual))


@pytest.mark.parametrize(
    ("rank", "local_rank", "error", "said"),
    [
        (0, 0, InputError("no such model"), "error: no such model"),
        (1, 1, InputError("no such model"), ""),  # the first process says it
        (8, 0, InputError("no such model"), "process 8: error: no such model"),  # another machine
        (1, 1, RunInterrupted("stopped"), ""),  # agreed on by all
        (1, 1, RunError("disk full"), "process 1: error: disk full"),
    ],
)
def test_no_process_ends_without_a_word(rank, local_rank, error, said, monkeypatch, capsys) -> None:
    from loralib.glue.arguments import command

    def main() -> None:
        raise error

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    with pytest.raises(SystemExit) as ended:
        command(main)
    assert ended.value.code == error.exit_status
    assert capsys.readouterr().err.partition(": ")[2] == (f"{said}\n" if said else "")


@pytest.mark.parametrize("name", ["a.json", "a.yaml"])
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "is not valid"),
        ("[1]", "must hold one mapping"),
        ('{"lora_rr": 3}', "lora_rr is not a flag"),
        ('{"lora_r": "four"}', "--lora_r.* invalid int value: 'four'"),
        ('{"apply_lora": "perhaps"}', "--apply_lora.* got perhaps"),
        ('{"lora_r": 2.5}', "--lora_r.* invalid int value: '2.5'"),
        ('{"attention": "slow"}', "--attention.* invalid choice: 'slow' .*fast.*stock"),
        ("{}", "model_name_or_path"),
    ],
)
def test_refused_in_a_file(name: str, text: str, said: str, entry_point, tmp_path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        entry_point("AdaLoRA").main([str(tmp_path / name)])


def test_a_file_that_is_not_there(entry_point, tmp_path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        entry_point("AdaLoRA").main([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize("damage", ["missing", "unknown", "shape", "cut", "pickle", "folder"])
def test_lora_path_that_does_not_fit(damage: str, usual, entry_point, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    main = entry_point("AdaLoRA").main
    main(argv(usual | {"max_steps": 1, "save_strategy": "no"}))
    file = tmp_path / "adapter.safetensors"
    state = load_file(tmp_path / "out" / "adapter.safetensors")
    key = next(k for k in state if k.endswith("lora_A"))
    said = key.replace(".", r"\.")
    if damage == "missing":
        del state[key]
    elif damage == "unknown":
        state["somewhere.lora_A"] = torch.zeros(2)
        said = r"somewhere\.lora_A"
    elif damage == "shape":
        state[key] = torch.zeros(2, 3)
        said += r".*|\(2, 3\)"
    save_file(state, file)
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-100])
        said = r"adapter\.safetensors"
    elif damage == "pickle":
        file = tmp_path / "adapter.bin"
        marker = tmp_path / "executed"

        class Evil:
            def __reduce__(self):
                return (os.mkdir, (str(marker),))

        torch.save({"x": Evil()}, file)
        said = r"adapter\.bin"
    elif damage == "folder":
        file = tmp_path / "empty"
        file.mkdir()
        said = "empty holds no adapter|empty"
    with pytest.raises(InputError, match=said):
        main(argv(usual | {"lora_path": file, "output_dir": tmp_path / "second"}))
    assert not (tmp_path / "executed").exists()


def test_diverged_run_stops_with_its_step(usual, entry_point, tmp_path, monkeypatch) -> None:
    """A loss that is not finite: noticed at the next log, no checkpoint from it, the last good one stays."""
    from loralib.training import trainer

    calls = {"n": 0}
    real = trainer.task_loss

    def poisoned(*args, **kwargs):
        calls["n"] += 1
        return real(*args, **kwargs) * (math.nan if calls["n"] == 4 else 1.0)

    monkeypatch.setattr(trainer, "task_loss", poisoned)
    flags = usual | {"max_steps": 10, "logging_steps": 6, "save_strategy": "steps", "save_steps": 3}
    with pytest.raises(RunError, match=r"at step 4 .*noticed at step 6.*checkpoint-3"):
        entry_point("AdaLoRA").main(argv(flags))
    assert [p.name for p in sorted((tmp_path / "out").glob("checkpoint-*"))] == ["checkpoint-3"]
    assert json.loads((tmp_path / "out" / "run.json").read_text())["status"] == "diverged"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (
            PermissionError(13, "Permission denied", "/cache/x"),
            2,
            "/cache/x cannot be used (Permission denied): make it usable",
        ),
        (OSError(28, "No space left on device"), 3, "refused to go on: No space left on device."),
    ],
)
def test_an_error_of_the_system_is_one_sentence(error, status, said, capsys) -> None:
    from loralib.glue.arguments import command

    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as ended:
        command(main)
    printed = capsys.readouterr().err
    assert ended.value.code == status and said in printed and printed.count("\n") == 1


def test_an_error_of_a_library_keeps_its_traceback() -> None:
    from loralib.glue.arguments import command

    def main() -> None:
        raise OSError("a mistake of this project's own")

    with pytest.raises(OSError, match="own"):
        command(main)


@pytest.mark.parametrize("inside", [True, False])
def test_the_path_that_failed_is_blamed(inside: bool, usual, entry_point, tmp_path, monkeypatch) -> None:
    """A cache that cannot be written at the evaluation is not the output folder's fault."""
    path = tmp_path / "out" / "x.tmp" if inside else tmp_path / "cache" / "metrics"

    def evaluate(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    module = entry_point("AdaLoRA")
    monkeypatch.setattr("loralib.training.trainer.LoRATrainer.evaluate", evaluate)
    said = f"^output_dir .*out could not be written to .*{path}" if inside else f"^{path} could not be used .Permission"
    with pytest.raises(RunError, match=said):
        module.main(argv(usual | {"do_eval": True, "max_steps": 1}))


def run(*command: object, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=os.environ | env)


def test_command_line_prints_one_sentence_and_no_traceback(usual) -> None:
    done = run(ROOT / "RM-LoRA" / "run_glue.py", *argv(usual | {"lora_type": "v1", "random_rank": 9}))
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "run_glue.py: error: random_rank is 9, it must lie in 1 to 4 (lora_r)" in done.stderr


@pytest.mark.parametrize("folder", ["AdaLoRA", "SoRA", "RM-LoRA"])
def test_another_package_called_loralib_is_named(folder: str, tmp_path) -> None:
    """Microsoft's package has the same import name."""
    (tmp_path / "loralib").mkdir()
    (tmp_path / "loralib" / "__init__.py").write_text("name = 'lora'\n")
    (tmp_path / "loralib" / "layers.py").write_text("class Linear: ...\n")
    done = run(ROOT / folder / "run_glue.py", "--help", PYTHONPATH=str(tmp_path))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert "another one (Microsoft's)" in done.stderr and "pip uninstall loralib" in done.stderr


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1\n", "its weights are not a file of tensors"),
        ("pytorch_model.bin", b"", "cannot be loaded: EOFError"),
        ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "cannot be loaded.*is every file whole"),
        ("spm.model", b"", "cannot be loaded"),
        ("spm.model", None, "knows no words, since its vocabulary .* is missing"),
        ("config.json", b"{", "cannot be loaded.*JSON"),
    ],
)
def test_a_model_folder_with_a_damaged_file(
    file: str, content: bytes | None, said: str, usual, entry_point, tiny_model_dir, tmp_path
) -> None:
    """What half a download leaves. Without spm.model the library makes a tokenizer to which every word is unknown."""
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        entry_point("AdaLoRA").main(argv(usual | {"model_name_or_path": folder}))
    assert "weights_only" not in str(caught.value)


def test_a_model_with_a_head_for_other_classes(usual, entry_point, tmp_path) -> None:
    (tmp_path / "train.csv").write_text("sentence,label\nfine,a\nso so,b\nbad,c\n")
    three = {"dataset_name": None, "train_file": tmp_path / "train.csv", "apply_lora": None, "lora_r": None}
    entry_point("AdaLoRA").main(argv(usual | three | {"max_steps": 1, "lora_alpha": None, "save_strategy": "no"}))
    other = usual | {"model_name_or_path": tmp_path / "out", "output_dir": tmp_path / "two"}
    evaluated = other | {"do_train": None, "do_eval": True}
    with pytest.raises(InputError, match="not_equivalent.*labels a, b, c"):
        entry_point("AdaLoRA").main(argv(evaluated))
    entry_point("AdaLoRA").main(argv(other | {"max_steps": 1}))


def test_a_tokenizer_of_another_model(usual, entry_point, tiny_model_dir, tmp_path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"unused{i}" for i in range(1000)), "the", "a", "was"]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    with pytest.raises(InputError, match=r"the tokenizer gives the token 100\d and the model knows tokens 0 to \d+:"):
        entry_point("AdaLoRA").main(argv(usual | {"tokenizer_name": folder}))


def test_a_small_vocabulary_with_high_ids(usual, entry_point, tiny_model_dir, tmp_path) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "on", "in", "was", "."]
    vocabulary = {word: i if i < 5 else 5000 + i for i, word in enumerate(words)}
    tokenizer = {"version": "1.0", "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"},
                 "pre_tokenizer": {"type": "Whitespace"}, "added_tokens": []}  # fmt: skip
    (folder / "spm.model").unlink()
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "mask_token": "[MASK]"} | special)
    )
    with pytest.raises(InputError, match=r"the tokenizer gives the token 500\d and the model knows tokens 0 to \d+:"):
        entry_point("AdaLoRA").main(argv(usual | {"tokenizer_name": folder}))


def test_ctrl_c_is_one_sentence(capsys) -> None:
    from loralib.glue.arguments import command

    def main() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        command(main)
    assert stopped.value.code == 130
    text = capsys.readouterr().err
    assert (
        "The same command goes on from the last checkpoint, or starts over if there is none." in text
        and text.count("\n") == 1
    )
