"""Games in sequence: DQN with EWC and a Forget-me-not recogniser."""
