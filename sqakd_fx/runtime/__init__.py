"""ONNX Runtime: sessions, the kernels that it fuses, the forms that each release takes."""
