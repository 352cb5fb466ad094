"""Run configuration: the fields, reading and writing recipes, and the checks between fields."""
