"""What tests share: engines, oracles, probes, statistics."""
