"""The EWC penalty, the merging of Fishers and weights, and the overlap of Fishers."""
