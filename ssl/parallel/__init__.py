"""Several processes as one run: collectives, gradients, sharding, signs of life, devices."""
