"""sqakd-fx: label-free quantization-aware distillation of PyTorch models to integer ONNX."""
