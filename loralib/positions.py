"""How many tokens a model can read."""

from torch import nn

# Names of the tables of absolute positions in the models of transformers. Tables of distances have other names.
_POSITION_TABLES = (
    "position_embeddings",
    "position_embedding",
    "embed_positions",
    "positions_embed",
    "pos_emb",
    "wpe",
)
LONGEST = 2**20  # tokens; a longer row is a typing mistake, for which tokenizers raise a traceback


def position_limit(model: nn.Module) -> int | None:
    """The number of tokens that a model with absolute positions can read, special tokens included; None: no limit.

    RoBERTa and its family count positions from the index of padding on, so that a table of 66 rows serves 64 tokens.
    """
    for name, table in model.named_modules():
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _POSITION_TABLES:
            taken = getattr(table, "offset", 0) if table.padding_idx is None else table.padding_idx + 1
            stated = getattr(model.config, "max_position_embeddings", None) or table.num_embeddings
            return min(table.num_embeddings - taken, stated)
    return None
