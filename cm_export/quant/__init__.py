"""Weights in 4 and 8 bits: group sizes, packing and the error of what was packed, for every backend."""
