"""Flags: every way to write them means the same, later ones win, and what cannot be is refused in one sentence."""

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from loralib.errors import InputError
from loralib.glue.arguments import DataArguments, GlueTrainingArguments, LoRAArguments, ModelArguments, make_parser
from loralib.glue.arguments import parse as parse_classes
from loralib.glue.gone import GONE

CLASSES = (ModelArguments, DataArguments, LoRAArguments, GlueTrainingArguments)
USUAL = {"model_name_or_path": "m", "output_dir": "o", "use_cpu": True, "report_to": "none"}
MIN_LR = {"lr_scheduler_type": "cosine_with_min_lr"}  # a schedule that takes arguments


def parse(*argv: str) -> dict[str, Any]:
    """All flags by name, as the dataclasses have them."""
    return fields_of(parse_classes(CLASSES, argv))


def fields_of(parts: Any) -> dict[str, Any]:
    return {f.name: getattr(part, f.name) for part in parts for f in dataclasses.fields(part) if f.init}


def words(flags: dict[str, Any]) -> list[str]:
    return [str(word) for name, value in flags.items() for word in (f"--{name}", value)]


@pytest.fixture
def file(tmp_path: Path) -> Callable[[Any], str]:
    """file(flags): the path of a JSON file with them, and what a run needs besides; a text is YAML."""

    def write(flags: Any) -> str:
        path = tmp_path / ("run.yaml" if isinstance(flags, str) else "run.json")
        path.write_text(flags if isinstance(flags, str) else json.dumps(flags))
        return str(path)

    return write


# ---- every spelling ----

SPELLED = {  # values of each kind; the abbreviation of each name is the shortest that argparse takes
    "seed": st.integers(0, 2**32 - 1),
    "max_steps": st.integers(-1, 10**6),
    "learning_rate": st.floats(0, 1e3),
    "lora_dropout": st.floats(0, 0.99),
    "max_train_samples": st.none() | st.integers(1, 10**9),
    "cls_dropout": st.none() | st.floats(0, 0.9),
    "do_train": st.booleans(),
    "use_fast_tokenizer": st.booleans(),
    "ddp_find_unused_parameters": st.booleans(),
    "lora_module": st.text("abc.,-_ é", min_size=1, max_size=9).map(lambda t: f"x{t}"),
    "run_name": st.none() | st.text("ab-:#'\"{}[] 019.e\\né", max_size=9),
    "eval_strategy": st.sampled_from(["no", "epoch"]),
    "padding": st.sampled_from([None, "fixed", "longest"]),
    "pad_to_max_length": st.booleans(),
    "warmup_ratio": st.none() | st.floats(0, 0.9),
    "label_names": st.sampled_from([None, ["labels"]]),
    "optim_args": st.none() | st.text("ab=1,", max_size=5),
    "lr_scheduler_kwargs": st.none() | st.fixed_dictionaries({"min_lr": st.floats(0, 1e-6)}),
}  # fmt: skip


def abbreviated(name: str) -> str:
    options = [option for action in make_parser(*CLASSES)._actions for option in action.option_strings]
    full = f"--{name}"
    shortest = (n for n in range(3, len(full)) if sum(option.startswith(full[:n]) for option in options) == 1)
    return full[: next(shortest, len(full))]


def outcome(*argv: str) -> Any:
    """What the flags are, or the sentence that refuses them together."""
    try:
        return parse(*argv)
    except InputError as error:
        return str(error)


SHORT = {name: abbreviated(name) for name in (*SPELLED, *MIN_LR)}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flags=st.fixed_dictionaries({}, optional=SPELLED))
def test_every_spelling_parses_to_the_same(flags: dict[str, Any], tmp_path: Path) -> None:
    flags = {k: v for k, v in flags.items() if not (k == "pad_to_max_length" and flags.get("padding"))}
    if flags.get("lr_scheduler_kwargs"):
        flags = MIN_LR | flags
    typed = {k: v for k, v in flags.items() if v is not None}  # null stands only in files

    def argv(name_of: Callable[[str], str], joined: bool) -> list[str]:
        found: list[str] = words(USUAL)
        for name, value in typed.items():
            texts = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else str(value)]
            if joined and len(texts) == 1 or texts[0][:1] == "-":
                found.append(f"{name_of(name)}={texts[0]}")
            else:
                found += [name_of(name), *texts]
        return found

    (tmp_path / "a.json").write_text(json.dumps(USUAL | flags))
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(USUAL | flags, allow_unicode=True))
    (tmp_path / "b.yml").write_text(yaml.safe_dump({k.replace("_", "-"): v for k, v in (USUAL | flags).items()}))
    right = outcome(*argv("--{}".format, joined=False))
    for other in (
        argv("--{}".format, joined=True),
        argv(lambda name: f"--{name.replace('_', '-')}", joined=False),
        argv(lambda name: SHORT[name], joined=False),
        argv(lambda name: SHORT[name], joined=True),
        [str(tmp_path / "a.json")],
        [str(tmp_path / "a.yaml")],
        [str(tmp_path / "b.yml")],
    ):
        assert outcome(*other) == right
    for name, value in typed.items():
        if isinstance(right, dict) and name in (
            "seed",
            "learning_rate",
            "lora_module",
            "run_name",
            "label_names",
            "lr_scheduler_kwargs",
        ):
            assert right[name] == value


# ---- a file first, flags after it ----


def test_flags_override_the_file_before_them(file: Any) -> None:
    path = file(USUAL | {"seed": 1, "learning_rate": 1e-3, "do_train": True, "lora_module": "query"})
    found = parse(path, "--seed", "2", "--do_train", "False", "--lora-module=key")
    assert (found["seed"], found["learning_rate"], found["do_train"]) == (2, 1e-3, False)
    assert found["lora_module"] == "key"
    other = Path(path).with_name("more.yaml")
    other.write_text("seed: 3\nlearning_rate: -0.0\n")
    assert parse(path, str(other))["seed"] == 3 and parse(path, str(other), "--seed", "4")["seed"] == 4


@pytest.mark.parametrize(
    ("first", "later", "expected"),
    [
        ({"evaluation_strategy": "epoch"}, "--eval_strategy steps", {"eval_strategy": "steps"}),
        ({"eval_strategy": "epoch"}, "--evaluation_strategy no", {"eval_strategy": "no"}),
        ({"evaluation_strategy": "epoch"}, "--eval-strategy=no", {"eval_strategy": "no"}),
        ({"warmup_ratio": 0.1}, "--warmup_steps 7", {"warmup_steps": 7}),
        ({"warmup_ratio": 0.1}, "--warmup_s 0", {"warmup_steps": 0}),
        ({"warmup_steps": 7}, "--warmup-ratio 0.2", {"warmup_steps": 0.2}),
        ({"warmup_steps": 7}, "--warmup_ratio 0", {"warmup_steps": 0}),
        ({"pad_to_max_length": False}, "--padding fixed", {"padding": "fixed"}),
        ({"padding": "longest"}, "--pad_to_max_length", {"padding": "fixed"}),
        ({"padding": "unpadded"}, "--no_pad_to_max_length", {"padding": "longest"}),
        ({"no_cuda": True}, "--use_cpu False", {"use_cpu": False}),
        ({"use_cpu": True}, "--no-cuda=False", {"use_cpu": False}),
        ({"group_by_length": True}, "--train_sampling_strategy random", {"train_sampling_strategy": "random"}),
        ({"train_sampling_strategy": "group_by_length"}, "--group_by_l no", {"train_sampling_strategy": "random"}),
    ],
)
def test_old_and_new_names_override_each_other(first: dict[str, Any], later: str, expected: Any, file: Any) -> None:
    usual = {k: v for k, v in USUAL.items() if k != "use_cpu" or "use_cpu" not in expected}
    for begin in ([file(usual | first)], [file(yaml.safe_dump(usual | first))], words(usual | first)):
        found = parse(*begin, *later.split())
        assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("both", "expected"),
    [
        ({"warmup_ratio": 0.0, "warmup_steps": 100, "evaluation_strategy": None}, {"warmup_steps": 100}),
        ({"warmup_ratio": 0.1, "warmup_steps": 0}, {"warmup_steps": 0.1}),
        ({"warmup_steps": 0.1, "warmup_ratio": 0.1}, {"warmup_steps": 0.1}),
        ({"padding": "longest", "pad_to_max_length": True}, {"padding": "longest"}),
        ({"no_cuda": False, "use_cpu": True}, {"use_cpu": True}),
        ({"warmup_ratio": 0.1, "warmup_steps": 100}, "warmup_ratio and warmup_steps mean the same and differ here"),
        ({"padding": "fixed", "pad_to_max_length": False}, "keep padding"),
    ],
)
def test_one_file_with_both_names(both: dict[str, Any], expected: Any, file: Any) -> None:
    """A file has no order: what says nothing yields, and two that differ are refused."""
    for order in (both, dict(reversed(both.items()))):
        if isinstance(expected, str):
            with pytest.raises(InputError, match=expected):
                parse(file(USUAL | order))
        else:
            found = parse(file(USUAL | order))
            assert {name: found[name] for name in expected} == expected


def test_a_run_s_own_record_is_a_file_of_flags(file: Any) -> None:
    from loralib.glue.record import flags_of

    flags = words(
        USUAL | {"no_cuda": True, "warmup_ratio": 0.1, "evaluation_strategy": "epoch", "group_by_length": True}
    )
    parts = parse_classes(CLASSES, flags)
    again = parse(file({k: v for part in parts for k, v in flags_of(part).items()}))
    older = {name: again[name] for name in ("evaluation_strategy", "no_cuda", "group_by_length", "warmup_ratio")}
    assert again == fields_of(parts) | older


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-3", "learning_rate", 1e-3),
        ("learning_rate: 5E-4", "learning_rate", 5e-4),
        ("max_steps: -1", "max_steps", -1),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 8.0", "max_steps", 8),
        ("save_strategy: no", "save_strategy", "no"),
        ("save_strategy: false", "save_strategy", "no"),
        ("eval_strategy: Off", "eval_strategy", "no"),
        ("do_train: on", "do_train", True),
        ("do_train: No", "do_train", False),
        ("model_revision: 2024-01-01", "model_revision", "2024-01-01"),
        ("model_revision: 010", "model_revision", "010"),
        ("model_revision: 'null'", "model_revision", "null"),
        ("cls_dropout: ~", "cls_dropout", None),
        ("cls_dropout:", "cls_dropout", None),
        ("ddp_find_unused_parameters: null", "ddp_find_unused_parameters", None),
        ("lora_module: [query, key]", "lora_module", "query,key"),
        ("label_names: [labels]", "label_names", ["labels"]),
        ("report_to: [tensorboard]", "report_to", ["tensorboard"]),
        ("report_to: [tensorboard, none]", "report_to", ["tensorboard", "none"]),
        (
            "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: 1e-5, num_cycles: .5}",
            "lr_scheduler_kwargs",
            {"min_lr": 1e-5, "num_cycles": 0.5},
        ),
        ("use_fast_tokenizer: false", "use_fast_tokenizer", False),
        ("model_revision: &x main\ntokenizer_name: *x", "tokenizer_name", "main"),
    ],
)
def test_values_of_yaml(text: str, name: str, value: Any, file: Any) -> None:
    usual = [f"{k}: {v}" for k, v in USUAL.items() if f"{k}:" not in text]
    assert parse(file("\n".join([*usual, text])))[name] == value


# ---- what cannot be ----

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: .inf", "invalid int value: '.inf'"),
        ("learning_rate: .inf", "invalid float value: '.inf'"),
        ("learning_rate: Infinity", "learning_rate is inf, it must be a finite number"),
        ("learning_rate: 1e999", "learning_rate is inf"),
        (f"learning_rate: {10**400}", "learning_rate is inf"),
        (f"seed: {10**400}", "seed is a number of 401 digits"),
        ("lora_alpha: 1e308", "lora_alpha is 1e\\+308, it must be at most"),
        ("seed: null", "seed is null"),
        ("seed: [1, 2]", "seed is a list"),
        ("seed: {a: 1}", "seed is a mapping"),
        ("label_names: [[a]]", "label_names is a list that holds more"),
        ("label_names: [--seed, '3']", "a word that begins with a dash"),
        ('output_dir: "a\\0b"', "output_dir holds a NUL character"),
        (f"model_name_or_path: {'m' * 5000}", "model_name_or_path is m{40}... of 5,000 letters.*too long"),
        (f"train_file: {'a/' * 2040}b.csv", "train_file is .* too long for a path"),
        (f"lora_module: {'[' * 5000}", "not valid YAML for flags: .* nested too deeply"),
        (BOMB, "not valid YAML: an alias stands for a list or mapping"),
        ("seed: 1\nseed: 2", "gives seed twice"),
        ("max_steps: 1\nmax-steps: 2", "gives max_steps twice, as max_steps and as max-steps"),
        ("seed: !!python/name:os.system", "not valid YAML: could not determine a constructor"),
        ("token: hf_abc\n  bad: [", "not valid YAML"),
        ("hub_token: {a: hf_abc}", "hub_token is a mapping"),
        ("lr_scheduler_kwargs: {a: .inf}", "lr_scheduler_kwargs is inf"),
        ("<<: {a: 1}", "<< is not a flag"),
        ("a\n---\nb: 1", "not valid YAML"),
        ("warmup: 1", "--warmup is not a flag of this program"),
    ],
)
def test_refused_in_yaml(text: str, said: str, file: Any) -> None:
    names = [line.partition(":")[0] for line in text.splitlines()]
    usual = "".join(f"{k}: {v}\n" for k, v in USUAL.items() if k not in names)
    began = time.process_time()
    with pytest.raises(InputError, match=said) as refused:
        parse(file(usual + text))
    assert time.process_time() - began < 5
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value) and "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"seed": 1, "seed": 2}', "gives seed twice"),
        ('{"learning_rate": Infinity}', "learning_rate is inf"),
        ('{"learning_rate": 1e999}', "learning_rate is inf"),
        ('{"learning_rate": NaN}', "learning_rate is nan"),
        ('{"seed": ' + "1" * 5000 + "}", "not valid JSON|invalid int"),
        ('{"lora_module": ' + "[" * 100_000, "nested too deeply"),
        ('{"lr_scheduler_kwargs": {"a": Infinity}}', "lr_scheduler_kwargs is inf"),
        ('{"output_dir": "a\\u0000b"}', "NUL"),
        ('{"output_dir": "a\\ud800b"}', "holds characters that no path"),
        ('{"hub_token": "hf_abc", }', "not valid JSON"),
        ("[" + "1," * 600_000 + "1]", "has 1,200,003 bytes"),
    ],
)
def test_refused_in_json(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(text)
    with pytest.raises(InputError, match=said) as refused:
        parse(str(path), *words({k: v for k, v in USUAL.items() if f'"{k}"' not in text}))
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value) and "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--seed 1 run.yaml", "run.yaml must come before the flags; flags after it override it"),
        ("stray --seed 1", "stray is not a flag of this program"),
        ("--tok=hf_abc", "Ambiguous option: --tok could match"),
        ("--hub_tokn=hf_abc", "--hub_tokn is not a flag of this program: did you mean --hub_token"),
        ("--train_batch_size 8", "did you mean --per_device_train_batch_size"),
        ("--lora_target_modules query", "is not a flag of this program: .*--lora_module"),
        ("--optm_target_modules query", "--help lists all flags"),  # that flag is refused
        ("--cls_dropout 1e30", "cls_dropout is 1e\\+30, it must be at least 0 and below 1"),
        ("--output_dir=", "--output_dir is missing"),
        ("--eval_accumulation_steps 0", "eval_accumulation_steps is 0, it must be 1 or more"),
        ("--apply_lora --lora_alpha 8 --lora_r 1000000000000", "lora_r is 1000000000000, it must be at most"),
        ("--apply_lora --lora_r 8 --lora_alpha 1e308", "lora_alpha"),
        ("--apply_lora --lora_r 8 --lora_alpha 1e-320", "lora_alpha"),
        ("--max_seq_length 1000000000000", "max_seq_length is 1000000000000, it must"),
        ("--lr_scheduler_kwargs {" + '"a":{' * 100_000, "nested too deeply"),
        ('--lr_scheduler_kwargs {"a":1e999}', "lr_scheduler_kwargs is inf"),
    ],
)
def test_refused_on_the_command_line(argv: str, said: str) -> None:
    with pytest.raises(InputError, match=said) as refused:
        parse(*([] if "stray" in argv else words(USUAL)), *argv.split())
    assert len(str(refused.value)) < 500 and "\n" not in str(refused.value) and "hf_abc" not in str(refused.value)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("--output_dir o", "^--model_name_or_path is missing: "),
        ("--output_dir o --model_nme_or_path m", "--model_nme_or_path is not a flag .*--model_name_or_path"),
        ("--output_dir o --use_auth_token True", "--use_auth_token is not a flag any more: give --token"),
        ("--output_dir o run.yaml", "run.yaml must come before the flags"),
    ],
)
def test_a_flag_that_is_misspelt_is_named_where_one_that_is_needed_is_missing(argv: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        parse(*argv.split())


@pytest.mark.parametrize("value", ["1e999", "nan", "-inf", str(10**400), "1e39", "\0"])
def test_no_numeric_flag_overflows(value: str) -> None:
    """One sentence at once for every field that holds a number."""
    make_parser(*CLASSES)  # resolves the fields' types
    numeric = [
        f.name
        for c in CLASSES
        for f in dataclasses.fields(c)
        if {int, float} & {f.type, *getattr(f.type, "__args__", ())}
    ]
    assert len(numeric) > 30
    for name in numeric:
        if name == "max_grad_norm" and value in ("1e999", "1e39", str(10**400)):  # no clipping
            continue
        with pytest.raises(InputError, match=name):
            parse(*words(USUAL), f"--{name}={value}")


# ---- flags of other days ----


def test_flags_that_are_gone_say_what_to_do(file: Any) -> None:
    now = {option for action in make_parser(*CLASSES)._actions for option in action.option_strings}
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    for name, hint in GONE.items():
        assert name not in fields and f"--{name}" not in now
        for call in ([f"--{name}", "1"], [f"--{name}=1"], [f"--{name.replace('_', '-')}"]):
            with pytest.raises(InputError) as refused:
                parse(*words(USUAL), *call)
            assert str(refused.value).endswith(f" is not a flag any more: {hint}.")
        with pytest.raises(InputError, match="is not a flag any more"):
            parse(file(USUAL | {name: True}))
        given = {word.strip("'.,") for word in hint.split() if word.startswith("--")}
        assert given <= now, given - now


def test_every_field_of_earlier_transformers_is_known() -> None:
    """The fields that TrainingArguments had in 4.0, 4.10, 4.30 and 4.57 and has no more."""
    earlier = """
        evaluate_during_training per_gpu_train_batch_size per_gpu_eval_batch_size tpu_num_cores past_index
        tpu_metrics_debug adafactor sharded_ddp mp_parameters push_to_hub_model_id push_to_hub_organization
        torchdynamo use_legacy_prediction_loop fp16_opt_level fp16_backend half_precision_backend xpu_backend
        jit_mode_eval use_ipex use_mps_device fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap
        push_to_hub_token ray_scope dispatch_batches split_batches include_tokens_per_second
        include_inputs_for_metrics save_safetensors tp_size warmup_ratio no_cuda overwrite_output_dir
        evaluation_strategy group_by_length logging_dir
    """.split()
    ours = {f.name for f in dataclasses.fields(GlueTrainingArguments)}
    assert set(earlier) <= ours | set(GONE)
