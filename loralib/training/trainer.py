"""The trainer of adapted models: a penalty beside the task loss, and checkpoints that hold only the adapter.

This class overrides methods of the stock Trainer, and copies no loop. It treats all methods alike, except that for
AdaLoRA it chooses the best model among the evaluations at the target budget.
"""

import logging
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations import TensorBoardCallback

from loralib.adapt import adapted_layers
from loralib.adapters.own import load_adapter, save_adapter
from loralib.adapters.writing import disk_errors
from loralib.methods import Method
from loralib.training.penalty import WithPenalty
from loralib.training.resume import ExactResume
from loralib.training.sampling import OWN_ROWS

logger = logging.getLogger(__name__)


def task_loss(
    logits: Tensor, labels: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over classes, or mean squared error for one output, in float32.

    The stock DeBERTa model computes the same inside its forward, but there the selection of labelled rows costs a graph
    break and a synchronisation.

    Args:
        logits: (batch, classes), or (batch, 1) for regression.
        labels: (batch,).
        class_weights: (classes,) weight of a row by its class. The weighted sum is divided by the number of rows, and
            not, as torch does, by the sum of the weights, so that the parts of a batch add up to the whole batch.
    """
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.view(-1).float(), labels.view(-1).float())
    logits, labels = logits.float(), labels.view(-1)
    if class_weights is None:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    rows = F.cross_entropy(logits, labels, class_weights, reduction="none", label_smoothing=label_smoothing)
    return rows.mean()


class LoRATrainer(WithPenalty, ExactResume):
    """Trainer of an adapted (or, without `adapter`, of a fully fine-tuned) sequence classifier.

    Args:
        method, penalty, penalty_coef, penalty_name, make_optimizer: see `WithPenalty`.
        adapter: facts for the adapter's config file (method, r, alpha, ...); None for full fine-tuning.
        class_weights: weight of each class in the training loss; evaluation losses are not weighted.
        kwargs: arguments of `ExactResume` and of the stock Trainer.
    """

    state_in_optimizer = False  # it is in method_state.safetensors

    def __init__(
        self,
        *,
        method: Method | None = None,
        adapter: dict[str, Any] | None = None,
        class_weights: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        if method is not None:
            kwargs["method_state"] = method.state
        super().__init__(method=method, **kwargs)
        # DeBERTa's forward takes **kwargs, and the stock Trainer concludes that it divides the loss. It does not.
        self.model_accepts_loss_kwargs = False
        self.adapter = adapter
        self.class_weights = None if class_weights is None else torch.tensor(class_weights, device=self.args.device)
        self.running_sums.append(self._penalties)
        method_name = "full" if adapter is None else adapter.get("method", "full")
        self.settings |= {"method": method_name, "modules": [name for name, _ in adapted_layers(self.model)]}
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback):
                # Without a folder, a run that only evaluates would write into ./runs.
                asked = getattr(self.args, "logging_dir", None) or callback.logging_dir
                name = f"{time.strftime('%b%d_%H-%M-%S')}_{platform.node()}"  # the stock one
                callback.logging_dir = asked or str(Path(self.args.output_dir, "runs", name))

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**{k: v for k, v in inputs.items() if k not in ("labels", OWN_ROWS)})
        logits, labels = outputs["logits"], inputs["labels"]
        smoothing, weights = self.args.label_smoothing_factor, self.class_weights if model.training else None
        if OWN_ROWS in inputs:
            real_rows, weight = inputs[OWN_ROWS]
            rows = max(real_rows, 1)  # a process without a real row takes one, whose weight is 0
            logits, labels = logits[:rows], labels[:rows]
            loss = task_loss(logits, labels, smoothing, weights) * weight
        else:
            loss = task_loss(logits, labels, smoothing, weights)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Tensor], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._watch(loss)
        return loss

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate as the stock method does. With several processes, count each row once in the loss, as in metrics."""
        output: Any = super().evaluation_loop(*args, **kwargs)
        loss = next((name for name in output.metrics if name.endswith("_loss")), None)
        if self.args.world_size > 1 and loss and isinstance(output.predictions, np.ndarray):
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[loss] = task_loss(logits, labels, self.args.label_smoothing_factor).item()
        return output

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.is_in_train:
            self.check_finite()
        super().log(logs, start_time)

    # ---- files ----

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        with disk_errors():
            if self.adapter is None:
                super()._save(output_dir, state_dict)
            elif self.args.should_save:
                save_adapter(self.model, folder, self.adapter)
                self.model.config.save_pretrained(folder)
                # The tokenizer is saved once, with the result: DeBERTa-v3's takes 11 MB, and no checkpoint needs it.
                if self.processing_class is not None and folder == Path(self.args.output_dir):
                    self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Do nothing. --push_to_hub sends the finished run once, at its end."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_adapter(self.model, resume_from_checkpoint)

    def _load_best_model(self) -> None:
        if self.adapter is None:
            super()._load_best_model()
        else:
            load_adapter(self.model, str(self.state.best_model_checkpoint))
        loaded, best, name = self.loaded_step(), self.state.best_global_step, self.args.metric_for_best_model
        for piece in self._allocators():
            if piece.at_target(loaded):
                if loaded == best:
                    logger.info("best %s at the target budget: %s, at step %s", name, self.state.best_metric, best)
            else:
                logger.warning(
                    "no evaluation with a checkpoint was made at the target budget, so the best one of all is taken, "
                    "and it is over budget: the model of step %s has %d singular values, the target is %d; raise "
                    "--final_warmup or evaluate and save more often",
                    loaded,
                    sum(piece.ranks().values()),
                    piece.target_total,
                )

    def loaded_step(self) -> int:
        """The step whose model a finished training has: with --load_best_model_at_end that of the checkpoint that was
        loaded, otherwise the last step."""
        best = self.state.best_model_checkpoint if self.args.load_best_model_at_end else None
        return self.state.global_step if best is None else int(Path(best).name.rpartition("-")[2])

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._finalize_training(*args, **kwargs)
        best, loaded = self.state.best_global_step, self.loaded_step()
        if self.args.load_best_model_at_end and best not in (None, loaded):
            logger.warning(
                "the best evaluation was that of step %s, but no checkpoint of that step is here: the result is the "
                "model of step %s; save as often as you evaluate (--save_steps)",
                best,
                loaded,
            )
        return found

    # ---- the best model ----

    def _allocators(self) -> list[Any]:
        """The pieces of the method that know at which steps the model has its target budget."""
        return [piece for piece in self.method_state.values() if hasattr(piece, "at_target")]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Choose as the stock method does. Once an evaluation has the target budget, choose only among such ones."""
        state, pieces = self.state, self._allocators()

        def at_target(step: int) -> bool:
            return all(piece.at_target(step) for piece in pieces)

        if state.best_global_step is not None and at_target(state.best_global_step) != at_target(state.global_step):
            if at_target(state.best_global_step):
                return False
            state.best_metric = None  # the best so far belongs to a model above the target budget: forget it
        return super()._determine_best_metric(metrics, trial)
