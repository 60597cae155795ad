"""What families share whose backbone is a plain decoder of vLLM: no family of its own."""
