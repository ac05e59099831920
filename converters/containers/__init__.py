"""One module for each container: bytes to named tensors, and back. None knows GPT-2."""

__all__ = [
    "container",
    "gguf",
    "hdf5",
    "llmc",
    "msgpack",
    "npz",
    "onnx",
    "onnx_adapter",
    "safetensors",
    "shard_index",
    "tf_bundle",
    "torch_legacy",
    "torch_zip",
]
