"""What must happen before vLLM is imported.

The plugin's `register()` runs when vLLM loads general plugins, which is after vLLM has imported its
configuration and with it Transformers, torchvision and torchaudio. Where importing those raises
(see `torch_companions.py`), that is too late. torch calls the entry points of the group
`torch.backends` at the end of its own import: the only moment that comes before all of them, in
every process, also in one that uses Transformers alone.
"""

from __future__ import annotations

import contextlib


def prepare_host() -> None:
    """Entry point of the group `torch.backends`.

    Not switched off by `VLLM_DIFFUSION=0`: without it stock vLLM cannot be imported on such a host
    either. An error here would make torch itself unimportable, hence the one broad suppression of
    this package: what is wrong with a companion then shows when it is imported.
    """
    with contextlib.suppress(Exception):
        from vllm_diffusion.patches.early import EARLY_PATCHES
        from vllm_diffusion.upstream import ledger

        ledger.apply(EARLY_PATCHES)
