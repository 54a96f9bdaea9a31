"""`load` and `predict` for programs in Python: a trained folder as a model, and labels and scores for texts."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loralib.adapt import is_lora
from loralib.adapters.exports import read_run, restored, tokenizer_of
from loralib.adapters.peft import PEFT_CONFIG, read_peft
from loralib.adapters.reading import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    Adapter,
    holds_decoder,
    is_decoder,
    output_layer,
    shape_of,
)
from loralib.errors import InputError
from loralib.jsonfile import find_json, read_json
from loralib.layers import LoRALinear
from loralib.positions import LONGEST, position_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def load(
    folder: str | Path, *, base: str | None = None, layer: type[LoRALinear] | None = None
) -> tuple["PreTrainedModel", "PreTrainedTokenizerBase"]:
    """Load the model and the tokenizer of a run's output folder, of one of its checkpoints, or of an export.

    An adapter is put into its base model with the layers, the values and the scaling that were trained. You can train
    it further or `merge` it. Exports of every kind and fully fine-tuned folders load as well. The tokenizer cuts texts
    to the run's `max_seq_length` if the folder has the run's record.

    Args:
        folder: the folder.
        base: name or folder of the base model; None: the recorded one.
        layer: class of the adapted layers, needed if it has its own `delta_weight`.

    Returns:
        The model in evaluation mode, in the dtype of the files, and its tokenizer.

    Raises:
        InputError: the folder is none of these, is incomplete or foreign, or its base model cannot be loaded or is not
            the one that the adapter was trained on.
    """
    folder = Path(folder).expanduser()
    own = any((folder / name).is_file() for name in (ADAPTER_CONFIG, ADAPTER_FILE))
    if own or (folder / PEFT_CONFIG).is_file():
        adapter = read_run(folder) if own else _of_peft(folder)
        model, name, revision = restored(adapter, base, layer, _outputs(adapter))
    elif any((folder / name).is_file() for name in WEIGHTS):
        model, name, revision = _whole(folder), str(folder), None
    else:
        raise InputError(f"{folder} holds no adapter and no model: give a run's folder, a checkpoint or an export.")
    return model.eval(), _tokenizer(folder, name, revision, model)


def _of_peft(folder: Path) -> Adapter:
    adapter, config = read_peft(folder), read_json(folder / PEFT_CONFIG)
    facts = {"base_model": config.get("base_model_name_or_path"), "base_model_revision": config.get("revision")}
    return replace(adapter, config=facts | {"task_type": config.get("task_type"), "low_rank": True})


def _outputs(adapter: Adapter) -> int | None:
    """The number of outputs of an adapter's head: that of its last layer."""
    last = output_layer(adapter.rest)
    return None if last is None else int(adapter.rest[last[0]].shape[0])


def _whole(folder: Path) -> Any:
    """Load a fully fine-tuned or merged model."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind: Any = AutoModelForCausalLM if holds_decoder(folder) else AutoModelForSequenceClassification
    try:
        model, found = kind.from_pretrained(folder, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise InputError(f"no model loads from {folder}: {' '.join(str(error).split())[:300]}") from error
    if adapted := [key for key in found["unexpected_keys"] if is_lora(key) or ".lora_" in key]:
        raise InputError(
            f"{folder} holds a whole model with adapted layers ({adapted[0]}), as a stock Trainer saves it, and not "
            "how they were made: save it by save_adapter or merge, or adapt the base model and load its weights."
        )
    if lost := sorted(map(str, found["missing_keys"])):
        raise InputError(f"{folder} holds no {lost[0]}: it is a pretrained model, whose head nobody has trained yet.")
    return model


def _tokenizer(folder: Path, name: str, revision: str | None, model: Any) -> Any:
    """The tokenizer of a folder or of its base model; it cuts texts as the run did."""
    tokenizer = tokenizer_of(folder, name, revision)
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    for place in (folder, folder.parent):
        arguments = (find_json(place / "run.json") or {}).get("arguments")
        if not isinstance(arguments, dict):
            continue
        length = arguments.get("max_seq_length")
        if isinstance(length, int) and 0 < length < tokenizer.model_max_length:
            logger.info("texts are cut to %d tokens, the max_seq_length of the run", length)
            tokenizer.model_max_length = length
        break
    return tokenizer


@dataclass(frozen=True)
class Prediction:
    """The answer of a model for one text.

    label: the name of the most probable class; for a regression, the number.
    scores: the probability of each class by its name, largest first; empty for a regression.
    """

    label: str | float
    scores: dict[str, float]


@torch.no_grad()
def predict(
    model: Any,
    texts: Sequence[str | Sequence[str]],
    tokenizer: Any = None,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
) -> list[Prediction]:
    """Predict labels and scores for texts.

    Args:
        model: a sequence classifier, or a folder for `load`, which has the tokenizer too.
        texts: a list of texts, or of pairs of texts.
        tokenizer: the tokenizer; not needed for a folder.
        batch_size: number of texts in a batch; each batch is padded to its longest text.
        max_length: largest number of tokens of a text; None: what the tokenizer (see `load`) and the model's positions
            allow.

    Raises:
        InputError: as `load`; or `texts` is no such list; or the model does not give one label for a text; or
            `batch_size` or `max_length` lies outside its range.
    """
    if isinstance(model, str | Path):
        model, own = load(model)
        tokenizer = own if tokenizer is None else tokenizer
    if tokenizer is None:
        raise InputError("predict needs the tokenizer of the model: give both, as load returns them, or a folder.")
    if isinstance(texts, str) or not isinstance(texts, Sequence):
        raise InputError(f"predict takes a list of texts or of pairs, not a {type(texts).__name__}.")
    names, kind = getattr(model.config, "id2label", {}), getattr(model.config, "problem_type", None)
    if is_decoder(type(model).__name__) or kind == "multi_label_classification":
        raise InputError(f"{type(model).__name__} gives no label for a text: predict needs a classifier of one label.")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}, it must be 1 or more.")
    pairs = [_as_pair(number, text) for number, text in enumerate(texts)]
    other = next((n for n, pair in enumerate(pairs) if (pair[1] is None) != (pairs[0][1] is None)), None)
    if other is not None:
        raise InputError(
            f"text {other} is {str(texts[other])[:80]!r}, and text 0 is {str(texts[0])[:80]!r}: give texts alone or "
            "pairs alone."
        )
    columns = list(zip(*pairs, strict=True))
    limit = _limit(model, tokenizer, max_length, bool(pairs) and pairs[0][1] is not None)
    found: list[Prediction] = []
    was_training = model.training
    model.eval()
    for start in range(0, len(texts), batch_size):
        first, second = (list(column[start : start + batch_size]) for column in columns)
        seconds = None if second[0] is None else second
        batch = tokenizer(first, seconds, truncation=True, max_length=limit, padding=True, return_tensors="pt")
        logits = model(**batch.to(model.device)).logits.float()
        if logits.ndim != 2:
            raise InputError(f"{type(model).__name__} gives no label for a text: its logits are {shape_of(logits)}.")
        if logits.shape[-1] == 1:
            found += [Prediction(value, {}) for value in logits.view(-1).tolist()]
            continue
        for row in logits.softmax(-1).tolist():
            scores = {str(names.get(i, f"LABEL_{i}")): score for i, score in enumerate(row)}
            ranked = dict(sorted(scores.items(), key=lambda item: -item[1]))
            found.append(Prediction(next(iter(ranked)), ranked))
    model.train(was_training)
    return found


def _limit(model: Any, tokenizer: Any, asked: int | None, pair: bool) -> int:
    """The largest number of tokens of a text.

    Raises:
        InputError: `asked` leaves no token for the text, or is more than the model has positions.
    """
    positions, own = position_limit(model), int(tokenizer.model_max_length)
    if asked is None:
        stated = getattr(model.config, "max_position_embeddings", None)
        if positions is None and own > LONGEST and stated:  # neither has a limit, so the usual length is taken
            return int(stated)
        return own if positions is None else min(own, positions)
    least = tokenizer.num_special_tokens_to_add(pair=pair) + 1
    most = LONGEST if positions is None else positions
    if not least <= asked <= most:
        raise InputError(f"max_length is {asked}, it must lie in {least} to {most}.")
    return asked


def _as_pair(number: int, text: Any) -> tuple[str, str | None]:
    if isinstance(text, str):
        return text, None
    if isinstance(text, Sequence) and len(text) == 2 and all(isinstance(part, str) for part in text):
        return text[0], text[1]
    raise InputError(f"text {number} is {str(text)[:80]!r}: predict takes texts, or pairs of texts.")
