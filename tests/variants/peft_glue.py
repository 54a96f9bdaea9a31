"""PEFT's LoRA, AdaLoRA or DoRA on GLUE, with this project's data, seeds and report: peft_glue.py --peft lora ..."""

from dataclasses import dataclass
from typing import Any

from peft import AdaLoraConfig, LoraConfig, get_peft_model

from loralib.adapt import backbone_of, is_head, match_modules, parameters
from loralib.allocator import check_schedule
from loralib.glue import arguments, flow
from loralib.methods import Method
from loralib.peft import PeftAllocatorState, peft_factors
from loralib.regularizer import svd_penalty


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
    adapted: Any = get_peft_model(model, config)  # changes `model` itself
    trained, backbone = [p for p in model.parameters() if p.requires_grad], backbone_of(model)[0]
    for name, p in model.named_parameters():
        p.requires_grad |= is_head(name, backbone)  # the head trains, as with every method here
    facts = lambda: {"parameters": parameters(model) | {"lora": sum(p.numel() for p in trained)}}  # noqa: E731
    method = Method(f"peft-{flags.peft}", model, facts=facts, penalty_coef=flags.reg_orth_coef)
    if flags.peft == "adalora":
        tuner, factors = adapted.base_model, peft_factors(adapted)
        method.penalty = lambda: svd_penalty(factors.A, factors.B)  # that of AdaLoraModel.forward
        method.begin = lambda steps: check_schedule(*ends, steps) or tuner.rankallocator.set_total_step(steps)
        method.after_step = lambda step, **_: tuner.update_and_allocate(step)
        method.state = {"peft_allocator": PeftAllocatorState(tuner)}  # PEFT's checkpoints lack it
    return method


def main(argv: list[str] | None = None) -> dict[str, Any]:
    classes = (arguments.ModelArguments, arguments.DataArguments, PeftArguments, arguments.GlueTrainingArguments)
    model_args, data_args, flags, training = arguments.parse(classes, argv, __doc__)
    run = flow.start(training, model_args, data_args, flags, argv)
    data = flow.load_data(training, model_args, data_args)
    model, tokenizer = flow.load_model(model_args, data.task)
    return flow.train_and_report(run, flow.make_trainer(run, put_in(model, flags), model, tokenizer, data), data)


if __name__ == "__main__":
    arguments.command(main)
