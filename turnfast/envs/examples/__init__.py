"""Small built-in environments."""
