"""Fine-tune a pretrained encoder on GLUE with SoRA (arXiv 2311.11696): gates on the low-rank directions, many pruned.

SoRA: --apply_lora --train_sparse --sparse_lambda_2 ...
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
if importlib.util.find_spec("loralib.adapt") is None:
    sys.exit(
        "error: the package 'loralib' found here is another one (Microsoft's): run 'pip uninstall loralib', then "
        f"'pip install -e {Path(__file__).resolve().parents[1]}', or use an environment of its own."
    )

from loralib.adapt import adapt
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
from loralib.layers import GatedLinear, LoRALinear
from loralib.sparse import GateCallback, gate_l1, gates, sora_optimizer
from loralib.trainer import LoRATrainer


@dataclass
class SoRAArguments(LoRAArguments):
    """SoRA. Symbols are those of arXiv 2311.11696."""

    _argument_group_name = "SoRA"

    train_sparse: bool = flag(False, "Put a gate on each low-rank direction and make the gates sparse; off: plain LoRA.")
    sparse_lambda: float = flag(0.0, "lambda of eq. 5: weight of the gates' L1 norm in the loss.")
    sparse_lambda_2: float = flag(0.0, "eta lambda of eq. 7: threshold of the proximal step after each optimizer step.")
    sparse_lr: float | None = flag(None, "eta of the gates: their learning rate; learning_rate where not given.")
    as_released: bool = flag(False, "Shrink as the released code does: also gates between one and two thresholds become 0.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparse_lambda", "sparse_lambda_2"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} is {getattr(self, name)}, it must be 0 or more.")
        if self.sparse_lr is not None and self.sparse_lr <= 0:
            raise InputError(f"sparse_lr is {self.sparse_lr}, it must be above 0.")
        if self.train_sparse and not self.apply_lora:
            raise InputError("--train_sparse needs --apply_lora: the gates stand between low-rank factors.")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Parse, load data and model, adapt, train, report. Returns the final metrics."""
    classes = (ModelArguments, DataArguments, SoRAArguments, GlueTrainingArguments)
    model_args, data_args, lora, training = parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, lora, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)

    adapted, adapter = [], None
    method, lines, sparse = "full", [], {}
    if lora.apply_lora:
        method = "sora" if lora.train_sparse else "lora"
        layer = GatedLinear if lora.train_sparse else LoRALinear
        adapted = adapt(model, layer, lora.modules, **lora.layer_settings)
        adapter = flow.adapter_config(method, lora, model_args, data.task, layer="sparse" if lora.train_sparse else "frd")
        if lora.lora_path:
            flow.load_lora_path(model, lora.lora_path)
    if lora.train_sparse:
        sparse = {
            "penalty": partial(gate_l1, gates(model)),
            "penalty_coef": lora.sparse_lambda,
            "penalty_name": "gate_l1",
            "make_optimizer": partial(
                sora_optimizer,
                sparse_lr=lora.sparse_lr,
                sparse_lambda_2=lora.sparse_lambda_2,
                as_released=lora.as_released,
            ),
        }
        lines.append(f"gates: threshold {lora.sparse_lambda_2} after each step, L1 weight {lora.sparse_lambda}")
    elif lora.apply_lora:
        lines.append("train_sparse is off: plain LoRA without gates")

    trainer = LoRATrainer(adapter=adapter, **sparse, **flow.trainer_parts(run, data, tokenizer, data_args, model))
    if lora.train_sparse:
        trainer.add_callback(GateCallback(trainer))
    flow.announce(run, trainer, method, adapted, *lines)
    return flow.finish(run, trainer, data, method)


if __name__ == "__main__":
    command(main)
