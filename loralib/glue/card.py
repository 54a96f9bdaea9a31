"""The model card of a run, made only from `run.json`, and the one upload of `--push_to_hub`."""

import logging
import math
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from loralib.adapters.reading import ADAPTER_CONFIG, ADAPTER_FILE
from loralib.adapters.writing import write_file, write_json
from loralib.errors import InputError, RunError
from loralib.glue.record import RUN_FILE
from loralib.glue.tasks import GLUE
from loralib.jsonfile import read_json
from loralib.secrets import hide, remember_command
from loralib.training.manifest import checkpoints, is_written

logger = logging.getLogger(__name__)

CARD = "README.md"
HUB_GLUE = "nyu-mll/glue"
MARK = "<!-- Made from run.json; the next run in this folder replaces it. -->"
TIMES = ("runtime", "per_second", "preparation_time", "samples")
# What is sent, by name: an export or another run in the folder is not, and no backbone can be.
SENT = (
    CARD, RUN_FILE, ADAPTER_FILE, ADAPTER_CONFIG, "config.json", "all_results.json", "train_results.json",
    "eval_results.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "spm.model", "sentencepiece.bpe.model", "vocab.txt", "vocab.json", "merges.txt",
)  # fmt: skip
WHOLE_MODEL = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")


def write_card(folder: str | Path) -> None:
    """Write README.md beside `run.json`. A README.md that no run made is kept, and the log says so."""
    folder = Path(folder)
    card = folder / CARD
    if card.exists() and not is_card(card):
        logger.warning("%s is not a card of this program and stays as it is; run.json holds the same facts", card)
        return
    run = read_json(folder / RUN_FILE)
    write_file(card, card_text(run, folder.absolute().name).encode())


def is_card(file: Path) -> bool:
    """Whether a run wrote this README.md."""
    return file.name == CARD and file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def card_text(run: dict[str, Any], name: str) -> str:
    """Markdown of the card. Local paths are shortened to their last part.

    Args:
        run: contents of a `run.json`.
        name: of the model in the card's index of results.
    """
    remember_command(run["command"])
    flags, counts, task = run["arguments"], run["parameters"], run["task"]
    full = run["method"] == "full"
    base = str(flags.get("model_name_or_path"))
    facts = {
        "Method": run["method"],
        "Pretrained model": _public(base),
        "Data": _data(run),
        "Sequence length": flags.get("max_seq_length"),
        "Trained parameters": f"{counts['trainable']:,} (low-rank {counts['lora']:,}, head {counts['head']:,})",
    }
    if full:
        facts["Trained parameters"] = f"{counts['trainable']:,} (all)"
    else:
        facts |= {
            "Rank r, alpha": f"{flags.get('lora_r')}, {flags.get('lora_alpha')}",
            "Adapted layers": f"{flags.get('lora_module')} ({len(counts['modules'])} matrices)",
            "Low-rank parameters without what is pruned": f"{counts['remaining']:,}",
        }
    facts |= {
        "Optimizer steps": f"{run['steps']:,} of {run['effective_batch']} rows each",
        "Learning rate": f"{flags['learning_rate']:g}",
        "Seed": run["seed"],
        "Hardware": ", ".join(run["hardware"]["gpus"]) or f"CPU, {run['hardware']['threads']} threads",
        "Wall time": f"{run['wall_seconds']:,.0f} s",
        "Versions": ", ".join(f"{package} {version}" for package, version in run["versions"].items()),
        "Commit": run["commit"] or "not a git checkout",
    }
    which = "with the best checkpoint" if flags.get("load_best_model_at_end") else "after the last step"
    measured = [f"| {key} | {value:.4f} |" for key, value in _scores(run).items()]
    rows = run["metrics"].get("eval_samples")
    what = (
        "A whole model, which `from_pretrained` of transformers loads as it is."
        if full
        else "Low-rank factors and the trained head, to be put into the pretrained model. That model is not part of "
        "this folder and keeps its own licence and limits."
    )
    lines = [
        "---",
        _head(run, name).to_yaml(),
        "---",
        MARK,
        f"# {run['method']} {'model' if full else 'adapter'} for {task}",
        "",
        what,
        "",
        "## Result",
        "",
        *(
            [f"On {rows:,} evaluation rows, {which}:", "", "| metric | value |", "|---|---|", *measured]
            if measured and rows
            else ["Not evaluated in this run."]
        ),
        "",
        "## How it was made",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {str(value).replace('|', '/')} |" for key, value in facts.items()),
        "",
        "```bash",
        shlex.join(["python", *map(_without_folders, hide(run["command"]))]),
        "```",
    ]
    if not full:
        lines += [
            "",
            "## How to use it",
            "",
            "Evaluate, predict, or train on: the command above with `--lora_path FOLDER`. Leave out `--do_train` to "
            "only evaluate (`--do_eval`) or predict (`--do_predict`). For other programs:",
            "",
            "```bash",
            "python scripts/export_adapter.py FOLDER --to peft    # a folder that PEFT loads",
            "python scripts/export_adapter.py FOLDER --to merged  # a checkpoint that transformers loads without this "
            "project",
            "```",
        ]
    return "\n".join(lines) + "\n"


def _head(run: dict[str, Any], name: str) -> ModelCardData:
    """What the hub reads of a card: tags, base model, data, and an index of the results."""
    flags, task = run["arguments"], run["task"]
    tags = [*([] if run["method"] == "full" else ["lora", run["method"]]), *(["glue", task] if task in GLUE else [])]
    base, data = str(flags.get("model_name_or_path")), flags.get("dataset_name")
    official = task in GLUE and not flags.get("train_file")
    known: dict[str, Any] = {"base_model": base} if _on_hub(base) else {}
    if official or (data and _on_hub(data)):
        known["datasets"] = [HUB_GLUE if official else data]
    results = []
    for key, value in _scores(run).items():
        metric, mismatched = key.removesuffix("_mm"), key.endswith("_mm") and task == "mnli"
        split = flags.get("validation_split") or "validation"
        if official:
            split = {"mnli": f"validation_{'mis' if mismatched else ''}matched", "ax": "test"}.get(task, "validation")
        if metric == "loss" or not math.isfinite(value):
            continue
        results.append(EvalResult(
            "text-classification", known.get("datasets", [_data(run)])[0], _data(run, "_mm" if mismatched else ""),
            metric, round(value, 6), dataset_config=task if official else flags.get("dataset_config_name"),
            dataset_split=split,
        ))  # fmt: skip
    index: dict[str, Any] = {"model_name": name, "eval_results": results} if results else {}
    return ModelCardData(pipeline_tag="text-classification", tags=list(dict.fromkeys(tags)) or None, **known, **index)


def _scores(run: dict[str, Any]) -> dict[str, float]:
    """The evaluation's metrics without `eval_`, and without times and numbers of rows."""
    found = {k: v for k, v in run["metrics"].items() if k.startswith("eval_") and not any(t in k for t in TIMES)}
    return {k.removeprefix("eval_"): v for k, v in found.items() if isinstance(v, int | float)}


def _data(run: dict[str, Any], suffix: str | None = None) -> str:
    """Name of the data: of the whole data set if `suffix` is None; otherwise of the rows of one evaluation.

    Args:
        suffix: the end of the evaluation's metrics in `run.json`, "" or "_mm". If only some rows were evaluated, the
            name has their number.
    """
    flags, task = run["arguments"], run["task"]
    given = flags.get("train_file") or flags.get("dataset_name") or flags.get("validation_file")
    name = f"GLUE {task}" if task in GLUE and not flags.get("train_file") else task
    if given and not _on_hub(given):
        name = f"{name}, read from {_public(given)}"
    elif given and task not in GLUE:
        name = given
    if suffix is None or (flags.get("heldout_split") is None and flags.get("max_eval_samples") is None):
        return name
    return f"{name}, {run['metrics'].get(f'eval_samples{suffix}')} of its validation rows"


def _on_hub(name: str) -> bool:
    """Whether a name can only be one of the hub: it has the hub's form, and nothing here is called so."""
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) is not None and not os.path.exists(os.path.expanduser(name))


def _public(name: str) -> str:
    """A name of the hub as it is; of a path the last part."""
    return name if _on_hub(name) else f"{Path(name).name} (local)"


def _without_folders(word: str) -> str:
    """A word of a command; of a path that leads out of the working folder the last part, of a program the last two."""
    flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if not (path.is_absolute() or value.startswith("~") or ".." in path.parts):
        return word
    return flag + equals + "/".join(path.parts[-2:] if path.suffix == ".py" else path.parts[-1:])


# ---- hub ----


def make_repository(training: Any) -> None:
    """Create the repository of `--push_to_hub` before anything is trained, so that a wrong token costs nothing.

    Raises:
        InputError: the hub refuses or is not reachable.
    """
    from huggingface_hub import HfApi

    name = training.hub_model_id or Path(training.output_dir).absolute().name
    try:
        HfApi().create_repo(name, token=training.hub_token, private=training.hub_private_repo, exist_ok=True)
    except Exception as error:  # network, token, name: the hub's client has a class for each
        raise InputError(
            f"--push_to_hub: the repository {name} cannot be made ({' '.join(str(error).split())[:200]}): log in with "
            "'hf auth login', or leave the flag out and upload the output folder later."
        ) from error


def push(trainer: Any) -> None:
    """Send the finished run: adapter, card, config, tokenizer, results. Never a backbone.

    Checkpoints go with it only if asked for: the last by `--hub_strategy checkpoint`, all by `all_checkpoints`.

    Raises:
        RunError: the upload failed; the run itself is complete on disk.
    """
    from huggingface_hub import HfApi

    args = trainer.args
    if not trainer.is_world_process_zero():
        return
    folder = Path(args.output_dir)
    names = list(SENT if trainer.adapter is not None else (*SENT, *WHOLE_MODEL))
    steps = [step for step, path in checkpoints(folder) if is_written(path)]
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    wanted = {"checkpoint": steps[-1:], "all_checkpoints": steps}.get(strategy, [])
    names += [f"checkpoint-{step}/*" for step in wanted]
    try:
        with tempfile.TemporaryDirectory() as public:
            _gather(folder, names, Path(public))
            HfApi().upload_folder(
                repo_id=trainer.hub_model_id,
                folder_path=public,
                commit_message="Trained adapter" if trainer.adapter is not None else "Trained model",
                token=args.hub_token,
                revision=args.hub_revision,
            )
    except Exception as error:
        raise RunError(
            f"the run is complete in {folder}, but the upload to {trainer.hub_model_id} failed "
            f"({' '.join(str(error).split())[:200]}): 'hf upload {trainer.hub_model_id} {folder}' sends it later, with "
            "all other files there, and with the paths of this machine that they hold."
        ) from error
    logger.info("sent to the hub: %s", trainer.hub_model_id)


def _gather(folder: Path, patterns: Sequence[str], public: Path) -> None:
    """Fill a folder with what is sent: links to the files, and copies of those that would show paths of this machine.

    A checkpoint is sent as it is, because its checksums cover each byte.
    """
    for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        place = public / file.relative_to(folder)
        place.parent.mkdir(exist_ok=True)
        if place.parent == public and file.name in (RUN_FILE, ADAPTER_CONFIG):
            write_json(place, _without_paths(read_json(file)))
        else:
            place.symlink_to(file.absolute())


def _without_paths(value: Any) -> Any:
    """A JSON value in which each path is replaced as in the card's command; label names stay as they are."""
    if isinstance(value, dict):
        return {key: v if key == "label_names" else _without_paths(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_without_paths(v) for v in value]
    return _without_folders(value) if isinstance(value, str) else value
