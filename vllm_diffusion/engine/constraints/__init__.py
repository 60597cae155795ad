"""Structured output where vLLM asks for it: compiled, checked, and sent to the worker."""
