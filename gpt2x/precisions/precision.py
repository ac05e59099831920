"""The base class of precisions: the facts of one, how it stores weights, how the ONNX graph computes with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .stored import Piece

if TYPE_CHECKING:
    from converters import Checkpoint
    from converters.io.publishing import Output

    from ..model import GPT2
    from .graph import Graph, Value, Weight
    from .stored import Stored


@dataclass(frozen=True)
class Bounds:
    """The largest errors of logits that pass. Absolute errors are relative to the largest logit.

    Top-1 or top-5 disagreement counts only where the reference's gap exceeds twice ``max_abs_error``: a smaller gap is
    a near tie, which rounding may decide either way.
    """

    max_abs_error: float = 1e-5  # relative to the largest logit of all positions
    mean_abs_error: float = 2e-6
    max_rel_error: float = 5e-5  # relative to the largest logit at the same position
    mean_rel_error: float = 5e-6
    kl_divergence: float = 1e-6  # nats, mean over positions
    perplexity: float = 1e-5  # relative difference


@dataclass(frozen=True, kw_only=True)
class Precision(ABC):
    """How an exported ONNX model stores its weights and computes with them.

    Args:
        name: as in ``--precision`` and in the model's metadata.
        suffix: transformers.js's suffix of the model's file name.
        transformers_js: transformers.js's name of this precision (its ``dtype`` option).
        about: one line for the model card.
        bytes_per_weight: the size of a weight in the file, without scales.
        bounds: the largest errors of logits against the source: about three times what was measured on the shipped
            model (``docs/design.md`` lists the figures).
        exact_multiple: the same as a multiple of the error of exact arithmetic on the same model.
        worst_block: the largest root mean square error of a block of weights, relative to the block. 0 if no weight is
            quantized.
        bits: of a quantized weight, None if no weight is quantized. Calibration applies to quantized weights only.
        block_sizes: how many weights can share a scale; empty if the precision has no such choice.
        cache_dtype: of a KV cache that is not 8-bit.
        keeps_source: whether the file of weights is a safetensors file of the source's float32 weights.
        integer_products: whether products are computed in integers: uint8 activations times int8 weights.
        for_cpu: whether it is useful on a CPU.
        min_opset: the first ONNX opset that has its data types.
        runtime_by_opset: from this opset on, the first version of ONNX Runtime that runs it, if later than that of
            the opset.
        runtime_by_cache: kind of cache -> the same, if later than that of the cache.
        near_tie: as ``Decoder.near_tie``: twice and more what was measured (``docs/generation.md``).
        several_price: as ``Decoder.several_price``.
        row_by_row: whether matrix products of one row of activations and of several give the same bits.
    """

    name: str
    suffix: str
    transformers_js: str
    about: str
    bytes_per_weight: float
    bounds: Bounds
    exact_multiple: int = 3
    worst_block: float = 0.0
    bits: int | None = None
    block_sizes: tuple[int, ...] = ()
    cache_dtype: str = "float32"
    keeps_source: bool = False
    integer_products: bool = False
    for_cpu: bool = True
    min_opset: int = 17
    runtime_by_opset: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    runtime_by_cache: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    near_tie: float = 3e-5
    several_price: float = 0.15
    row_by_row: bool = True

    @property
    def model_file(self) -> str:
        """The path of the ONNX file in an exported directory."""
        return f"onnx/model{self.suffix}.onnx"

    @property
    def data_file(self) -> str:
        """The name of the file of weights beside it: the only name that optimum and transformers.js download."""
        return f"model{self.suffix}.onnx_data"

    def runtimes(self, cache: str, opset: int) -> list[tuple[int, int]]:
        """The versions of ONNX Runtime that this precision needs with a kind of cache and an opset."""
        needed = [version for first, version in self.runtime_by_opset.items() if opset >= first]
        if cache in self.runtime_by_cache:
            needed.append(self.runtime_by_cache[cache])
        return needed

    # ------------------------------------------------------------------------------------------------------- storage

    @abstractmethod
    def store(self, out: Output, checkpoint: Checkpoint, block: int, calibration: Sequence[int] | None) -> Stored:
        """Write every weight of a float32 checkpoint.

        Args:
            block: how many weights share a scale, if this precision has a choice.
            calibration: tokens for GPTQ; None rounds to nearest.

        Raises:
            ConversionError: if a weight cannot be represented.
        """

    def check_activations(self, checkpoint: Checkpoint, sample: Callable[[], Sequence[int]]) -> None:
        """Run the model on the tokens that ``sample`` returns, if the precision cannot represent every activation.

        Raises:
            ConversionError: if an activation overflows.
        """
        return

    # ------------------------------------------------------------------------------------------------------ lowering

    def product(self, g: Graph, x: Value, weight: Weight) -> Any:
        """``x @ weight``, for weights that are not quantized."""
        stored = g.stored[weight.name]
        assert isinstance(stored, Piece)
        return g.op("MatMul", g.cast(x, stored.dtype), g.plain(weight))

    def look_up(self, g: Graph, ids: Value, table: Weight) -> Any:
        """Rows of a table, (B, T, C), in float32."""
        return g.cast(g.op("Gather", g.plain(table), ids, axis=0), "float32")

    def logits(self, g: Graph, x: Value, table: Weight) -> Any:
        """``x @ table.T``, (B, T, V), in float32."""
        columns = g.op("Transpose", g.cast(g.plain(table), "float32"), perm=[1, 0])
        return g.op("MatMul", x, columns)

    # --------------------------------------------------------------------------------------------------- verification

    def exact(self, model: GPT2, block: int) -> GPT2:
        """A model of the stored weights, changed so that it rounds activations as ONNX Runtime does.

        Args:
            block: how many weights share a scale.
        """
        return model
