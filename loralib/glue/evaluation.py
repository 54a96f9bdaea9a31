"""Adds to each evaluation the ranks that are left, the effective rank of the updates, and a held-out half's scores."""

import logging
from typing import Any

import numpy as np
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from loralib.adapt import adapted_layers, ranks
from loralib.glue.data import GlueData
from loralib.report.spectrum import effective_rank, singular_values
from loralib.training.trainer import LoRATrainer

logger = logging.getLogger(__name__)

# What `EvaluationCallback.measure_and_log` adds to the history.
MEASURED = ("rank_total", "remaining", "effective_rank", "budget", "rank_nonzero", "remaining_nonzero")
HELDOUT = "heldout"  # key of the half in `GlueData.evals`, and prefix of its metrics


def split_heldout(data: GlueData, seed: int) -> None:
    """Split the validation rows into two halves: `eval_*` metrics, by which one chooses, and `heldout_*`, to report.

    SoRA's paper evaluates the small tasks with such a split. MNLI's mismatched rows stay whole. Changes `data.evals`.

    Args:
        seed: only of the split, so that all runs of a comparison can share it although their own seeds differ.
    """
    name, rows = next(iter(data.evals.items()))
    order = np.random.default_rng(seed).permutation(len(rows))
    choose, report = (rows.select(sorted(part.tolist())) for part in np.array_split(order, 2))
    data.evals[name], data.evals[HELDOUT] = choose, report
    logger.info("heldout_split %d: %d validation rows for choices, %d held out", seed, len(choose), len(report))


def _numpy(value: Tensor | None) -> Any:
    return None if value is None else value.detach().float().cpu().numpy()


class EvaluationCallback(TrainerCallback):
    """At each evaluation: ranks, remaining parameters and effective rank, in the run's history and in TensorBoard.

    Args:
        trainer: the run's trainer.
        heldout: tokenised rows to evaluate as `heldout_*`; None for none.
    """

    def __init__(self, trainer: LoRATrainer, heldout: Dataset | None) -> None:
        self.trainer, self.heldout = trainer, heldout
        self.seen = -1  # step of the last evaluation: the final one of a run often repeats it
        self.model_of_step: int | None = None  # step of the best model, if it was loaded in place of the last one
        self.heldout_metrics: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """On resume, restore the step of the last evaluation from the history."""
        self.model_of_step = None
        for entry in state.log_history:
            if any(name.startswith("eval_") for name in entry):
                self.seen = entry["step"]
            heldout = {name: value for name, value in entry.items() if name.startswith(f"{HELDOUT}_")}
            self.heldout_metrics = heldout or self.heldout_metrics

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """With --load_best_model_at_end the model is now that of an earlier step, which has to be evaluated again."""
        if (loaded := self.trainer.loaded_step()) != state.global_step:
            self.model_of_step, self.seen = loaded, -1

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        of_step = {} if self.model_of_step is None else {"model_of_step": self.model_of_step}
        if of_step and state.log_history:
            state.log_history[-1] |= of_step  # the stock Trainer has just added eval_* under the last step
        if state.global_step == self.seen:
            return
        self.seen = state.global_step
        entry: dict[str, Any] = {}
        if self.heldout is not None:
            self.heldout_metrics = dict(self.trainer.predict(self.heldout, metric_key_prefix=HELDOUT).metrics or {})
            entry |= self.heldout_metrics
        if state.is_world_process_zero:
            entry |= self.measure_and_log() if self.model_of_step is None else self._measured(state.log_history)
            if entry:
                state.log_history.append({**entry, **of_step, "epoch": state.epoch, "step": state.global_step})

    def _measured(self, history: list[dict[str, Any]]) -> dict[str, float]:
        """The numbers at the step of the best model, from the history; a method's state is that of the last step."""
        then = next((e for e in history if e.get("step") == self.model_of_step and "rank_total" in e), {})
        return {name: then[name] for name in MEASURED if name in then}

    def measure_and_log(self) -> dict[str, float]:
        """Numbers of all adapted matrices together. TensorBoard gets them too, with each matrix's and a heatmap.

        - rank_total, remaining: ranks and elements of the factors that the method keeps. With an allocator, its last
          mask decides what is kept.
        - effective_rank: the mean over the matrices.
        - With an allocator only: budget is the allocator's total; rank_nonzero and remaining_nonzero count the values
          that are not 0 at this moment.
        """
        layers = dict(adapted_layers(self.trainer.model))
        if not layers:
            return {}
        nonzero = ranks(self.trainer.model)
        pieces: list[Any] = [p for p in self.trainer.method_state.values() if hasattr(p, "kept_ranks")]
        keeper = pieces[0] if pieces else None
        kept = nonzero if keeper is None else keeper.kept_ranks()
        effective = {
            name: effective_rank(singular_values(*map(_numpy, (layer.lora_A, layer.lora_B, layer.diagonal()))))
            for name, layer in layers.items()
        }
        sizes = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
        numbers = {
            "rank_total": sum(kept.values()),
            "remaining": sum(kept[name] * sizes[name] for name in layers),
            "effective_rank": float(np.mean(list(effective.values()))),
        }
        if keeper is not None:  # between two masks more values are not 0 than the method keeps
            numbers |= {
                "budget": keeper.budget,
                "rank_nonzero": sum(nonzero.values()),
                "remaining_nonzero": sum(nonzero[name] * sizes[name] for name in layers),
            }
        scalars = {f"Watch/{name}": value for name, value in numbers.items()}
        self.trainer.add_scalars(scalars | {f"EffectiveRank/{name}": value for name, value in effective.items()})
        self._draw(kept, max(layer.r for layer in layers.values()))
        return numbers

    def _draw(self, kept: dict[str, int], most: int) -> None:
        writers = [c.tb_writer for c in self.trainer.callback_handler.callbacks if getattr(c, "tb_writer", None)]
        if writers:
            from loralib.report.figures import as_image, rank_heatmap

            image = as_image(rank_heatmap(kept, "rank left of each matrix", most))
            for writer in writers:
                writer.add_image("Watch/ranks", image, self.trainer.state.global_step, dataformats="HWC")

    def summary(self) -> dict[str, Any]:
        """Facts for run.json: the last metrics of the held-out half."""
        return {HELDOUT: self.heldout_metrics} if self.heldout_metrics else {}
