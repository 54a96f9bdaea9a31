"""Reads and writes folders in the format of Hugging Face PEFT, without PEFT itself."""

import math
import re
from pathlib import Path

from loralib.adapters.exports import copy_config, folded, read_run
from loralib.adapters.reading import (
    PEFT_FILES,
    Adapter,
    is_language_model,
    read_number,
    read_state,
    split_state,
)
from loralib.adapters.writing import new_folder, write_json, write_tensors
from loralib.errors import InputError
from loralib.jsonfile import read_json
from loralib.peft import MORE

PEFT_CONFIG = "adapter_config.json"
# Settings with which PEFT's LoRA computes more than W + scaling B A.
PEFT_MORE = (*MORE, "layer_replication")
# Values of init_lora_weights with which the base model's weights stay as they are.
PEFT_STARTS = ("gaussian", "eva", "orthogonal", "mica")
# PEFT's task types by the ends of the names of transformers' classes.
TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}


def read_peft(folder: Path) -> Adapter:
    """Read a folder that PEFT wrote.

    Raises:
        InputError: it is not plain LoRA, or its files are broken; the message names the file and the setting.
    """
    file = folder / PEFT_CONFIG
    config = read_json(file)
    if config.get("peft_type") != "LORA":
        raise InputError(f"{file} has peft_type {config.get('peft_type')!r}: only LORA can be read here.")
    for key, wanted in (("bias", "none"), ("fan_in_fan_out", False)):
        if config.get(key, wanted) != wanted:
            raise InputError(f"{file} has {key} = {config[key]!r}: only {wanted!r} can be read here.")
    for key in PEFT_MORE:
        if config.get(key):
            raise InputError(
                f"{file} has {key} = {str(config[key])[:80]}: only plain LoRA, without it, can be read here."
            )
    start = config.get("init_lora_weights", True)
    if not (start is None or isinstance(start, bool) or start in PEFT_STARTS):  # other starts change W
        raise InputError(
            f"{file} has init_lora_weights = {str(start)[:80]!r}, which belongs to changed base weights: convert it to "
            "plain LoRA with peft (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    state = {}
    for key, value in read_state(folder).items():
        if ".original_module." not in key:
            name = re.sub(r"\.modules_to_save(\.default)?\.", ".", key.removeprefix("base_model.model."))
            state[re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)] = value
    matrices, rest = split_state(state, folder)
    alphas = config.get("alpha_pattern") or {}
    # PEFT reads these keys as regular expressions. One from a file could run for ever, so only plain names are allowed.
    if not isinstance(alphas, dict) or not all(re.fullmatch(r"[\w.\\]+", key) for key in alphas):
        raise InputError(f"{file} has an alpha_pattern that is not a mapping from module names to numbers.")
    scaling = {}
    for name, tensors in matrices.items():
        found = next((key for key in alphas if f".{name}".endswith("." + key.replace("\\", ""))), None)
        alpha = read_number(config, "lora_alpha", file) if found is None else read_number(alphas, found, file)
        r = tensors["lora_A"].shape[0]
        scaling[name] = alpha / (math.sqrt(r) if config.get("use_rslora") is True else r)
    return Adapter(folder, {}, matrices, scaling, rest, complete=False)


def export_peft(run: str | Path, out: str | Path, base: str | None = None) -> None:
    """Write a folder that PEFT loads as plain LoRA, with a rank and an alpha for each matrix and the head beside them.

    Args:
        base: name or folder of the base model; None: the recorded one.

    Raises:
        InputError: the adapter is not a product of two factors, or `out` cannot be written.
    """
    trained = read_run(run)
    adapter = folded(trained)
    matrices, scaling = dict(adapter.matrices), dict(adapter.scaling)
    if not matrices:  # PEFT refuses an adapter without a matrix, so one matrix keeps a row of zeros
        if not trained.matrices:
            raise InputError(f"{trained.source} has rank 0 everywhere: export to peft from the run's own folder.")
        name, tensors = next(iter(trained.matrices.items()))
        matrices[name] = {"lora_A": tensors["lora_A"][:1] * 0, "lora_B": tensors["lora_B"][:, :1] * 0}
        scaling[name] = 1.0
    sizes = {name: m["lora_A"].shape[0] for name, m in matrices.items()}
    alphas = {name: scaling[name] * sizes[name] for name in matrices}
    r = max(sizes.values(), key=list(sizes.values()).count)
    alpha = next(alphas[name] for name in sizes if sizes[name] == r)
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(adapter),
        "base_model_name_or_path": base or adapter.config.get("base_model"),
        "revision": None if base else adapter.config.get("base_model_revision"),
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": {name: size for name, size in sizes.items() if size != r},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": list(matrices),
        "modules_to_save": sorted({_head_module(name) for name in adapter.rest}),
        "lora_dropout": adapter.config.get("lora_dropout", 0.0),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "inference_mode": True,
    }
    state = {f"{name}.{key}.weight": t for name, tensors in matrices.items() for key, t in tensors.items()}
    state = {f"base_model.model.{name}": t for name, t in (state | adapter.rest).items()}
    with new_folder(Path(out)) as folder:
        write_tensors(folder / PEFT_FILES[0], state)
        write_json(folder / PEFT_CONFIG, config)
        copy_config(adapter, folder)


def _task_type(adapter: Adapter) -> str | None:
    """PEFT's name for the task of the model that the adapter was trained in; None if PEFT has no name for it.

    Adapters whose files do not name the model's class were trained in a decoder or in a classifier of texts.
    """
    if recorded := adapter.config.get("model_class"):
        return next((task for end, task in TASK_TYPES.items() if str(recorded).endswith(end)), None)
    return "CAUSAL_LM" if is_language_model(adapter) else "SEQ_CLS"


def _head_module(parameter: str) -> str:
    """The module that PEFT saves as a whole: classifier for classifier.dense.weight, bert.pooler for
    bert.pooler.dense.weight."""
    parts = parameter.split(".")
    return ".".join(parts[: parts.index("pooler") + 1] if "pooler" in parts else parts[:1])
