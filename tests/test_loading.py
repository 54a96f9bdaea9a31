"""`loralib.load` and `loralib.predict`, and the names that `import loralib` reaches without loading another library."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import peft
import pytest
import torch
from adapter_runs import METHODS, RootScaled, facts, load_base, logits, make_base, make_run
from test_variants import VARIANTS
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline
from transformers import logging as transformers_logging

import loralib
from loralib import InputError, load, load_adapter, predict
from loralib.adapt import ROLES, adapt, adapted_layers
from loralib.layers import LoRALinear

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "bert")


@pytest.mark.parametrize("method", METHODS)
def test_every_folder_loads_as_what_was_trained(method: str, base: Path, tmp_path: Path) -> None:
    trained = make_run(tmp_path / "run", base, method)
    model, tokenizer = load(tmp_path / "run")
    assert torch.equal(logits(model), logits(trained)) and not model.training
    wanted = {name: layer.scaling for name, layer in adapted_layers(trained)}
    assert {name: layer.scaling for name, layer in adapted_layers(model)} == wanted
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        n for n, p in trained.named_parameters() if p.requires_grad
    }
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(base).get_vocab()
    for kind in ("lora", "peft", "merged"):
        getattr(loralib, f"export_{kind}")(tmp_path / "run", tmp_path / kind)
        found, _ = load(tmp_path / kind)
        torch.testing.assert_close(logits(found), logits(trained), rtol=0, atol=1e-5)
        assert bool(list(adapted_layers(found))) == (
            kind != "merged" and method != "adalora-all-zero" or kind == "peft"
        )


def test_no_head_is_called_untrained_that_is_then_filled(
    base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_run(tmp_path / "run", base)
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    try:
        load_base(base, 3)
        assert "MISSING" in caplog.text  # which is true there
        caplog.clear()
        load(tmp_path / "run")
        assert "MISSING" not in caplog.text and transformers_logging.get_verbosity() == logging.WARNING
    finally:
        logger.removeHandler(caplog.handler)
        transformers_logging.set_verbosity(before)


def test_pefts_own_folder_loads(base: Path, tmp_path: Path) -> None:
    """One that PEFT wrote, with rank patterns and rsLoRA; nothing but the head tells how many labels there are."""
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=3, use_rslora=True, rank_pattern={"value": 2},
        target_modules=["query", "value"], init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(load_base(base, 5), config).eval()
    theirs.save_pretrained(tmp_path)
    stated = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(stated | {"base_model_name_or_path": str(base)}))
    model, _ = load(tmp_path)
    # the pooler is not part of PEFT's head: it is the base model's, and this base was saved with one
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-5)
    assert logits(model).shape == (3, 5) and sorted({m.r for _, m in adapted_layers(model)}) == [2, 4]


def test_a_language_models_adapter_loads(base: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    plain = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    plain.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "base")
    adapt(plain, LoRALinear, ["q_proj"], r=2, lora_alpha=6)
    torch.nn.init.normal_(plain.model.layers[0].self_attn.q_proj.lora_B)
    loralib.save_adapter(plain, tmp_path / "run", facts(tmp_path / "base") | {"lora_alpha": 6})
    plain.config.save_pretrained(tmp_path / "run")
    model, _ = load(tmp_path / "run")
    assert isinstance(model, LlamaForCausalLM) and torch.equal(logits(model), logits(plain.eval()))
    loralib.export_peft(tmp_path / "run", tmp_path / "peft")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft")  # it reads the task type
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    loralib.export_merged(tmp_path / "run", tmp_path / "merged")
    merged, tokenizer = load(tmp_path / "merged")
    torch.testing.assert_close(logits(merged), logits(model), rtol=0, atol=1e-5)
    with pytest.raises(InputError, match="LlamaForCausalLM gives no label"):
        predict(merged, ["a b"], tokenizer)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_classifier_on_a_decoder_is_no_language_model(recorded: bool, base: Path, tmp_path: Path) -> None:
    """The config.json of such a run names the class of its base model, LlamaForCausalLM; older runs have only this."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)).save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path / "b")
    trained = load_base(tmp_path / "b", 3)
    trained.config.pad_token_id = 0  # as the entry points set it
    adapt(trained, LoRALinear, ["q_proj"], r=2, lora_alpha=6)
    torch.nn.init.normal_(trained.model.layers[0].self_attn.q_proj.lora_B)
    run = tmp_path / "run"
    loralib.save_adapter(trained, run, facts(tmp_path / "b") | {"lora_alpha": 6})
    trained.config.save_pretrained(run)
    assert json.loads((run / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    stated = json.loads((run / "adapter.json").read_text())
    assert stated.pop("model_class") == "LlamaForSequenceClassification"
    if not recorded:
        (run / "adapter.json").write_text(json.dumps(stated))
    loralib.export_merged(run, tmp_path / "merged")
    loralib.export_peft(run, tmp_path / "peft")
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"
    for folder in (run, tmp_path / "merged", tmp_path / "peft"):
        model, tokenizer = load(folder)
        torch.testing.assert_close(logits(model), logits(trained.eval()), rtol=0, atol=1e-5)
        assert len(predict(model, ["a b"], tokenizer)[0].scores) == 3


@pytest.mark.parametrize("num_labels", [3, 1])
@pytest.mark.parametrize("pairs", [False, True])
def test_predictions_are_those_of_the_pipeline(num_labels: int, pairs: bool, base: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "run", base, num_labels=num_labels)
    singles = ["a b c", "d", "e f g h i j a b", "j i"]
    texts: Any = [(text, "b d") for text in singles] if pairs else singles
    found = predict(tmp_path / "run", texts, batch_size=3)
    model, tokenizer = load(tmp_path / "run")
    stock = pipeline("text-classification", model=model, tokenizer=tokenizer)
    given: Any = [{"text": a, "text_pair": b} for a, b in texts] if pairs else texts
    for one, each in zip(found, given, strict=True):
        theirs = stock(each, top_k=None, function_to_apply=None if num_labels > 1 else "none")
        if num_labels == 1:
            assert one.label == pytest.approx(theirs[0]["score"], abs=1e-5) and one.scores == {}
        else:
            assert one.scores == pytest.approx({t["label"]: t["score"] for t in theirs}, abs=1e-5)
            assert list(one.scores)[0] == one.label == theirs[0]["label"]
    assert predict(model, [], tokenizer) == []


def test_a_runs_own_predictions(entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> None:
    """The file that --do_predict writes, from the output folder and from its checkpoint, cut to its max_seq_length."""
    argv = f"--model_name_or_path {tiny_model_dir} --dataset_name {mrpc_dir} --apply_lora --lora_r 2 --lora_alpha 8 "
    argv += f"--lora_module query --do_train --do_predict --max_steps 2 --max_seq_length 16 --output_dir {tmp_path} "
    argv += "--save_steps 2 --learning_rate 0.05 --use_cpu --report_to none --predict_scores"
    entry_point("AdaLoRA").main(argv.split())
    written = pd.read_csv(tmp_path / "predict_results_mrpc.txt", sep="\t")
    rows = pd.read_parquet(next(mrpc_dir.rglob("test*.parquet")))
    texts = list(zip(rows["sentence1"], rows["sentence2"], strict=True))
    for folder in (tmp_path, tmp_path / "checkpoint-2"):
        found = predict(folder, texts)
        assert [p.label for p in found] == written["prediction"].tolist()
        for number, one in enumerate(found):
            assert one.scores == pytest.approx({n: written[f"probability_{n}"][number] for n in one.scores}, abs=1e-4)


def test_a_whole_model_with_adapted_layers_is_not_taken_for_a_plain_one(base: Path, tmp_path: Path) -> None:
    """What a stock Trainer saves; from_pretrained by itself would drop the factors."""
    make_run(tmp_path / "run", base).save_pretrained(tmp_path / "stock")
    with pytest.raises(InputError, match="a whole model with adapted layers .*save it by save_adapter or merge"):
        load(tmp_path / "stock")
    with pytest.raises(InputError, match="holds no classifier.bias: it is a pretrained model"):
        load(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, base: load(run.parent), "holds no adapter and no model"),
        (lambda run, base: load(run, base=str(run / "nowhere")), "is not there|cannot be loaded"),
        (
            lambda run, base: load(run, base=str(make_base(run / "other", "roberta"))),
            "does not fit|no tokenizer|are not",
        ),
        (lambda run, base: predict(load(run)[0], ["a"]), "needs the tokenizer"),
        (lambda run, base: predict(run, "a b"), "a list of texts or of pairs, not a str"),
        (lambda run, base: predict(run, ["a", 3]), "text 1 is '3'"),
        (lambda run, base: predict(run, [("a", "b", "c")]), "text 0 is"),
    ],
)
def test_folders_that_cannot_be_loaded_are_refused(change: Any, message: str, base: Path, tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run", base)
    with pytest.raises(InputError, match=message):
        change(tmp_path / "runs" / "run", base)


def test_a_wrong_alpha_is_refused(base: Path, tmp_path: Path) -> None:
    make_run(tmp_path, base)
    model = load_base(base, 3)
    adapt(model, LoRALinear, list(ROLES), r=4, lora_alpha=24.0)
    with pytest.raises(
        InputError, match="scaling 3 for bert.encoder.layer.0.*this model has 6: adapt it with the lora_a"
    ):
        load_adapter(model, tmp_path)


def test_a_layer_with_an_update_of_its_own_needs_its_class(base: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.syspath_prepend(str(VARIANTS))
    from dora import DoRALinear

    trained = load_base(base, 3)
    adapt(trained, DoRALinear, list(ROLES), r=4, lora_alpha=12.0)
    for _, layer in adapted_layers(trained):
        torch.nn.init.normal_(layer.lora_B, std=0.3)
    loralib.save_adapter(trained, tmp_path, facts(base, "dora"))
    trained.config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="give its class by layer="):
        load(tmp_path)
    model, _ = load(tmp_path, layer=DoRALinear)
    assert torch.equal(logits(model), logits(trained))
    with pytest.raises(InputError):
        load(tmp_path, layer=RootScaled)


# ---- the top level ----


def test_importing_loralib_loads_no_other_library() -> None:
    code = (
        "import sys, loralib; assert set(loralib.__all__) <= set(dir(loralib)); "
        "loaded = {'torch', 'transformers', 'peft', 'datasets', 'safetensors'} & set(sys.modules); assert not loaded; "
        "loralib.rm_lora; assert 'torch' in sys.modules and 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_name_of_the_top_level_is_there() -> None:
    assert loralib.__all__ == sorted(loralib.__all__) and set(loralib.__all__) == set(loralib._PLACES)
    for name in loralib.__all__:
        assert getattr(loralib, name).__name__ == name
        assert getattr(loralib, name).__module__ == loralib._PLACES[name]
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = loralib.nothing  # type: ignore[attr-defined]
