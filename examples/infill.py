"""Fill holes, insert before given text, change a given text: `LLM()` on a small DiffusionGemma.

    python examples/infill.py [--checkpoint DIR]

The same options go over HTTP as `vllm_xargs`; a suffix is also a field of `/v1/completions`.
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams

CHECKPOINT = Path(__file__).parent / "tiny-diffusiongemma"

# A user with a GPU and the released checkpoint needs none of these.
SMALL = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "enforce_eager": True}


def main() -> None:
    """Ask for the four kinds of filling, and print what comes back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    llm = LLM(str(parser.parse_args().checkpoint), **SMALL)

    # Text and holes: a number is a hole of at most so many tokens.
    person = "Rosa from Madrid works as a clerk at 55."
    template = ['[{"name":"', 3, '","age":', 3, ',"city":"', 4, '","job":"', 3, '"}]']
    show("template", ask(llm, person, diffusion_template=template))
    rows = [4, "/3124/", 4, "/4312"]
    show("sudoku", ask(llm, "sudoku 0431/0024/0243/4002", diffusion_template=rows))

    # What follows is given; the answer is what belongs before it.
    before = ask(llm, person, max_tokens=9, diffusion_suffix=',"city":"Madrid","job":"clerk"}]')
    show("suffix", before)

    # A draft, three tenths of it noise.
    edit = "Dublin becomes Madrid: Carol, 23, is a nurse in Dublin."
    draft = {"diffusion_draft": "Carol, 23, is a nurse in Dublin.", "diffusion_noise_level": 0.3}
    show("draft", ask(llm, edit, **draft))


def ask(llm: LLM, question: str, max_tokens: int = 64, **options: object) -> str:
    """The answer of the model to one question."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=1, extra_args=options)
    messages = [{"role": "user", "content": question}]
    return str(llm.chat(messages, sampling, use_tqdm=False)[0].outputs[0].text)


def show(kind: str, answer: str) -> None:
    """One line an answer."""
    print(f"{kind:<9} {answer}")


if __name__ == "__main__":
    main()
