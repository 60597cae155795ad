"""The shared engines: reused for equal options, gone for others, the same tokens either way."""

import gc
import weakref

import pytest
from helpers.inside import Inside

pytestmark = pytest.mark.vllm


def tokens(llm, **sampling):
    from vllm import SamplingParams

    parameters = SamplingParams(max_tokens=40, seed=11, ignore_eos=True, **sampling)
    return llm.generate("a short prompt", parameters, use_tqdm=False)[0].outputs[0].token_ids


def test_equal_options_share_an_engine(engine):
    assert engine() is engine()


def test_other_options_start_another_which_answers_the_same(engine):
    first = engine()
    expected = tokens(first)
    second = engine(max_num_seqs=2)
    assert second is not first
    assert second.llm_engine.vllm_config.scheduler_config.max_num_seqs == 2
    assert tokens(second) == expected


def test_an_engine_that_was_shut_down_leaves_no_weights_and_no_collector_behind(
    engine, engine_pool
):
    model = weakref.ref(Inside(engine()).runner.model)
    assert model() is not None
    engine(max_num_seqs=2)
    assert model() is None
    engine_pool.close()
    assert gc.freeze.__name__ == "freeze"
    assert gc.get_freeze_count() > 0


@pytest.mark.slow
def test_an_engine_in_processes_of_its_own_answers_the_same(engine):
    expected = tokens(engine())
    llm = engine(in_process=False)
    assert type(llm.llm_engine.engine_core).__name__ == "SyncMPClient"
    assert tokens(llm) == expected
