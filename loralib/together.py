"""`work_alone` under the name that programs written after earlier versions of docs/variant.md import it by."""

from loralib.kernels.prepare import prepare_one_by_one as work_alone

__all__ = ["work_alone"]
