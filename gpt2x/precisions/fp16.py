"""fp16: weights and cache in float16; residual stream, norms, softmax and logits in float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from .precision import Bounds, Precision

if TYPE_CHECKING:
    from converters import Checkpoint
    from converters.io.publishing import Output

    from ..model import GPT2
    from .stored import Stored

LARGEST = 65504.0  # of float16


class Fp16(Precision):
    """All weights but those of norms are float16."""

    def store(self, out: Output, checkpoint: Checkpoint, block: int, calibration: Sequence[int] | None) -> Stored:
        from .weights import Writer, check_finite, write_half

        writer, stored = Writer(out), {}
        for name, tensor in checkpoint.tensors.items():
            array = tensor.read()
            check_finite(name, array, self.name)
            # Norms are computed in float32, and their weights are small.
            if ".ln_" in name or name.startswith("ln_"):
                stored[name] = writer.add("float32", array.shape, array)
            else:
                stored[name] = write_half(writer, name, array, LARGEST)
        return stored

    def check_activations(self, checkpoint: Checkpoint, sample: Callable[[], Sequence[int]]) -> None:
        # ONNX Runtime computes float16 in float32 on a CPU, so that verification there would not see an overflow.
        from converters import ConversionError

        from .calibrate import largest_values

        for name, largest in largest_values(checkpoint, sample()).items():
            if not largest <= LARGEST:
                raise ConversionError(
                    f"{name}: activations reach {largest:.6g}, beyond fp16's largest value {LARGEST:.0f}. "
                    "Export this model as fp32 or int8."
                )

    def exact(self, model: GPT2, block: int) -> GPT2:
        return model.half()


FP16 = Fp16(
    name="fp16",
    suffix="_fp16",
    transformers_js="fp16",
    about="weights and cache in float16; norms, softmax and logits in float32. For GPUs: a CPU only loses time with it",
    bytes_per_weight=2,
    near_tie=1.5e-3,
    # Measured where it is computed in float16: on an emulated Neoverse N1. Most x86 processors compute it in float32, with
    # a hundredth of the KL divergence.
    bounds=Bounds(8e-3, 7e-4, 1.7e-2, 1.5e-3, 3e-5, 1.4e-3),
    exact_multiple=9,  # Arm processors also sum in float16, which triples the error
    cache_dtype="float16",
    for_cpu=False,
    runtime_by_cache={"inplace-int8": (1, 29)},
)
