"""Why an engine did not start, and what the command is to be given instead."""

from __future__ import annotations

import pytest

from vllm_diffusion.tune.refusal import reason, way_out

# What vLLM 0.32 logs where its CPU worker finds too little memory, shortened.
REFUSED = (
    "Available memory on node 0 (8.0/16.0 GiB) on startup is less than desired CPU memory "
    "utilization (0.92, 14.7 GiB). To resolve: decrease `--gpu-memory-utilization`"
)
LOG = f"""
(EngineCore pid=2) INFO 11-30 18:00:00 [core.py:133] Initializing: Error: none so far
(Worker pid=3) ERROR 11-30 18:00:01 [multiproc_executor.py:953] Traceback (most recent call last):
(Worker pid=3) ERROR 11-30 18:00:01 [multiproc_executor.py:953] ValueError: {REFUSED}
(EngineCore pid=2) ERROR 11-30 18:00:02 [core.py:1263] Exception: WorkerProc initialization failed \
due to an exception in a background process. See stack trace for root cause.
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {{}}
"""
ELSEWHERE = RuntimeError("Engine core initialization failed. See root cause above.")
GPU = (
    "Free memory on device cuda:0 (70.0/80.0 GiB) on startup is less than desired GPU memory "
    "utilization (0.92, 73.6 GiB)."
)


class InvalidError(ValueError):
    """As pydantic's error."""

    def errors(self) -> list[dict[str, str]]:
        return [{"msg": "Value error, no such"}, {"msg": "model"}]


@pytest.mark.parametrize(
    ("error", "log", "told"),
    [
        (ELSEWHERE, LOG, REFUSED),
        (ELSEWHERE, "", str(ELSEWHERE)),
        (OSError("no such\n\n  model"), LOG, "no such model"),
        (InvalidError("1 validation error for ModelConfig"), LOG, "Value error, no such; model"),
        (KeyError(), LOG, "KeyError"),
    ],
)
def test_the_reason_is_one_line_of_whichever_process_failed(
    error: Exception, log: str, told: str
) -> None:
    assert reason(error, log) == told


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (REFUSED, """--engine '{"seed": 1, "gpu_memory_utilization": 0.45}'"""),
        (REFUSED, """--engine '{"seed": 1, "kv_cache_memory_bytes": 1073741824}'"""),
        (GPU, """--engine '{"seed": 1, "gpu_memory_utilization": 0.78}'"""),
        ("increase `max_num_batched_tokens`", """{"seed": 1, "max_num_batched_tokens": "N"}"""),
        ("pass --max-model-len", """--engine '{"seed": 1, "max_model_len": "N"}'"""),
    ],
)
def test_the_way_out_is_an_option_of_this_command(told: str, said: str) -> None:
    assert said in way_out(told, {"seed": 1})


def test_there_is_no_way_out_of_what_names_none() -> None:
    assert not way_out("no such model", {})
