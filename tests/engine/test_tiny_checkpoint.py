"""The random checkpoint is complete: it loads like the released model, and its bytes repeat."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    DiffusionGemmaForBlockDiffusion,
)

from vllm_diffusion.models.diffusion_gemma.testing.checkpoint import (
    TinySpec,
    make_tiny_checkpoint,
    make_weightless_checkpoint,
)
from vllm_diffusion.models.diffusion_gemma.testing.tokenizer import (
    MIN_VOCAB,
    SPECIAL_TOKENS,
    build_tokenizer,
)
from vllm_diffusion.testing.tiny_checkpoint import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def weights(checkpoint):
    return load_file(checkpoint / "model.safetensors")


@pytest.fixture(scope="module")
def model(checkpoint):
    return DiffusionGemmaForBlockDiffusion.from_pretrained(checkpoint).eval()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return AutoProcessor.from_pretrained(checkpoint)


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def image_inputs(processor, text: str = "What is this?"):
    picture = Image.new("RGB", (64, 48), (200, 30, 30))
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    ]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    return processor(text=prompt, images=[picture], return_tensors="pt")


def test_same_spec_gives_the_same_bytes_in_another_process(checkpoint, tmp_path):
    program = "vllm_diffusion.testing.tiny_checkpoint"
    options = ["--family", "diffusion_gemma", str(tmp_path)]
    subprocess.run([sys.executable, "-m", program, *options], check=True, timeout=120)
    assert digests(tmp_path) == digests(checkpoint)


def test_default_checkpoint_is_small(checkpoint):
    assert sum(file.stat().st_size for file in checkpoint.iterdir()) < 3_000_000


def test_another_seed_changes_every_weight(weights, tmp_path):
    other = load_file(make_tiny_checkpoint(tmp_path, TinySpec(seed=1)) / "model.safetensors")
    assert other.keys() == weights.keys()
    assert [name for name in weights if torch.equal(weights[name], other[name])] == []


def test_weight_names_are_those_of_the_released_checkpoint(weights):
    text = {name for name in weights if ".vision_tower." not in name}
    layer = "model.decoder.layers.0."
    assert {name.removeprefix(layer) for name in text if name.startswith(layer)} == {
        "experts.down_proj",
        "experts.gate_up_proj",
        "input_layernorm.weight",
        "layer_scalar",
        "mlp.down_proj.weight",
        "mlp.gate_proj.weight",
        "mlp.up_proj.weight",
        "post_attention_layernorm.weight",
        "post_feedforward_layernorm.weight",
        "post_feedforward_layernorm_1.weight",
        "post_feedforward_layernorm_2.weight",
        "pre_feedforward_layernorm.weight",
        "pre_feedforward_layernorm_2.weight",
        "router.per_expert_scale",
        "router.proj.weight",
        "router.scale",
        "self_attn.k_norm.weight",
        "self_attn.k_proj.weight",
        "self_attn.o_proj.weight",
        "self_attn.q_norm.weight",
        "self_attn.q_proj.weight",
        "self_attn.v_proj.weight",
    }
    assert {name for name in text if ".layers." not in name} == {
        "model.decoder.embed_tokens.weight",
        "model.decoder.norm.weight",
        "model.decoder.self_conditioning.down_proj.weight",
        "model.decoder.self_conditioning.gate_proj.weight",
        "model.decoder.self_conditioning.pre_norm.weight",
        "model.decoder.self_conditioning.up_proj.weight",
        "model.encoder.embed_vision.embedding_projection.weight",
    }


def test_full_layers_share_keys_as_values(weights):
    with_values = {name.split(".")[3] for name in weights if name.endswith("decoder.v_proj.weight")}
    assert "model.decoder.layers.2.self_attn.k_proj.weight" in weights
    assert "model.decoder.layers.2.self_attn.v_proj.weight" not in weights
    assert "2" not in with_values


def test_encoder_keeps_only_its_own_layer_scalars_and_they_differ(weights):
    encoder = "model.encoder.language_model."
    own = {name for name in weights if name.startswith(encoder)}
    assert own == {f"{encoder}layers.{layer}.layer_scalar" for layer in range(3)}
    for name in own:
        decoder = name.replace(encoder, "model.decoder.")
        assert weights[name].item() != pytest.approx(weights[decoder].item(), abs=1e-3)


def test_no_vector_is_left_at_its_initial_value(weights):
    constant = [
        name for name, weight in weights.items() if weight.dim() <= 1 and weight.eq(1).any()
    ]
    assert constant == []
    assert [name for name, weight in weights.items() if not weight.isfinite().all()] == []


def test_unperturbed_checkpoint_keeps_the_initial_values(tmp_path):
    plain = load_file(make_tiny_checkpoint(tmp_path, TinySpec(perturb=False)) / "model.safetensors")
    assert plain["model.decoder.layers.0.layer_scalar"].item() == 1
    assert plain["model.decoder.layers.0.router.per_expert_scale"].eq(1).all()


def test_making_a_checkpoint_leaves_the_global_random_state_alone(tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_tiny_checkpoint(tmp_path)
    assert torch.equal(torch.rand(3), expected)


def test_auto_classes_find_model_and_processor(checkpoint, processor):
    assert type(processor).__name__ == "Gemma4Processor"
    model = AutoModelForMultimodalLM.from_pretrained(checkpoint)
    assert type(model).__name__ == "DiffusionGemmaForBlockDiffusion"
    assert model.config.text_config.final_logit_softcapping == 30


def test_generation_constants_are_the_released_ones(checkpoint, model):
    constants = json.loads((checkpoint / "generation_config.json").read_text())
    assert constants["max_denoising_steps"] == 48
    assert (constants["t_min"], constants["t_max"]) == (0.4, 0.8)
    assert constants["sampler_config"]["_cls_name"] == "EntropyBoundSamplerConfig"
    assert model.generation_config.sampler_config.entropy_bound == 0.1


def test_canvas_settles_over_a_varying_number_of_steps(model):
    """Guards the scales of tiny_weights: neither every position at once nor none at all."""
    prompts = torch.randint(30, 512, (4, 12), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    output = model.generate(prompts, max_new_tokens=32)
    steps = 32 / output.tokens_per_forward
    assert steps.min() > 8
    assert steps.min() < 48
    assert len(set(output.sequences[:, 12:].flatten().tolist())) > 20


def test_logits_use_the_range_of_the_softcap(model):
    torch.manual_seed(0)
    prompt = torch.arange(40, 60)[None]
    logits = model(input_ids=prompt).logits[0]
    assert 15 < logits.max() < 30
    entropy = torch.distributions.Categorical(logits=logits / 0.6).entropy()
    assert entropy.quantile(0.05) < 0.5
    assert entropy.quantile(0.95) > 2


def test_image_reaches_the_canvas(model, processor):
    inputs = image_inputs(processor)
    soft_tokens = int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert 1 < soft_tokens <= 70
    torch.manual_seed(0)
    output = model.generate(**inputs, max_new_tokens=32)
    assert output.sequences.shape[1] > inputs["input_ids"].shape[1]

    canvas = torch.arange(100, 132)[None]
    red = model(**inputs, decoder_input_ids=canvas).logits
    inputs["pixel_values"] = inputs["pixel_values"].flip(-1)
    assert not torch.allclose(red, model(**inputs, decoder_input_ids=canvas).logits, atol=1e-3)


def test_chat_template_takes_strings_and_parts(processor):
    as_string = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Hi"}]
    as_parts = [
        {"role": message["role"], "content": [{"type": "text", "text": message["content"]}]}
        for message in as_string
    ]
    expected = "<bos><|turn>system\nBe brief.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n"
    for conversation in (as_string, as_parts):
        text = processor.apply_chat_template(conversation, add_generation_prompt=True)
        assert text == expected
    assert processor.tokenizer(expected, add_special_tokens=False)["input_ids"].count(4) == 3


def test_assistant_turns_are_named_model(processor):
    conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}]
    assert processor.apply_chat_template(conversation).endswith("<|turn>model\nYes<turn|>\n")


@pytest.mark.parametrize("text", ["hello 2024!", "Grüße, 你好 🙂", "  a\n\tb ", '{"a": [1, 23]}'])
def test_tokenizer_round_trips_any_text(checkpoint, text):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_digits_are_separate_tokens(checkpoint):
    tokens = AutoTokenizer.from_pretrained(checkpoint).tokenize("in 2024")
    assert tokens[-4:] == ["2", "0", "2", "4"]


def test_special_tokens_have_fixed_ids_and_vanish_from_text(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(range(len(SPECIAL_TOKENS)))
    assert tokenizer.decode([4, 100, 5], skip_special_tokens=True) == tokenizer.decode([100])
    assert tokenizer.image_token_id == SPECIAL_TOKENS.index("<|image|>")


@pytest.mark.parametrize("vocab", [MIN_VOCAB, 512, 5000])
def test_every_id_has_a_token(vocab):
    tokenizer = build_tokenizer(vocab)
    assert tokenizer.get_vocab_size() == vocab
    assert None not in [tokenizer.id_to_token(index) for index in range(vocab)]


def test_sizes_are_taken_from_the_spec(tmp_path):
    spec = TinySpec(
        canvas=64, hidden=96, layers=7, vocab=640, sliding_window=16, dtype="bfloat16", max_steps=9
    )
    model = DiffusionGemmaForBlockDiffusion.from_pretrained(make_tiny_checkpoint(tmp_path, spec))
    text = model.config.text_config
    assert model.dtype == torch.bfloat16
    assert (model.config.canvas_length, text.hidden_size, text.vocab_size) == (64, 96, 640)
    assert text.sliding_window == 16
    assert text.layer_types == ["sliding_attention"] * 5 + ["full_attention"] * 2
    assert model.generation_config.max_denoising_steps == 9


def test_command_line_reports_what_it_wrote(tmp_path, capsys):
    options = ["--layers", "1", "--no-perturb", "--dtype", "float16"]
    assert main(["--family", "diffusion_gemma", str(tmp_path / "new"), *options]) == 0
    assert "MB" in capsys.readouterr().out
    assert (tmp_path / "new" / "chat_template.jinja").exists()


def test_impossible_spec_names_every_problem():
    with pytest.raises(ValueError, match=r"head_dim must be one of .*vocab must be at least"):
        TinySpec(head_dim=48, vocab=10)
    with pytest.raises(ValueError, match="canvas must be positive, but got 0"):
        TinySpec(canvas=0)
    with pytest.raises(ValueError, match="must be a multiple of kv_heads"):
        TinySpec(kv_heads=3)


def test_a_checkpoint_without_weights_differs_in_nothing_else(checkpoint, tmp_path):
    without = make_weightless_checkpoint(tmp_path / "without")
    files = {file.name: file.read_bytes() for file in checkpoint.iterdir()}
    del files["model.safetensors"]
    assert {file.name: file.read_bytes() for file in without.iterdir()} == files
