"""The loss head in Triton."""
