"""The core imports only torch, and each method trains in a plain loop there."""

import subprocess
import sys
from pathlib import Path

CORE = ("errors", "layers", "adapt", "regularizer", "allocator", "masking", "sparse", "methods")
ABSENT = ("transformers", "datasets", "accelerate", "tokenizers", "safetensors", "peft")

LOOP = """
import torch
from torch import nn
from loralib.adapt import Factors, adapted_layers
from loralib.methods import adalora, lora, rm_lora, sora

STEPS, settings = 12, {"r": 4, "lora_alpha": 8}
methods = {
    "lora": lambda m: lora(m, ["all-linear"], reg_orth_coef=0.1, **settings),
    "svd-lora": lambda m: lora(m, ["all-linear"], triplets=True, reg_orth_coef=0.1, **settings),
    "adalora": lambda m: adalora(
        m, ["all-linear"], target_rank=2, final_warmup=4, mask_interval=2, reg_orth_coef=0.1, **settings
    ),
    "sora": lambda m: sora(m, ["all-linear"], threshold=0.05, sparse_lambda=0.1, **settings),
    "rm-lora-v1": lambda m: rm_lora(m, ["all-linear"], random_rank=1, reg_orth_coef=0.1, seed=1, **settings),
    "rm-lora-v2": lambda m: rm_lora(m, ["all-linear"], random_rank=1, version="v2", reg_orth_coef=0.1, **settings),
}
for name, put_into in methods.items():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    method = put_into(model)
    assert method.name == name, (method.name, name)
    optimizer = method.optimizer(lr=0.02)
    method.begin(STEPS)
    x, labels = torch.randn(32, 6), torch.arange(32) % 3
    losses = []
    for step in range(STEPS):
        task = nn.functional.cross_entropy(model(x), labels)
        (task + method.loss()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        method.before_step(step)
        if name.startswith("rm-lora"):
            for layer in (model[0], model[2]):
                assert int(layer.lora_A.grad.any(1).sum()) <= 1 and int(layer.lora_B.grad.any(0).sum()) <= 1
        optimizer.step()
        method.after_step(step)
        optimizer.zero_grad()
        losses.append(task.item())
    assert losses[-1] < losses[0], (name, losses)
    assert all(p.grad is None and not p.requires_grad for n, p in model.named_parameters() if "lora_" not in n)
    if name == "adalora":
        assert method.facts()["total_rank"] == 4 == sum(method.factors.ranks().values()), method.facts()
    if name == "sora":
        assert any((gate == 0).any() for gate in method.factors.between) and 0 < method.facts()["remaining"] < 4 * 25
    print(name, "trained")
"""


def run(code: str) -> subprocess.CompletedProcess[str]:
    blocked = f"import sys; sys.modules.update(dict.fromkeys({ABSENT!r})); "
    root = str(Path(__file__).resolve().parents[1])
    command = [sys.executable, "-c", f"{blocked}sys.path.insert(0, {root!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_every_method_trains_with_only_torch() -> None:
    imports = "".join(f"import loralib.{name}\n" for name in CORE)
    done = run(imports + LOOP)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[::2] == ["lora", "svd-lora", "adalora", "sora", "rm-lora-v1", "rm-lora-v2"]


def test_the_other_libraries_cannot_be_imported_there() -> None:
    """Otherwise the test above would show nothing."""
    done = run("import loralib.training.trainer")
    assert done.returncode != 0 and "No module named 'transformers" in done.stderr, done.stderr
