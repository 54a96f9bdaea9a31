"""Turns texts into the model's inputs: limits the length of a row, tokenises and pads."""

import logging
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from loralib.errors import InputError
from loralib.glue.tasks import Task
from loralib.positions import LONGEST, position_limit

logger = logging.getLogger(__name__)

MULTIPLE = 8  # the length of a batch is rounded up to a multiple of this, which suits matrix units


def row_length(max_seq_length: int, task: Task, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """The largest number of tokens in a row: max_seq_length, or less if the tokenizer or the positions require it.

    The log says which of them reduced it.

    Raises:
        InputError: no token would be left for the text, or the tokenizer's limit is not a number of tokens.
    """
    limits = {"the model's positions": position_limit(model), "the tokenizer's limit": _tokenizer_limit(tokenizer)}
    length = max_seq_length
    for what, limit in limits.items():
        if limit is not None and length > limit:
            logger.warning("max_seq_length %d is above %s: %d is used.", length, what, limit)
            length = limit
    if length > LONGEST:
        raise InputError(f"max_seq_length is {length}, it must be at most {LONGEST}: 128 is usual.")
    special = tokenizer.num_special_tokens_to_add(pair=len(task.text_columns) == 2)
    if length <= special:
        reduced = f", reduced from {max_seq_length}," if length < max_seq_length else ""
        raise InputError(f"max_seq_length is {length}{reduced} but must be above {special}, the tokens that mark the "
                         "ends of the texts: 128 is usual.")  # fmt: skip
    return length


def _tokenizer_limit(tokenizer: PreTrainedTokenizerBase) -> int:
    """The limit in tokenizer_config.json; a huge number if it has none."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise InputError(
            f"the tokenizer's model_max_length is {limit!r}, it must be a number of tokens: correct it in "
            "tokenizer_config.json, or give another --tokenizer_name."
        )
    return int(min(limit, 10**30))  # infinity has no integer


def pad_on_the_right(tokenizer: PreTrainedTokenizerBase, model: Any) -> None:
    """Let `tokenizer` pad behind the text, even if its file asks for the other side.

    The heads of encoders read the first token, and absolute positions are counted from it. Padding in front of the text
    would silently change the result of every shorter row.

    Raises:
        InputError: the tokenizer has no token to pad with, or the model's head would read padding.
    """
    reads = getattr(getattr(model, "sequence_summary", None), "summary_type", "first")
    if reads in ("last", "mean"):  # XLNet
        raise InputError(
            f"the head of {type(model).__name__} has summary_type {reads}, which reads padding too in every row "
            "that is shorter than its batch: use another model, or one trained with summary_type first."
        )
    if tokenizer.pad_token_id is None:
        raise InputError(
            "the tokenizer has neither a pad_token nor an eos_token, so batches cannot be padded: set one in its "
            "tokenizer_config.json, or give another --tokenizer_name."
        )
    if tokenizer.padding_side != "right":
        logger.warning("the tokenizer pads on the %s: this run pads on the right.", tokenizer.padding_side)
        tokenizer.padding_side = "right"


def tokenize(
    dataset: Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    fixed: bool = True,
    overwrite_cache: bool = False,
) -> Dataset:
    """The dataset with the model's inputs and `label`, and no other columns.

    Args:
        length: tokens of a row, from `row_length`. Longer texts are cut, of a pair the longer one first.
        fixed: pad every row to `length`; otherwise the collator pads.
        overwrite_cache: tokenise data of the hub again, although the result is in its cache.
    """
    padding = "max_length" if fixed else False

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch[column] for column in task.text_columns)
        # The mask is asked for, because some tokenizers leave it out, and the model would read padding.
        return dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True, return_attention_mask=True))

    return dataset.map(
        encode,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column != "label"],
        load_from_cache_file=not overwrite_cache,
        desc="Tokenizing",
    )


def collator(tokenizer: PreTrainedTokenizerBase, length: int, fixed: bool, model: nn.Module) -> Any:
    """The function that makes a batch of tokenised rows: unchanged if `fixed`, else padded to the longest one."""
    if fixed:
        return default_data_collator
    limit = position_limit(model)
    rounded = -(-length // MULTIPLE) * MULTIPLE
    # If the longest row takes all positions of the model, it cannot be padded to a multiple.
    return DataCollatorWithPadding(
        tokenizer, pad_to_multiple_of=MULTIPLE if limit is None or rounded <= limit else None
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any, splits: list[Dataset]) -> None:
    """Refuse rows or padding with tokens that the model does not know.

    Raises:
        InputError: the message names the token.
    """
    known = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab().values()  # len(tokenizer) is not enough: a small vocabulary may have high ids
    if max(ids, default=0) < known and tokenizer.pad_token_id < known:
        return
    highest = max(tokenizer.pad_token_id, *(max(ids) for split in splits for ids in split["input_ids"]))
    if highest >= known:
        raise InputError(
            f"the tokenizer gives the token {highest} and the model knows tokens 0 to {known - 1}: the two do not "
            "belong together, look at --tokenizer_name and --model_name_or_path."
        )
