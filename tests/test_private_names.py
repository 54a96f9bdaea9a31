"""The private names of other libraries that this project leans on, and where a new version has dropped one.

Public names may change as well, but with a warning; these change without one.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version
from transformers import Trainer

ROOT = Path(__file__).resolve().parents[1]

# Everything private, or imported from below a library's top level, that loralib uses: module or class, then its names.
LEANED_ON = {
    "argparse.ArgumentParser": "_actions",
    "accelerate.utils": "DynamoBackend GradientAccumulationPlugin",
    "huggingface_hub.errors": "RemoteEntryNotFoundError",
    "peft.tuners.adalora.layer": "AdaLoraLayer",
    "peft.tuners.lora.layer": "LoraLayer",
    "peft.tuners.tuners_utils": "BaseTunerLayer",
    "torch": """
        _C _dynamo _foreach_abs _foreach_abs_ _foreach_add_ _foreach_addcdiv_ _foreach_addcmul_ _foreach_clamp_min_
        _foreach_copy_ _foreach_lerp_ _foreach_mul _foreach_mul_ _foreach_norm _foreach_sign _foreach_sqrt
        _foreach_sub _foreach_sub_ _foreach_zero_ _softmax_backward_data
    """,
    "torch._C": "_are_functorch_transforms_active",
    "torch._inductor": "list_mode_options",
    "torch.amp.GradScaler": "_scale",
    "torch.nn.Module": "_forward_hooks _forward_hooks_always_called _forward_pre_hooks",
    "torch.ops.mkldnn": "_linear_pointwise",
    "transformers.PreTrainedModel": "_init_weights",
    "transformers.Trainer": """
        _determine_best_metric _evaluate _finalize_training _get_dataloader _get_grad_norm _get_learning_rate
        _get_output_dir _get_train_sampler _globalstep_last_logged _init_training_state _initial_global_step
        _inner_training_loop
        _load_best_model _load_from_checkpoint _load_optimizer_and_scheduler _load_rng_state
        _maybe_log_save_evaluate _push_from_checkpoint _run_epoch _save _save_checkpoint
        _save_optimizer_and_scheduler _total_loss_scalar _tr_loss _train_batch_size
    """,
    "transformers.hf_argparser": "string_to_bool",
    "transformers.integrations": "TensorBoardCallback",
    "transformers.modeling_outputs": "BaseModelOutput",
    "transformers.models.deberta_v2.modeling_deberta_v2": """
        DebertaV2Encoder DebertaV2ForSequenceClassification DisentangledSelfAttention make_log_bucket_position
        scaled_size_sqrt
    """,
    "transformers.trainer_pt_utils": "AcceleratorConfig get_length_grouped_indices",
    "transformers.training_args": "trainer_log_levels",
}


# Names that older versions within the range lack, where this project does without them: the version that brought them.
ABSENT_BEFORE = {("transformers.Trainer", "_initial_global_step"): "5.23"}


def absent(where: str, name: str) -> bool:
    """Whether the installed version is older than the name."""
    since = ABSENT_BEFORE.get((where, name))
    return since is not None and Version(version(where.split(".")[0])) < Version(since)


def names(where: str) -> list[str]:
    return LEANED_ON[where].split()


def sets(source: str, name: str) -> bool:
    """Whether the source of a class sets or reads self.name."""
    return re.search(rf"self\.{name}\b", source) is not None


@pytest.mark.parametrize(("where", "name"), [(where, name) for where in LEANED_ON for name in names(where)])
def test_every_name_that_is_leaned_on_is_there(where: str, name: str) -> None:
    owner: Any = None
    for part in where.split("."):
        try:
            owner = importlib.import_module(part) if owner is None else getattr(owner, part)
        except AttributeError:
            owner = importlib.import_module(f"{owner.__name__}.{part}")
    there = hasattr(owner, name) or isinstance(owner, type) and sets(inspect.getsource(owner), name)
    if not there and inspect.ismodule(owner) and hasattr(owner, "__path__"):
        there = importlib.util.find_spec(f"{owner.__name__}.{name}") is not None
    library = where.split(".")[0]
    at = f" {version(library)}" if library != "argparse" else ""
    assert there or absent(where, name), (
        f"{library}{at} has no {where}.{name} any more, which this project leans on: look for what took its place, "
        "change the code that uses it (grep for the name in loralib), then this list."
    )


def test_the_list_is_complete_and_holds_nothing_else() -> None:
    listed = {(where, name) for where in LEANED_ON for name in names(where) if not absent(where, name)}
    new, gone = sorted(used() - listed), sorted(listed - used())
    assert not new, f"loralib now uses {new}: write each into LEANED_ON, under the module or class that has it"
    assert not gone, f"loralib does not use {gone} any more: take them out of LEANED_ON"


def used() -> set[tuple[str, str]]:
    """(where, name) of each such use in loralib, read from its source."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "loralib").rglob("*.py"))}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {n.name for n in nodes if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    own |= {n.arg for n in nodes if isinstance(n, ast.arg | ast.keyword) and n.arg}
    stored = [n for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)]
    overridden = {name for name in own if name.startswith("_") and hasattr(Trainer, name) and not name.endswith("__")}
    source = inspect.getsource(Trainer)
    found = {("transformers.Trainer", name) for name in overridden}
    own |= {n.attr for n in stored if not sets(source, n.attr)}
    own |= {t.id for n in nodes if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            top, dot, _ = node.module.partition(".")
            for alias in node.names:
                if top in ("transformers", "accelerate", "datasets", "evaluate", "huggingface_hub", "peft") and dot:
                    found.add((node.module, alias.name))
                elif top == "torch" and (alias.name.startswith("_") or "._" in node.module):
                    found.add((node.module, alias.name))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            where = ast.unparse(node.value)
            if where.split(".")[0] in ("torch", "transformers", "datasets", "accelerate"):
                found.add((where, node.attr))
            elif where != "os" and node.attr not in own and node.attr not in overridden:  # os._exit is public
                # an attribute of an object: whose it is, the list has to say
                owners = [where for where in LEANED_ON if node.attr in names(where)]
                found.add(("transformers.Trainer" if sets(source, node.attr) else (*owners, "?")[0], node.attr))
    return found
