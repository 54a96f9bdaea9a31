"""The trainer: exact resume, complete checkpoints, guards, sampling, the penalty beside the task loss."""
