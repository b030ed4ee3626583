"""What training a model takes, worked out before a GPU is rented: bytes, FLOPs, hours; no weights are read."""
