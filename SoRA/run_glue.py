"""Fine-tune a pretrained encoder on GLUE with SoRA (arXiv 2311.11696): gates on the low-rank directions, many pruned.

SoRA: --apply_lora --train_sparse --sparse_lambda_2 ...
With --lambda_schedule the threshold rises from stage to stage (Algorithm 1), each stage going on from the last one.
Without --train_sparse plain LoRA, without --apply_lora full fine-tuning.
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

from loralib.adapt import adapt
from loralib.errors import InputError
from loralib.glue import flow, stages
from loralib.glue.arguments import (
    DataArguments,
    GlueTrainingArguments,
    LoRAArguments,
    ModelArguments,
    command,
    flag,
    parse,
)
from loralib.layers import GatedLinear, LoRALinear
from loralib.sparse import GateCallback, gate_l1, gates, lambda_stages, sora_optimizer
from loralib.trainer import LoRATrainer


@dataclass
class SoRAArguments(LoRAArguments):
    """SoRA. Symbols are those of arXiv 2311.11696."""

    _argument_group_name = "SoRA"

    train_sparse: bool = flag(
        False, "Put a gate on each low-rank direction and make the gates sparse; off: plain LoRA."
    )
    sparse_lambda: float = flag(0.0, "lambda of eq. 5: weight of the gates' L1 norm in the loss.")
    sparse_lambda_2: float = flag(0.0, "eta lambda of eq. 7: threshold of the proximal step after each optimizer step.")
    lambda_schedule: str | None = flag(
        None,
        "Algorithm 1: raise the threshold over stages, evenly (linear), as log of even steps between e^a and e^b "
        "(log_linear) or as exp of even steps between log a and log b (exp_linear).",
        choices=["linear", "log_linear", "exp_linear"],
    )
    max_lambda: float | None = flag(None, "b: threshold of the last stage; the first has a = sparse_lambda_2.")
    lambda_num: int | None = flag(None, "n: number of stages, the first included.")
    lambda_epochs: float | None = flag(None, "Epochs of each later stage; num_train_epochs where not given.")
    sparse_lr: float | None = flag(None, "eta of the gates: their learning rate; learning_rate where not given.")
    as_released: bool = flag(
        False, "Shrink as the released code does: also gates between one and two thresholds become 0."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparse_lambda", "sparse_lambda_2"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must be 0 or more.")
        if self.sparse_lr is not None and self.sparse_lr <= 0:
            raise InputError(f"sparse_lr is {self.sparse_lr}, it must be above 0.")
        if self.train_sparse and not self.apply_lora:
            raise InputError("--train_sparse needs --apply_lora: the gates stand between low-rank factors.")
        scheduled = [name for name in ("max_lambda", "lambda_num", "lambda_epochs") if getattr(self, name) is not None]
        if self.lambda_schedule is None:
            if scheduled:
                raise InputError(f"--{scheduled[0]} belongs to a schedule: give --lambda_schedule, or leave it out.")
            return
        if not self.train_sparse:
            raise InputError("--lambda_schedule needs --train_sparse: without gates there is no threshold to raise.")
        for name in ("max_lambda", "lambda_num"):
            if getattr(self, name) is None:
                raise InputError(f"--lambda_schedule {self.lambda_schedule} needs --{name}.")
        if self.lambda_epochs is not None and self.lambda_epochs <= 0:
            raise InputError(f"lambda_epochs is {self.lambda_epochs}, it must be above 0.")
        lambda_stages(self.lambda_schedule, self.sparse_lambda_2, self.max_lambda, self.lambda_num)

    @property
    def thresholds(self) -> list[float]:
        """Thresholds of the stages, first to last; one stage without a schedule."""
        if self.lambda_schedule is None:
            return [self.sparse_lambda_2]
        return lambda_stages(self.lambda_schedule, self.sparse_lambda_2, self.max_lambda, self.lambda_num)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, load data and model, adapt, train, report. Returns the final metrics."""
    classes = (ModelArguments, DataArguments, SoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    optim = getattr(training.optim, "value", training.optim)
    if lora.train_sparse and optim not in ("adamw_torch", "adamw_torch_fused"):
        raise InputError(f"--optim {optim} cannot be had with --train_sparse: the gates need SoRA's own AdamW.")
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)

    adapted, adapter = [], None
    method, lines, sparse = "full", [], {}
    if lora.apply_lora:
        method = "sora" if lora.train_sparse else "lora"
        layer = GatedLinear if lora.train_sparse else LoRALinear
        adapted = adapt(model, layer, lora.modules, **lora.layer_settings)
        adapter = flow.adapter_config(
            method, lora, model_args, data.task, layer="sparse" if lora.train_sparse else "frd"
        )
        if lora.lora_path:
            flow.load_lora_path(model, lora.lora_path)
    if lora.train_sparse:
        sparse = {
            "penalty": partial(gate_l1, gates(model)),
            "penalty_coef": lora.sparse_lambda,
            "penalty_name": "gate_l1",
        }
        thresholds = ", ".join(f"{t:.4g}" for t in lora.thresholds)
        lines.append(f"gates: threshold {thresholds} after each step, L1 weight {lora.sparse_lambda}")
    elif lora.apply_lora:
        lines.append("train_sparse is off: plain LoRA without gates")
    parts = flow.trainer_parts(run, data, tokenizer, data_args, model)

    def trainer_for(training: GlueTrainingArguments, threshold: float) -> LoRATrainer:
        if not lora.train_sparse:
            return LoRATrainer(adapter=adapter, **parts)
        optimizer = partial(
            sora_optimizer, sparse_lr=lora.sparse_lr, sparse_lambda_2=threshold, as_released=lora.as_released
        )
        trainer = LoRATrainer(adapter=adapter, make_optimizer=optimizer, **sparse, **(parts | {"args": training}))
        trainer.add_callback(GateCallback(trainer, threshold))
        return trainer

    *earlier, last = enumerate(lora.thresholds) if training.do_train else [(0, lora.sparse_lambda_2)]
    for number, threshold in earlier:
        stage = stages.start_stage(run, number, training.num_train_epochs if number == 0 else lora.lambda_epochs)
        trainer = trainer_for(stage.training, threshold)
        if not stages.take_finished_stage(stage, trainer):
            flow.announce(stage, trainer, f"{method}, stage {number}: threshold {threshold:.4g}", adapted)
            flow.finish(stage, trainer, data, method)
    if earlier:
        run = stages.last_stage(run, last[0], lora.lambda_epochs, ("lambda", "remaining", "gates"))
    trainer = trainer_for(run.training, last[1])
    flow.announce(run, trainer, method, adapted, *lines)
    metrics = flow.finish(run, trainer, data, method)
    if earlier:
        stages.show_stages(run)
    return metrics


if __name__ == "__main__":
    command(main)
