"""Ways to fine-tune a model on a new task: what a user would pick, and ours."""
