"""Kernels in Triton; imported only where triton is there and an accelerator is in use."""
