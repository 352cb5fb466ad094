"""One credit rule per file."""
