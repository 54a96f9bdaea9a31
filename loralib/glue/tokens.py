"""From texts to the model's inputs: how long a row may be, on which side it is padded, and the rows themselves."""

import logging
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase, default_data_collator

from loralib.errors import InputError
from loralib.glue.tasks import Task

logger = logging.getLogger(__name__)

# How the models of transformers call their table of absolute positions. Tables of distances have other names.
_POSITION_TABLES = (
    "position_embeddings",
    "position_embedding",
    "embed_positions",
    "positions_embed",
    "pos_emb",
    "wpe",
)
MULTIPLE = 8  # a batch padded to its longest row is padded to a multiple of this: matrix units like it
LONGEST = 2**20  # tokens; longer ones are a slip of the keyboard, which tokenizers answer with a traceback


def position_limit(model: nn.Module) -> int | None:
    """Tokens that a row may have in a model with absolute positions, special tokens included; None: any number.

    RoBERTa and its family begin to count after the index of padding, so that of a table of 66 rows 64 are left.
    """
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            taken = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
            stated = getattr(model.config, "max_position_embeddings", None) or table.num_embeddings
            return min(table.num_embeddings - taken, stated)
    return None


def row_length(max_seq_length: int, task: Task, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> int:
    """Tokens that a row has at most: max_seq_length, or what the tokenizer and the model's positions allow.

    The log says which of them reduced it.

    Raises:
        InputError: so few tokens that no text is left, or a limit of the tokenizer that is no number of tokens.
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
    """The number in tokenizer_config.json, or the huge one that stands for none."""
    limit = tokenizer.model_max_length
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
        raise InputError(
            f"the tokenizer's model_max_length is {limit!r}, it must be a number of tokens: correct it in "
            "tokenizer_config.json, or give another --tokenizer_name."
        )
    return int(min(limit, 10**30))  # infinity has no integer


def pad_on_the_right(tokenizer: PreTrainedTokenizerBase) -> None:
    """Let `tokenizer` pad behind the text, whatever its file says.

    Heads of encoders read the first token, and absolute positions are counted from it. Padding in front of the text
    would silently change the result of every shorter row.

    Raises:
        InputError: the tokenizer has no token to pad with.
    """
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
    """The dataset with exactly the model's inputs and `label`.

    Texts are cut to `length` tokens (longest first for pairs) and padded to it, or left for the collator to pad.
    overwrite_cache only concerns data of the hub, whose tokens are kept in its cache.

    Args:
        length: as `row_length` gives it.
        fixed: pad every row to `length`.
    """
    padding = "max_length" if fixed else False

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = (batch[column] for column in task.text_columns)
        # the mask is asked for: a tokenizer that leaves it out would let the model read padding
        return dict(tokenizer(*texts, padding=padding, max_length=length, truncation=True, return_attention_mask=True))

    return dataset.map(
        encode,
        batched=True,
        remove_columns=[column for column in dataset.column_names if column != "label"],
        load_from_cache_file=not overwrite_cache,
        desc="Tokenizing",
    )


def collator(tokenizer: PreTrainedTokenizerBase, length: int, fixed: bool, model: nn.Module) -> Any:
    """What makes a batch of rows that `tokenize` gave: as they are, or padded to the longest one."""
    if fixed:
        return default_data_collator
    limit = position_limit(model)
    rounded = -(-length // MULTIPLE) * MULTIPLE
    # a row as long as the positions allow cannot be padded further
    return DataCollatorWithPadding(
        tokenizer, pad_to_multiple_of=MULTIPLE if limit is None or rounded <= limit else None
    )


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any, splits: list[Dataset]) -> None:
    """Refuse rows, or padding, with tokens that the model does not know.

    Raises:
        InputError: names the token.
    """
    known = model.get_input_embeddings().weight.shape[0]
    ids = tokenizer.get_vocab().values()  # not len(tokenizer): the ids of a small vocabulary may be high
    if max(ids, default=0) < known and tokenizer.pad_token_id < known:
        return
    highest = max(tokenizer.pad_token_id, *(max(ids) for split in splits for ids in split["input_ids"]))
    if highest >= known:
        raise InputError(
            f"the tokenizer gives the token {highest} and the model knows tokens 0 to {known - 1}: the two do not "
            "belong together, look at --tokenizer_name and --model_name_or_path."
        )
