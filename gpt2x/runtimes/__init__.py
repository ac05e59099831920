"""Everything that runs a GPT-2: ONNX Runtime, torch, TorchScript, torch.export, transformers, the reference."""

__all__ = ["base", "batching", "kv_cache", "onnx_task", "onnxruntime", "opening", "reference", "torch", "transformers"]
