"""The embedded model and data: the hub's layout, the same on every build, no fact in two splits, learnable."""

import json
import zipfile
from collections import Counter
from pathlib import Path

import embedded
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def meaning(sentence: str) -> tuple[int, ...]:
    """The fact that a sentence states, read back from its words."""
    text = f" {sentence} "
    found = []
    for part in embedded.PARTS:
        hits = [i for i, wordings in enumerate(part) if any(f" {w} " in text for w in wordings)]
        assert len(hits) == 1, (sentence, hits)
        found += hits
    return tuple(found)


def test_labels_say_whether_both_sentences_state_one_fact_and_splits_share_none(mrpc_dir: Path) -> None:
    seen: dict[tuple[int, ...], str] = {}
    for split in ("train", "validation", "test"):
        rows = pq.read_table(mrpc_dir / f"{split}-00000-of-00001.parquet").to_pylist()
        for row in rows:
            first, second = meaning(row["sentence1"]), meaning(row["sentence2"])
            assert row["label"] == (first == second)
            for fact in (first, second):
                assert seen.setdefault(fact, split) == split
        share = Counter(row["label"] for row in rows)[1] / len(rows)
        assert abs(share - 0.67) < 0.05


def test_parquet_files_have_the_columns_and_features_of_mrpc(mrpc_dir: Path) -> None:
    first = 0
    for split, rows in (("train", 64), ("validation", 32), ("test", 16)):
        table = pq.read_table(mrpc_dir / f"{split}-00000-of-00001.parquet")
        types = [(field.name, str(field.type)) for field in table.schema]
        assert types == [("sentence1", "string"), ("sentence2", "string"), ("label", "int64"), ("idx", "int32")]
        features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
        assert features["label"] == {"names": ["not_equivalent", "equivalent"], "_type": "ClassLabel"}
        assert table["idx"].to_pylist() == list(range(first, first + rows))
        first += rows


def test_checkpoint_is_laid_out_as_the_hubs(tiny_model_dir: Path) -> None:
    assert {f.name for f in tiny_model_dir.iterdir()} == {
        "config.json",
        "pytorch_model.bin",
        "spm.model",
        "tokenizer_config.json",
    }
    config = json.loads((tiny_model_dir / "config.json").read_text())
    assert config["model_type"] == "deberta-v2" and config["pos_att_type"] == "p2c|c2p" and config["share_att_key"]
    tokenizer = json.loads((tiny_model_dir / "tokenizer_config.json").read_text())
    assert tokenizer == {"do_lower_case": False, "vocab_type": "spm"}
    state = torch.load(tiny_model_dir / "pytorch_model.bin", weights_only=True)
    assert {t.dtype for t in state.values()} == {torch.float16}
    assert {k.split(".")[0] for k in state} == {"deberta", "mask_predictions", "lm_predictions"}


def test_stock_classes_load_every_backbone_weight(tiny_model_dir: Path) -> None:
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tiny_model_dir, dtype=torch.float32, output_loading_info=True
    )
    assert {k.split(".")[0] for k in info["missing_keys"]} == {"pooler", "classifier"}
    assert all(k.startswith(("lm_predictions.", "mask_predictions.")) for k in info["unexpected_keys"])
    state = torch.load(tiny_model_dir / "pytorch_model.bin", weights_only=True)
    for name, tensor in model.deberta.state_dict().items():
        assert torch.equal(tensor, state[f"deberta.{name}"].float()), name


def test_tokenizer_keeps_words_whole_and_spells_out_others(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert tokenizer.tokenize("the firm bought the road .") == ["▁the", "▁firm", "▁bought", "▁the", "▁road", "▁."]
    ids = tokenizer("Any ASCII text: 3.14!", "the plan .")["input_ids"]
    assert (ids[0], ids[-1]) == (tokenizer.cls_token_id, tokenizer.sep_token_id) == (1, 2)
    assert tokenizer.unk_token_id not in ids
    assert (tokenizer.pad_token_id, tokenizer.unk_token_id) == (0, 3)


def test_builds_are_the_same_bytes_and_leave_the_random_state(tmp_path: Path) -> None:
    folders = []
    for name in ("a", "b"):
        torch.rand(len(folders) + 1)
        before = torch.get_rng_state()
        folder = tmp_path / name
        embedded.build_model(folder / "m", hidden_size=16, layers=1, heads=2, steps=0)
        embedded.build_data(folder / "d", train=8, validation=4, test=4)
        assert torch.equal(before, torch.get_rng_state())
        folders.append(folder)
    files = sorted(f.relative_to(folders[0]) for f in folders[0].rglob("*") if f.is_file())
    assert len(files) == 7
    for file in files:
        assert (folders[0] / file).read_bytes() == (folders[1] / file).read_bytes(), file


def test_main_builds_once_and_leaves_no_half_made_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = embedded.build_model

    def failing(folder: Path) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded, "build_model", failing)
    with pytest.raises(KeyboardInterrupt):
        embedded.main(["--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(embedded, "build_model", lambda f: small(f, hidden_size=16, layers=1, heads=2, steps=0))
    target = embedded.main(["--out", str(tmp_path)])
    assert list(tmp_path.iterdir()) == [target] and capsys.readouterr().out.split() == [str(target)]
    assert zipfile.is_zipfile(target / embedded.MODEL / "pytorch_model.bin")

    monkeypatch.setattr(embedded, "build_model", failing)
    assert embedded.main(["--out", str(tmp_path)]) == target


def test_more_rows_than_facts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 410 facts, not 5000"):
        embedded.build_data(tmp_path, train=8, validation=5000)


@pytest.mark.slow
def test_pretrained_backbone_is_the_same_on_every_build(tmp_path: Path) -> None:
    bins = [embedded.build_model(tmp_path / name) / "pytorch_model.bin" for name in ("a", "b")]
    assert bins[0].read_bytes() == bins[1].read_bytes()
