"""A cycle model of compiled CUDA kernels: what an H100 would take, predicted from machine code, without a GPU."""
