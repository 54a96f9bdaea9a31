"""The settings that decide a run's numbers: a checkpoint is only resumed with the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralib.errors import InputError

NUMERIC_ARGUMENTS = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "auto_find_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "n_gpu",
    "num_train_epochs",
    "max_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "neftune_noise_alpha",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "bf16",
    "fp16",
)
# These decide too, but older checkpoints do not have them. A value that is off (None, False) is stored as None, and so
# equals a missing one.
LATER_ARGUMENTS = (
    "torch_compile_backend",
    "torch_compile_mode",
    "tf32",
    "full_determinism",
    "dataloader_persistent_workers",  # with it, no seed for workers is drawn from the global random state
)
# These decide as well if the schedule depends on evaluations.
_EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# These decide which checkpoint is the result.
_BEST = ("load_best_model_at_end", "metric_for_best_model", "greater_is_better")
# Settings that older checkpoints lack; these still resume.
LATER = frozenset({"label_names", "config_name", "model_revision", "lora_path", "eval_rows", "eval_data", *_BEST})


def argument_settings(args: Any) -> dict[str, Any]:
    """The stock arguments that decide a run's numbers: values by name."""
    own = {name: getattr(args, name) for name in NUMERIC_ARGUMENTS}
    own |= {name: getattr(args, name) or None for name in LATER_ARGUMENTS}
    if args.lr_scheduler_type in _BY_METRIC:
        own |= {name: getattr(args, name) for name in _EVALUATIONS}
    if args.load_best_model_at_end:
        own |= {name: getattr(args, name) for name in _BEST}
    return own


def evaluations_decide(args: Any) -> bool:
    """Whether what a run ends with depends on its evaluations, and so on the rows that are evaluated."""
    stops = getattr(args, "early_stopping_patience", None) is not None
    return stops or args.load_best_model_at_end or args.lr_scheduler_type in _BY_METRIC


def check_settings(folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any], what: str = "checkpoint") -> None:
    """Refuse to resume with other settings: the result would match neither the old run nor a new one.

    Args:
        folder: the checkpoint or stage, for the message.
        saved: its settings; own: those of this run.
        what: what the message calls the folder.

    Raises:
        InputError: names the settings that differ, with both values.
    """
    names = ["method"] if saved.get("method") != own.get("method") else sorted({*saved, *own} - (LATER - {*saved}))
    differing = [_difference(n, saved.get(n), own.get(n)) for n in names if saved.get(n) != own.get(n)]
    if not differing:
        return
    why = ""
    if any(saved.get(n) != own.get(n) for n in ("world_size", "n_gpu")):
        why = " (another number of processes would deal other rows and random numbers to each)"
    more = f"; and {len(differing) - 6} more" if len(differing) > 6 else ""
    raise InputError(
        f"{what} {folder} belongs to a run with other settings: {'; '.join(differing[:6])}{more}{why}: use the "
        "old settings again, name another --output_dir, or start over with --overwrite_output_dir."
    )


def _difference(name: str, saved: Any, own: Any) -> str:
    if isinstance(saved, list) and isinstance(own, list):
        lost, new = [x for x in saved if x not in own], [x for x in own if x not in saved]
        parts = [
            f"{len(saved)} then, {len(own)} now",
            *(f"without {x}" for x in lost[:1]),
            *(f"with {x}" for x in new[:1]),
        ]
        return f"{name}: {', '.join(parts)}"
    return f"{name} was {saved!r}, is {own!r}"
