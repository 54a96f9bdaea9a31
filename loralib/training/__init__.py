"""Training: the trainer with exact resume, checkpoints, guards and sampling; the callback and the mixin for others."""
