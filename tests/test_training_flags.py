"""Every flag of TrainingArguments works or is refused in one sentence before anything is loaded."""

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from loralib.errors import InputError, RunError
from loralib.glue import training_flags
from loralib.glue.arguments import GlueTrainingArguments, parse
from loralib.glue.run import start
from loralib.training.lock import unlock

FIELDS = {f.name for f in dataclasses.fields(TrainingArguments)}


def test_every_flag_stands_in_one_table() -> None:
    tables = [*training_flags.WORK, *training_flags.CHECKED, *training_flags.REFUSED]
    new = sorted(FIELDS - set(tables))
    assert not new, (
        f"this transformers has the flags {', '.join(new)}, which no table of loralib/glue/training_flags.py names: "
        "try each of them with an adapter run and a full one, then write down if it works, is checked or is refused."
    )
    assert [name for name, count in Counter(tables).items() if count > 1] == []


def flags(folder: Path, *more: str) -> GlueTrainingArguments:
    always = ("--output_dir", str(folder / "out"), "--do_train", "--use_cpu", "--report_to", "none")
    (training,) = parse((GlueTrainingArguments,), [*always, *more])
    return training


REFUSED = {
    "batch_eval_metrics True": "--batch_eval_metrics True is not supported: GLUE's metrics are computed once",
    "debug underflow_overflow": "the message names the step",
    "length_column_name length_of_text": "rows are grouped by the number of their tokens",
    "use_cache True": "no use for past keys and values",
    "deepspeed ds.json": "--deepspeed ds.json is not supported: AdaLoRA, SoRA and RM-LoRA .* torchrun",
    "enable_jit_checkpoint True": "SIGTERM saves a checkpoint here without it",
    "eval_do_concat_batches False": "--eval_do_concat_batches False is not supported: GLUE's metrics",
    "eval_use_gather_object True": "the outputs are tensors",
    "fsdp full_shard": "--fsdp full_shard is not supported",
    "fsdp_config nowhere.json": "--fsdp_config nowhere.json is not supported",
    "ignore_data_skip True": "other rows than an undisturbed run",
    "include_for_metrics inputs": "GLUE's metrics need only predictions and labels",
    'liger_kernel_config {"rope":true}': "liger_kernel_config",  # argparse makes no mapping, a file does
    "optim_target_modules query": "only GaLore and APOLLO read it",
    "prediction_loss_only True": "an evaluation without predictions has no metrics",
    "restore_callback_states_from_checkpoint True": "everything that a run needs to go on is restored",
    "use_liger_kernel True": "its kernels replace modules",
    "activation_checkpointing_kwargs soft": "it must be a JSON mapping",
    'gradient_checkpointing_kwargs {"use_reentrant":false}': "but --gradient_checkpointing is not given",
    'gradient_checkpointing True --gradient_checkpointing_kwargs {"reentrant":1}': "has the key 'reentrant', it must",
    "ddp_backend smoke": "invalid choice: 'smoke'",
    "ddp_bucket_cap_mb 0": "ddp_bucket_cap_mb is 0, it must be 1 or more",
    "ddp_timeout 0": "ddp_timeout is 0, it must be 1 second or more",
    "eval_accumulation_steps 0": "eval_accumulation_steps is 0, it must be 1 or more",
    "eval_steps -1": "eval_steps is -1.0, it must be above 0",
    "label_names label": r"label_names is \['label'\], it must be labels",
    "eval_on_start True": "--eval_on_start needs --do_eval",
    "load_best_model_at_end True --save_strategy no": "--load_best_model_at_end needs --eval_strategy steps or epoch",
    "load_best_model_at_end True --eval_strategy epoch": "requires the save and eval strategy to match",
    "log_level loud": "loud",
    "neftune_noise_alpha -1": "neftune_noise_alpha is -1.0, it must be 0 or more",
    "optim galore_adamw": "--optim galore_adamw is not supported: it does not step once",
    "optim lomo": "--optim lomo is not supported",
    "optim schedule_free_adamw": "it evaluates other weights than the ones that are saved",
    "optim grokadamw": "ends with other weights than an undisturbed run",
    "optim adamw_anyprecision": "--optim adamw_anyprecision cannot be used here: .*torchdistx",
    "optim sgd --optim_args momentum": "optim_args is 'momentum', it must be names and numbers",
    "optim sgd --optim_args momentum=much": "--optim sgd with optim_args 'momentum=much' cannot be used here",
    "optim_args betas=1": "--optim adamw_torch_fused does not read it",
    "optim sgd --optim_args momentum=0.9,speed=1": "optim_args has speed=1 without effect: --optim sgd",
    "lr_scheduler_type cosine_with_min_lr": "it needs min_lr or min_lr_rate in --lr_scheduler_kwargs",
    "lr_scheduler_type warmup_stable_decay": "it needs num_decay_steps in --lr_scheduler_kwargs",
    "lr_scheduler_type reduce_lr_on_plateau": "reduce_lr_on_plateau needs --eval_strategy steps or epoch",
    'lr_scheduler_type constant --lr_scheduler_kwargs {"a":1}': "--lr_scheduler_type constant reads none of it",
    'lr_scheduler_type cosine --lr_scheduler_kwargs {"cycles":1}': "unexpected keyword argument 'cycles'",
    "lr_scheduler_kwargs {": "lr_scheduler_kwargs is '{', it must be a JSON mapping",
    'lr_scheduler_type polynomial --lr_scheduler_kwargs {"power":"x"}': "--lr_scheduler_type polynomial with",
    "dataloader_persistent_workers True": "but --dataloader_num_workers is 0: give 1 or more",
    "dataloader_multiprocessing_context spawn": "but --dataloader_num_workers is 0: give 1 or more",
    "dataloader_num_workers 1 --dataloader_prefetch_factor 0": "dataloader_prefetch_factor is 0, it must be 1 or more",
    "accelerator_config nowhere.json": "accelerator_config names the file nowhere.json, which does not exist",
    "accelerator_config {": "accelerator_config .* is not JSON",
    'accelerator_config {"split":true}': "accelerator_config has the key 'split', it must be one of split_batches, ",
    'accelerator_config {"gradient_accumulation_kwargs":{"by":2}}': "gradient_accumulation_kwargs has the key 'by'",
    "remove_unused_columns False": "--remove_unused_columns False is not supported",
    "save_steps 0": "save_steps is 0.0, it must be above 0; --save_strategy no saves none",
    "save_strategy best": "--save_strategy best needs --metric_for_best_model",
    "save_strategy best --metric_for_best_model f1": "--save_strategy best needs --eval_strategy",
    "save_total_limit 0": "save_total_limit is 0, it must be 1 or more; without it all are kept",
    "tf32 True": "--tf32 requires Ampere",
    "torch_empty_cache_steps 0": "torch_empty_cache_steps",
}


@pytest.mark.parametrize("words", [w for w in REFUSED if w.split()[0] in FIELDS], ids=lambda words: words[:40])
def test_refused_before_anything_is_loaded(words: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=REFUSED[words]) as caught:
        flags(tmp_path, *f"--{words}".split())
    assert "\n" not in str(caught.value)


def test_every_flag_that_is_refused_is_tried() -> None:
    # a parallelism config cannot be written on a command line, only given as an object or by accelerate launch
    assert FIELDS & set(training_flags.REFUSED) - {words.split()[0] for words in REFUSED} <= {"parallelism_config"}


@pytest.mark.parametrize("name", [o.value for o in OptimizerNames])
def test_every_optimizer_is_made_or_refused(name: str, tmp_path: Path) -> None:
    try:
        args = flags(tmp_path, "--optim", name)
    except InputError as error:
        assert str(error).startswith(f"--optim {name} ") and name not in ("adamw_torch", "adafactor", "sgd", "rmsprop")
    else:
        assert args.optim == name


@pytest.mark.parametrize(
    "given",
    [
        ("cosine_with_min_lr", '{"min_lr": 1e-6}'),
        ("warmup_stable_decay", '{"num_decay_steps": 1}'),
        ("cosine_with_restarts", ' {"num_cycles": 2}'),
        ("inverse_sqrt", '{"timescale": 5}'),
    ],
)
def test_schedules_that_take_values(given: tuple[str, str], tmp_path: Path) -> None:
    args = flags(tmp_path, "--lr_scheduler_type", given[0], "--lr_scheduler_kwargs", given[1])
    assert args.lr_scheduler_kwargs == json.loads(given[1])


def test_spellings_that_the_stock_classes_take(tmp_path: Path) -> None:
    assert flags(tmp_path, "--torch_compile_backend", "EAGER").torch_compile_backend == "eager"
    assert flags(tmp_path, "--optim_args", " ").optim_args is None
    args = flags(tmp_path, "--optim", "sgd", "--optim_args", "momentum=0.9, nesterov=true")
    assert args.optim_args == "momentum=0.9, nesterov=true"


def test_a_warm_up_that_does_nothing_is_reported(tmp_path: Path) -> None:
    args = flags(tmp_path, "--lr_scheduler_type", "constant", "--warmup_steps", "5")
    assert training_flags.warn_of(args) == [
        "--lr_scheduler_type constant has no warm-up, so warmup_steps 5 does nothing"
    ]
    assert training_flags.warn_of(flags(tmp_path, "--lr_scheduler_type", "cosine", "--warmup_steps", "5")) == []


def test_a_compiler_that_fails_is_noticed_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no g++ is found: the backend raises, and nothing was loaded by then."""

    def broken(graph: Any, inputs: Any) -> Any:
        raise RuntimeError("no working C++ compiler\nwas found")

    args = flags(tmp_path, "--torch_compile_backend", "eager")
    training_flags.check_compiler(args)
    monkeypatch.setattr(args, "torch_compile_backend", broken)
    with pytest.raises(
        InputError, match="--torch_compile cannot be used here.*no working C.. compiler was found"
    ) as caught:
        start(args, None, None, None)  # type: ignore[arg-type] # looked at later
    assert "\n" not in str(caught.value)


# ---- exact resume where an argument decides it ----


@pytest.mark.parametrize(
    ("then", "now", "said"),
    [
        ({}, {"torch_compile_backend": "eager"}, "torch_compile_backend was None, is 'eager'"),
        ({"full_determinism": True}, {}, "full_determinism was True, is None"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "epoch", "eval_steps": 1},
            "eval_strategy was 'steps', is 'epoch'",
        ),
    ],
)
def test_a_checkpoint_is_resumed_with_what_computed_it(
    then: dict[str, Any], now: dict[str, Any], said: str, tmp_path: Path
) -> None:
    rows = runs.rows(8)
    common = {"max_steps": 4, "save_steps": 2}
    try:
        runs.trainer("lora", runs.arguments(tmp_path, **common, **then), rows, rows).train()
        run = runs.trainer("lora", runs.arguments(tmp_path, **common, **now), rows, rows)
        with pytest.raises(InputError, match=said):
            run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_schedule_by_metric_resumes_exactly(tmp_path: Path) -> None:
    rows, results = runs.rows(24), []
    for folder in (tmp_path / "whole", tmp_path / "whole" / "checkpoint-4"):
        args = runs.arguments(
            tmp_path / "whole",
            max_steps=8,
            save_steps=4,
            eval_steps=1,
            eval_strategy="steps",
            logging_steps=1,
            lr_scheduler_type="reduce_lr_on_plateau",
            lr_scheduler_kwargs={"factor": 0.5, "patience": 0, "threshold": 0.9},
        )
        run = runs.trainer("lora", args, rows, rows)
        run.train(resume_from_checkpoint=str(folder) if folder.name != "whole" else None)
        results.append(runs.result(run))
    assert runs.differences(*results) == []
    rates = [log["learning_rate"] for log in results[0]["history"] if "learning_rate" in log]
    assert len(set(rates)) > 1


# ---- everything, as a user would try it ----

USUAL = [
    *("--do_train", "--do_eval", "--do_predict", "--max_steps", "2", "--max_seq_length", "32", "--use_cpu"),
    *("--max_train_samples", "16", "--max_eval_samples", "8", "--max_predict_samples", "4", "--report_to", "none"),
]
TRY: dict[str, list[str]] = {
    "accelerator_config": [
        '{"split_batches":true}',
        '{"dispatch_batches":true}',
        '{"even_batches":false}',
        '{"use_seedable_sampler":false}',
        '{"non_blocking":true}',
        '{"gradient_accumulation_kwargs":{"num_steps":2}}',
        '{"gradient_accumulation_kwargs":{"sync_each_batch":true}}',
        '{"gradient_accumulation_kwargs":{"foo":2}}',
        '{"use_configured_state":true}',
        '{"foo":1}',
        "garbage",
    ],
    "activation_checkpointing": ["True"],
    "activation_checkpointing_kwargs": ["garbage"],
    "adam_beta1": ["0", "1"],
    "adam_beta2": ["0", "1"],
    "adam_epsilon": ["0", "-1"],
    "auto_find_batch_size": ["True"],
    "bf16": ["True", "True --fp16"],
    "bf16_full_eval": ["True", "True --bf16"],
    "data_seed": ["-1", "5"],
    "dataloader_in_order": ["False --dataloader_num_workers 2"],
    "dataloader_multiprocessing_context": [
        "spawn",
        "bogus --dataloader_num_workers 1",
        "fork --dataloader_num_workers 1",
    ],
    "dataloader_num_workers": ["1", "-1"],
    "dataloader_persistent_workers": ["True", "True --dataloader_num_workers 1"],
    "dataloader_prefetch_factor": ["2", "2 --dataloader_num_workers 1", "0 --dataloader_num_workers 1"],
    "ddp_backend": ["bogus", "gloo", "nccl"],
    "ddp_bucket_cap_mb": ["0", "-1", "10"],
    "ddp_timeout": ["0", "-1", "100"],
    "debug": ["underflow_overflow", "tpu_metrics_debug", "bogus"],
    "deepspeed": ["x.json", '{"a":1}'],
    "disable_tqdm": ["False", "x"],
    "eval_accumulation_steps": ["0", "1", "-1"],
    "eval_delay": ["1 --eval_strategy steps --eval_steps 1", "-1", "0.5"],
    "eval_on_start": ["True", "True --eval_strategy epoch"],
    "eval_steps": ["0", "-1", "1 --eval_strategy steps"],
    "eval_strategy": [
        "steps",
        "epoch",
        "steps --eval_steps 0.5",
        "steps --eval_steps 1.5",
        "steps --eval_steps 0",
        "bogus",
        "steps --logging_steps 0.3",
    ],
    "fp16": ["True", "True --fp16_full_eval"],
    "fp16_full_eval": ["True", "True --bf16_full_eval"],
    "fsdp": ["full_shard", "true"],
    "fsdp_config": ["x.json", '{"a":1}'],
    "full_determinism": ["True"],
    "gradient_accumulation_steps": ["0", "1000"],
    "gradient_checkpointing": [
        "True",
        'True --gradient_checkpointing_kwargs {"use_reentrant":true}',
        'True --gradient_checkpointing_kwargs {"use_reentrant":false}',
        'True --gradient_checkpointing_kwargs {"foo":1}',
        "True --gradient_checkpointing_kwargs garbage",
    ],
    "gradient_checkpointing_kwargs": ["garbage", '{"use_reentrant":true}'],
    "greater_is_better": ["True", "x"],
    "hub_private_repo": ["True", "x"],
    "hub_strategy": ["end", "bogus"],
    "include_for_metrics": ["inputs", "loss inputs"],
    "include_num_input_tokens_seen": ["True", "non_padding", "bogus", "all"],
    "label_names": ["labels", "foo", "label labels"],
    "label_smoothing_factor": ["0.1", "1", "-0.1"],
    "learning_rate": ["0", "1e30", "-1"],
    "length_column_name": [
        "foo --train_sampling_strategy group_by_length",
        "label --train_sampling_strategy group_by_length",
        "label --train_sampling_strategy batch_rebalance",
    ],
    "liger_kernel_config": ['{"rope":true}', "garbage"],
    "load_best_model_at_end": [
        "True",
        "True --eval_strategy epoch",
        "True --eval_strategy steps --eval_steps 2 --save_steps 3",
        "True --eval_strategy steps --eval_steps 1 --save_steps 1 --save_only_model",
        "True --eval_strategy epoch --save_strategy epoch --save_total_limit 1",
        "True --eval_strategy steps --eval_steps 0.5 --save_steps 1",
        "True --eval_strategy epoch --save_strategy epoch --metric_for_best_model nope",
    ],
    "local_rank": ["0", "3"],
    "log_level": ["debug", "bogus"],
    "log_level_replica": ["critical", "bogus"],
    "logging_steps": ["0", "1.5", "-1", "1"],
    "logging_strategy": ["epoch", "no", "bogus", "steps --logging_steps 0", "steps --logging_steps 0.5"],
    "lr_scheduler_kwargs": ["garbage", '{"foo":1}', "{bad", "[]"],
    "lr_scheduler_type": [
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "constant",
        "constant_with_warmup",
        "inverse_sqrt",
        "reduce_lr_on_plateau",
        "cosine_with_min_lr",
        "cosine_warmup_with_min_lr",
        "warmup_stable_decay",
        "greedy",
        "bogus",
        "reduce_lr_on_plateau --eval_strategy epoch",
        "greedy --eval_strategy epoch",
        'cosine_with_min_lr --lr_scheduler_kwargs {"min_lr":1e-6}',
        'warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":1}',
        'warmup_stable_decay --lr_scheduler_kwargs {"num_decay_steps":1000}',
        'polynomial --lr_scheduler_kwargs {"lr_end":1}',
        'cosine_with_restarts --lr_scheduler_kwargs {"num_cycles":0}',
        'reduce_lr_on_plateau --eval_strategy epoch --lr_scheduler_kwargs {"factor":2}',
        "reduce_lr_on_plateau --eval_strategy epoch --metric_for_best_model accuracy",
    ],
    "max_grad_norm": ["0", "-1", "inf", "nan"],
    "max_steps": ["0 --num_train_epochs 1", "-5 --num_train_epochs 0.5"],
    "metric_for_best_model": ["accuracy", "nope"],
    "neftune_noise_alpha": ["5", "-1", "0"],
    "num_train_epochs": ["0", "0.01 --max_steps -1", "1e9"],
    "optim_args": [
        "garbage",
        "a=b",
        "momentum=0.9",
        "=,=",
        "lr=1",
        "momentum=0.9 --optim sgd",
        "momentum=x --optim sgd",
        "nesterov=true --optim sgd",
        "alpha=0.9 --optim rmsprop",
        "foo=1 --optim adafactor",
    ],
    "optim_target_modules": ["all-linear", "query"],
    "output_dir": ["/etc/passwd", "/proc/x"],
    "parallelism_config": ["x", '{"tp_size":2}'],
    "per_device_eval_batch_size": ["0", "1000"],
    "per_device_train_batch_size": ["0", "1000"],
    "push_to_hub": ["True", "True --hub_model_id a/b", "True --hub_token hf_x --hub_model_id bad name!!/x/y"],
    "report_to": ["all", "wandb", "tensorboard", "none tensorboard", "bogus"],
    "resume_from_checkpoint": ["True", "/nope"],
    "save_steps": ["0", "-1", "1"],
    "save_strategy": [
        "best",
        "no",
        "best --metric_for_best_model accuracy",
        "best --metric_for_best_model accuracy --eval_strategy steps --eval_steps 1",
        "steps --save_steps 0.5",
        "epoch",
    ],
    "save_total_limit": ["0", "-1", "1 --save_steps 1"],
    "seed": ["-1", "4294967296", "0"],
    "skip_memory_metrics": ["False"],
    "tf32": ["True", "False"],
    "torch_compile": [
        "False",
        "True --torch_compile_backend eager",
        "True --torch_compile_backend aot_eager",
        "True --torch_compile_backend tvm",
    ],
    "torch_compile_backend": ["eager", "ipex", "bogus"],
    "torch_compile_mode": ["default", "bogus"],
    "torch_empty_cache_steps": ["0", "1"],
    "trackio_static_space_id": ["x", "False"],
    "train_sampling_strategy": [
        "sequential",
        "group_by_length",
        "batch_rebalance",
        "bogus",
        "batch_rebalance --padding longest",
    ],
    "warmup_steps": ["-1", "0.5", "1.5", "1000"],
    "weight_decay": ["-1", "1e30", "x"],
}


def values_to_try(field: Any) -> list[str]:
    """Two unusual values at least; for a flag that the table above lacks, what its type suggests."""
    if field.name in TRY:
        return TRY[field.name]
    if field.name == "optim":
        return [*(o.value for o in OptimizerNames), "bogus"]
    return (
        ["True", "False"]
        if "bool" in str(field.type)
        else ["garbage", "3"]
        if "str" in str(field.type)
        else ["3", "-3"]
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", ["an adapter", "full fine-tuning"])
@pytest.mark.parametrize("field", dataclasses.fields(TrainingArguments), ids=lambda field: field.name)
def test_no_value_ends_in_a_traceback(
    field: Any, method: str, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path, entry_point: Any
) -> None:
    """A run ends well, or is refused before anything is written, or is one whose numbers fail (exit status 3)."""
    folder = tmp_path / "out"
    usual = [*("--model_name_or_path", str(tiny_model_dir), "--dataset_name", str(mrpc_dir)), *USUAL]
    usual += ["--apply_lora", "--lora_r", "2", "--lora_alpha", "4"] if method == "an adapter" else []
    problems = []
    for value in values_to_try(field):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            entry_point("AdaLoRA").main([*usual, "--output_dir", str(folder), f"--{field.name}", *value.split(" ")])
        except InputError as error:
            left = [path.name for path in folder.glob("*") if path.name not in (".lock", "runs")]
            if left or "\n" in str(error):
                problems.append(f"{value}: refused late (left: {left}) or in several lines: {error}")
        except RunError:
            pass
        except Exception as error:
            problems.append(f"{value}: {type(error).__name__}: {error}")
        finally:
            unlock(folder)
            torch.use_deterministic_algorithms(False)
    assert not problems, "\n".join(problems)
