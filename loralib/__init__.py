"""LoRA, AdaLoRA, SoRA and RM-LoRA: layers, penalties, rank allocation, gates and masks for current PyTorch."""
