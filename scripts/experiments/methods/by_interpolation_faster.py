"""Back a share of the way to the start, at a larger rate: the curve is over the share."""

from scripts.experiments.methods.by_interpolation import tune as tune
