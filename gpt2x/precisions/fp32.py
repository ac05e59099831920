"""fp32: the source's float32 weights, unchanged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .precision import Bounds, Precision
from .stored import Piece

if TYPE_CHECKING:
    from converters import Checkpoint
    from converters.io.publishing import Output

    from .stored import Stored


class Fp32(Precision):
    """Weights are one safetensors file, whose header shows a reader where a truncated file ends."""

    def store(self, out: Output, checkpoint: Checkpoint, block: int, calibration: Sequence[int] | None) -> Stored:
        from converters.config import to_hf
        from converters.containers.safetensors import write_safetensors
        from converters.dialects import HF

        spans = write_safetensors(out, HF.write(checkpoint.tensors, checkpoint.config), to_hf(checkpoint.config))
        stored = {}
        for name, tensor in checkpoint.tensors.items():
            offset = spans[HF.names(name)[0]][0]
            stored[name] = Piece("float32", tensor.shape, offset, tensor.nbytes)
        return stored


FP32 = Fp32(
    name="fp32",
    suffix="",
    transformers_js="fp32",
    about="float32, bit for bit the source's",
    bytes_per_weight=4,
    bounds=Bounds(),
    keeps_source=True,
)
