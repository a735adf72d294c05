"""Other people's engines: ONNX Runtime, transformers' server, vLLM."""
