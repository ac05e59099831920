"""GPT-2 for other programs: TorchScript, ``torch.export``, and ONNX with a KV cache."""

__all__ = ["model_card", "onnx_directory", "push", "torch_program", "triton"]
