"""Rollouts: episodes, their schedule, and the prompts of a step."""
