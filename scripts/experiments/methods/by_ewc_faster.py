"""EWC at a larger rate: the curve is over λ."""

from scripts.experiments.methods.by_ewc import tune as tune
