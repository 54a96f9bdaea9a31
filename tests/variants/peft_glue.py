"""PEFT's LoRA, AdaLoRA or DoRA on GLUE, with this project's data, seeds and report: peft_glue.py --peft lora ..."""

from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import eye

from loralib.adapt import backbone_of, is_head, match_modules, parameters
from loralib.allocator import check_schedule
from loralib.glue import arguments, flow
from loralib.methods import Method


@dataclass
class PeftArguments(arguments.LoRAArguments):
    apply_lora: bool = arguments.flag(True, "PEFT: this entry point has nothing else.")
    peft: str = arguments.flag("lora", "PEFT's method.", choices=["lora", "adalora", "dora"])
    target_rank: int = arguments.flag(4, "AdaLoRA: average rank at the end.")
    init_warmup: int = arguments.flag(0, "AdaLoRA: steps at the start without pruning.")
    final_warmup: int = arguments.flag(0, "AdaLoRA: steps at the end at the target budget.")
    mask_interval: int = arguments.flag(10, "AdaLoRA: steps between two prunings.")
    reg_orth_coef: float = arguments.flag(0.5, "AdaLoRA: weight of the orthogonality penalty.")


def put_in(model: Any, flags: Any) -> Method:
    """PEFT's factors put into the model, as a method that loralib's trainer calls."""
    names, ends = match_modules(model, flags.modules), (flags.init_warmup, flags.final_warmup)
    same: Any = {"lora_alpha": flags.lora_alpha, "lora_dropout": flags.lora_dropout, "target_modules": names}
    config: Any = LoraConfig(r=flags.lora_r, use_dora=flags.peft == "dora", **same)
    if flags.peft == "adalora":  # the true number of steps follows when training begins
        own = {"target_r": flags.target_rank, "deltaT": flags.mask_interval, "total_step": sum(ends) + 1}
        config = AdaLoraConfig(init_r=flags.lora_r, tinit=ends[0], tfinal=ends[1], **own, **same)
    tuner: Any = get_peft_model(model, config).base_model  # changes `model` itself
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in (p for name, p in model.named_parameters() if is_head(name, backbone_of(model)[0])):
        p.requires_grad = True  # the head trains, as with every method here
    facts = lambda: {"parameters": parameters(model) | {"lora": sum(p.numel() for p in trained)}}  # noqa: E731
    method = Method(f"peft-{flags.peft}", model, facts=facts, penalty_coef=flags.reg_orth_coef)
    if flags.peft == "adalora":
        pairs = [p for p in trained if min(p.shape) > 1]  # A and B, not E
        gram = lambda p: p @ p.T if len(p) == flags.lora_r else p.T @ p  # noqa: E731
        method.penalty = lambda: sum((gram(p) - eye(flags.lora_r).to(p)).norm() for p in pairs) / len(pairs)
        method.begin = lambda steps: check_schedule(*ends, steps) or tuner.rankallocator.set_total_step(steps)
        method.after_step = lambda step, **_: tuner.update_and_allocate(step)
    return method


def main(argv: list[str] | None = None) -> dict[str, Any]:
    classes = (arguments.ModelArguments, arguments.DataArguments, PeftArguments, arguments.GlueTrainingArguments)
    model_args, data_args, flags, training = arguments.parse(classes, argv, __doc__)
    training.save_strategy = "no" if flags.peft == "adalora" else training.save_strategy  # its importance is not saved
    run = flow.start(training, model_args, data_args, flags, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    return flow.train_and_report(run, flow.make_trainer(run, put_in(model, flags), model, tokenizer, data), data)


if __name__ == "__main__":
    arguments.command(main)
