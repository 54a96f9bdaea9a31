"""Adapters as files: this project's format, Hugging Face PEFT's, merged checkpoints, the released state dicts."""
