"""Quantization's arithmetic: weights → integers, scales and zeros, and the files that hold them."""
