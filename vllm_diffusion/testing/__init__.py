"""What tests, benchmarks and the demo need that users do not: checkpoints made on the spot."""
