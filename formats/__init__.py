"""The nouns on disk: checkpoints and shards, the Fisher folder and its ledger, task data, atomic writes."""
