"""Singular values and effective rank of trained updates, from the factors alone. Needs numpy only."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def singular_values(lora_A: Array, lora_B: Array, diagonal: Array | None = None, scaling: float = 1.0) -> Array:
    """Singular values of scaling * B diag(d) A, largest first, without ever forming the (out, in) product.

    With B = Q_B R_B and A^T = Q_A R_A, they are those of the (r, r) matrix R_B diag(d) R_A^T, since Q_B and Q_A have
    orthonormal columns.

    Args:
        lora_A: (r, in).
        lora_B: (out, r).
        diagonal: (r,), what stands between the factors (AdaLoRA's E, SoRA's gates); None for ones.

    Returns:
        (min(r, in, out),).
    """
    right: Any = np.linalg.qr(np.asarray(lora_A, dtype=np.float64).T, mode="r")  # (min(in, r), r)
    left: Any = np.linalg.qr(np.asarray(lora_B, dtype=np.float64), mode="r")  # (min(out, r), r)
    middle: Any = left if diagonal is None else left * np.asarray(diagonal, dtype=np.float64)
    values: Array = abs(scaling) * np.linalg.svd(middle @ right.T, compute_uv=False)
    return values


def effective_rank(values: Array) -> float:
    """exp of the entropy of the singular values' shares (Roy and Vetterli, EUSIPCO 2007), 1 to their number.

    0 for an update that is 0.
    """
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values[values > 0] / total
    return float(np.exp(-(shares * np.log(shares)).sum()))


def adapter_spectra(folder: str | Path) -> dict[str, Array]:
    """Singular values of each adapted matrix of a saved adapter, by module name.

    Args:
        folder: holds `adapter.safetensors` and `adapter.json`.

    Raises:
        OSError, ValueError: a file is missing or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))
    try:
        state = load_file(folder / "adapter.safetensors")
    except SafetensorError as error:
        raise ValueError(f"{folder / 'adapter.safetensors'} is cut short") from error
    spectra = {}
    for key, lora_A in state.items():
        name, _, kind = key.rpartition(".")
        if kind != "lora_A":
            continue
        between = state.get(f"{name}.lora_E", state.get(f"{name}.lora_gate"))
        diagonal = None if between is None else between.reshape(-1)
        spectra[name] = singular_values(lora_A, state[f"{name}.lora_B"], diagonal, config["scaling"][name])
    return spectra
