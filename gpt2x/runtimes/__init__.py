"""Everything that runs a GPT-2: ONNX Runtime, torch, TorchScript, torch.export, transformers, the reference."""
