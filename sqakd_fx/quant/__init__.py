"""The unified quantizer: families, grids, ranges, calibration, BatchNorm beside a quantizer."""
