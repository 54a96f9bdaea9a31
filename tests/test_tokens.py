"""How long a row may be and where it is padded, against what the models themselves do: no lost row, no IndexError."""

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset
from test_backbones import CONFIGS, DECODER, SIZE
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, BertTokenizer

from loralib.errors import InputError
from loralib.glue.tasks import Task
from loralib.glue.tokens import collator, pad_on_the_right, position_limit, row_length, tokenize
from loralib.kernels.deberta import unpad, use_fast_attention

FAMILIES: dict[str, Any] = {
    **CONFIGS,
    "DeBERTa-v3 with positions": lambda: CONFIGS["DeBERTa-v3"]().__class__(
        **CONFIGS["DeBERTa-v3"]().to_diff_dict() | {"position_biased_input": True}
    ),
    "DeBERTa without positions": lambda: transformers.DebertaConfig(**SIZE, position_biased_input=False),
    "OPT": lambda: transformers.OPTConfig(
        **{k: v for k, v in DECODER.items() if k not in ("intermediate_size", "num_key_value_heads")},
        ffn_dim=24,
        word_embed_proj_dim=16,
    ),
    "GPT-2": lambda: transformers.GPT2Config(vocab_size=50, n_positions=40, n_embd=16, n_layer=2, n_head=2),
}
WITHOUT_LIMIT = {"DeBERTa without positions", "ModernBERT", "Llama", "Qwen2", "Qwen3"}
TASK = Task("classification", ("text",), ("a", "b", "c"), ("accuracy",))
WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    """Whitespace words, which pads on the left with token 1, as RoBERTa's number is."""
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS))
    return BertTokenizer(str(tmp_path / "vocab.txt"), padding_side="left")


def build(family: str) -> Any:
    config = FAMILIES[family]()
    config.num_labels, config.pad_token_id = 3, 1
    return AutoModelForSequenceClassification.from_config(config).double().eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_limit_is_where_the_model_ends(family: str) -> None:
    model = build(family)

    def forward(length: int) -> None:
        ids = torch.full((1, length), 5)
        model(input_ids=ids, attention_mask=torch.ones_like(ids))

    limit = position_limit(model)
    assert (limit is None) == (family in WITHOUT_LIMIT)
    forward(limit or 200)
    if limit is not None:
        with pytest.raises((IndexError, RuntimeError, ValueError)):
            forward(limit + 1)


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("family", [*FAMILIES, "DeBERTa-v3, fast", "DeBERTa-v3, unpadded"])
def test_a_row_gives_the_same_logits_in_a_batch_and_by_itself(
    family: str, fixed: bool, tokenizer: Any, caplog: Any
) -> None:
    """With a tokenizer that pads on the left, rows of every length give what they give without any padding."""
    family, _, way = family.partition(", ")
    model = build(family)
    alone = copy.deepcopy(model)
    if way:
        assert (unpad if way == "unpadded" else use_fast_attention)(model)
    texts = ["a", "b c d e f g h", "h g a b c", "a b c " * 20]
    rows = Dataset.from_dict({"text": texts, "label": [0, 1, 2, 0]})
    with caplog.at_level(logging.WARNING):
        pad_on_the_right(tokenizer, model)
        length = row_length(38, TASK, tokenizer, model)
    assert "the tokenizer pads on the left: this run pads on the right" in caplog.text
    tokens = tokenize(rows, TASK, tokenizer, length, fixed)
    batch = collator(tokenizer, length, fixed, model)([tokens[i] for i in range(4)])
    batch.pop("labels")
    assert batch["input_ids"].shape[1] <= (position_limit(model) or 10**6)
    with torch.no_grad():
        logits = model(**batch).logits
        for i, text in enumerate(texts):
            own = tokenizer(text, truncation=True, max_length=length, return_tensors="pt")
            torch.testing.assert_close(logits[i], alone(**own).logits[0], rtol=0, atol=1e-9, msg=text)


@pytest.mark.parametrize(("reads", "allowed"), [("last", False), ("mean", False), ("first", True)])
def test_a_head_that_reads_padding_is_refused(reads: str, allowed: bool, tokenizer: Any) -> None:
    """XLNet's own default is the last position of a row."""
    config = transformers.XLNetConfig(vocab_size=60, d_model=8, n_layer=1, n_head=2, d_inner=8, summary_type=reads)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    padded = {"input_ids": torch.cat([ids, ids * 0], 1), "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0]])}
    with torch.no_grad():
        same = torch.allclose(model(ids).logits, model(**padded).logits, atol=1e-6)
    assert same == allowed
    if allowed:
        pad_on_the_right(tokenizer, model)
    else:
        with pytest.raises(InputError, match=f"head of XLNetForSequenceClassification has summary_type {reads}"):
            pad_on_the_right(tokenizer, model)


# ---- from a user's seat ----


def model_folder(folder: Path, family: str, **tokenizer: Any) -> Path:
    """A base model with 64 positions and a tokenizer without a limit."""
    config = FAMILIES[family]()
    config.max_position_embeddings = 66 if family == "RoBERTa" else 64
    config.pad_token_id, config.vocab_size = 1, 60
    AutoModel.from_config(config).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizer(str(folder / "vocab.txt"), **tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A jsonl of rows from 3 to 200 tokens."""
    path = tmp_path / "rows.jsonl"
    lines = [{"text": "a b c d e " * (1 + 8 * (i % 6)), "label": "yes" if i % 2 else "no"} for i in range(24)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def flags(model: Path, rows: Path, out: Path, *more: str) -> list[str]:
    usual = f"--model_name_or_path {model} --train_file {rows} --validation_file {rows} --output_dir {out} --do_eval "
    usual += "--apply_lora --lora_r 2 --lora_alpha 4 --max_seq_length 128 --use_cpu --disable_tqdm 1 --report_to none "
    return [*(usual + "--per_device_train_batch_size 4 --learning_rate 0.01").split(), *more]


@pytest.mark.parametrize("family", ["BERT", "RoBERTa", "DeBERTa-v3 with positions"])
def test_rows_longer_than_the_positions_are_cut(
    family: str, rows: Path, tmp_path: Path, entry_point: Callable[[str], Any], caplog: Any
) -> None:
    """Trained, resumed, and evaluated as an adapter, however batches are padded; 64 is what the issue's models have."""
    model, main = model_folder(tmp_path / "model", family), entry_point("AdaLoRA").main
    scores = []
    for padding in ("fixed", "longest", *(["unpadded"] if family.startswith("DeBERTa") else [])):
        out = tmp_path / padding
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            main(flags(model, rows, out, "--do_train", "--max_steps", "2", "--padding", padding))
        assert "max_seq_length 128 is above the model's positions: 64 is used" in caplog.text
        more = ["--lora_path", str(tmp_path / "fixed"), "--padding", padding]
        scores.append(main(flags(model, rows, tmp_path / f"{padding}-alone", *more))["eval_loss"])
    assert scores == pytest.approx([scores[0]] * len(scores), abs=1e-6)


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(
    rows: Path, tmp_path: Path, entry_point: Callable[[str], Any]
) -> None:
    main = entry_point("RM-LoRA").main
    losses = {}
    for side in ("right", "left"):
        torch.manual_seed(0)
        model = model_folder(tmp_path / side, "DeBERTa-v3", padding_side=side)
        for module in (base := AutoModel.from_pretrained(model)).modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.2)
        base.save_pretrained(model)
        for padding in ("fixed", "longest", "unpadded"):
            out = tmp_path / f"{side}-{padding}"
            losses[side, padding] = main(flags(model, rows, out, "--padding", padding, "--random_rank", "1"))[
                "eval_loss"
            ]
    assert list(losses.values()) == pytest.approx([losses["right", "fixed"]] * 6, abs=1e-6)
