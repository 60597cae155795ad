"""What tests share: checkpoints, engines, oracles, statistics. Imports vLLM only inside functions."""
