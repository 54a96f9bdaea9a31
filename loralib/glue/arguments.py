"""Re-exports the flags of an entry point and their parser, for user scripts."""

from loralib.glue.flags import LEAST, DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, flag
from loralib.glue.parsing import command, make_parser, parse

__all__ = [
    "DataArguments",
    "GlueTrainingArguments",
    "LEAST",
    "LoRAArguments",
    "ModelArguments",
    "command",
    "flag",
    "make_parser",
    "parse",
]
