"""The nouns on disk: checkpoints, the Fisher folder and its ledger, task data, atomic writes."""
