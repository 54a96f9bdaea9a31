"""Fine-tune a pretrained encoder on GLUE with LoRA, SVD-LoRA or AdaLoRA (arXiv 2106.09685, 2303.10512).

LoRA:    --apply_lora --lora_type frd    (--reg_orth_coef above 0 adds the penalty on cosines between directions)
AdaLoRA: --apply_lora --lora_type svd --apply_adalora --target_rank ...
Without --apply_lora everything is fine-tuned.
"""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not Path(str(importlib.util.find_spec("loralib").origin)).with_name("adapt.py").is_file():
    sys.exit(
        "error: the package 'loralib' found here is another one (Microsoft's): run 'pip uninstall loralib', then "
        f"'pip install -e {Path(__file__).resolve().parents[1]}', or use an environment of its own."
    )

from loralib.adapt import adapt, factors
from loralib.allocator import AllocatorCallback, RankAllocator
from loralib.errors import InputError
from loralib.glue import flow
from loralib.glue.arguments import (
    DataArguments,
    GlueTrainingArguments,
    LoRAArguments,
    ModelArguments,
    command,
    flag,
    parse,
)
from loralib.layers import LoRALinear, SVDLinear
from loralib.regularizer import frd_penalty, svd_penalty
from loralib.trainer import LoRATrainer


@dataclass
class AdaLoRAArguments(LoRAArguments):
    """LoRA and AdaLoRA. Symbols are those of arXiv 2303.10512."""

    _argument_group_name = "LoRA and AdaLoRA"

    lora_type: str = flag("frd", "frd: W + alpha/r B A (LoRA); svd: triplets P Lambda Q (AdaLoRA), P = B, Q = A.")
    reg_orth_coef: float = flag(0.0, "gamma: weight of the orthogonality penalty (svd: eq. 4; frd: cosines).")
    apply_adalora: bool = flag(False, "Allocate the budget of singular values while training (needs lora_type svd).")
    target_rank: int | None = flag(None, "b^(T) / matrices: average rank at the end, below lora_r.")
    target_total_rank: int | None = flag(None, "b^(T): ranks of all matrices together at the end.")
    init_warmup: int = flag(0, "t_i: steps at the start without pruning.")
    final_warmup: int = flag(0, "t_f: steps at the end at the target budget.")
    mask_interval: int = flag(10, "Delta_T: steps between two prunings.")
    beta1: float = flag(0.85, "beta_1: decay of the average of importance.")
    beta2: float = flag(0.85, "beta_2: decay of the average of its uncertainty.")
    tb_writter_loginterval: int | None = flag(
        None,
        "Steps between entries of budget and ranks in TensorBoard; logging_steps where not given.",
        aliases=["--tb_writer_loginterval"],
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_type not in ("frd", "svd"):
            raise InputError(
                f"lora_type is {self.lora_type!r}, it must be frd or svd here (v1 and v2: RM-LoRA/run_glue.py)."
            )
        if self.reg_orth_coef < 0:
            raise InputError(f"reg_orth_coef is {self.reg_orth_coef}, it must be 0 or more.")
        if not self.apply_adalora:
            return
        if not self.apply_lora or self.lora_type != "svd":
            raise InputError(
                f"--apply_adalora needs --apply_lora and --lora_type svd, here apply_lora is {self.apply_lora} and "
                f"lora_type is {self.lora_type}: only triplets have singular values to allocate."
            )
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, it must lie between 0 and 1, both excluded.")
        for name, least in (
            ("mask_interval", 1),
            ("init_warmup", 0),
            ("final_warmup", 0),
            ("tb_writter_loginterval", 1),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} is {value}, it must be {least} or more.")
        if self.target_rank is not None and not 1 <= self.target_rank < self.lora_r:
            raise InputError(
                f"target_rank is {self.target_rank}, it must lie in 1 to {self.lora_r - 1}, below lora_r = "
                f"{self.lora_r}."
            )


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, load data and model, adapt, train, report. Returns the final metrics."""
    classes = (ModelArguments, DataArguments, AdaLoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)

    adapted, adapter, penalty = [], None, None
    method = "full"
    if lora.apply_lora:
        method = "adalora" if lora.apply_adalora else "svd-lora" if lora.lora_type == "svd" else "lora"
        layer = SVDLinear if lora.lora_type == "svd" else LoRALinear
        adapted = adapt(model, layer, lora.modules, **lora.layer_settings)
        adapter = flow.adapter_config(method, lora, model_args, data.task, layer=lora.lora_type)
        penalty = partial(svd_penalty if lora.lora_type == "svd" else frd_penalty, *factors(model))
        if lora.lora_path:
            flow.load_lora_path(model, lora.lora_path)

    trainer = LoRATrainer(
        penalty=penalty,
        penalty_coef=lora.reg_orth_coef,
        penalty_name="orth_regu_loss",
        adapter=adapter,
        **flow.trainer_parts(run, data, tokenizer, data_args, model),
    )
    lines = []
    if not lora.apply_adalora and (lora.target_rank or lora.target_total_rank):
        lines.append("apply_adalora is off: no budget is allocated, all ranks stay, whatever target_rank says")
    if lora.apply_adalora and training.do_train:
        total = trainer.total_steps()
        allocator = RankAllocator(
            model,
            target_rank=lora.target_rank,
            target_total_rank=lora.target_total_rank,
            init_warmup=lora.init_warmup,
            final_warmup=lora.final_warmup,
            mask_interval=lora.mask_interval,
            total_step=total,
            beta1=lora.beta1,
            beta2=lora.beta2,
        )
        trainer.method_state["allocator"] = allocator
        trainer.add_callback(AllocatorCallback(trainer, allocator, lora.tb_writter_loginterval))
        lines.append(
            f"budget: {allocator.total_rank} singular values until step {lora.init_warmup}, then falling to "
            f"{allocator.target_total} at step {total - lora.final_warmup} of {total}"
        )
    flow.announce(run, trainer, method, adapted, *lines)
    return flow.finish(run, trainer, data, method)


if __name__ == "__main__":
    command(main)
