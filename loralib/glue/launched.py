"""Turns requests of `accelerate launch`, of its config file and of ACCELERATE_* variables into flags of the same
meaning.

Without this the libraries would follow the variables, while record, resume and checks would follow the flags.
"""

import os
from typing import Any

from loralib.errors import InputError

_SHARDING = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config (tensor, context, sequence or expert parallelism)",
}
_YES, _NO = ("1", "true", "yes", "on", "y", "t"), ("", "0", "false", "no", "off", "n", "f")
_DYNAMO = "ACCELERATE_DYNAMO_"


def take_launcher_settings(args: Any) -> list[str]:
    """Set the flags of `args` that correspond to the variables.

    Args:
        args: the training arguments, before the stock class has processed them.

    Returns:
        Sentences for the log about the flags that were set.

    Raises:
        InputError: the launcher asks for something that is not supported, or contradicts a flag.
    """
    for variable, what in _SHARDING.items():
        if _on(variable):
            raise InputError(
                f"accelerate launch asks for {what} ({variable}={os.environ[variable]}), which is not supported: "
                "AdaLoRA, SoRA and RM-LoRA change single parameters and gradients, and sharding splits these. Use a "
                "config file without it, or torchrun."
            )
    taken = [*_take_precision(args), *_take_compiler(args)]
    if _on("ACCELERATE_USE_CPU") and not args.use_cpu:
        args.use_cpu = True
        taken.append("accelerate launch asks for the CPU: taken as --use_cpu")
    steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "").strip()
    if steps not in ("", "auto", "1", str(args.gradient_accumulation_steps)):
        raise InputError(
            f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS is {steps} and --gradient_accumulation_steps is "
            f"{args.gradient_accumulation_steps}: the Trainer reads only the flag, so give {steps} there or unset the "
            "variable."
        )
    return taken


def _take_precision(args: Any) -> list[str]:
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower()
    if not asked:
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)  # accelerate would fail on an empty value
    if asked in ("", "no"):
        return []
    if asked not in ("bf16", "fp16"):
        raise InputError(f"accelerate launch asks for --mixed_precision {asked}, it must be no, bf16 or fp16.")
    flag = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    if flag not in (None, asked):
        raise InputError(
            f"accelerate launch asks for --mixed_precision {asked} and the program for --{flag}: give one of them."
        )
    if flag is not None:
        return []
    setattr(args, asked, True)
    return [f"accelerate launch asks for --mixed_precision {asked}: taken as --{asked}"]


def _take_compiler(args: Any) -> list[str]:
    backend = os.environ.get(f"{_DYNAMO}BACKEND", "no").strip().lower() or "no"
    for name in ("USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        # accelerate reads these variables even if --torch_compile sets the backend.
        if _on(_DYNAMO + name) and (backend != "no" or args.torch_compile):
            raise InputError(
                f"accelerate launch asks for --dynamo_{name.lower()}, which is not supported: give only "
                "--torch_compile with --torch_compile_backend and --torch_compile_mode."
            )
    # accelerate launch always sets this to False, but by default torch decides for itself.
    os.environ.pop(f"{_DYNAMO}USE_DYNAMIC", None)
    if backend == "no":
        return []
    if args.torch_compile_backend is not None and args.torch_compile_backend.lower() != backend:
        raise InputError(
            f"accelerate launch asks for --dynamo_backend {backend} and the program for --torch_compile_backend "
            f"{args.torch_compile_backend}: give one of them."
        )
    mode = os.environ.get(f"{_DYNAMO}MODE", "default").strip()
    args.torch_compile, args.torch_compile_backend = True, backend
    if mode not in ("", "default") and args.torch_compile_mode is None:
        args.torch_compile_mode = mode
    return [f"accelerate launch asks for --dynamo_backend {backend}: taken as --torch_compile_backend {backend}"]


def _on(variable: str) -> bool:
    value = os.environ.get(variable, "").strip().lower()
    if value not in _YES + _NO:
        raise InputError(f"{variable} is {os.environ[variable]!r}, it must be true or false.")
    if not value:
        os.environ.pop(variable, None)  # accelerate would fail on an empty value
    return value in _YES
