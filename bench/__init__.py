"""Benchmarks of the kernels and the model, against roofs and peers measured in the same run."""
