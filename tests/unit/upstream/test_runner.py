from vllm_diffusion.upstream.runner import runner_refusal


def test_names_the_variable_that_forced_the_old_runner():
    message = runner_refusal("0", ["pipeline parallelism"])
    assert "VLLM_USE_V2_MODEL_RUNNER=0 forces V1" in message
    assert message.endswith("unset VLLM_USE_V2_MODEL_RUNNER.")


def test_names_what_the_new_runner_lacks():
    message = runner_refusal(None, ["dual batch overlap", "this"])
    assert message.endswith("V2 does not support: dual batch overlap, this; turn that off.")


def test_names_triton_when_nothing_else_explains_it():
    assert "Triton" in runner_refusal(None, [])
