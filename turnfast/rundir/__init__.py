"""The run directory: logs, metric sinks and checkpoints."""
