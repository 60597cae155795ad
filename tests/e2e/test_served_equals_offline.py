"""One request gives one text, whichever door it came through."""

import pytest

# Token ids, because vLLM puts a beginning-of-text token before a text over HTTP, but not offline.
PROMPT = [2, 120, 305, 77, 410, 99]
REQUEST = {"max_tokens": 70, "seed": 5}


@pytest.mark.server
@pytest.mark.slow
def test_completions_streamed_and_offline_agree(client, engine):
    from vllm import SamplingParams

    request = {"model": "tiny", "prompt": PROMPT, "extra_body": {"ignore_eos": True}} | REQUEST
    whole = client.completions.create(**request)
    chunks = list(client.completions.create(stream=True, **request))
    offline = engine().generate(
        {"prompt_token_ids": PROMPT}, SamplingParams(ignore_eos=True, **REQUEST), use_tqdm=False
    )

    assert whole.usage.completion_tokens == 70
    assert whole.choices[0].finish_reason == "length"
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert offline[0].outputs[0].text == whole.choices[0].text


@pytest.mark.server
@pytest.mark.slow
def test_the_server_counts_its_steps(client, server):
    before = server.metrics()
    client.completions.create(model="tiny", prompt=PROMPT, max_tokens=32, seed=1)
    after = server.metrics()
    steps = "vllm:diffusion_num_denoising_steps"
    assert after[steps] > before[steps]
