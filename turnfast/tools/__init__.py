"""Tools: typed Python functions that an agent may call."""
