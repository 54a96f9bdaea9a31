"""Adapters go out: each export computes what the trained model computes, and its files hold what the counts say."""

import json
import os
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_runs import FAMILIES, METHODS, SIZE, Lengthened, R, facts, fill, load_base, logits, make_base, make_run
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertTokenizer,
    DebertaV2Config,
)

from loralib.adapt import ROLES, adapt, adapted_layers, parameters, ranks
from loralib.adapters.exports import export_lora, export_merged, merge
from loralib.adapters.own import load_adapter, save_adapter
from loralib.adapters.peft import export_peft
from loralib.adapters.start import load_lora
from loralib.errors import InputError
from loralib.layers import GatedLinear, LoRALinear, SVDLinear


@pytest.mark.parametrize(
    "num_labels, dtype", [(3, torch.float32), (1, torch.float64)], ids=["classes-float32", "regression-float64"]
)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_route_computes_what_the_trained_model_computes(
    tmp_path: Path, family: str, method: str, num_labels: int, dtype: torch.dtype
) -> None:
    base, run = make_base(tmp_path / "base", family, dtype), tmp_path / "run"
    trained = make_run(run, base, method, num_labels, dtype)
    expected = logits(trained)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    assert (expected - logits(load_base(base, num_labels, dtype))).abs().max() > 0.1  # there is something to get right

    def close(model: nn.Module) -> None:
        assert (logits(model.eval()) - expected).abs().max() <= tolerance

    def fresh() -> nn.Module:
        model = load_base(base, num_labels, dtype)
        adapt(model, METHODS[method][0], list(ROLES), r=R, lora_alpha=12.0)
        return model

    reloaded = fresh()
    load_adapter(reloaded, run)
    assert all(torch.equal(p, q) for p, q in zip(reloaded.parameters(), trained.parameters(), strict=True))
    for export, out in ((export_lora, "lora"), (export_peft, "peft"), (export_merged, "merged")):
        export(run, tmp_path / out)
    for source in (run, tmp_path / "lora", tmp_path / "peft"):
        model = fresh()
        load_lora(model, source)
        close(model)
    close(peft.PeftModel.from_pretrained(load_base(base, num_labels, dtype), str(tmp_path / "peft")))
    close(
        peft.AutoPeftModelForSequenceClassification.from_pretrained(
            str(tmp_path / "peft"), num_labels=num_labels, dtype=dtype
        )
    )
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=dtype))
    # from an exported folder one can go on
    export_merged(tmp_path / "lora", tmp_path / "merged2")
    close(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged2", dtype=dtype))
    merge(trained)
    close(trained)
    assert not list(adapted_layers(trained))


@pytest.mark.parametrize(
    "kind, task, loader",
    [
        (BertForTokenClassification, "TOKEN_CLS", peft.AutoPeftModelForTokenClassification),
        (BertForQuestionAnswering, "QUESTION_ANS", peft.AutoPeftModelForQuestionAnswering),
        (BertForMaskedLM, None, None),  # PEFT has no name for it
    ],
)
def test_an_export_to_peft_names_the_task_of_the_model(
    tmp_path: Path, kind: Any, task: str | None, loader: Any
) -> None:
    torch.manual_seed(0)
    base, ids = tmp_path / "base", torch.arange(12).view(2, 6)
    kind(BertConfig(**SIZE)).save_pretrained(base)
    trained = kind.from_pretrained(base)
    adapt(trained, LoRALinear, ["query"], r=R, lora_alpha=12.0)
    fill(trained, None)
    save_adapter(trained, tmp_path / "run", {"lora_r": R, "lora_alpha": 12.0, "base_model": str(base)})
    export_peft(tmp_path / "run", tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == task
    if loader is None:
        theirs = peft.PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path / "peft")
    else:
        theirs = loader.from_pretrained(tmp_path / "peft")
    with torch.no_grad():
        wanted, found = trained.eval()(ids), theirs.eval()(ids)
    torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-5)


# ---- files hold what counts say ----


def elements(file: Path) -> int:
    return sum(t.numel() for t in load_file(file).values())


@pytest.mark.parametrize("method", METHODS)
def test_files_hold_the_counted_parameters_and_no_more(tmp_path: Path, method: str) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = make_run(tmp_path / "run", base, method)
    counts, constants = parameters(model), sum(hasattr(layer, "ranknum") for _, layer in adapted_layers(model))
    assert elements(tmp_path / "run" / "adapter.safetensors") == counts["trainable"] + constants
    export_lora(tmp_path / "run", tmp_path / "lora")
    export_peft(tmp_path / "run", tmp_path / "peft")
    assert elements(tmp_path / "lora" / "adapter.safetensors") == counts["remaining"] + counts["head"]
    zero_row = 0 if counts["remaining"] else 24 + 24  # of a query matrix
    assert elements(tmp_path / "peft" / "adapter_model.safetensors") == counts["remaining"] + counts["head"] + zero_row
    for file in (tmp_path / "lora" / "adapter.safetensors", tmp_path / "peft" / "adapter_model.safetensors"):
        assert file.stat().st_size <= 4 * elements(file) + 200 * len(load_file(file)) + 200  # values and their names
    config = json.loads((tmp_path / "lora" / "adapter.json").read_text())
    state = load_file(tmp_path / "lora" / "adapter.safetensors")
    assert (
        config["ranks"]
        == ranks(model)
        == {name: state[f"{name}.lora_A"].shape[0] if f"{name}.lora_A" in state else 0 for name in config["ranks"]}
    )


def test_the_config_is_readable_and_says_what_the_weights_do_not(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "deberta")
    model = make_run(tmp_path / "run", base, "adalora")
    config = json.loads((tmp_path / "run" / "adapter.json").read_text())
    assert config["method"] == "adalora" and config["base_model"] == str(base) and config["format_version"] == 1
    assert config["head"] == ["pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"]
    assert config["ranks"] == ranks(model) and config["low_rank"] is True
    assert set(config["scaling"].values()) == {12.0 / (R + 1e-5)}


def test_peft_alpha_over_rank_is_the_trained_scaling(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base, "adalora")
    export_peft(tmp_path / "run", tmp_path / "peft")
    config = peft.LoraConfig.from_pretrained(str(tmp_path / "peft"))
    state = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert sorted(config.modules_to_save) == ["bert.pooler", "classifier"]
    assert len(set(config.rank_pattern.values())) > 1  # otherwise this test would test nothing
    for name in config.target_modules:
        r, alpha = config.rank_pattern.get(name, config.r), config.alpha_pattern.get(name, config.lora_alpha)
        assert state[f"base_model.model.{name}.lora_A.weight"].shape[0] == r > 0
        assert alpha / r == pytest.approx(12.0 / (R + 1e-5), rel=1e-14)


def test_an_adapter_of_rank_zero_keeps_one_row_for_peft(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base, "adalora-all-zero")
    export_peft(tmp_path / "run", tmp_path / "peft")
    factors = {k: t for k, t in load_file(tmp_path / "peft" / "adapter_model.safetensors").items() if "lora_" in k}
    assert len(factors) == 2 and not any(t.any() for t in factors.values())
    export_lora(tmp_path / "run", tmp_path / "lora")
    with pytest.raises(InputError, match="rank 0 everywhere"):
        export_peft(tmp_path / "lora", tmp_path / "again")


def test_parameters_shared_between_matrices_are_saved_once_and_exported_everywhere(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, LoRALinear, ["query", "key"], r=R, lora_alpha=12.0)
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers[1:]:
        layer.lora_A = layers[0].lora_A
    fill(model, None)
    counts = parameters(model)
    assert counts["lora"] == R * 24 + len(layers) * R * 24 == sum(m["trainable"] for m in counts["modules"].values())
    save_adapter(model, tmp_path / "run", facts(base))
    model.config.save_pretrained(tmp_path / "run")
    assert elements(tmp_path / "run" / "adapter.safetensors") == counts["trainable"]
    export_merged(tmp_path / "run", tmp_path / "merged")
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    for load in (load_adapter, load_lora):
        again = load_base(base, 2)
        adapt(again, LoRALinear, ["query", "key"], r=R, lora_alpha=12.0)
        for _, layer in list(adapted_layers(again))[1:]:
            layer.lora_A = next(adapted_layers(again))[1].lora_A
        load(again, tmp_path / "run")
        assert torch.equal(logits(again), logits(model))


def test_deberta_v3_base_fits_the_sizes_promised() -> None:
    """By arithmetic on a model without storage: r 8, six modules: 165,888 a rank, model part below 8 MB."""
    config = DebertaV2Config(
        hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072, vocab_size=128100,
        relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=256,
        norm_rel_ebd="layer_norm", pooler_hidden_size=768, num_labels=2, type_vocab_size=0,
    )  # fmt: skip
    for layer, more in ((LoRALinear, 0), (SVDLinear, 1), (GatedLinear, 1)):
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config)
        adapt(model, layer, list(ROLES), r=8, lora_alpha=16.0)
        trainable = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in trainable)
        assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == 8 * (165_888 + 72 * more)
        assert 183e6 < sum(p.numel() for p in model.parameters() if not p.requires_grad) < 185e6
        assert 4 * count < 8e6  # float32
        # Adam keeps two numbers for each, AdaLoRA's allocator two for each of the low-rank ones
        assert 4 * (count + 2 * count + 2 * 8 * (165_888 + 72)) < 36e6


def test_files_are_as_readable_as_the_user_wants(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    before = os.umask(0o027)
    try:
        make_run(tmp_path / "run", base)
        for export in (export_lora, export_peft, export_merged):
            export(tmp_path / "run", tmp_path / export.__name__)
    finally:
        os.umask(before)
    files = [p for p in tmp_path.rglob("*.safetensors") if base not in p.parents]
    assert len(files) == 4 and {oct(p.stat().st_mode & 0o777) for p in files} == {"0o640"}


def test_a_merged_decoder_pads_also_from_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.pad_token, tokenizer.eos_token = None, "[SEP]"  # as Llama's
    tokenizer.save_pretrained(base)
    assert AutoTokenizer.from_pretrained(base).pad_token is None
    export_merged(tmp_path / "run", tmp_path / "merged")
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").pad_token == "[SEP]"


def test_a_failing_export_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "bert")
    make_run(tmp_path / "run", base)
    before = sorted(p.name for p in tmp_path.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    for room in ("exports", "peft"):
        monkeypatch.setattr(f"loralib.adapters.{room}.write_json", full)
    for export in (export_lora, export_peft):
        with pytest.raises(InputError, match="No space left"):
            export(tmp_path / "run", tmp_path / "out")

    def full_too(*args: Any, **kwargs: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(BertForSequenceClassification, "save_pretrained", full_too)
    with pytest.raises(InputError, match="No space left"):
        export_merged(tmp_path / "run", tmp_path / "out")
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="exists and is not empty"):
        export_lora(tmp_path / "run", tmp_path / "out")


# ---- variants ----


def test_a_layer_with_a_product_of_its_own_is_refused_for_peft_and_merged_by_its_class(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, Lengthened, ["query", "value"], r=R, lora_alpha=12.0)
    fill(model, None)
    save_adapter(model, tmp_path / "run", facts(base, "lengthened"))
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match=r"lora_length'.* --layer"):
        export_peft(tmp_path / "run", tmp_path / "peft")
    with pytest.raises(InputError, match=r"lora_length'.* --layer"):
        export_merged(tmp_path / "run", tmp_path / "merged")
    export_merged(tmp_path / "run", tmp_path / "merged", layer=Lengthened)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5
    export_lora(tmp_path / "run", tmp_path / "lora")
    again = load_base(base, 2)
    adapt(again, Lengthened, ["query", "value"], r=R, lora_alpha=12.0)
    assert load_lora(again, tmp_path / "lora") == []
    assert torch.equal(logits(again), logits(model))


class Halved(GatedLinear):
    """A variant whose diagonal is not the tensor in the file."""

    def diagonal(self) -> Tensor:
        return super().diagonal() / 2


def test_a_layer_with_a_diagonal_of_its_own_is_not_folded_from_the_file(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "bert")
    model = load_base(base, 2)
    adapt(model, Halved, ["query", "value"], r=R, lora_alpha=12.0)
    fill(model, None)
    save_adapter(model, tmp_path / "run", facts(base, "halved"))
    model.config.save_pretrained(tmp_path / "run")
    with pytest.raises(InputError, match=r"--layer"):
        export_peft(tmp_path / "run", tmp_path / "peft")
    export_merged(tmp_path / "run", tmp_path / "merged", layer=Halved)
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    assert (logits(merged) - logits(model)).abs().max() < 1e-5


# ---- through the entry points ----


def test_a_run_is_evaluated_exported_and_trained_on(
    entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Train; then only `--do_eval` from each route gives the metrics of training; then go on with another head."""
    import export_adapter

    usual = {
        "model_name_or_path": tiny_model_dir, "dataset_name": mrpc_dir, "max_seq_length": 32, "report_to": "none",
        "disable_tqdm": True, "per_device_train_batch_size": 16, "learning_rate": 0.01, "overwrite_output_dir": True,
    }  # fmt: skip
    methods = {
        "AdaLoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_type": "svd", "apply_adalora": True,
                    "target_rank": 2, "mask_interval": 1, "final_warmup": 1},
        "SoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "train_sparse": True, "sparse_lambda_2": 0.2},
        "RM-LoRA": {"apply_lora": True, "lora_r": 4, "lora_alpha": 8, "lora_type": "v1", "random_rank": 2},
    }  # fmt: skip

    def call(method: str, out: str, **flags: Any) -> dict[str, Any]:
        flags = usual | flags | {"output_dir": tmp_path / out}
        given = {name: value for name, value in flags.items() if value is not None}
        return entry_point(method).main([str(x) for name, value in given.items() for x in (f"--{name}", value)])

    for method, flags in methods.items():
        run = tmp_path / method
        trained = call(method, method, **flags, do_train=True, do_eval=True, max_steps=4, save_strategy="no")
        assert any(run.glob("tokenizer*")) and "Made from run.json" in (run / "README.md").read_text()
        for to in ("lora", "peft", "merged"):
            out = export_adapter.main([str(run), "--to", to])
            loaded = {"model_name_or_path": out} if to == "merged" else flags | {"lora_path": out}
            got = call(method, f"eval-{to}", **loaded, do_eval=True)
            for key in ("eval_loss", "eval_accuracy", "eval_f1"):
                assert got[key] == pytest.approx(trained[key], abs=1e-5)
        assert not list(run.rglob("pytorch_model*")) and not list(run.rglob("model*.safetensors"))
    three = tmp_path / "three.csv"
    three.write_text("sentence,label\n" + "".join(f"word {i},{'abc'[i % 3]}\n" for i in range(12)))
    caplog.clear()
    call("RM-LoRA", "on", **methods["RM-LoRA"], lora_path=tmp_path / "RM-LoRA", do_train=True, max_steps=1,
         dataset_name=None, train_file=three, validation_file=three, do_eval=True)  # fmt: skip
    assert "get fresh values: classifier.weight, classifier.bias" in caplog.text
    with pytest.raises(InputError, match="fully fine-tuned"):
        export_adapter.main([str(tmp_path / "RM-LoRA-merged"), "--to", "peft"])


def test_the_best_checkpoint_comes_back_exactly(
    entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path
) -> None:
    for method, flags in (
        ("AdaLoRA", "--lora_type svd --apply_adalora --target_rank 1 --mask_interval 1"),
        ("SoRA", "--train_sparse --sparse_lambda_2 0.1"),
    ):
        run = tmp_path / method
        entry_point(method).main(
            f"{flags} --model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --max_seq_length 32 "
            "--report_to none --disable_tqdm True --apply_lora --lora_r 2 --lora_alpha 4 --do_train --do_eval "
            "--max_steps 6 --eval_steps 1 --learning_rate 0.3 --eval_strategy steps --save_strategy steps "
            "--save_steps 1 --load_best_model_at_end --metric_for_best_model loss --greater_is_better True "
            f"--output_dir {run}".split()
        )
        best = Path(json.loads((run / "trainer_state.json").read_text())["best_model_checkpoint"])
        final, kept, last = (load_file(f / "adapter.safetensors") for f in (run, best, run / "checkpoint-6"))
        assert best.name != "checkpoint-6" and any(not torch.equal(last[k], kept[k]) for k in kept)
        assert final.keys() == kept.keys() and all(torch.equal(final[k], kept[k]) for k in final)
        assert json.loads((run / "adapter.json").read_text())["ranks"] == ranks_of(final)
        assert not [p for p in best.iterdir() if p.name.startswith(("model", "tokenizer", "training_args"))]


def ranks_of(state: dict[str, Tensor]) -> dict[str, int]:
    found = {}
    for key, value in state.items():
        if key.endswith(("lora_E", "lora_gate")):
            found[key.rpartition(".")[0]] = int(value.count_nonzero())
    return found


# ---- the script, and base models that are not there ----


def test_a_base_that_moved_is_found_by_its_flag_and_one_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    import export_adapter

    base, run = make_base(tmp_path / "base", "bert"), tmp_path / "run"
    trained = make_run(run, base, "adalora")
    base.rename(tmp_path / "moved")
    with pytest.raises(InputError, match=r"base model .*base of .*run is not there: .*--base"):
        export_merged(run, tmp_path / "merged")
    out = export_adapter.main([str(run), "--to", "merged", "--base", str(tmp_path / "moved")])
    assert out == tmp_path / "run-merged"
    merged = AutoModelForSequenceClassification.from_pretrained(out).eval()
    assert (logits(merged) - logits(trained)).abs().max() < 1e-5
    assert len(BertTokenizer.from_pretrained(out)) == 15
    small = tmp_path / "small"
    AutoModel.from_config(BertConfig(**(SIZE | {"intermediate_size": 20}))).save_pretrained(small)
    with pytest.raises(InputError, match=r"small does not fit .*intermediate\.dense.*\(20.*\(40"):
        export_merged(run, tmp_path / "again", str(small))
    other = make_base(tmp_path / "other", "roberta")  # same shapes under the same names
    with pytest.raises(InputError, match=r"weights of the base model .*other are not those"):
        export_merged(run, tmp_path / "again", str(other))
    half = tmp_path / "half"  # a copy in half precision is the same model
    AutoModel.from_pretrained(tmp_path / "moved").to(torch.bfloat16).save_pretrained(half)
    export_merged(run, tmp_path / "from-half", str(half))
    model = load_base(other, 3)
    adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    with pytest.raises(InputError, match="adapts 'bert"):
        load_lora(model, run)
    torch.manual_seed(99)
    config = AutoConfig.from_pretrained(tmp_path / "moved", num_labels=3)
    model = AutoModelForSequenceClassification.from_config(config)
    adapt(model, SVDLinear, list(ROLES), r=R, lora_alpha=12.0)
    assert any("another pretrained model" in line for line in load_lora(model, run))
    file = run / "adapter.json"
    file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "base_model"}))
    with pytest.raises(InputError, match=r"names no base_model: give it by --base"):
        export_merged(run, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "words, said",
    [
        (["nowhere", "--to", "peft"], r"nowhere is not a folder"),
        ([".", "--to", "lora"], r"holds no adapter\.json"),
        (["run", "--to", "peft", "--layer", "x.py:X"], r"--layer is for --to merged"),
        (["run", "--to", "merged", "--layer", "x.py:X"], r"--layer x\.py:X names no file"),
        (["run", "--to", "merged", "--layer", "own.py:Other"], r"own\.py has no layer class 'Other'"),
        (["run", "--to", "merged", "--layer", "own.py:Path"], r"own\.py has no layer class 'Path'"),
    ],
)
def test_the_export_script_refuses_bad_arguments(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import export_adapter

    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text("from pathlib import Path\n")
    with pytest.raises(InputError, match=said):
        export_adapter.main(words)
