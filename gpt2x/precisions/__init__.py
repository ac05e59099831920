"""How the weights of an ONNX model are stored and computed with."""
