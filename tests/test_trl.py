"""TRL's SFTTrainer on tiny decoders: all methods train, with accumulation and gradient checkpointing, and resume."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from datasets import Dataset
from datasets.utils.logging import disable_progress_bar
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from loralib.methods import Method, adalora, lora, rm_lora, sora
from loralib.training.method_callback import MethodCallback
from loralib.training.penalty import WithPenalty

WORDS = [f"w{i}" for i in range(40)]
MODULES = ["query", "v_proj", "mlp.down_proj"]
STEPS = 10


class PenaltySFTTrainer(WithPenalty, SFTTrainer):
    """The mixin on TRL's trainer."""


def decoder(kind: str = "llama") -> nn.Module:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 43, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 32,
        "initializer_range": 0.2,
    }
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**sizes, tie_word_embeddings=True))
    return LlamaForCausalLM(LlamaConfig(**sizes))


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    """Sentences of made-up words, and a tokenizer that knows them."""
    disable_progress_bar()
    vocabulary = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=32
    )
    texts = [" ".join(WORDS[(i * 7 + j * 3) % 40] for j in range(6 + i % 5)) for i in range(48)]
    return {"train_dataset": Dataset.from_dict({"text": texts}), "processing_class": tokenizer}


def arguments(folder: Path, **changes: Any) -> SFTConfig:
    usual = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "max_length": 32,
        "learning_rate": 0.03,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "log_level": "error",
    }
    return SFTConfig(**(usual | changes))


def put_in(name: str, model: nn.Module) -> Method:
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 32}
    torch.manual_seed(1)
    if name == "adalora":
        warm = {"init_warmup": 2, "final_warmup": 3, "mask_interval": 2}
        return adalora(model, MODULES, target_rank=2, reg_orth_coef=0.1, **warm, **settings)
    if name == "sora":
        return sora(model, MODULES, threshold=0.02, sparse_lambda=0.1, **settings)
    if name == "lora":
        return lora(model, MODULES, **settings)
    return rm_lora(model, MODULES, random_rank=1, version=name, seed=5, reg_orth_coef=0.1, **settings)


class Directions(TrainerCallback):
    """Counts the directions that have a gradient when the optimizer takes it. It comes after the method's callback."""

    def __init__(self, method: Method) -> None:
        self.method, self.seen = method, set()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        of: Any = self.method.factors
        for a, b in zip(of.A, of.B, strict=True):
            rows, columns = a.grad.any(1), b.grad.any(0)
            self.seen.add((int(rows.sum()), int(columns.sum()), bool(torch.equal(rows, columns))))


@pytest.mark.parametrize("name", ["lora", "adalora", "sora", "v1", "v2"])
@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_every_method_trains_there(name: str, kind: str, data: dict[str, Any], tmp_path: Path) -> None:
    """bf16 by TRL's own default; what should move moves, and nothing else, the output layer of the model included."""
    model = decoder(kind)
    method = put_in(name, model)
    for b in method.factors.B:
        nn.init.normal_(b, std=0.02)  # where B is 0, A has no gradient
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trainer = PenaltySFTTrainer(model=model, args=arguments(tmp_path), method=method, **data)
    directions = Directions(method)
    trainer.add_callback(directions)
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    trainer.train()
    for n, p in model.named_parameters():
        if not n.endswith("lora_E"):  # they start at 0, and pruning puts them back
            assert torch.equal(p, before[n]) != ("lora_" in n), n
    losses = [log["task_loss"] for log in trainer.state.log_history if "loss" in log]
    assert len(losses) == STEPS and sum(losses[-3:]) < sum(losses[:3]) - 0.1
    if name == "v1":
        assert directions.seen == {(1, 1, True)}
    elif name == "v2":
        assert {(1, 1, True), (1, 1, False)} == directions.seen
    elif name == "adalora":
        assert method.facts()["total_rank"] == method.facts()["target_total_rank"] == 12
    elif name == "sora":
        assert 0 < sum(method.facts()["gates"].values()) < 24


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 5


@pytest.mark.parametrize("name", ["adalora", "v2"])
def test_a_resumed_run_is_the_straight_one(name: str, data: dict[str, Any], tmp_path: Path) -> None:
    def run(folder: Path, *callbacks: TrainerCallback, resume: str | None = None) -> dict[str, torch.Tensor]:
        model = decoder()
        method = put_in(name, model)
        args = arguments(folder, save_strategy="steps", save_steps=5)
        trainer = PenaltySFTTrainer(model=model, args=args, method=method, callbacks=list(callbacks), **data)
        trainer.train(resume_from_checkpoint=resume)
        return model.state_dict()

    straight = run(tmp_path / "straight")
    run(tmp_path / "stopped", Stop())
    resumed = run(tmp_path / "stopped", resume=str(tmp_path / "stopped" / "checkpoint-5"))
    assert straight.keys() == resumed.keys()
    for key, value in straight.items():
        assert torch.equal(value, resumed[key]), key


def test_peft_in_sft_trainer(data: dict[str, Any], tmp_path: Path) -> None:
    """A PEFT model in TRL with RM-LoRA's mask, only by the callback."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(decoder(), config)
    method = rm_lora(model, random_rank=2)
    for b in method.factors.B:
        nn.init.normal_(b, std=0.02)
    directions = Directions(method)
    callbacks = [MethodCallback(method), directions]
    SFTTrainer(model=model, args=arguments(tmp_path), callbacks=callbacks, **data).train()
    assert directions.seen == {(2, 2, True)}
