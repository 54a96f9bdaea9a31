"""Singular values and effective rank of trained updates, computed from the factors. Needs only numpy."""

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
        OSError, ValueError: a file is missing, cut short or not of this project's; the message is a clause.
    """
    folder = Path(folder)
    try:
        scaling = json.loads((folder / "adapter.json").read_text(encoding="utf-8"))["scaling"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise ValueError("adapter.json is cut short or not one of this project's") from error
    state = _read_factors(folder / "adapter.safetensors")
    try:
        return _spectra(state, scaling)
    except (KeyError, TypeError, ValueError, np.linalg.LinAlgError) as error:
        raise ValueError(
            f"adapter.safetensors and adapter.json do not fit ({type(error).__name__}: {error})"
        ) from error


def _read_factors(file: Path) -> dict[str, Array]:
    """All tensors of a safetensors file, bfloat16 included, which numpy does not know."""
    from safetensors import SafetensorError, deserialize

    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16}
    try:
        found = deserialize(file.read_bytes())
    except SafetensorError as error:
        raise ValueError("adapter.safetensors is cut short") from error
    state = {}
    for name, entry in found:
        if entry["dtype"] not in kinds:
            raise ValueError(
                f"adapter.safetensors holds {name} as {entry['dtype']}, a kind of float that is not read here"
            )
        values = np.frombuffer(entry["data"], kinds[entry["dtype"]])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        state[name] = values.reshape(entry["shape"]).astype(np.float64)
    return state


def _spectra(state: dict[str, Array], scaling: dict[str, float]) -> dict[str, Array]:
    spectra = {}
    for key, lora_A in state.items():
        name, _, kind = key.rpartition(".")
        if kind != "lora_A":
            continue
        between = state.get(f"{name}.lora_E", state.get(f"{name}.lora_gate"))
        diagonal = None if between is None else between.reshape(-1)
        spectra[name] = singular_values(lora_A, state[f"{name}.lora_B"], diagonal, scaling[name])
    return spectra
