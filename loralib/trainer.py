"""Re-exports LoRATrainer, for entry points written after docs/variant.md."""

from loralib.training.checkpoints import Stateful
from loralib.training.trainer import LoRATrainer, task_loss

__all__ = ["LoRATrainer", "Stateful", "task_loss"]
