"""No access token in any file, log or printed command, whichever program wrote it and however its flag was spelt."""

import io
import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from export_adapter import main as export
from test_scripts import script

from loralib.glue.arguments import GlueTrainingArguments, command
from loralib.secrets import hide, is_secret, remember_command
from loralib.sweep import asking
from loralib.sweep import command as sweep

ROOT = Path(__file__).resolve().parents[1]
# One for each spelling; all are found by this part.
MARK = "Secret-of-the-hub"
SPELLINGS = [
    ["--hub_token", f"{MARK}-a"],
    [f"--hub_token={MARK}-b"],
    ["--hub-token", f"{MARK}-c"],
    ["--hub_tok", f"{MARK}-d"],
    [f"--hub-t={MARK}-e"],
    ["--token", f"{MARK}-f"],
    [f"--token={MARK} g"],
]
WORDS = [word for words in SPELLINGS for word in words]


def leaks(folder: Path) -> list[str]:
    """Files below a folder that hold a token, in any of their bytes."""
    return [str(p) for p in folder.rglob("*") if p.is_file() and MARK.encode() in p.read_bytes()]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands for the hub; the tokens that it was given."""
    given: list[str] = []

    def create_repo(self: Any, repo_id: str, token: str, **kwargs: Any) -> Any:
        given.append(token)
        return type("Repository", (), {"repo_id": repo_id})

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda self, token, **kwargs: given.append(token))
    return given


METHODS = {
    "lora": ("AdaLoRA", ["--apply_lora", "--lora_r", "2", "--lora_alpha", "4"]),
    "full": ("AdaLoRA", []),
    "stages": (
        "SoRA",
        "--apply_lora --lora_r 2 --lora_alpha 4 --train_sparse --sparse_lambda_2 1e-4 --lambda_schedule linear "
        "--max_lambda 1e-3 --lambda_num 2".split(),
    ),
    "rm-lora": ("RM-LoRA", ["--apply_lora", "--lora_r", "2", "--lora_alpha", "4", "--random_rank", "1"]),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_token_is_written(
    method: str, entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, hub: list[str],
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """All spellings at once, also those whose value a later flag replaces; then what an export makes of the run."""
    folder, flags = METHODS[method]
    file = tmp_path / "flags" / ("run.json" if method == "full" else "run.yaml")
    file.parent.mkdir()
    values = {"hub_token": f"{MARK}-h", "token": f"{MARK}-i", "learning_rate": 0.01}
    file.write_text(json.dumps(values) if method == "full" else yaml.safe_dump(values))
    out = tmp_path / "out"
    usual = [
        *("--model_name_or_path", tiny_model_dir, "--dataset_name", mrpc_dir, "--output_dir", out / "run"),
        *("--do_train", "--do_eval", "--max_steps", 2, "--save_steps", 1, "--max_seq_length", 32, "--logging_steps", 1),
        *("--report_to", "tensorboard", "--push_to_hub", "--hub_model_id", "me/x", "--hub_strategy", "checkpoint"),
        *("--log_level", "debug", "--disable_tqdm", "True"),
    ]
    with caplog.at_level(logging.DEBUG):
        entry_point(folder).main([str(file), *map(str, usual), *flags, *WORDS])
        if method != "full":
            for kind in ("peft", "lora", "merged"):
                export([str(out / "run"), "--to", kind])
    assert hub and set(hub) == {f"{MARK}-e"}  # the run itself has the last one
    assert not leaks(out)
    assert MARK not in "".join(capfd.readouterr()) + caplog.text
    record = json.loads((out / "run" / "run.json").read_text())
    assert "--hub-t=..." in record["command"] and record["command"].count("...") == 4
    assert record["arguments"]["average_tokens_across_devices"] is True  # hides no other flag
    assert "tokenizer_name" in record["arguments"]
    if method == "full":
        saved = torch.load(out / "run" / "checkpoint-2" / "training_args.bin", weights_only=False)
        assert saved.hub_token is None and saved.max_steps == 2


def test_a_pickled_copy_has_no_token_and_the_run_keeps_it(tmp_path: Path) -> None:
    args = GlueTrainingArguments(output_dir=str(tmp_path), hub_token=MARK, use_cpu=True, report_to="none")
    buffer = io.BytesIO()
    pickle.dump(args, buffer)
    assert MARK.encode() not in buffer.getvalue() and args.hub_token == MARK


@pytest.mark.parametrize("words", SPELLINGS, ids=str)
def test_printed_commands(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_parse_all", lambda commands: {})  # seconds each, and nothing is printed there
    for method in ("lora", "full"):
        printed = script("mrpc", method, *words, "--seed", "7").stdout
        assert MARK not in printed and "..." in printed and "--seed 7" in printed
    usual = ["--tasks", "mrpc", "--seeds", "1", "--methods", "lora,full", "--output", str(tmp_path)]
    for given in (words, ["--only", f"lora:{' '.join(words).replace(' g', 'g')}"]):
        assert sweep.main([*usual, *given, "--dry_run"]) == 0
        printed = capsys.readouterr().out
        assert MARK not in printed and "..." in printed
    for wrong in (["--only", f"lora {' '.join(words)}"], ["--grid", f"hub_token={MARK}x,"]):
        assert sweep.main([*usual, *wrong, "--dry_run"]) == 2
        assert MARK not in "".join(capsys.readouterr())


@pytest.mark.parametrize(
    "argv",
    [
        [f"--hub_tokn={MARK}"],
        ["--hub_tokn", MARK],
        [f"--tok={MARK}"],
        ["--tok", MARK],
        ["--hub_token", MARK, "--seed", "x"],
        ["--hub_token", MARK, "--output_dir", f"/proc/{MARK}/none"],
        ["--token", MARK, MARK],
        ["--token", MARK, "--use_auth_token", MARK],
        [f"--push_to_hub_token={MARK}"],
    ],
)
def test_error_messages(
    argv: list[str], entry_point: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["run_glue.py", "--model_name_or_path", "m", "--do_train", *argv])
    with pytest.raises(SystemExit) as ended:
        command(entry_point("AdaLoRA").main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and MARK not in said


def test_the_hub_s_own_message(
    entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """A token with a line break is not a header, which the client's error shows with its value."""

    def create_repo(self: Any, repo_id: str, token: str, **kwargs: Any) -> None:
        raise ValueError(f"Illegal header value b'Bearer {token!r}'")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    flags = ["--model_name_or_path", tiny_model_dir, "--dataset_name", mrpc_dir, "--output_dir", tmp_path / "o"]
    flags += ["--do_train", "--push_to_hub", "--hub_tok", f"{MARK}\n", "--report_to", "none", "--max_seq_length", 16]
    monkeypatch.setattr(sys, "argv", ["run_glue.py", *map(str, flags)])
    with pytest.raises(SystemExit):
        command(entry_point("AdaLoRA").main)
    said = capsys.readouterr().err
    assert "Illegal header value" in said and MARK not in said


def test_names_of_secrets() -> None:
    yes = "token hub_token hub-token --hub_tok hub_t tok push_to_hub_token --wandb_token".split()
    no = "push_to_hub hub tokenizer_name average_tokens_across_devices include_num_input_tokens_seen to seed".split()
    assert all(map(is_secret, yes)) and not any(map(is_secret, no))


def test_short_values_and_the_hub_s_form() -> None:
    remember_command(["--token", "ab", "--seed", "1"])
    assert hide(["ab", "--token=ab", "table", {"x": "ab"}]) == ["...", "--token=...", "table", {"x": "..."}]
    assert hide(f"failed with hf_{'a1' * 17}.") == "failed with ...."


def test_launch_and_the_library_agree_on_names() -> None:
    """One rule, written in bash and in Python."""
    names = (
        "token tok toke to hub_token hub_tok hub_t hub_ hub push_to_hub push_to_hub_token push_to_hub_to x_token seed"
    )
    source = (ROOT / "scripts" / "launch.sh").read_text()
    shown = source[source.index("shown() {") : source.index("\n}\n", source.index("shown() {")) + 3]
    for name in names.split():
        for flag in (f"--{name}", f"--{name.replace('_', '-')}"):
            done = subprocess.run(
                ["bash", "-c", f"{shown}shown {flag} value"], capture_output=True, text=True, check=True
            )
            assert (done.stdout.split()[1] == "...") == is_secret(flag), flag
