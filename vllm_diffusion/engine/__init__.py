"""Where vLLM calls us: model state, attention (who sees whom), sampler, scheduler, serving config."""
