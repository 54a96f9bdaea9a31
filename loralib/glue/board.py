"""Writes TensorBoard's HPARAMS tab, and its CUSTOM SCALARS tab with charts that show related curves together.

`SummaryWriter.add_hparams` would make a second run folder. Here its records go into the folder of the run.
"""

import time
from typing import Any

from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback

from loralib.adapt import parameters
from loralib.glue.metrics import COMBINED
from loralib.glue.record import summaries
from loralib.glue.tasks import Task
from loralib.training.trainer import LoRATrainer

# The results that every run has, so that the plots of a sweep can compare all of its runs.
RESULTS = ("Final/score", "Final/loss", "Final/remaining_parameters", "Final/seconds")


class BoardCallback(TrainerCallback):
    """Writes hyperparameters and charts when the training begins; `write_results` adds the results.

    Args:
        trainer: the run's trainer.
        flags: the dataclasses of the run's flags: model, data, method, training.
        task: the run's task.
        started: the time at which the run began, in seconds since 1970.
    """

    def __init__(self, trainer: LoRATrainer, flags: tuple[Any, ...], task: Task, started: float) -> None:
        self.trainer, self.flags, self.task, self.started = trainer, flags, task, started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for board in self._boards():
            writer = board.tb_writer
            if writer is not None:
                experiment, begin, _ = self._records()
                writer.file_writer.add_summary(experiment)
                writer.file_writer.add_summary(begin)
                writer.add_custom_scalars(layout(self.trainer, self.task))

    def write_results(self, metrics: dict[str, Any], succeeded: bool = True) -> None:
        """Write the results, and mark the end of the run.

        Args:
            metrics: as `run.json` has them.
            succeeded: False for a run that was interrupted, failed or diverged.
        """
        for board in self._boards():
            if not self.trainer.is_world_process_zero() or board.logging_dir is None:
                continue
            from torch.utils.tensorboard import SummaryWriter  # it is there if `_boards` finds a board

            score = COMBINED if f"eval_{COMBINED}" in metrics else self.task.metrics[0]
            counts = parameters(self.trainer.model)
            values = (
                metrics.get(f"eval_{score}"),
                metrics.get("eval_loss"),
                counts["remaining"] if self.trainer.adapter is not None else counts["trainable"],
                time.time() - self.started,
            )
            with SummaryWriter(log_dir=board.logging_dir) as writer:
                for tag, value in zip(RESULTS, values, strict=True):
                    if value is not None:
                        writer.add_scalar(tag, value, self.trainer.state.global_step)
                writer.file_writer.add_summary(self._records(succeeded)[2])

    def _boards(self) -> list[Any]:
        callbacks = self.trainer.callback_handler.callbacks
        return [c for c in callbacks if isinstance(c, TensorBoardCallback)] if _has_plugin() else []

    def _name(self) -> str:
        """The name of the run's row, which the sessions of a resumed run share.

        Method and task come first, because the tab shows only about 12 letters.
        """
        method = (self.trainer.adapter or {}).get("method", "full")
        return f"{method} {self.task.name} {self.flags[3].seed} {self.trainer.args.output_dir}"

    def _records(self, succeeded: bool = True) -> tuple[Any, Any, Any]:
        """The records of the experiment, of the session's beginning and of its end."""
        from tensorboard.plugins.hparams.api_pb2 import Status
        from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
        from torch.utils.tensorboard.summary import hparams

        records = hparams(hyperparameters(self.trainer, self.flags, self.task), dict.fromkeys(RESULTS, 0.0))
        for record in records[1:]:
            metadata = record.value[0].metadata.plugin_data
            content = HParamsPluginData.FromString(metadata.content)
            if record is records[1]:
                content.session_start_info.group_name = self._name()
                content.session_start_info.start_time_secs = self.started
            else:
                content.session_end_info.status = Status.Value("STATUS_SUCCESS" if succeeded else "STATUS_FAILURE")
                content.session_end_info.end_time_secs = time.time()
            metadata.content = content.SerializeToString()
        return records


def _has_plugin() -> bool:
    try:
        import tensorboard.plugins.hparams.api_pb2  # noqa: F401 - tensorboardX lacks it
    except ImportError:
        return False
    return True


def hyperparameters(trainer: LoRATrainer, flags: tuple[Any, ...], task: Task) -> dict[str, Any]:
    """The columns of the HPARAMS tab, the same for every method.

    The tab's plots leave out a run that lacks a value. If a method does not use a number, the column holds the value
    that describes the method: random_rank is r because every direction is trained, target_rank is r because every rank
    is kept, and a weight is 0.
    """
    model, _, lora, training = flags
    args = trainer.args
    facts = summaries(trainer)
    r = lora.lora_r or 0 if lora.apply_lora else 0

    def flag(name: str) -> Any:
        return getattr(lora, name, None) or 0

    matrices = len(facts["ranks"]) if "target_total_rank" in facts else 1
    return {
        "method": (trainer.adapter or {}).get("method", "full"),
        "task": task.name,
        "model": str(model.model_name_or_path).rstrip("/").rpartition("/")[2],
        "r": r,
        "alpha": lora.lora_alpha or 0.0 if lora.apply_lora else 0.0,
        "random_rank": flag("random_rank") or r,
        "target_rank": facts.get("target_total_rank", r * matrices) / matrices,
        "threshold": facts.get("lambda", 0.0),
        "gate_l1_weight": flag("sparse_lambda"),
        "penalty_weight": flag("reg_orth_coef"),
        "learning_rate": args.learning_rate,
        "batch": trainer.get_total_train_batch_size(args),
        "steps": trainer.state.max_steps,
        "epochs": args.num_train_epochs if args.max_steps <= 0 else trainer.state.num_train_epochs,
        "seed": training.seed,
    }


def layout(trainer: LoRATrainer, task: Task) -> dict[str, dict[str, list[Any]]]:
    """The charts of the CUSTOM SCALARS tab by heading, each with regular expressions for the tags of its curves.

    A chart lists the curves of every method. TensorBoard would show a chart twice if two runs defined it differently.
    """
    losses = dict.fromkeys(("task_loss", "orth_regu_loss", "gate_l1", "penalty", trainer.penalty_name))
    charts: dict[str, dict[str, list[Any]]] = {
        "loss": {"task loss and penalty": ["Multiline", [*(f"train/{name}$" for name in losses), "eval/loss$"]]},
        "evaluation": {name: ["Multiline", [f"eval/{name}$"]] for name in task.metrics},
    }
    if trainer.adapter is not None:
        charts["rank"] = {
            "budget and ranks": ["Multiline", ["Budget/total_rank$", "Watch/rank_total$", "Watch/rank_nonzero$"]],
            "effective rank": ["Multiline", ["Watch/effective_rank$"]],
        }
    if trainer.method is not None and any(name.startswith("Gates/") for name in trainer.method.scalars()):
        charts["gates"] = {
            "share that is not 0": ["Multiline", ["Gates/nonzero_share$"]],
            "remaining parameters": ["Multiline", ["Gates/remaining_parameters$"]],
        }
        charts["stages of SoRA"] = {
            "remaining parameters": ["Multiline", ["Stages/remaining$"]],
            "evaluation": ["Multiline", [f"Stages/eval_{name}$" for name in task.metrics]],
        }
    return charts
