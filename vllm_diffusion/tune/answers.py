"""Answer the items of a task under one arm after the other.

One engine serves all arms, which are options of requests. Forwards come from the answers'
telemetry.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm import LLM, SamplingParams
from vllm.exceptions import VLLMClientError

from vllm_diffusion.engine import carriers
from vllm_diffusion.errors import TuneError
from vllm_diffusion.request.options import read_options, requested_rule
from vllm_diffusion.telemetry import OPTION as TELEMETRY
from vllm_diffusion.tune.compare import Outcome, repeated_share

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from vllm_diffusion.denoise.constants import RuleConstants
    from vllm_diffusion.tune.items import TaskItem, Verifier


class Answerer:
    """Answers and scores items, with the same seed for an item under every arm."""

    def __init__(
        self,
        model: str,
        verifier: Verifier,
        *,
        engine: Mapping[str, Any],
        max_tokens: int,
        seed: int,
    ) -> None:
        """Start an engine.

        Args:
            model: path or name of a checkpoint.
            verifier: scores an answer.
            engine: arguments of ``LLM``.
            max_tokens: default for items that set none.
            seed: seed of the run, from which every item's is derived.

        Raises:
            TuneError: the model is not one of ours.
        """
        self.llm = LLM(model, **engine)
        config = self.llm.llm_engine.model_config.hf_config
        if not carriers.is_served(config):
            self.close()
            raise TuneError(f"{model} is not served by vllm-diffusion")
        self._rules = carriers.served(config).rules
        self._verifier = verifier
        self._max_tokens = max_tokens
        self._seed = seed

    def rule(self, options: Mapping[str, Any]) -> RuleConstants:
        """The constants that these options are served with."""
        return requested_rule(read_options(options)[0], self._rules)

    def close(self) -> None:
        """End the engine and its processes."""
        self.llm.llm_engine.engine_core.shutdown()

    def answer(
        self, items: Sequence[TaskItem], options: Mapping[str, Any], bar: Callable[..., Any]
    ) -> list[Outcome]:
        """Answer all items under the options of one arm, in order.

        Args:
            items: items of the task.
            options: options of every request.
            bar: progress bar factory, called like tqdm.

        Raises:
            TuneError: the engine refuses these options, or an item.
        """
        try:
            sampling = [
                SamplingParams(
                    max_tokens=item.max_tokens or self._max_tokens,
                    seed=self._seed * 1_000_003 + number,
                    extra_args={**options, TELEMETRY: True},
                )
                for number, item in enumerate(items)
            ]
            outputs = self.llm.chat([item.messages for item in items], sampling, use_tqdm=bar)
        except (ValueError, VLLMClientError) as error:  # what vLLM answers 400 to over HTTP
            raise TuneError(f"the engine refuses: {error}") from error
        return [
            self._outcome(item, output.outputs[0])
            for item, output in zip(items, outputs, strict=True)
        ]

    def _outcome(self, item: TaskItem, output: Any) -> Outcome:  # noqa: ANN401 - ours adds a field
        ended = output.finish_reason == "stop"
        tokens = list(output.token_ids)
        tokens = tokens[:-1] if ended and output.stop_reason is None else tokens
        told = output.diffusion
        return Outcome(
            score=self._verifier(output.text, item),
            finished=ended,
            empty=not output.text.strip(),
            repeated=repeated_share(tokens),
            tokens=len(tokens),
            denoise=told.denoise_forwards,
            commits=told.commit_forwards,
            steps=[canvas.steps for canvas in told.canvases],
        )
