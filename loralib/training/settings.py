"""The settings that decide a run's numbers: a checkpoint is only resumed with the same ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loralib.errors import InputError

# Stock arguments that decide a run's numbers: a checkpoint is only resumed with the same ones.
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
# These too, but checkpoints did not always hold them: None stands for the default, and for what is not there.
LATER_ARGUMENTS = (
    "torch_compile_backend",
    "torch_compile_mode",
    "tf32",
    "full_determinism",
    "dataloader_persistent_workers",  # which draws no seeds for its workers from the global random state
)
# With a schedule that looks at the evaluations, these decide as well.
_EVALUATIONS = ("eval_strategy", "eval_steps", "eval_delay", "metric_for_best_model", "greater_is_better")
_BY_METRIC = ("reduce_lr_on_plateau", "greedy")
# Settings that came later: checkpoints without them still resume.
LATER = frozenset({"label_names"})


def argument_settings(args: Any) -> dict[str, Any]:
    """The values of a run's stock arguments that decide its numbers, by name."""
    own = {name: getattr(args, name) for name in NUMERIC_ARGUMENTS}
    own |= {name: getattr(args, name) or None for name in LATER_ARGUMENTS}
    if args.lr_scheduler_type in _BY_METRIC:
        own |= {name: getattr(args, name) for name in _EVALUATIONS}
    return own


def check_settings(folder: Path, saved: Mapping[str, Any], own: Mapping[str, Any], what: str = "checkpoint") -> None:
    """Refuse to resume a run whose settings differ: its end would equal neither run's.

    Raises:
        InputError: names each setting that differs, with both values.
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
        f"{what} {folder} belongs to a run with other settings: {'; '.join(differing[:6])}{more}{why}: go back to "
        "them, name another --output_dir, or start over with --overwrite_output_dir."
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
