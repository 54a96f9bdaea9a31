"""A run goes on only with the flags that it began with: each flag is compared, or listed with the reason why not."""

import json
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from loralib.errors import InputError
from loralib.glue.assemble import NOT_COMPARED
from loralib.glue.flags import DataArguments, LoRAArguments, ModelArguments
from loralib.report.results import WITHOUT_NUMBERS

OWN = {"AdaLoRA": ("AdaLoRAArguments", ""), "SoRA": ("SoRAArguments", "--train_sparse --sparse_lambda_2 0.01"),
       "RM-LoRA": ("RMLoRAArguments", "--random_rank 1")}  # fmt: skip


@pytest.fixture(scope="module")
def flags(tiny_model_dir: Path, mrpc_dir: Path) -> list[str]:
    """A run of two steps with an evaluation and a checkpoint after each, whose result is the best of them."""
    text = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --do_train --do_eval --apply_lora "
    text += "--lora_r 2 --lora_alpha 4 --lora_module query --max_seq_length 16 --max_steps 2 --save_steps 1 --use_cpu "
    text += "--eval_strategy steps --eval_steps 1 --load_best_model_at_end --metric_for_best_model loss "
    return (text + "--report_to none --disable_tqdm 1").split()


@pytest.fixture(scope="module")
def begun(flags: list[str], entry_point: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of runs that were stopped after their first checkpoint, one of each entry point."""
    folder = tmp_path_factory.mktemp("begun")
    for name, (_, own) in OWN.items():
        entry_point(name).main([*flags, *own.split(), f"--output_dir={folder / name}"])
        (folder / name / "run.json").unlink()
        shutil.rmtree(folder / name / "checkpoint-2")
    return folder


@pytest.mark.parametrize("name", OWN)
def test_each_flag_is_compared_or_listed_with_a_reason(
    name: str, begun: Path, entry_point: Callable[[str], Any]
) -> None:
    compared = json.loads((begun / name / "checkpoint-1" / "checkpoint.json").read_text())["settings"]
    own = getattr(entry_point(name), OWN[name][0])
    every = {f.name for part in (ModelArguments, DataArguments, own) for f in fields(part) if f.init}
    assert every - compared.keys() == every & NOT_COMPARED.keys(), "compare the flag, or say in NOT_COMPARED why not"
    assert all(len(reason) > 5 for reason in NOT_COMPARED.values())
    for reason in NOT_COMPARED.values():  # what a reason names in its place is compared
        for word in reason.split("`")[1::2]:
            assert word in compared


def test_the_list_of_a_sweep_and_that_of_a_checkpoint_agree(entry_point: Callable[[str], Any]) -> None:
    """A flag that changes no number for one of them changes none for the other."""
    classes = [ModelArguments, DataArguments, LoRAArguments, *(getattr(entry_point(n), c) for n, (c, _) in OWN.items())]
    every = {f.name for part in classes for f in fields(part) if f.init}
    assert NOT_COMPARED.keys() <= every
    without = {name for name in every if WITHOUT_NUMBERS.fullmatch(name)}
    assert without <= NOT_COMPARED.keys()
    # A finished run, which a sweep takes, must also have these: they decide what is measured or predicted in it.
    elsewhere = {name for name, why in NOT_COMPARED.items() if "compared by" in why} | {"test_file", "test_split"}
    assert NOT_COMPARED.keys() - without - elsewhere == {"ignore_mismatched_sizes", "predict_scores"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("--config_name {model}", "config_name was None, is "),
        ("--model_revision other", "model_revision was 'main', is 'other'"),
        ("--max_eval_samples 9", "eval_rows was 32, is 9"),
        ("--heldout_split 1", "eval_rows was 32, is 16"),
        ("--metric_for_best_model accuracy", "metric_for_best_model was 'loss', is 'accuracy'"),
        ("--load_best_model_at_end False", "load_best_model_at_end was True, is None"),
        ("--lora_path {adapter}", "lora_path was None, is 'AdaLoRA'"),
    ],
)
def test_a_run_does_not_go_on_with_another_value(
    change: str, said: str, begun: Path, flags: list[str], tiny_model_dir: Path, entry_point: Any
) -> None:
    more = change.format(model=tiny_model_dir, adapter=begun / "AdaLoRA").split()
    with pytest.raises(InputError, match=said):
        entry_point("AdaLoRA").main([*flags, f"--output_dir={begun / 'AdaLoRA'}", *more])


def test_a_run_goes_on_with_what_decides_no_number(
    begun: Path, flags: list[str], tmp_path: Path, entry_point: Any
) -> None:
    shutil.copytree(begun / "RM-LoRA", tmp_path / "run")
    own = [*OWN["RM-LoRA"][1].split(), "--overwrite_cache", "True", "--do_predict", "--predict_scores", "True"]
    entry_point("RM-LoRA").main([*flags, *own, f"--output_dir={tmp_path / 'run'}", "--save_steps", "2"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2
