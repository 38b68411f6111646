"""The machine and its processes: devices, random numbers, shards, signals, progress."""
