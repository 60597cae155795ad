"""SDAR and TraDo: Qwen3 that reveals block after block, dense and with experts."""
