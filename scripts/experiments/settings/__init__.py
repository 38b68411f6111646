"""Settings of the trade-off: the data of two tasks or more, and the model that is tuned on them."""
