"""Answers of our engine, native vLLM and Transformers to the same items, and their forwards.

A forward is one pass of one request's rows after its prompt: denoising a canvas or committing it.
Requests that share a batch count as if each had run alone. Called in a process of its own.
"""
# ruff: noqa: ANN401 - wraps functions of vLLM and Transformers, which are not type-checked

from __future__ import annotations

import gc
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import TURN_END, token_id

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm_diffusion.testing.tasks import Item

CONCURRENCY = 16
SPARE = 1
"""Canvases that an answer may be too long by before it is cut."""


@dataclass(slots=True)
class Answer:
    """What an engine wrote for an item, and at which cost."""

    text: str
    tokens: list[int]
    """Up to the end of the turn, which is not among them."""
    finished: bool
    """Whether the turn was ended, not cut."""
    steps: list[int]
    """Denoising forwards of every canvas."""
    commits: int
    """Forwards that only write a canvas into the cache."""


@dataclass(slots=True)
class Forwards:
    """Counts the forwards of one request of an engine that tells nothing of them."""

    steps: list[int] = field(default_factory=list)
    commits: int = 0
    begin: bool = True

    def denoise(self) -> None:
        """One step of a canvas, of a new one after a commit."""
        if self.begin:
            self.steps.append(0)
        self.begin = False
        self.steps[-1] += 1

    def commit(self) -> None:
        """The canvas is written; denoising goes on with another."""
        self.commits += 1
        self.begin = True


def budget(item: Item, tokenizer: Any, canvas: int, spare: int = SPARE) -> int:
    """New tokens granted to an item: its answer in whole canvases, and `spare` canvases more."""
    needed = len(tokenizer.encode(item.answer, add_special_tokens=False)) + 1
    return (-(-needed // canvas) + spare) * canvas


def ask_ours(
    checkpoint: str,
    items: Sequence[Item],
    seed: int,
    ways: Sequence[tuple[Any, Mapping[str, Any]]],
) -> list[list[Answer]]:
    """Answers of stock vLLM with this plugin, to all items in each of some ways.

    Args:
        checkpoint, items: what answers what.
        seed: of all items together, the same in every way.
        ways: what makes a rule of its noise, None for the published one, and the diffusion
            options of every request.
    """
    from vllm_diffusion.engine.sampler import CanvasSampler

    llm = start_vllm(checkpoint)
    sampler = sampler_of(llm)
    assert isinstance(sampler, CanvasSampler)
    answers, published = [], sampler.rule
    for make, options in ways:
        sampler.rule = published if make is None else make(published.noise)
        answers.append([answer_of(output) for output in generate_ours(llm, items, seed, options)])
    return answers


def generate_ours(
    llm: Any, items: Sequence[Item], seed: int, options: Mapping[str, Any], **how: Any
) -> list[Any]:
    """`generate` with a seed for every item, and telemetry for `answer_of`."""
    seeds = [seed * 1_000_003 + number for number in range(len(items))]
    return generate(llm, items, seeds, {"diffusion_telemetry": True, **options}, **how)


def answer_of(output: Any) -> Answer:
    """An output of ours, which says itself what it took."""
    telemetry = output.outputs[0].diffusion
    steps = [canvas.steps for canvas in telemetry.canvases]
    assert sum(steps) == telemetry.denoise_forwards, "a canvas was lost: give the engine memory"
    return finish(output, Forwards(steps=steps, commits=telemetry.commit_forwards))


def ask_native(checkpoint: str, items: Sequence[Item], seed: int) -> list[Answer]:
    """Answers of vLLM's own DiffusionGemma, which draws from torch's global generator."""
    llm = start_vllm(checkpoint)
    counter = NativeForwards(llm)
    torch.manual_seed(seed)
    return [counter.answer_of(output) for output in generate(llm, items, [None] * len(items), {})]


class NativeForwards:
    """Counts the forwards of native vLLM's requests, from now on."""

    def __init__(self, llm: Any) -> None:
        self._counted: dict[str, Forwards] = defaultdict(Forwards)
        sampler = type(sampler_of(llm))
        inner = sampler.__call__

        def call(sampler: Any, logits: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._count(sampler, batch)
            return inner(sampler, logits, batch, *args, **kwargs)

        sampler.__call__ = call

    def answer_of(self, output: Any) -> Answer:
        """An output with what was counted for it."""
        (name,) = (name for name in self._counted if name.split("-")[0] == output.request_id)
        return finish(output, self._counted.pop(name))

    def _count(self, sampler: Any, batch: Any) -> None:
        if not batch.num_draft_tokens:
            return
        for row, slot in enumerate(batch.idx_mapping_np[: batch.num_reqs]):
            if batch.cu_num_logits_np[row + 1] == batch.cu_num_logits_np[row]:
                continue  # prompt rows
            forwards = self._counted[batch.req_ids[row]]
            if sampler.diffusion_states.is_encoder_phase[slot]:
                forwards.commit()
            else:
                forwards.denoise()


def ask_transformers(checkpoint: str, items: Sequence[Item], seed: int) -> list[Answer]:
    """Answers of Transformers' own `generate`, one item after the other."""
    model = Transformers(checkpoint)
    return [
        answer
        for number, item in enumerate(items)
        for answer in model.answer([item], seed * 1_000_003 + number)
    ]


class Transformers:
    """Transformers' own model and loop."""

    def __init__(self, checkpoint: str) -> None:
        from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion

        model = DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint, dtype=torch.float32)
        self._model = model.eval()
        self._tokenizer = AutoTokenizer.from_pretrained(checkpoint, padding_side="left")
        self._forwards = Forwards()
        model.model.decoder.register_forward_hook(lambda *_: self._forwards.denoise())
        model.model.encoder.register_forward_hook(lambda *_: self._forwards.commit())

    def answer(self, items: Sequence[Item], seed: int) -> list[Answer]:
        """Answer items in one static batch, all of whose requests run until the last is done."""
        asked = self._tokenizer.apply_chat_template(
            [chat(item) for item in items],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            padding=True,
        )
        self._forwards.steps, self._forwards.commits = [], -1  # the first call is the prompts'
        torch.manual_seed(seed)
        canvas = self._model.config.canvas_length
        output = self._model.generate(
            asked.input_ids,
            attention_mask=asked.attention_mask,
            max_new_tokens=max(budget(item, self._tokenizer, canvas) for item in items),
        )
        return [
            self._answer_of(ids) for ids in output.sequences[:, asked.input_ids.shape[1] :].tolist()
        ]

    def _answer_of(self, ids: list[int]) -> Answer:
        end = ids.index(token_id(TURN_END)) if token_id(TURN_END) in ids else None
        return Answer(
            text=self._tokenizer.decode(ids[:end], skip_special_tokens=True),
            tokens=ids[:end],
            finished=end is not None,
            steps=self._forwards.steps,
            commits=self._forwards.commits,
        )


def start_vllm(checkpoint: str, concurrency: int = CONCURRENCY, *, eager: bool = True) -> Any:
    """An engine in this process, the same for ours and native."""
    from vllm import LLM

    gc.freeze()  # a start collects garbage eight times, each time through all modules
    return LLM(
        checkpoint,
        dtype="float32",
        max_model_len=1024,
        max_num_seqs=concurrency,
        kv_cache_memory_bytes=256 << 20,
        enforce_eager=eager,
        enable_prefix_caching=False,
        limit_mm_per_prompt={"image": 0, "video": 0},
    )


def sampler_of(llm: Any) -> Any:
    """The sampler of an engine that runs in this process."""
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    return executor.driver_worker.worker.model_runner.sampler


def generate(
    llm: Any,
    items: Sequence[Item],
    seeds: Sequence[int | None],
    options: Mapping[str, Any],
    *,
    one_by_one: bool = False,
) -> list[Any]:
    """All items through LLM.chat, in order; at once, or each when the one before is answered."""
    from vllm import SamplingParams

    tokenizer = llm.get_tokenizer()
    config = llm.llm_engine.model_config.hf_config
    canvas, spare = config.canvas_length, spare_of(config.model_type)
    sampling = [
        SamplingParams(
            temperature=llm.get_default_sampling_params().temperature,
            max_tokens=budget(item, tokenizer, canvas, spare),
            seed=seed,
            extra_args=dict(options),
        )
        for item, seed in zip(items, seeds, strict=True)
    ]
    chats = [chat(item) for item in items]
    if one_by_one:
        pairs = zip(chats, sampling, strict=True)
        return [llm.chat(each, wish, use_tqdm=False)[0] for each, wish in pairs]
    return list(llm.chat(chats, sampling, use_tqdm=False))


def spare_of(family: str) -> int:
    """Canvases that an answer of a family may be too long by.

    LLaDA sees the whole answer that it is granted, and fills what it does not need with ends.
    """
    return 0 if family == "llada" else SPARE


def chat(item: Item) -> list[dict[str, str]]:
    """The item as a conversation."""
    return [{"role": "user", "content": item.prompt}]


def finish(output: Any, forwards: Forwards) -> Answer:
    """Put a vLLM output and its forwards together."""
    made = output.outputs[0]
    ended = made.finish_reason == "stop"
    tokens = list(made.token_ids)
    return Answer(
        text=made.text,
        tokens=tokens[:-1] if ended else tokens,
        finished=ended,
        steps=forwards.steps,
        commits=forwards.commits,
    )
