"""From texts to the model's inputs."""

import logging
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from loralib.errors import InputError
from loralib.glue.tasks import Task

logger = logging.getLogger(__name__)


def tokenize(
    dataset: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_seq_length: int = 128,
    pad_to_max_length: bool = True,
    overwrite_cache: bool = False,
) -> Dataset:
    """The dataset with exactly the model's inputs and `label`.

    Texts are cut to max_seq_length tokens (longest first for pairs) and padded to it, or left for the collator to pad.
    A max_seq_length above the tokenizer's own limit is reduced with a warning. overwrite_cache only concerns data of
    the hub, whose tokens are kept in its cache.
    """
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if max_seq_length <= special:
        raise InputError(f"max_seq_length is {max_seq_length} but must be above {special}, the tokens that mark the "
                         "ends of the texts: 128 is usual.")  # fmt: skip
    if max_seq_length > tokenizer.model_max_length:
        logger.warning("max_seq_length %d is above the tokenizer's limit: %d is used.",
                       max_seq_length, tokenizer.model_max_length)  # fmt: skip
    length = min(max_seq_length, tokenizer.model_max_length)
    padding = "max_length" if pad_to_max_length else False

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch[column] for column in task.text_columns)
        return dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True))

    return dataset.map(
        encode,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column != "label"],
        load_from_cache_file=not overwrite_cache,
        desc="Tokenizing",
    )
