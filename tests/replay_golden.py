"""Replay recorded trajectories of the released code through this project's layers, trainer, callbacks and optimizer.

    python tests/replay_golden.py CASE.json [CASE.json ...]

Beside each CASE.json lies CASE.safetensors. Only the sampler (file order), the dtype (float64) and the mask's draws
are replaced. One JSON object per line: {"case", "max_loss_diff", "max_param_diff", "max_logit_diff", "ranks_equal",
"seconds"}; exit status 1 beyond tolerance (losses 1e-6, parameters 1e-5, every rank at every step).
"""

import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import DebertaV2Config, DebertaV2ForSequenceClassification, TrainerCallback, default_data_collator
from transformers.utils import logging as transformers_logging

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from loralib.adapters.own import load_trained
from loralib.glue.arguments import GlueTrainingArguments
from loralib.kernels.deberta import use_fast_attention
from loralib.masking import RandomMask
from loralib.methods import Method, adalora, lora, rm_lora, sora
from loralib.trainer import LoRATrainer

LOSS_TOLERANCE, PARAMETER_TOLERANCE = 1e-6, 1e-5


class RecordingTrainer(LoRATrainer):
    """Keeps what `training_step` returns for each micro-batch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def recorded_draws(selections: list[list[int]]) -> Any:
    """Stands for `RandomMask.draw`: takes the draws from a list in place of the generator."""
    remaining = list(selections)

    def draw(self: RandomMask, key: int) -> Tensor:
        masks = torch.zeros(2, len(self.names), self.r)
        for i in range(len(self.names)):
            rows = remaining.pop(0)
            columns = remaining.pop(0) if self.version == "v2" else rows
            masks[0, i, rows] = 1.0
            masks[1, i, columns] = 1.0
        return masks

    return draw


class RecordAllocations(TrainerCallback):
    """Keeps budget and ranks of each step."""

    def __init__(self, allocator: Any) -> None:
        self.allocator = allocator
        self.steps: list[dict[str, Any]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        nonzero = {f"{name}.lora_E": rank for name, rank in self.allocator.ranks().items()}
        self.steps.append({"global_step": state.global_step, "budget": self.allocator.budget, "nonzero": nonzero})


def choose(method: str, model: Any, h: dict[str, Any]) -> Method:
    """The method of a recorded case, put into the model, with the released code's behaviour."""
    modules = h["lora_module"].split(",")
    common: dict[str, Any] = {"r": h["lora_r"], "lora_alpha": h["lora_alpha"]}
    if method == "sora":
        gates = {"sparse_lambda": h.get("sparse_lambda", 0.0), "sparse_lr": h.get("sparse_lr")}
        return sora(model, modules, threshold=h["sparse_lambda_2"], as_released=True, **gates, **common)
    common["reg_orth_coef"] = h.get("reg_orth_coef", 0.0)
    if method == "adalora":
        names = ("target_rank", "target_total_rank", "init_warmup", "final_warmup", "mask_interval", "beta1", "beta2")
        return adalora(model, modules, log_every=10**9, **{name: h[name] for name in names if name in h}, **common)
    if method == "rm-lora":
        kind = {"random_rank": h["random_rank"], "version": h["lora_type"]}
        return rm_lora(model, modules, as_released=True, **kind, **common)
    return lora(model, modules, triplets=h.get("lora_type") == "svd", **common)


def replay(path: Path, output_dir: str) -> dict[str, Any]:
    """One case; see the module's text for the result."""
    started = time.time()
    case = json.loads(path.read_text())
    tensors = load_file(path.with_suffix(".safetensors"))
    method, h, t, expected = case["method"], case["hparams"], case["train"], case["expected"]
    model = DebertaV2ForSequenceClassification(DebertaV2Config(**case["model"])).double()
    use_fast_attention(model)
    chosen = choose(method, model, h)
    initial = {k.removeprefix("init/"): v for k, v in tensors.items() if k.startswith("init/")}
    load_trained(model, initial, path.name, head_may_differ=False)

    args = GlueTrainingArguments(
        output_dir=output_dir,
        max_steps=t["steps"],
        per_device_train_batch_size=t["batch_size"],
        gradient_accumulation_steps=t["gradient_accumulation_steps"],
        learning_rate=t["learning_rate"],
        weight_decay=t["weight_decay"],
        warmup_steps=t["warmup_steps"],
        max_grad_norm=t["max_grad_norm"],
        train_sampling_strategy="sequential",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    rows = [
        {"input_ids": ids, "attention_mask": mask, "labels": label}
        for ids, mask, label in zip(
            *(tensors[f"data/{k}"] for k in ("input_ids", "attention_mask", "labels")), strict=True
        )
    ]
    trainer = RecordingTrainer(
        method=chosen, model=model, args=args, train_dataset=rows, data_collator=default_data_collator
    )
    record = None
    if method == "adalora":
        record = RecordAllocations(chosen.state["allocator"])
        trainer.add_callback(record)
    # the Trainer prints its last log where no progress bar is shown; this command prints one object per line
    trainer.callback_handler.callbacks = [
        c for c in trainer.callback_handler.callbacks if type(c).__name__ != "PrinterCallback"
    ]
    with patch.object(RandomMask, "draw", recorded_draws(expected.get("selections", []))):
        trainer.train()

    own = dict(model.named_parameters())
    final = {k.removeprefix("final/"): v for k, v in tensors.items() if k.startswith("final/")}
    model.eval()
    with torch.no_grad():
        logits = model(tensors["data/input_ids"][:8], attention_mask=tensors["data/attention_mask"][:8]).logits
    ranks_equal = record is None or (
        [s["nonzero"] for s in record.steps] == [a["nonzero"] for a in expected["allocations"]]
        and [s["budget"] for s in record.steps] == [a["budget"] for a in expected["allocations"]]
    )
    losses = expected["training_step_losses"]
    same_length = len(losses) == len(trainer.losses)
    return {
        "case": case["name"],
        "max_loss_diff": max(abs(a - b) for a, b in zip(trainer.losses, losses, strict=False))
        if same_length
        else math.inf,
        "max_param_diff": max((own[k].detach() - v).abs().max().item() for k, v in final.items()),
        "max_logit_diff": (logits - tensors["final_logits_eval8"]).abs().max().item(),
        "ranks_equal": ranks_equal,
        "seconds": round(time.time() - started, 2),
    }


def within_tolerance(result: dict[str, Any]) -> bool:
    """Whether a replayed case reproduces the record."""
    return (
        result["max_loss_diff"] <= LOSS_TOLERANCE
        and result["max_param_diff"] <= PARAMETER_TOLERANCE
        and result["ranks_equal"]
    )


def main(argv: list[str]) -> int:
    transformers_logging.set_verbosity_error()
    if not argv:
        print(__doc__, file=sys.stderr)
        return 2
    good = True
    for name in argv:
        if not Path(name).is_file():
            print(f"no recorded case at {name}: give the CASE.json of a case.", file=sys.stderr)
            return 2
        with tempfile.TemporaryDirectory() as folder:
            result = replay(Path(name), folder)
        print(json.dumps(result), flush=True)
        good = good and within_tolerance(result)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
