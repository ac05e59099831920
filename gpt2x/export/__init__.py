"""GPT-2 for other programs: TorchScript, ``torch.export``, and ONNX with a KV cache."""
