"""What scored replies say: accuracy with intervals, calibration, length, benchmarks. Plain arrays, no model."""
