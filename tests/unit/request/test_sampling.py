"""What sampling parameters become on a canvas."""

from __future__ import annotations

import pytest
from helpers.sampling import CONSTRAINT, RULE, Sampling

from vllm_diffusion.constrain.constraints import Constraints, Holes
from vllm_diffusion.request.admitted import Admitted
from vllm_diffusion.request.sampling import GREEDY_SEED, constraints, ends, noise_seed

PLAIN = Admitted(rule=RULE)


def test_a_default_request_changes_nothing_in_its_distribution():
    assert constraints(Sampling(), PLAIN) == Constraints()
    # Stop ids matter to min_tokens alone.
    stopping = Sampling(all_stop_token_ids={1, 2}, eos_token_id=1)
    assert constraints(stopping, PLAIN) == Constraints()


def test_every_wish_of_a_request_reaches_its_constraints():
    sampling = Sampling(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        min_tokens=3,
        all_stop_token_ids={9, 8},
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={5: -100.0, 6: 2},
        bad_words_token_ids=[[4], [4, 5]],
        allowed_token_ids=[1, 2, 2],
    )
    assert constraints(sampling, PLAIN) == Constraints(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        early=((8, 3), (9, 3)),
        presence=0.5,
        frequency=-0.5,
        repetition=1.1,
        bias=((5, -100.0), (6, 2.0)),
        bad_words=((4,), (4, 5)),
        allowed=(1, 2),
    )


def test_an_answer_may_not_stop_before_its_last_pin():
    admitted = Admitted(rule=RULE, seed_canvas=(1, 2, 3, 4), pinned=(2,))
    sampling = Sampling(
        eos_token_id=50, stop_token_ids=[51], all_stop_token_ids={50, 51, 52}, min_tokens=1
    )
    assert constraints(sampling, admitted).early == ((50, 3), (51, 3), (52, 1))
    # With ignore_eos vLLM gives no EOS here: it ends nothing, so it may be said.
    assert constraints(Sampling(all_stop_token_ids={50}), admitted).early == ()


def test_a_constrained_request_may_say_the_ids_it_asks_about():
    admitted = Admitted(rule=RULE, constrained=True)
    assert constraints(Sampling(logprob_token_ids=[3, 4]), admitted).allowed == (3, 4)


@pytest.mark.parametrize(
    ("temperature", "seed", "key"),
    [(1.0, None, None), (1.0, 5, 5), (0.0, None, GREEDY_SEED), (0.0, 5, 5), (1e-6, None, 0)],
)
def test_a_greedy_request_without_a_seed_has_a_constant_one(
    temperature: float, seed: int | None, key: int | None
):
    assert noise_seed(Sampling(temperature=temperature, seed=seed)) == key
    assert (constraints(Sampling(temperature=temperature), PLAIN).temperature == 0) == (
        temperature < 0.1
    )


def test_bad_words_of_a_constrained_text_are_tokens_that_never_stand() -> None:
    words = {"bad_words_token_ids": [[7], [9]]}
    free = constraints(Sampling(**words), PLAIN)
    bound = constraints(Sampling(**words, structured_outputs=CONSTRAINT), PLAIN)
    assert (free.bad_words, free.early) == (((7,), (9,)), ())
    assert bound.bad_words == ()
    assert [token for token, until in bound.early if until > 10**9] == [7, 9]


def test_an_answer_ends_with_the_ids_that_vllm_stops_at() -> None:
    stops = {"stop_token_ids": [8, 5], "eos_token_id": 5}
    assert ends(Sampling(), PLAIN) == ()
    assert ends(Sampling(**stops), PLAIN) == (5, 8)
    assert ends(Sampling(**stops, ignore_eos=True), PLAIN) == (8, 5)
    assert ends(Sampling(eos_token_id=5, ignore_eos=True), PLAIN) == ()
    # Where an end may stand and the answer goes on.
    for wish in (
        {"min_tokens": 1},
        {"bad_words_token_ids": [[3, 4]]},
        {"structured_outputs": CONSTRAINT},
    ):
        assert ends(Sampling(**stops, **wish), PLAIN) == ()
    holes = Holes(shown=3, pad=0, end=5)
    for admitted in (
        Admitted(rule=RULE, read_only=True),
        Admitted(rule=RULE, seed_canvas=(5, 5, 5)),
        Admitted(rule=RULE, seed_canvas=(5, 5, 5), pinned=(0,), holes=holes),
    ):
        assert ends(Sampling(**stops), admitted) == ()
