"""The denoising loop on Transformers' model with our rule, for experiments the engine lacks.

Takes an item and a rule; returns the answer and its cost. Uses the step, canvas and head of this
package, so with one branch and no cut the answer equals the engine's for the same seed
(`branches.py` compares them). Additionally:

    branches    several canvases of one request, each with its own noise, over one prefix; the first
                to finish is committed for all, or the most certain if several finish together
    cut         commits part of an unfinished canvas; the rest moves up (tokens, belief and
                self-conditioning) and noise is appended

Commits count as fused: rows but no separate forward, and none after the last canvas.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from _answers import budget, chat
from transformers import AutoTokenizer, DiffusionGemmaForBlockDiffusion, DynamicCache

from vllm_diffusion.canvas import CanvasPool
from vllm_diffusion.config import served_rules
from vllm_diffusion.head.reference import ReferenceHead
from vllm_diffusion.head.stream import StreamingHead
from vllm_diffusion.head.vocabulary import Vocabulary
from vllm_diffusion.models.diffusion_gemma.testing.reference import CACHE
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import TURN_END, token_id
from vllm_diffusion.records import CanvasBatch
from vllm_diffusion.rules.entropy_bound import EntropyBound
from vllm_diffusion.step import advance
from vllm_diffusion.testing.tasks import TASKS, held_out_items, solved
from vllm_diffusion.tune.compare import Outcome, repeated_share

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from vllm_diffusion.denoise.constants import EntropyBoundConstants
    from vllm_diffusion.records import CanvasStats
    from vllm_diffusion.testing.tasks import Item

CHECKPOINT = Path(__file__).parents[1] / "examples" / "tiny-diffusiongemma"
ASKED = ("json", "sudoku", "chain", "joint", "edit")
"""Without `count`, which the model has not learnt."""

HEAD_BYTES = 1 << 26
APART = 0x9E3779B97F4A7C15  # between the seeds of branches


def items_of(count: int, seed: int, tasks: Sequence[str] | None = None) -> list[Item]:
    """Held-out items of hard sizes, so many of each task; of all that were learnt for None."""
    return [
        item
        for task in tasks or ASKED
        for item in held_out_items(task, count, seed=seed, sizes=TASKS[task].hard)
    ]


def seed_of(seed: int, number: int) -> int:
    """Of an item, as `quality.py` has it."""
    return seed * 1_000_003 + number


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """A canvas as it was committed, and what the forward that commits it says of it."""

    tokens: Tensor  # [N] int64
    top_prob: Tensor  # [N] fp32, of the last step
    causal: Tensor  # [N, V] fp32 logits of the row before each token, which has not seen it
    own: Tensor  # [N, V] fp32 logits of the token's own row


@dataclass(slots=True)
class Run:
    """An answer, and what it took."""

    tokens: list[int] = field(default_factory=list)
    """Up to the end of the turn, which is not among them."""
    text: str = ""
    finished: bool = False
    steps: list[int] = field(default_factory=list)
    """Forwards of every canvas, or between two commits."""
    rows: int = 0

    def judged(self, item: Item) -> Outcome:
        """As `quality.py` judges."""
        return Outcome(
            score=float(self.finished and solved(item, self.text)),
            finished=self.finished,
            empty=not self.text.strip(),
            repeated=repeated_share(self.tokens),
            tokens=len(self.tokens),
            denoise=sum(self.steps),
            commits=0,
            steps=self.steps,
        )


class Prefix:
    """The cache of what is before a canvas, once for every branch."""

    def __init__(self, model: Any, branches: int) -> None:  # noqa: ANN401 - of Transformers
        self._encoder = model.model.encoder
        self._config = model.config
        self.cache = DynamicCache(config=model.config.get_text_config(decoder=True))
        self.length = 0
        self._branches = branches
        self._last: Tensor | None = None

    def write(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Run known text [N] through the model; hidden rows [N, H] before each token, and its own.

        Nothing stands before the first token of all; its row is given twice.
        """
        ids = tokens.expand(self._branches, -1)
        position = (self.length + torch.arange(len(tokens)))[None]
        self.length += len(tokens)
        masks = self._encoder.create_masks_for_generate(
            config=self._config,
            inputs_embeds=torch.empty(*ids.shape, 0),
            attention_mask=torch.ones(self._branches, self.length, dtype=torch.bool),
            position_ids=position,
            **{CACHE: self.cache},
        )
        output = self._encoder(
            input_ids=ids, attention_mask=masks, position_ids=position, **{CACHE: self.cache}
        )
        own = output.last_hidden_state[0]
        before = torch.cat([own[:1] if self._last is None else self._last, own[:-1]])
        self._last = own[-1:]
        return before, own


def _nobody_asks(prob: Tensor) -> Tensor:
    raise AssertionError(f"the streaming head takes whole rows, {prob.shape}")


class CanvasLoop:
    """Answers items on a checkpoint, one after the other."""

    def __init__(self, checkpoint: Path = CHECKPOINT) -> None:
        self._model = DiffusionGemmaForBlockDiffusion.from_pretrained(
            checkpoint, dtype=torch.float32
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        generation = json.loads((checkpoint / "generation_config.json").read_text())
        self.rules, _ = served_rules(generation, source="generation_config.json")
        self._decoder = self._model.model.decoder
        self._decoder.self_conditioning.register_forward_pre_hook(
            lambda _, arguments: (arguments[0], self._soft)
        )
        self._soft = self._top_prob = torch.empty(0)
        self._length = self._model.config.canvas_length
        self._head = StreamingHead(
            vocabulary=Vocabulary(
                output=self._model.lm_head.weight.detach(),
                embedding=self._decoder.embed_tokens.weight.detach(),
                size=self._model.config.text_config.vocab_size,
                softcap=self._model.final_logit_softcapping,
                scale=self._decoder.embed_tokens.embed_scale,
            ),
            whole=ReferenceHead(logits=self._logits, soft_embedding=_nobody_asks, max_rows=1),
            budget=HEAD_BYTES,
        )

    @torch.no_grad()
    def answer(
        self,
        item: Item,
        seed: int,
        constants: EntropyBoundConstants,
        *,
        branches: int = 1,
        cut: Callable[[CanvasPool, Tensor, int], int] | None = None,
        watch: Callable[[Commit], None] | None = None,
    ) -> Run:
        """Answer an item.

        Args:
            item: what is asked.
            seed: of the first branch; the others' follow from it.
            constants: of all of them.
            branches: canvases of the request in a forward.
            cut: of the pool, the argmax [1, L] of the step before the last one, and the steps since
                the last commit; how many tokens to commit now, 0 for none. One branch.
            watch: sees every commit, the last one too, and what its forward says.
        """
        assert branches == 1 or cut is None
        pool = self._pool(constants, branches, seed)
        rule = EntropyBound(pool.noise)
        prefix, slots = Prefix(self._model, branches), torch.arange(branches)
        asked = self.tokenizer.apply_chat_template(
            chat(item), add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).input_ids[0]
        prefix.write(asked)
        limit = budget(item, self.tokenizer, self._length)
        pool.begin(slots, self._positions(prefix.length, branches))
        run, said, taken = Run(), [], 0
        while True:
            before = pool.argmax.clone()
            hidden = self._denoise(pool, prefix)
            batch = self._batch(slots, prefix.length)
            emission = advance(pool, batch, hidden, self._head, rule, observe=self._see)
            taken, run.rows = taken + 1, run.rows + branches * self._length
            ended = emission.count.nonzero()[:, 0]
            if len(ended):
                winner = ended[emission.entropy[ended].argmin()]
                tokens, top_prob = emission.tokens[winner], self._top_prob[winner]
            else:
                count = cut(pool, before, taken) if cut else 0
                tokens, top_prob = pool.argmax[0, :count].clone(), self._top_prob[0, :count]
            if not len(tokens):
                continue
            run.steps.append(taken)
            said, taken = said + tokens.tolist(), 0
            over = token_id(TURN_END) in said or len(said) >= limit
            if over and watch is None:
                break
            rows = prefix.write(tokens)
            if watch is not None:
                causal, own = (self._logits(each) for each in rows)
                watch(Commit(tokens=tokens, top_prob=top_prob, causal=causal, own=own))
            if over:
                break
            run.rows += len(tokens)
            if len(ended):
                pool.begin(slots, self._positions(prefix.length, branches))
            else:
                self._move_up(pool, len(tokens), prefix.length)
        run.finished = token_id(TURN_END) in said
        run.tokens = said[: said.index(token_id(TURN_END))] if run.finished else said[:limit]
        run.text = self.tokenizer.decode(run.tokens, skip_special_tokens=True)
        return run

    def _see(self, _: object, __: object, stats: CanvasStats, ___: object) -> None:
        self._top_prob = stats.top_prob  # the pool forgets that of a canvas that ends

    def _pool(self, rule: EntropyBoundConstants, branches: int, seed: int) -> CanvasPool:
        config = self._model.config.text_config
        pool = CanvasPool(
            num_slots=branches,
            canvas_length=self._length,
            hidden_size=config.hidden_size,
            vocab_size=config.vocab_size,
            constants=rule,
            dtype=torch.float32,
            device=torch.device("cpu"),
        )
        for branch in range(branches):
            pool.admit(branch, seed=(seed + branch * APART) % (1 << 64), fused=True)
        return pool

    def _denoise(self, pool: CanvasPool, prefix: Prefix) -> Tensor:
        self._soft = pool.soft_embedding
        output = self._decoder(
            decoder_input_ids=pool.tokens,
            decoder_position_ids=self._positions(prefix.length, 1),
            **{CACHE: prefix.cache},
        )
        hidden: Tensor = output.last_hidden_state
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        cap = self._model.final_logit_softcapping
        return torch.tanh(self._model.lm_head(hidden).float() / cap) * cap

    def _positions(self, start: int, branches: int) -> Tensor:
        return (start + torch.arange(self._length)).expand(branches, -1)

    def _batch(self, slots: Tensor, start: int) -> CanvasBatch:
        position = self._positions(start, len(slots))
        return CanvasBatch(
            slots=slots,
            width=torch.full_like(slots, self._length),
            position=position,
            valid=torch.ones_like(position, dtype=torch.bool),
        )

    def _move_up(self, pool: CanvasPool, count: int, start: int) -> None:
        """Let the canvas, of which so many tokens are committed, begin at ``start``."""
        behind = self._positions(start, 1)
        noise = pool.noise.initial(pool.seed, behind)

        def moved(rows: Tensor, fill: Tensor | float, dim: int = 1) -> Tensor:
            kept = rows.narrow(dim, count, self._length - count)
            new = rows.narrow(dim, self._length - count, count)
            new = torch.full_like(new, fill) if isinstance(fill, float) else fill[:, -count:]
            return torch.cat([kept, new], dim)

        pool.tokens = moved(pool.tokens, noise)
        pool.argmax = moved(pool.argmax, -1.0)
        pool.top_prob = moved(pool.top_prob, 0.0)
        pool.history = moved(pool.history, -1.0, dim=2)
        pool.soft_embedding = moved(pool.soft_embedding, 0.0)
