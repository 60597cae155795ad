"""Attention masks: the segments of a step, and their forms for CPU and GPU backends."""
