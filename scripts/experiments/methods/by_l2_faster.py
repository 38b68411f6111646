"""The penalty (λ/2) Σ (θ − μ)² around the start, at a larger rate: the curve is over λ."""

from scripts.experiments.methods.by_l2 import tune as tune
