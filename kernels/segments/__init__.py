"""Sums over turns and sequences for the loss head: torch on any device, Triton on CUDA."""
