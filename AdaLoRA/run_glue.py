"""Fine-tune a pretrained encoder on GLUE with LoRA, SVD-LoRA or AdaLoRA (arXiv 2106.09685, 2303.10512).

LoRA:    --apply_lora --lora_type frd    (--reg_orth_coef above 0 adds the penalty on cosines between directions)
AdaLoRA: --apply_lora --lora_type svd --apply_adalora --target_rank ...    (without --apply_lora: full fine-tuning)
"""

import importlib.util
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if not Path(str(importlib.util.find_spec("loralib").origin)).with_name("adapt.py").is_file():
    sys.exit(
        "error: the package 'loralib' found here is another one (Microsoft's): run 'pip uninstall loralib', then "
        f"'pip install -e {Path(__file__).resolve().parents[1]}', or use another environment."
    )

from loralib.allocator import check_numbers
from loralib.errors import InputError, check_at_least
from loralib.glue.assemble import make_trainer
from loralib.glue.flags import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, flag
from loralib.glue.model import load_model
from loralib.glue.parsing import command, parse
from loralib.glue.run import load_data, start
from loralib.glue.train import train_and_report
from loralib.methods import Method, adalora, full_fine_tuning, lora


@dataclass
class AdaLoRAArguments(LoRAArguments):
    """LoRA and AdaLoRA. Symbols are those of arXiv 2303.10512."""

    _argument_group_name = "LoRA and AdaLoRA"

    lora_type: str = flag("frd", "frd: W + alpha/r B A (LoRA); svd: triplets P Lambda Q (AdaLoRA), P = B, Q = A.")
    reg_orth_coef: float = flag(0.0, "gamma: weight of the orthogonality penalty (svd: eq. 4; frd: cosines).")
    apply_adalora: bool = flag(False, "Allocate the budget of singular values while training (needs lora_type svd).")
    target_rank: int | None = flag(None, "b^(T) / matrices: average rank at the end, below lora_r.")
    target_total_rank: int | None = flag(None, "b^(T): ranks of all matrices together at the end.")
    init_warmup: float = flag(0, "t_i: steps at the start without pruning; below 1 a fraction of all steps.")
    final_warmup: float = flag(0, "t_f: steps at the end at the target budget; below 1 a fraction of all steps.")
    mask_interval: int = flag(10, "Delta_T: steps between two prunings.")
    beta1: float = flag(0.85, "beta_1: decay of the average of importance.")
    beta2: float = flag(0.85, "beta_2: decay of the average of its uncertainty.")
    tb_writter_loginterval: int | None = flag(
        None, "Steps between entries of budget and ranks in TensorBoard; by default logging_steps.",
        aliases=["--tb_writer_loginterval"],
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lora_type not in ("frd", "svd"):
            raise InputError(
                f"lora_type is {self.lora_type!r}, it must be frd or svd here (v1 and v2: RM-LoRA/run_glue.py)."
            )
        check_at_least(0, reg_orth_coef=self.reg_orth_coef)
        if not self.apply_adalora:
            return
        if not self.apply_lora or self.lora_type != "svd":
            raise InputError(
                f"--apply_adalora needs --apply_lora and --lora_type svd, here apply_lora is {self.apply_lora} and "
                f"lora_type is {self.lora_type}: only triplets have singular values to allocate."
            )
        for name in ("init_warmup", "final_warmup"):
            if getattr(self, name) % 1 == 0:
                setattr(self, name, int(getattr(self, name)))  # the record of a run says 80, not 80.0
        check_numbers(self.init_warmup, self.final_warmup, self.mask_interval, self.beta1, self.beta2)
        check_at_least(1, tb_writter_loginterval=self.tb_writter_loginterval)
        if self.target_rank is not None and not 1 <= self.target_rank < self.lora_r:
            raise InputError(
                f"target_rank is {self.target_rank}, it must lie in 1 to {self.lora_r - 1}, below lora_r = "
                f"{self.lora_r}."
            )


def choose_method(model: Any, flags: AdaLoRAArguments, do_train: bool) -> Method:
    """Make the method that the flags ask for, and put it into the model."""
    if not flags.apply_lora:
        return full_fine_tuning(model)
    common: dict[str, Any] = {"reg_orth_coef": flags.reg_orth_coef, **flags.layer_settings}
    if flags.apply_adalora and do_train:
        names = ("target_rank", "target_total_rank", "init_warmup", "final_warmup", "mask_interval", "beta1", "beta2")
        numbers = {name: getattr(flags, name) for name in names}
        return adalora(model, flags.modules, log_every=flags.tb_writter_loginterval, **numbers, **common)
    if not flags.apply_adalora and (flags.target_rank or flags.target_total_rank):
        sentence = "apply_adalora is off: no budget is allocated, target_rank has no effect and all ranks stay"
        logging.getLogger("loralib.run_glue").warning(sentence)
    method = lora(model, flags.modules, triplets=flags.lora_type == "svd", **common)
    # Without training nothing is allocated; the name is still AdaLoRA's in logs and records.
    return replace(method, name="adalora") if flags.apply_adalora else method


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse the flags, load data and model, adapt, train and report. Return the final metrics."""
    classes = (ModelArguments, DataArguments, AdaLoRAArguments, GlueTrainingArguments)
    model_args, data_args, flags, training = parse(classes, argv, __doc__)
    run = start(training, model_args, data_args, flags, argv)
    data = load_data(training, model_args, data_args)
    model, tokenizer = load_model(model_args, data.task)
    method = choose_method(model, flags, training.do_train)
    trainer = make_trainer(run, method, model, tokenizer, data)
    return train_and_report(run, trainer, data)


if __name__ == "__main__":
    command(main)
