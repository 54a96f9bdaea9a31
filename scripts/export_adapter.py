"""Export a trained adapter as plain factors of its true ranks, for Hugging Face PEFT, or merged into the model.

    python scripts/export_adapter.py RUN_DIR --to peft|lora|merged [--out DIR]

RUN_DIR is a run's output folder, one of its checkpoints, or an exported `lora` folder. Only files are read.
"""

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

if importlib.util.find_spec("loralib") is None:  # a clone that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loralib.adapters.exports import export_lora, export_merged
from loralib.adapters.peft import export_peft
from loralib.errors import InputError
from loralib.glue.arguments import command
from loralib.layers import LoRALinear


def layer_class(where: str) -> type[LoRALinear]:
    """Load the class of `FILE.py:CLASS`. This executes the file."""
    file, _, name = where.rpartition(":")
    if not Path(file).is_file():
        raise InputError(f"--layer {where} names no file: write FILE.py:CLASS.")
    spec = importlib.util.spec_from_file_location(Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, LoRALinear):
        raise InputError(f"--layer {where}: {file} has no layer class {name!r} (a subclass of LoRALinear).")
    return found


def main(argv: Sequence[str] | None = None) -> Path:
    """Export an adapter, and return the folder that was written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", metavar="RUN_DIR", help="output folder of a run, a checkpoint, or an exported folder")
    parser.add_argument("--to", required=True, choices=["peft", "lora", "merged"], help="what to write")
    parser.add_argument("--out", help="where to write it; default: RUN_DIR-peft, RUN_DIR-lora or RUN_DIR-merged")
    parser.add_argument("--base", help="the base model, if it is no longer where the run found it")
    parser.add_argument("--layer", help="FILE.py:CLASS of your own layer, for merged; the file is executed")
    args = parser.parse_args(argv)
    if args.layer and args.to != "merged":
        raise InputError(f"--layer is for --to merged, here it is --to {args.to}.")
    run = Path(args.run).expanduser()
    out = Path(args.out).expanduser() if args.out else run.resolve().with_name(f"{run.resolve().name}-{args.to}")
    if args.to == "lora":
        export_lora(run, out)
    elif args.to == "peft":
        export_peft(run, out, args.base)
    else:
        from transformers.utils import logging

        logging.set_verbosity_error()  # a warning about the head would mislead, because it is replaced
        logging.disable_progress_bar()
        export_merged(run, out, args.base, layer_class(args.layer) if args.layer else None)
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    print(f"{out} ({size:,} bytes)")
    return out


if __name__ == "__main__":
    command(main)
