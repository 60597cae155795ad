"""Transformers' own ``generate`` as the oracle, run under our noise and watched from inside.

Takes a checkpoint directory. Gives, for a prompt, everything the published loop did: the input, the
logits and the verdict of every denoising step, the committed tokens, and the hidden states and KV
that the encoder wrote. The loop, the sampler, the schedule, the stopping rule and the model are
Transformers', untouched; only where they draw a random number, ours is put in its place.

Never changes a number: what is recorded is copied on its way through.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import DiffusionGemmaForBlockDiffusion, DynamicCache

from vllm_diffusion.denoise.renoise import initial_canvas, uniform_tokens
from vllm_diffusion.denoise.rng import split_seed
from vllm_diffusion.head.sample import sample_rows
from vllm_diffusion.models.diffusion_gemma.testing.reference import CACHE
from vllm_diffusion.records import Noise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleStep:
    """One denoising step. L canvas length, V vocabulary."""

    start: int  # absolute position of the canvas's first row
    step: int  # steps taken before this one
    canvas: Tensor  # [L] int64, input of the forward
    logits: Tensor  # [L, V] fp32, softcap applied, not divided by the temperature
    temperature: float
    argmax: Tensor  # [L] int64
    sample: Tensor  # [L] int64
    accept: Tensor  # [L] bool
    next_canvas: Tensor  # [L] int64, accepted samples and fresh noise
    finished: bool  # by the stopping rule; False on the last step of a canvas that ran out


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleCanvas:
    """One canvas from initial noise to commit."""

    start: int  # absolute position of its first row
    steps: tuple[OracleStep, ...]
    tokens: Tensor  # [L] int64, the argmax canvas: what is committed
    padded: Tensor  # [L] int64, the same with everything behind the first end token replaced


@dataclass(frozen=True, slots=True, kw_only=True)
class OracleRun:
    """One prompt and everything generated from it. T positions the encoder has seen."""

    prompt: tuple[int, ...]
    canvases: tuple[OracleCanvas, ...]
    hidden: Tensor  # [T, H] encoder output after the final norm: prompt and committed canvases
    keys: tuple[Tensor, ...]  # a layer [T, kv heads, head dim], after norm and rotary
    values: tuple[Tensor, ...]  # a layer [T, kv heads, head dim], after norm

    @property
    def tokens(self) -> list[int]:
        """All generated tokens as Transformers returns them, padded behind an end token."""
        return [token for canvas in self.canvases for token in canvas.padded.tolist()]

    @property
    def steps(self) -> list[int]:
        """Denoising steps of every canvas."""
        return [len(canvas.steps) for canvas in self.canvases]


class Oracle:
    """A loaded model; call ``generate`` as often as needed.

    Runs one prompt at a time and on one thread's arithmetic, so a result does not depend on what
    else was asked.
    """

    def __init__(
        self,
        checkpoint: Path | str,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=dtype)
        self.model = model.eval().to(device)
        if dtype == torch.float64:
            # The fast path multiplies grouped matrices, which torch has for fp32 and below only.
            self.model.set_experts_implementation("eager")

    @property
    def canvas_length(self) -> int:
        """Tokens a canvas."""
        return int(self.model.config.canvas_length)

    def generate(
        self,
        prompt: Sequence[int],
        *,
        seed: int,
        canvases: int = 3,
        stop_at_end: bool = False,
        overrides: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Tensor] | None = None,
    ) -> OracleRun:
        """Run the published loop on one prompt.

        Args:
            prompt: token ids, image placeholders expanded.
            seed: 64-bit key of the noise, what ``rng.request_seed`` gives for the request.
            canvases: how many to write; fewer when ``stop_at_end`` ends the run.
            stop_at_end: honour the checkpoint's end tokens, as a request without ``ignore_eos``.
            overrides: generation constants other than the checkpoint's.
            inputs: what the processor adds for images (``pixel_values``, ``image_position_ids``,
                ``mm_token_type_ids``).
        """
        recorder = _Recorder(self.model, seed)
        cache = _RecordingCache(config=self.model.config.get_text_config(decoder=True))
        config = self.model.generation_config
        end_tokens = config.eos_token_id
        if not stop_at_end:
            # A keyword None would be filled from the model's own config again.
            config.eos_token_id = None
        try:
            with recorder.watching():
                self.model.generate(
                    torch.tensor([list(prompt)], device=self.model.device),
                    max_new_tokens=canvases * self.canvas_length,
                    **{CACHE: cache},
                    **(overrides or {}),
                    **(inputs or {}),
                )
        finally:
            config.eos_token_id = end_tokens
        return OracleRun(
            prompt=tuple(prompt),
            canvases=tuple(recorder.canvases),
            hidden=torch.cat(recorder.hidden),
            keys=cache.written("keys"),
            values=cache.written("values"),
        )

    @torch.no_grad()
    def encode(self, tokens: Sequence[int]) -> OracleRun:
        """Hidden states and KV of known text in one prefill, without generating."""
        cache = _RecordingCache(config=self.model.config.get_text_config(decoder=True))
        ids = torch.tensor([list(tokens)])
        positions = torch.arange(ids.shape[1])[None]
        encoder = self.model.model.encoder
        masks = encoder.create_masks_for_generate(
            config=self.model.config,
            inputs_embeds=torch.empty(1, ids.shape[1], 0),
            attention_mask=torch.ones_like(ids, dtype=torch.bool),
            position_ids=positions,
            **{CACHE: cache},
        )
        output = encoder(
            input_ids=ids, attention_mask=masks, position_ids=positions, **{CACHE: cache}
        )
        return OracleRun(
            prompt=tuple(tokens),
            canvases=(),
            hidden=output.last_hidden_state[0],
            keys=cache.written("keys"),
            values=cache.written("values"),
        )


class _RecordingCache(DynamicCache):
    """A plain dynamic cache that also keeps what a sliding layer would forget."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._written: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        part = (_kept(key_states[0].transpose(0, 1)), _kept(value_states[0].transpose(0, 1)))
        self._written.setdefault(layer_idx, []).append(part)
        both: tuple[Tensor, Tensor] = super().update(
            key_states, value_states, layer_idx, *args, **kwargs
        )
        return both

    def written(self, what: str) -> tuple[Tensor, ...]:
        """Everything written so far, a layer [T, kv heads, head dim]."""
        side = ("keys", "values").index(what)
        return tuple(
            torch.cat([part[side] for part in self._written[layer]])
            for layer in sorted(self._written)
        )


class _Recorder:
    """Puts our noise where the loop draws, and keeps what passes the loop's own methods."""

    def __init__(self, model: Any, seed: int) -> None:
        self.model = model
        self.key = torch.tensor([split_seed(seed)])
        self.canvases: list[OracleCanvas] = []
        self.hidden: list[Tensor] = []
        self._steps: list[OracleStep] = []
        self._start = 0
        self._step = -1  # -1: the canvas is about to be drawn; else steps taken before this one
        self._logits: Tensor | None = None
        self._sample: Tensor | None = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Patch the draws and wrap the loop's methods for the duration of one ``generate``."""
        model = self.model
        drawn = torch.multinomial, torch.randint
        wrapped = {
            "_prepare_denoiser_inputs": self._prepare_denoiser_inputs,
            "_denoising_step": self._denoising_step,
            "_finalize_canvas": self._finalize_canvas,
        }
        hook = model.model.encoder.register_forward_hook(self._after_encoder)
        try:
            torch.multinomial, torch.randint = self._multinomial, self._randint  # type: ignore[assignment]
            for name, wrapper in wrapped.items():
                # An instance attribute hides the class's method and is removed again below.
                setattr(model, name, wrapper)
            yield
        finally:
            torch.multinomial, torch.randint = drawn
            for name in wrapped:
                delattr(model, name)
            hook.remove()

    # ---- where the published loop draws ----

    def _multinomial(self, weight: Tensor, num_samples: int) -> Tensor:
        assert num_samples == 1, num_samples
        rows = weight.shape[0]
        self._sample = sample_rows(
            weight.cpu(),
            Noise(
                seed=self.key.expand(rows, 2),
                position=self._start + torch.arange(rows),
                step=torch.full((rows,), self._step),
            ),
        )
        return self._sample[:, None].to(weight.device)

    def _randint(self, *, low: int, high: int, size: tuple[int, int], device: Any) -> Tensor:
        assert (low, size[0]) == (0, 1), (low, size)
        position = (self._start + torch.arange(size[1]))[None]
        if self._step < 0:
            return initial_canvas(self.key, position, high).to(device)
        return uniform_tokens(self.key, position, torch.tensor([self._step]), high).to(device)

    # ---- what passes the published loop's methods ----

    def _after_encoder(self, _: Any, __: Any, output: Any) -> None:
        self.hidden.append(_kept(output.last_hidden_state[0]))

    def _prepare_denoiser_inputs(self, **kwargs: Any) -> Any:
        self._start = kwargs[CACHE].get_seq_length()
        self._step = -1
        self._steps = []
        return type(self.model)._prepare_denoiser_inputs(self.model, **kwargs)

    def _denoising_step(self, *, cur_step: int, decoder_forward: Any, **kwargs: Any) -> Any:
        self._step = len(self._steps)
        sampler, canvas = kwargs["sampler"], kwargs["current_canvas"]
        result = type(self.model)._denoising_step(
            self.model,
            cur_step=cur_step,
            decoder_forward=lambda **inputs: self._forward(decoder_forward, inputs),
            **kwargs,
        )
        next_canvas, argmax, scaled, finished = result
        assert self._logits is not None
        assert self._sample is not None
        # The schedule multiplies by one number: read it off the largest logit.
        at = int(self._logits.abs().argmax())
        self._steps.append(
            OracleStep(
                start=self._start,
                step=self._step,
                canvas=_kept(canvas[0]),
                logits=self._logits,
                temperature=float(self._logits.flatten()[at] / scaled[0].flatten()[at].cpu()),
                argmax=_kept(argmax[0]),
                sample=self._sample,
                accept=_kept(sampler.accepted_token_mask[0]),
                next_canvas=_kept(next_canvas[0]),
                finished=bool(finished),
            )
        )
        return result

    def _forward(self, decoder_forward: Any, inputs: dict[str, Any]) -> Any:
        output = decoder_forward(**inputs)
        self._logits = _kept(output.logits[0])
        return output

    def _finalize_canvas(self, **kwargs: Any) -> Any:
        length = kwargs["canvas_length"]
        tokens = _kept(kwargs["input_ids"][0, -length:])
        result = type(self.model)._finalize_canvas(**kwargs)
        self.canvases.append(
            OracleCanvas(
                start=self._start,
                steps=tuple(self._steps),
                tokens=tokens,
                padded=_kept(result[0][0, -length:]),
            )
        )
        return result


def _kept(tensor: Tensor) -> Tensor:
    """A copy on the host."""
    return tensor.detach().to("cpu", copy=True)
