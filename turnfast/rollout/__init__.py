"""Play groups of rollouts: one episode, the schedule, the prompts of a step."""
