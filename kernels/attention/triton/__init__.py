"""Tree attention in Triton."""
