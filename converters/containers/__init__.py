"""One module for each container: bytes to named tensors, and back. None knows GPT-2."""
