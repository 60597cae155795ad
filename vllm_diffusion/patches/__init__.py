"""What changes vLLM: one installer a file, and the table of them.

    table.py              THE TABLE: every patch, why it exists, when it can go
    serving_table.py      those of its rows that a serving process needs
    host.py               companions of torch, before vLLM is imported
    runner_choice.py      Model Runner V2 for diffusion models on CPU hosts without Triton
    worker_choice.py      and the worker there
    cpu_worker.py         that worker
    cpu_kernels.py        its stand-ins for Triton kernels, in cpu_step_kernels, cpu_request_kernels
    serving_config.py     what an architecture asks of vLLM's configuration
    adapter_requests.py   LoRA adapters are checked where a user asks for them
    adapter_layers.py     and served by our manager
    malformed_requests, media_errors, request_validation, structured_outputs, constraint_compiling,
    canvas_text           a request is checked and completed where it enters
    gemma_tools.py        tool calls in Gemma's format
    telemetry_*.py        what canvases took, in outputs, metrics and replies

What vLLM and the host are, which changes nothing, stands in ``upstream``. Importing this package or
the table imports neither vLLM nor torch.
"""
