"""The model card of a run, made from `run.json` alone, and the one upload of `--push_to_hub`."""

import json
import logging
import shlex
from pathlib import Path
from typing import Any

from loralib.adapters.reading import ADAPTER_CONFIG, ADAPTER_FILE
from loralib.errors import InputError, RunError
from loralib.glue.record import RUN_FILE
from loralib.glue.tasks import GLUE
from loralib.secrets import hide, remember_command

logger = logging.getLogger(__name__)

CARD = "README.md"
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
    """Write README.md beside `run.json`. One that no run wrote stays, which is said."""
    folder = Path(folder)
    card = folder / CARD
    if card.exists() and not is_card(card):
        logger.warning("%s is not a card of this program and stays as it is; run.json holds the same facts", card)
        return
    card.write_text(card_text(json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))), encoding="utf-8")


def is_card(file: Path) -> bool:
    """Whether a run wrote this README.md."""
    return file.name == CARD and file.is_file() and MARK in file.read_text(encoding="utf-8", errors="replace")


def card_text(run: dict[str, Any]) -> str:
    """Markdown of the card.

    Args:
        run: contents of a `run.json`.
    """
    remember_command(run["command"])
    flags, counts, task = run["arguments"], run["parameters"], run["task"]
    base, full = str(flags.get("model_name_or_path")), run["method"] == "full"
    on_hub = not Path(base).expanduser().is_dir() and base.count("/") <= 1
    tags = [*([] if full else ["lora", run["method"]]), *(["glue", task] if task in GLUE else [])]
    kind = "model" if full else "adapter"
    head = ["---", "pipeline_tag: text-classification", *([f"base_model: {base}"] if on_hub else [])]
    head += ["tags:", *(f"- {tag}" for tag in dict.fromkeys(tags))] if tags else []
    facts = {
        "Method": run["method"],
        "Pretrained model": base if on_hub else f"{Path(base).name} (a local folder)",
        "Data": flags.get("dataset_name") or flags.get("train_file") or f"GLUE {task}",
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
        "Versions": ", ".join(f"{name} {version}" for name, version in run["versions"].items()),
        "Commit": run["commit"] or "not a git checkout",
    }
    which = "with the best checkpoint" if flags.get("load_best_model_at_end") else "after the last step"
    scores = {k: v for k, v in run["metrics"].items() if k.startswith("eval_") and not any(t in k for t in TIMES)}
    measured = [f"| {name.removeprefix('eval_')} | {value:.4f} |" for name, value in scores.items()]
    rows = run["metrics"].get("eval_samples")
    what = (
        "A whole model, which `from_pretrained` of transformers loads as it is."
        if full
        else "Low-rank factors and the trained head, to be put into the pretrained model. That model is not part of "
        "this folder and keeps its own licence and limits."
    )
    lines = [
        *head,
        "---",
        MARK,
        f"# {run['method']} {kind} for {task}",
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
        *(f"| {name} | {str(value).replace('|', '/')} |" for name, value in facts.items()),
        "",
        "```bash",
        shlex.join(["python", *hide(run["command"])]),
        "```",
    ]
    if not full:
        lines += [
            "",
            "## How to use it",
            "",
            "Evaluate, predict, or train on: the command above with `--lora_path FOLDER`, with `--do_eval` or "
            "`--do_predict` alone where nothing is to be trained. For other programs:",
            "",
            "```bash",
            "python scripts/export_adapter.py FOLDER --to peft    # a folder that PEFT loads",
            "python scripts/export_adapter.py FOLDER --to merged  # a checkpoint that transformers loads alone",
            "```",
        ]
    return "\n".join(lines) + "\n"


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
    steps = sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*") if p.name[11:].isdigit())
    strategy = str(getattr(args.hub_strategy, "value", args.hub_strategy))
    wanted = {"checkpoint": steps[-1:], "all_checkpoints": steps}.get(strategy, [])
    names += [f"checkpoint-{step}/*" for step in wanted]
    try:
        HfApi().upload_folder(
            repo_id=trainer.hub_model_id,
            folder_path=folder,
            commit_message="Trained adapter" if trainer.adapter is not None else "Trained model",
            allow_patterns=names,
            token=args.hub_token,
            revision=args.hub_revision,
        )
    except Exception as error:
        raise RunError(
            f"the run is complete in {folder}, but the upload to {trainer.hub_model_id} failed "
            f"({' '.join(str(error).split())[:200]}): 'hf upload {trainer.hub_model_id} {folder}' sends it later."
        ) from error
    logger.info("sent to the hub: %s", trainer.hub_model_id)
