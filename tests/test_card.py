"""The model card, and what --push_to_hub sends, to a client that only writes down what it is told."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import yaml

from loralib.errors import InputError, RunError
from loralib.glue.card import MARK, card_text, write_card


class Hub:
    """Stands for the hub: repositories made, and the files of each upload with their contents."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.uploads: list[dict[str, bytes]] = []
        self.down = False

    def create_repo(self, repo_id: str, **kwargs: Any) -> SimpleNamespace:
        if self.down:
            raise ConnectionError("no route\nto the hub")
        self.made.append(repo_id)
        return SimpleNamespace(repo_id=f"me/{repo_id.rpartition('/')[2]}")

    def upload_folder(self, *, repo_id: str, folder_path: str, **kwargs: Any) -> None:
        if self.down:
            raise ConnectionError("no route\nto the hub")
        assert repo_id.startswith("me/") and kwargs.get("token") == "secret"
        files = [p for p in Path(folder_path).rglob("*") if p.is_file()]
        self.uploads.append({str(p.relative_to(folder_path)): p.read_bytes() for p in files})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(
        huggingface_hub.HfApi, "create_repo", lambda _, *args, **kwargs: hub.create_repo(*args, **kwargs)
    )
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **kwargs: hub.upload_folder(**kwargs))
    return hub


@pytest.fixture
def call(entry_point: Any, tiny_model_dir: Path, mrpc_dir: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """call(flag=value, ...): a LoRA run of two steps in tmp_path/run."""

    def run(**flags: Any) -> dict[str, Any]:
        usual = {
            "model_name_or_path": tiny_model_dir, "dataset_name": mrpc_dir, "max_seq_length": 32, "report_to": "none",
            "disable_tqdm": True, "apply_lora": True, "lora_r": 2, "lora_alpha": 4, "do_train": True, "do_eval": True,
            "max_steps": 2, "save_steps": 1, "output_dir": tmp_path / "run", "overwrite_output_dir": True,
        }  # fmt: skip
        return entry_point("AdaLoRA").main([str(x) for n, v in (usual | flags).items() for x in (f"--{n}", v)])

    return run


def test_the_card_tells_method_data_metrics_and_command(
    call: Any, tmp_path: Path, tiny_model_dir: Path, mrpc_dir: Path
) -> None:
    metrics = call(max_eval_samples=20)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    card = (tmp_path / "run" / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    known = huggingface_hub.ModelCardData(**yaml.safe_load(head))
    assert (known.pipeline_tag, known.tags) == ("text-classification", ["lora", "glue", "mrpc"])
    assert known.datasets == ["nyu-mll/glue"] and known.base_model is None
    # the index that the hub's leaderboards read, with the metrics that the run returned
    listed = {result.metric_type: result for result in known.eval_results}
    assert set(listed) == {"accuracy", "f1", "combined_score"} and known.model_name == "run"
    assert all(result.metric_value == pytest.approx(metrics[f"eval_{name}"]) for name, result in listed.items())
    same = {(r.dataset_type, r.dataset_config, r.dataset_split, r.task_type) for r in known.eval_results}
    assert same == {("nyu-mll/glue", "mrpc", "validation", "text-classification")}
    assert "20 of its validation rows" in listed["f1"].dataset_name
    # it has only the names of folders on this machine
    assert str(tmp_path) not in card and str(mrpc_dir) not in card and str(tiny_model_dir.parent) not in card
    assert f"--output_dir {tmp_path.name}" not in body and "--output_dir run" in body
    assert "# lora adapter for mrpc" in body and "On 20 evaluation rows" in body
    assert f"| accuracy | {metrics['eval_accuracy']:.4f} |" in body and f"| f1 | {metrics['eval_f1']:.4f} |" in body
    assert (
        f"{run['parameters']['trainable']:,}" in body and f"| Commit | {run['commit'] or 'not a git checkout'}" in body
    )
    assert "```bash\npython " in body and "--lora_r 2 --lora_alpha 4" in body
    # a card is replaced by the next run; a README of the user's own never is
    assert MARK in card
    (tmp_path / "run" / "README.md").write_text("# mine\n")
    write_card(tmp_path / "run")
    assert (tmp_path / "run" / "README.md").read_text() == "# mine\n"


def test_full_fine_tuning_has_a_card_too(call: Any, tmp_path: Path) -> None:
    call(apply_lora=False, save_strategy="no", do_eval=False)
    card = (tmp_path / "run" / "README.md").read_text()
    assert "# full model for mrpc" in card and "Not evaluated in this run." in card and "--lora_path" not in card


def test_a_model_of_the_hub_is_named_in_the_head(call: Any, tmp_path: Path) -> None:
    call(save_strategy="no", do_eval=False)
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    run["arguments"]["model_name_or_path"] = "microsoft/deberta-v3-base"
    file.write_text(json.dumps(run))
    write_card(tmp_path / "run")
    assert "\nbase_model: microsoft/deberta-v3-base\n" in (tmp_path / "run" / "README.md").read_text()


def test_a_users_data_are_named_without_their_folder(call: Any, tmp_path: Path) -> None:
    call(save_strategy="no")
    file = tmp_path / "run" / "run.json"
    run = json.loads(file.read_text())
    run["arguments"] |= {"train_file": "/home/me/private/reviews.csv", "dataset_name": None}
    run |= {
        "task": "classification",
        "command": ["/home/me/it/AdaLoRA/run_glue.py", "--train_file=~/private/reviews.csv"],
    }
    run["metrics"] |= {"eval_accuracy": 0.5, "eval_f1": float("nan")}
    text = card_text(run, "mine")
    assert (
        "private" not in text
        and "/home/me" not in text
        and "python AdaLoRA/run_glue.py --train_file=reviews.csv" in text
    )
    known = huggingface_hub.ModelCardData(**yaml.safe_load(text.split("---\n")[1]))
    (result,) = [r for r in known.eval_results if r.metric_type != "combined_score"]  # and no NaN
    assert (result.metric_type, result.metric_value, known.datasets) == ("accuracy", 0.5, None)
    assert result.dataset_name == "classification, read from reviews.csv (local)"


def test_the_finished_adapter_is_sent_once_and_no_backbone_or_checkpoint(
    call: Any, hub: Hub, tmp_path: Path, tiny_model_dir: Path
) -> None:
    call(push_to_hub=True, hub_token="secret", hub_model_id="me/lora-mrpc")
    assert set(hub.made) == {"me/lora-mrpc"} and len(hub.uploads) == 1
    sent = hub.uploads[0]
    assert {"adapter.safetensors", "adapter.json", "README.md", "config.json", "run.json"} <= set(sent)
    assert any(name.startswith("tokenizer") for name in sent)
    assert not [name for name in sent if "/" in name or "model.safetensors" in name or name.endswith((".bin", ".pt"))]
    run = tmp_path / "run"
    assert not [name for name, content in sent.items() if b"secret" in content]
    # of paths on this machine the last names are sent; the files here keep the paths, which loading and resuming use
    assert not [name for name, content in sent.items() if str(tmp_path.parent).encode() in content]
    here, there = (json.loads(c) for c in ((run / "adapter.json").read_bytes(), sent["adapter.json"]))
    assert here["base_model"] == str(tiny_model_dir) and there == here | {"base_model": tiny_model_dir.name}
    here, there = (json.loads(c) for c in ((run / "run.json").read_bytes(), sent["run.json"]))
    assert here["arguments"]["output_dir"] == str(run) and there["arguments"]["output_dir"] == "run"
    assert {*there["command"]} & {"run", "mrpc"} and there["metrics"] == here["metrics"]
    assert "--hub_token ..." in (run / "README.md").read_text()
    # what else may lie in the folder stays at home
    shutil.copy(run / "adapter.safetensors", run / "model.safetensors")
    (run / "exports").mkdir()
    shutil.copy(run / "adapter.safetensors", run / "exports" / "adapter.safetensors")
    call(push_to_hub=True, hub_token="secret", hub_model_id="me/lora-mrpc", overwrite_output_dir=False)
    assert set(hub.uploads[1]) == set(sent)


@pytest.mark.parametrize(
    "strategy, steps", [("checkpoint", {"2"}), ("all_checkpoints", {"1", "2"}), ("every_save", set())]
)
def test_checkpoints_are_sent_when_asked_for(call: Any, hub: Hub, strategy: str, steps: set[str]) -> None:
    call(push_to_hub=True, hub_token="secret", hub_strategy=strategy)
    assert len(hub.uploads) == 1
    assert {name.split("/")[0] for name in hub.uploads[0] if "/" in name} == {f"checkpoint-{step}" for step in steps}


def test_a_hub_that_is_not_there_is_noticed_before_training(call: Any, hub: Hub, tmp_path: Path) -> None:
    hub.down = True
    with pytest.raises(InputError, match=r"the repository run cannot be made \(no route to the hub\)"):
        call(push_to_hub=True, hub_token="secret")
    assert not (tmp_path / "run" / "adapter.json").exists()


def test_an_upload_that_fails_loses_nothing(
    call: Any, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("cut")

    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", broken)
    with pytest.raises(RunError, match=r"the run is complete in .*run, but the upload to me/run failed \(cut\)"):
        call(push_to_hub=True, hub_token="secret")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "finished"
    assert (tmp_path / "run" / "adapter.safetensors").is_file()
