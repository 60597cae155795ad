"""Where vLLM calls us: serving config, scheduler, model state, attention, sampler."""
