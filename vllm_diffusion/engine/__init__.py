"""What vLLM calls: serving config, scheduler, model state, attention, sampler."""
