"""Checks the flags of transformers' TrainingArguments, and refuses what cannot work before anything is loaded.

Every field is in exactly one of three tables. A flag in `WORK` takes every value that transformers takes. A flag in
`CHECKED` takes some values. A flag in `REFUSED` takes only its default, for the reason that the table gives. A test
compares the tables with the fields, so that it notices when a new version of transformers has a new flag.
"""

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin
from torch import nn
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels

from loralib.errors import InputError

_SHARDS = "AdaLoRA, SoRA and RM-LoRA change single parameters and gradients, and sharding splits these; train on several GPUs with torchrun instead"  # noqa: E501
_WHOLE = "GLUE's metrics are computed once, from the outputs of all rows together"
_LIGER = "its kernels replace modules that this project adapts, and nobody has compared the two"

REFUSED = {
    "batch_eval_metrics": _WHOLE,
    "debug": "a loss or a gradient that is not finite stops the run without it, and the message names the step",
    "deepspeed": _SHARDS,
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint here without it (docs/running.md)",
    "eval_do_concat_batches": _WHOLE,
    "eval_use_gather_object": "the outputs are tensors, which the usual gathering handles",
    "fsdp": _SHARDS,
    "fsdp_config": _SHARDS,
    "ignore_data_skip": "a run that goes on from a checkpoint would see other rows than an undisturbed run",
    "include_for_metrics": "GLUE's metrics need only predictions and labels",
    "jit_mode_eval": "the stock Trainer has given it up",
    "length_column_name": "rows are grouped by the number of their tokens",
    "liger_kernel_config": _LIGER,
    "optim_target_modules": "only GaLore and APOLLO read it, which are refused too",
    "parallelism_config": _SHARDS,
    "past_index": "a classifier of whole texts has no state to pass on",
    "prediction_loss_only": "an evaluation without predictions has no metrics",
    "restore_callback_states_from_checkpoint": "everything that a run needs to go on is restored without it",
    "use_cache": "a classifier does not generate texts, so it has no use for past keys and values",
    "use_liger_kernel": _LIGER,
}

# Some values work. The functions below, GlueTrainingArguments or the stock class refuse the others.
CHECKED = """
    accelerator_config activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon auto_find_batch_size bf16
    data_seed dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers
    dataloader_prefetch_factor ddp_backend ddp_bucket_cap_mb ddp_timeout eval_accumulation_steps eval_on_start
    eval_steps fp16 gradient_accumulation_steps gradient_checkpointing_kwargs label_names label_smoothing_factor
    learning_rate load_best_model_at_end log_level log_level_replica logging_steps lr_scheduler_kwargs
    lr_scheduler_type max_grad_norm metric_for_best_model neftune_noise_alpha num_train_epochs optim optim_args
    output_dir per_device_eval_batch_size per_device_train_batch_size remove_unused_columns report_to
    resume_from_checkpoint save_steps save_strategy save_total_limit seed torch_compile torch_compile_backend
    torch_compile_mode torch_empty_cache_steps warmup_steps weight_decay
""".split()

WORK = """
    activation_checkpointing average_tokens_across_devices bf16_full_eval dataloader_drop_last dataloader_in_order
    dataloader_pin_memory ddp_broadcast_buffers ddp_find_unused_parameters ddp_static_graph disable_tqdm do_eval
    do_predict do_train eval_delay eval_strategy fp16_full_eval full_determinism
    gradient_checkpointing greater_is_better hub_always_push hub_model_id hub_private_repo hub_revision hub_strategy
    hub_token include_num_input_tokens_seen local_rank log_on_each_node logging_first_step logging_nan_inf_filter
    logging_strategy max_steps project push_to_hub run_name save_on_each_node save_only_model skip_memory_metrics
    tf32 trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy use_cpu
""".split()

BY_METRIC = ("reduce_lr_on_plateau", "greedy")  # schedules that depend on the evaluations
_CHECKPOINTING = ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs")  # older and newer name
_CHECKPOINTING_KEYS = ("use_reentrant", "preserve_rng_state", "determinism_check", "debug")
_NOT_AT_ONCE = "it does not step once on the gradients of all parameters, which masks, penalties and importance need"
_OTHER_OPTIMIZERS = {
    "adalomo": _NOT_AT_ONCE,
    "apollo": _NOT_AT_ONCE,
    "galore": _NOT_AT_ONCE,
    "lomo": _NOT_AT_ONCE,
    "grokadamw": "a run that goes on from its checkpoint ends with other weights than an undisturbed run",
    "schedule_free": "it evaluates other weights than the ones that are saved",
}
_STEPS = 100  # of the schedule with which the flags are tried


def check_raw_flags(args: TrainingArguments) -> None:
    """Refuse values that are wrong by themselves. This is called before the stock class processes them.

    Raises:
        InputError: names the flag, its value and the reason.
    """
    for field, default in _defaults(args).items():
        value = getattr(args, field, None)
        if field in REFUSED and value != default and (value or default):
            raise InputError(f"--{field} {value} is not supported: {REFUSED[field]}.")
    _check_mappings(args)
    for name in ("log_level", "log_level_replica"):
        if getattr(args, name) not in trainer_log_levels:
            raise InputError(f"{name} is {getattr(args, name)!r}, it must be one of {', '.join(trainer_log_levels)}.")
    if args.optim_args is not None and not args.optim_args.strip():
        args.optim_args = None
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if name in BY_METRIC and args.eval_strategy == "no":
        raise InputError(f"--lr_scheduler_type {name} needs --eval_strategy steps or epoch: it looks at the metrics.")
    if args.label_names not in (None, ["labels"]):
        raise InputError(
            f"label_names is {args.label_names}, it must be labels: the column of labels in your data is renamed to it."
        )
    if not args.remove_unused_columns:
        raise InputError("--remove_unused_columns False is not supported: a batch holds only the model's inputs.")
    if args.save_total_limit is not None and args.save_total_limit < 1:
        raise InputError(f"save_total_limit is {args.save_total_limit}, it must be 1 or more; without it all are kept.")
    if args.eval_steps is not None and args.eval_steps < 0:
        raise InputError(f"eval_steps is {args.eval_steps}, it must be above 0.")
    if args.save_strategy == "steps" and not args.save_steps > 0:
        raise InputError(f"save_steps is {args.save_steps}, it must be above 0; --save_strategy no saves none.")
    if args.save_strategy == "best" and args.metric_for_best_model is None:
        raise InputError("--save_strategy best needs --metric_for_best_model (loss, or one of the task's metrics).")
    if args.save_strategy == "best" and args.eval_strategy == "no":
        raise InputError("--save_strategy best needs --eval_strategy steps or epoch: nothing else says what is best.")
    if args.do_train and args.eval_strategy == "no":
        if args.eval_on_start and not args.do_eval:
            raise InputError("--eval_on_start needs --do_eval, or --eval_strategy steps or epoch: it evaluates.")
        if args.load_best_model_at_end:
            raise InputError("--load_best_model_at_end needs --eval_strategy steps or epoch: nothing else says what is "
                             "best.")  # fmt: skip
    if args.neftune_noise_alpha is not None and args.neftune_noise_alpha < 0:
        raise InputError(f"neftune_noise_alpha is {args.neftune_noise_alpha}, it must be 0 or more.")
    if args.ddp_timeout < 1:
        raise InputError(f"ddp_timeout is {args.ddp_timeout}, it must be 1 second or more.")
    if args.ddp_bucket_cap_mb is not None and args.ddp_bucket_cap_mb < 1:
        raise InputError(f"ddp_bucket_cap_mb is {args.ddp_bucket_cap_mb}, it must be 1 or more.")
    _check_accelerator_config(args.accelerator_config)
    if not args.dataloader_num_workers:
        for name in (
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_multiprocessing_context",
        ):
            if getattr(args, name):
                raise InputError(f"{name} is {getattr(args, name)}, but --dataloader_num_workers is 0: give 1 or more.")
    if args.dataloader_prefetch_factor is not None and args.dataloader_prefetch_factor < 1:
        raise InputError(f"dataloader_prefetch_factor is {args.dataloader_prefetch_factor}, it must be 1 or more.")


def _check_mappings(args: TrainingArguments) -> None:
    """Refuse flags that should hold a JSON mapping and do not, or whose mapping has no effect."""
    for name in ("lr_scheduler_kwargs", *_CHECKPOINTING):
        value = getattr(args, name, None)
        if isinstance(value, str):
            setattr(args, name, value.strip())  # the stock class expects a brace at the beginning
            try:
                value = json.loads(value)
            except ValueError:
                pass
        if value is not None and not isinstance(value, dict):
            raise InputError(f'{name} is {value!r}, it must be a JSON mapping like {{"name": value}}.')
        if value and name in _CHECKPOINTING:
            other = [key for key in value if key not in _CHECKPOINTING_KEYS]
            if other:
                raise InputError(
                    f"{name} has the key {other[0]!r}, it must be one of {', '.join(_CHECKPOINTING_KEYS)}."
                )
            if not (args.gradient_checkpointing or getattr(args, "activation_checkpointing", False)):
                raise InputError(f"{name} is {value}, but --gradient_checkpointing is not given.")


def _check_accelerator_config(value: Any) -> None:
    """Refuse a value that is neither a mapping nor a file with one, or that has keys which accelerate does not know."""
    if isinstance(value, str):
        text = value.strip()
        if not text.startswith("{"):
            try:
                text = Path(text).expanduser().read_text(encoding="utf-8")
            except FileNotFoundError as error:
                raise InputError(f"accelerator_config names the file {value}, which does not exist.") from error
            except (OSError, ValueError) as error:
                raise InputError(
                    f"accelerator_config names the file {value}, which cannot be read: {error}."
                ) from error
        try:
            value = json.loads(text)
        except ValueError as error:
            raise InputError(f"accelerator_config ({text[:80]!r}) is not JSON: {error}.") from error
    if not isinstance(value, dict):
        return
    inner = value.get("gradient_accumulation_kwargs") or {}
    for name, given, kind in (
        ("accelerator_config", value, AcceleratorConfig),
        ("gradient_accumulation_kwargs", inner, GradientAccumulationPlugin),
    ):
        known = [f.name for f in dataclasses.fields(kind)]
        for key in given:
            if key not in known:
                raise InputError(f"{name} has the key {key!r}, it must be one of {', '.join(known)}.")
    if value.get("use_configured_state"):
        raise InputError(
            "--accelerator_config with use_configured_state is not supported: no program here configures a state "
            "beforehand; leave it out."
        )


def warn_of(args: TrainingArguments) -> list[str]:
    """Sentences for the log about flags that the stock classes ignore silently."""
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    if args.warmup_steps and name in ("constant", *BY_METRIC):
        return [f"--lr_scheduler_type {name} has no warm-up, so warmup_steps {args.warmup_steps:g} does nothing"]
    return []


def check_optimizer_and_schedule(args: TrainingArguments) -> None:
    """Build the optimizer and the schedule for a one-element parameter, and refuse them if that fails.

    Raises:
        InputError: names the flag, its value and the reason.
    """
    parameter = nn.Parameter(torch.zeros(1))
    _check_optimizer(args, parameter)
    _check_schedule(args, parameter)


def check_compiler(args: TrainingArguments) -> None:
    """Refuse --torch_compile if there is no compiler or no such backend. To find out, compile a product.

    This takes some seconds, so it is done when a run starts, and not when flags are parsed.

    Raises:
        InputError: the message names the backend and quotes its error.
    """
    if not args.torch_compile:
        return
    x = torch.ones(2, 2, device=args.device, requires_grad=True)
    options: dict[str, Any] = {"backend": args.torch_compile_backend}
    if args.torch_compile_mode is not None:
        options["mode"] = args.torch_compile_mode
    try:
        torch.compile(lambda y: (y @ y).exp().sum(), **options)(x).backward()
    except Exception as error:  # each backend has its own exceptions
        raise InputError(
            f"--torch_compile cannot be used here: backend {args.torch_compile_backend} fails on a product of two "
            f"matrices ({_brief(error)}); install a compiler (g++ on a CPU) or leave the flag out."
        ) from error
    finally:
        torch._dynamo.reset()


def _check_optimizer(args: TrainingArguments, parameter: nn.Parameter) -> None:
    name = str(getattr(args.optim, "value", args.optim))
    for start, why in _OTHER_OPTIMIZERS.items():
        if name.startswith(start):
            raise InputError(f"--optim {name} is not supported: {why}; use adamw_torch, adafactor, sgd or another one.")
    given = [pair for pair in str(args.optim_args or "").replace(" ", "").split(",") if pair]
    if name in ("adamw_torch", "adamw_torch_fused") and not given:
        return
    for pair in given:
        if pair.count("=") != 1 or not all(pair.split("=")):
            raise InputError(f"optim_args is {args.optim_args!r}, it must be names and numbers: name=value,name=value.")
    stated = args.optim_args
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        unread = []
        for pair in given:
            args.optim_args = ",".join(other for other in given if other != pair) or None
            if Trainer.get_optimizer_cls_and_kwargs(args)[1] == settings:
                unread.append(pair)
        kind([parameter], **settings)
    except Exception as error:  # a package is missing, a number is bad, or the device lacks kernels
        of = f" with optim_args {stated!r}" if stated else ""
        raise InputError(f"--optim {name}{of} cannot be used here: {_brief(error)}.") from error
    finally:
        args.optim_args = stated
    if unread:
        raise InputError(f"optim_args has {unread[0]} without effect: --optim {name} does not read it, or it is the "
                         "default.")  # fmt: skip


def _check_schedule(args: TrainingArguments, parameter: nn.Parameter) -> None:
    name = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    given: Any = args.lr_scheduler_kwargs
    if given and name in ("constant", "constant_with_warmup"):
        raise InputError(f"lr_scheduler_kwargs is {given}, and --lr_scheduler_type {name} reads none of it.")
    if name == "linear" and not given:
        return
    optimizer = torch.optim.SGD([parameter], lr=args.learning_rate)
    rates: list[float] = []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # fmt: off
            schedule: Any = get_scheduler(name, optimizer, args.get_warmup_steps(_STEPS), _STEPS, dict(given or {}))
            # fmt: on
            for _ in range(_STEPS):
                optimizer.step()
                schedule.step(*([0.5] if name in BY_METRIC else []))
                rates.append(float(optimizer.param_groups[0]["lr"]))
    except Exception as error:  # an argument is missing, unknown or not a number
        needs = {"warmup_stable_decay": "num_decay_steps", "cosine_with_min_lr": "min_lr or min_lr_rate"}
        needs["cosine_warmup_with_min_lr"] = needs["cosine_with_min_lr"]
        hint = f"; it needs {needs[name]} in --lr_scheduler_kwargs" if name in needs else ""
        raise InputError(
            f"--lr_scheduler_type {name} with lr_scheduler_kwargs {given} cannot be used: {_brief(error)}{hint}."
        ) from error
    if not all(math.isfinite(rate) and rate >= 0 for rate in rates):
        raise InputError(
            f"--lr_scheduler_type {name} with lr_scheduler_kwargs {given} leads to a learning rate of "
            f"{next(r for r in rates if not (math.isfinite(r) and r >= 0))}, where it must be 0 or more."
        )


def _defaults(args: TrainingArguments) -> dict[str, Any]:
    made = ((f, f.default_factory) for f in dataclasses.fields(args))
    return {f.name: f.default if make is dataclasses.MISSING else make() for f, make in made}


def _brief(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words[:300].rstrip(". ")
