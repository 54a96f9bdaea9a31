"""Builds the embedded default: a tiny DeBERTa-v3 with its own tokenizer, and a generated data set in MRPC's format.

This file makes both without network, and the same on every run. With them, the quickstart and the tests use the same
code as microsoft/deberta-v3-base on MRPC.

The language: a sentence states one fact, who did what to what and when. Each of the four parts has two wordings and a
sentence has four orders of words, so two sentences about one fact may share few words (label equivalent), and two
sentences that differ in one part may share most of them (label not_equivalent), as in MRPC.

The backbone is pre-trained for some seconds the way DeBERTa-v3 was, by replaced token detection, here on pairs of
sentences: the second has parts replaced, and the model says of each of its tokens whether it states something else than
the first. Pre-training, train, validation and test have no fact in common.

    python scripts/embedded.py            # makes .embedded/v1/{deberta-v3-tiny,mrpc}; does nothing if they are there
    python scripts/embedded.py --out DIR  # elsewhere
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

VERSION = "v1"  # of the artefacts: raise it with every change that changes them
MODEL, DATA = "deberta-v3-tiny", "mrpc"  # folder names; the data folder's name is what tells the task

# The four parts of a fact; a meaning in its two wordings.
WHO = (
    "the company/the firm, the police/the officers, the court/the judges, the airline/the carrier, the university/the "
    "college, the army/the troops, the bank/the lender, the union/the workers"
)
DID = (
    "bought/purchased, sold/marketed, rejected/refused, approved/accepted, delayed/postponed, praised/applauded, "
    "examined/reviewed, announced/unveiled"
)
WHAT = (
    "the plan/the proposal, the building/the tower, the report/the study, the contract/the deal, the aircraft/the "
    "plane, the vaccine/the shot, the road/the highway, the film/the movie"
)
WHEN = (
    "on monday/after the weekend, on friday/before the weekend, in july/in summer, in january/in winter, last night/"
    "late yesterday, this morning/early today, a year ago/twelve months ago, in march/in spring"
)
PARTS = [[meaning.strip().split("/") for meaning in part.split(",")] for part in (WHO, DID, WHAT, WHEN)]
ORDERS: tuple[tuple[int | str, ...], ...] = (  # a number is a part, a string is itself
    (0, 1, 2, 3, "."),
    (3, ",", 0, 1, 2, "."),
    (2, "was", 1, "by", 0, 3, "."),
    (3, ",", 2, "was", 1, "by", 0, "."),
)
SHARES = {"pretraining": 0.5, "train": 0.3, "validation": 0.1, "test": 0.1}
POSITIVE = 0.67  # MRPC's share of equivalent pairs

Fact = tuple[int, ...]  # the meaning of each part


def facts() -> dict[str, list[Fact]]:
    """All facts, each in exactly one share."""
    everything = list(itertools.product(*(range(len(part)) for part in PARTS)))
    random.Random(0).shuffle(everything)
    shares, start = {}, 0
    for name, share in SHARES.items():
        end = start + round(share * len(everything))
        shares[name], start = everything[start:end], end
    return shares


def sentence_for(fact: Fact, rng: random.Random) -> list[tuple[int | None, str]]:
    """A sentence for the fact in random wording, as (part or None, text) in order."""
    order = rng.choice(ORDERS)
    return [(None, p) if isinstance(p, str) else (p, rng.choice(PARTS[p][fact[p]])) for p in order]


def change(fact: Fact, share: set[Fact], rng: random.Random, parts: list[int]) -> Fact | None:
    """Another fact of the same share that differs in exactly these parts, None if twenty draws find none."""
    for _ in range(20):
        other = tuple(rng.randrange(len(PARTS[i])) if i in parts else m for i, m in enumerate(fact))
        if other in share and all(other[i] != fact[i] for i in parts):
            return other
    return None


def pairs(share: str, rows: int, seed: int) -> list[tuple[str, str, int]]:
    """`rows` (sentence1, sentence2, label) about different facts of one share; 67 of 100 are equivalent."""
    rng = random.Random(seed)
    pool, known = facts()[share], set(facts()[share])
    if not 1 <= rows <= len(pool):
        raise ValueError(
            f"The {share} share of the embedded data has {len(pool)} facts, not {rows}: ask for 1 to that many."
        )
    positives = round(POSITIVE * rows)
    labels = [1] * positives + [0] * (rows - positives)
    rng.shuffle(labels)
    out = []
    for fact, label in zip(pool, labels, strict=False):
        other = fact if label else change(fact, known, rng, rng.sample(range(4), rng.choice((1, 1, 2))))
        while other is None:
            other = change(fact, known, rng, rng.sample(range(4), 2))
        sentences = [" ".join(text for _, text in sentence_for(f, rng)) for f in (fact, other)]
        out.append((*sentences, label))
    return out


def build_data(folder: str | Path, train: int = 1024, validation: int = 408, test: int = 256) -> Path:
    """Writes the three parquet files of the hub's MRPC (sentence1, sentence2, label, idx) with generated rows.

    label is a ClassLabel (not_equivalent, equivalent), idx counts through the three files, as on the hub.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = {"dtype": "string", "_type": "Value"}
    features = {
        "sentence1": text,
        "sentence2": text,
        "label": {"names": ["not_equivalent", "equivalent"], "_type": "ClassLabel"},
        "idx": {"dtype": "int32", "_type": "Value"},
    }
    types = {"sentence1": pa.string(), "sentence2": pa.string(), "label": pa.int64(), "idx": pa.int32()}
    schema = pa.schema(types).with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    first = 0
    for seed, (split, rows) in enumerate({"train": train, "validation": validation, "test": test}.items()):
        sentence1, sentence2, label = zip(*pairs(split, rows, seed), strict=True)
        columns = {"sentence1": sentence1, "sentence2": sentence2, "label": label, "idx": range(first, first + rows)}
        table = pa.table({name: list(column) for name, column in columns.items()}, schema=schema)
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
        first += rows
    return folder


def build_tokenizer(folder: Path) -> Any:
    """Writes spm.model and a tokenizer_config.json of two keys, and returns the sentencepiece processor.

    A unigram model written out rather than trained: DeBERTa-v3's four special pieces first, then the language's words,
    then the printable characters, so that any English text can be given to the tiny model, if not understood by it.
    """
    import sentencepiece
    from sentencepiece import sentencepiece_model_pb2 as spm

    texts = [text for part in PARTS for meaning in part for text in meaning]
    texts += [p for order in ORDERS for p in order if isinstance(p, str)]
    words = sorted({"\u2581" + w for text in texts for w in text.split()})
    characters = [c for c in map(chr, [0x2581, *range(33, 127)]) if c not in words]
    model = spm.ModelProto()
    model.trainer_spec.model_type = spm.TrainerSpec.UNIGRAM
    model.trainer_spec.pad_id, model.trainer_spec.bos_id, model.trainer_spec.eos_id, model.trainer_spec.unk_id = range(
        4
    )
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.escape_whitespaces = True
    kinds = spm.ModelProto.SentencePiece
    for piece in ("[PAD]", "[CLS]", "[SEP]"):
        model.pieces.add(piece=piece, score=0.0, type=kinds.CONTROL)
    model.pieces.add(piece="[UNK]", score=0.0, type=kinds.UNKNOWN)
    for piece in words:
        model.pieces.add(piece=piece, score=-5.0, type=kinds.NORMAL)
    for piece in characters:
        model.pieces.add(piece=piece, score=-10.0, type=kinds.NORMAL)
    model.trainer_spec.vocab_size = len(model.pieces)
    (folder / "spm.model").write_bytes(model.SerializeToString(deterministic=True))
    config = {"do_lower_case": False, "vocab_type": "spm"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString(deterministic=True))


def pretraining_batch(sp: Any, pool: list[Fact], rng: random.Random, size: int) -> tuple[Any, Any, Any]:
    """(input_ids, attention_mask, labels), each (size, length); labels: 1 replaced, 0 not, -100 ignored.

    The loss counts the tokens of the second sentence's parts, and its [SEP], which stands for all of them. The other
    tokens are ignored. Each part is replaced with probability 1/4.
    """
    import torch

    ids, labels = [], []
    for _ in range(size):
        fact = rng.choice(pool)
        other = tuple(rng.randrange(len(PARTS[i])) if rng.random() < 0.25 else m for i, m in enumerate(fact))
        first = [i for _, text in sentence_for(fact, rng) for i in sp.encode(text)]
        row, asked = [1, *first, 2], [-100] * (len(first) + 2)
        for part, text in sentence_for(other, rng):
            pieces = sp.encode(text)
            row += pieces
            asked += [-100 if part is None else int(other[part] != fact[part])] * len(pieces)
        ids.append(torch.tensor([*row, 2]))
        labels.append(torch.tensor([*asked, int(other != fact)]))
    pad = torch.nn.utils.rnn.pad_sequence
    input_ids = pad(ids, batch_first=True, padding_value=0)
    return input_ids, (input_ids != 0).long(), pad(labels, batch_first=True, padding_value=-100)


def pretrain(model: Any, head: Any, sp: Any, steps: int, seed: int) -> float:
    """Replaced token detection on the pre-training facts; returns the last step's share of right answers."""
    import torch

    rng, pool = random.Random(seed), facts()["pretraining"]
    with torch.no_grad():  # two wordings begin close to each other, as co-occurrence would make them
        table = model.get_input_embeddings().weight
        for meaning in itertools.chain.from_iterable(PARTS):
            vector = torch.randn(table.shape[1]) * 0.05
            for i in {i for text in meaning for i in sp.encode(text)}:
                table[i] += vector
    parameters = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 50) * (1 - step / steps))
    right = 0.0
    for _ in range(steps):
        input_ids, mask, labels = pretraining_batch(sp, pool, rng, 64)
        asked = labels >= 0
        logits = head(model(input_ids, attention_mask=mask).last_hidden_state[asked]).squeeze(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[asked].float())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        right = ((logits > 0) == (labels[asked] == 1)).float().mean().item()
    return right


def build_model(
    folder: str | Path, hidden_size: int = 64, layers: int = 2, heads: int = 4, steps: int = 500, seed: int = 0
) -> Path:
    """Writes a tiny checkpoint laid out as the hub's microsoft/deberta-v3-base.

    That is: config.json (pos_att_type as one string), pytorch_model.bin in half precision with the backbone's keys
    under `deberta.` and those of two pre-training heads, spm.model, a tokenizer_config.json of two keys, nothing else.
    `steps` counts the pre-training steps (0: random weights). The caller's random state is left as it was.
    """
    import torch
    from torch import nn
    from transformers import DebertaV2Config, DebertaV2Model

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sp = build_tokenizer(folder)
    shape = {
        "hidden_size": hidden_size,
        "intermediate_size": 2 * hidden_size,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": sp.get_piece_size() + 16,  # [MASK] comes after the pieces, and some rows stay unused, as there
        "position_buckets": 32,
    }
    config = {
        "model_type": "deberta-v2",
        "attention_probs_dropout_prob": 0.1,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "initializer_range": 0.02,
        "max_position_embeddings": 512,
        "relative_attention": True,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": "p2c|c2p",
        "layer_norm_eps": 1e-7,
        "max_relative_positions": -1,
        "position_biased_input": False,
        "type_vocab_size": 0,
        "pooler_dropout": 0,
        "pooler_hidden_act": "gelu",
        "pooler_hidden_size": hidden_size,
        **shape,
    }
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.set_num_threads(1)  # sums in one order: the same bytes on every run
        torch.manual_seed(seed)
        # Larger first weights than the file states, and no dropout: a tiny model learns sooner.
        early = {"initializer_range": 0.1, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        model = DebertaV2Model(DebertaV2Config(**{**config, **early}))

        def block() -> dict[str, nn.Module]:
            return {"dense": nn.Linear(hidden_size, hidden_size), "LayerNorm": nn.LayerNorm(hidden_size)}

        detector = nn.ModuleDict({**block(), "classifier": nn.Linear(hidden_size, 1)})
        generator = nn.ModuleDict(block())
        head = nn.Sequential(detector["dense"], nn.GELU(), detector["LayerNorm"], detector["classifier"])
        right = pretrain(model, head, sp, steps, seed) if steps else 1.0
        torch.set_num_threads(threads)
    if right < 0.97:
        raise RuntimeError(
            f"Pre-training the embedded model ended with {right:.1%} right answers, expected 97% or more."
        )
    state = {f"deberta.{name}": tensor for name, tensor in model.state_dict().items()}
    state |= {f"mask_predictions.{name}": tensor for name, tensor in detector.state_dict().items()}
    state |= {f"lm_predictions.lm_head.{name}": tensor for name, tensor in generator.state_dict().items()}
    state["lm_predictions.lm_head.bias"] = torch.zeros(config["vocab_size"])
    torch.save({name: tensor.half() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder


def main(argv: list[str] | None = None) -> Path:
    """Builds model and data under --out unless this version's are there; prints and returns the folder of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / ".embedded", metavar="DIR")
    out = parser.parse_args(argv).out
    target = out / VERSION
    if not target.is_dir():
        started = time.perf_counter()
        print(f"Building the embedded model and data in {target} ...", file=sys.stderr)
        out.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix="building-", dir=out))
        try:
            build_data(aside / DATA)
            build_model(aside / MODEL)
            aside.chmod(0o755)  # only its owner can read mkdtemp's folder
            try:
                os.rename(aside, target)
            except OSError:  # another process was faster: what it built is the same
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        print(f"built in {time.perf_counter() - started:.0f} s", file=sys.stderr)
    print(target)
    return target


if __name__ == "__main__":
    main()
