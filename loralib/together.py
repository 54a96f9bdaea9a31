"""Re-exports `prepare_one_by_one` as `work_alone`, for programs written after earlier versions of docs/variant.md."""

from loralib.kernels.prepare import prepare_one_by_one as work_alone

__all__ = ["work_alone"]
