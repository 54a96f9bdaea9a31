"""What every test may ask for: a tiny checkpoint in the hub's layout, a slice of MRPC-format data, an entry point."""

import importlib.util
import os
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

# Before any library is imported: no test may wait for a network, and one thread is quickest on tiny tensors.
os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # the clone under test, installed or not; scripts are modules

import embedded  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test begins with the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer DeBERTa-v3 with random weights laid out as microsoft/deberta-v3-base: hidden 32, half precision."""
    folder = tmp_path_factory.mktemp("models") / "deberta-v3-base"
    return embedded.build_model(folder, hidden_size=32, layers=1, heads=2, steps=0)


@pytest.fixture(scope="session")
def mrpc_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MRPC's parquet files with 64 train, 32 validation and 16 test rows, in a folder called mrpc."""
    return embedded.build_data(tmp_path_factory.mktemp("glue") / "mrpc", train=64, validation=32, test=16)


@pytest.fixture(scope="session")
def entry_point() -> Callable[[str], ModuleType]:
    """The module of an entry point by its folder: entry_point("RM-LoRA").main([...])."""

    def load(folder: str) -> ModuleType:
        name = f"run_glue_{folder.replace('-', '_')}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, ROOT / folder / "run_glue.py")
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[name] = module  # dataclasses look their module up
            spec.loader.exec_module(module)
        return sys.modules[name]

    return load
