"""What changes vLLM: one subject a file, and the table of all changes.

    table.py              THE TABLE: every patch, why it exists, when it can go
    serving_table.py      those of its rows that a serving process needs
    host.py               companions of torch, before vLLM is imported
    runner_choice.py      Model Runner V2 for diffusion models on CPU hosts without Triton
    worker_choice.py      their worker there, cpu_worker.py
    cpu_kernels.py        its stand-ins for Triton kernels, in cpu_step_kernels.py and
                          cpu_request_kernels.py
    serving_config.py     what an architecture asks of vLLM's configuration
    adapter_requests.py   LoRA adapters are checked where a user asks for them
    adapter_layers.py     our manager of adapters and our experts in the worker
    malformed_requests, media_errors, completion_suffix
                          what the body of a request may hold
    request_validation, request_entry, constraint_compiling
                          a request is checked and admitted by `engine.admission`
    telemetry_*.py        telemetry in outputs, metrics and replies

Facts about vLLM and the host are in ``upstream``. Importing this package or the table imports
neither vLLM nor torch.
"""
