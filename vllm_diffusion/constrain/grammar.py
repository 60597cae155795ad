"""A constraint as a grammar that a parser follows token by token, compiled for a vocabulary.

Takes what vLLM's structured outputs take, a kind and its text. Gives a compiled grammar, from which
every request gets a parser of its own. Any grammar without context will do: what nests may nest
as deep as it likes. Compiling takes long (it sorts the vocabulary by what the grammar's states say
of it), so results are kept; xgrammar does both, and is the only thing that this file wraps.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Final

import xgrammar

from vllm_diffusion.constrain.guard import Guard
from vllm_diffusion.constrain.language.ebnf import parsed, reason
from vllm_diffusion.constrain.language.kinds import grammar_of
from vllm_diffusion.constrain.language.written import written
from vllm_diffusion.errors import ConstraintError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vllm_diffusion.constrain.automaton.thinking import Thinking
    from vllm_diffusion.constrain.automaton.vocabulary import Vocabulary
    from vllm_diffusion.constrain.language.syntax import Grammar

CACHE_BYTES: Final = 256 << 20
"""Compiled grammars that are kept, about; each takes up to a few MB at 262144 tokens."""


class GrammarCompiler:
    """Compiles grammars for one vocabulary and keeps them; may be shared by threads.

    Args:
        vocabulary: what every token id writes; a special one its ``mark``, so that a grammar can
            ask for it by its id, Token(48), and in no other way; empty for one that no grammar can
            ask for. As long as the model's vocabulary.
        threads: that compile one grammar.
        cache_bytes: that compiled grammars may take, roughly.
    """

    def __init__(
        self,
        vocabulary: Sequence[bytes],
        *,
        threads: int = 4,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        # Which tokens end a text is the request's. Named here, they would write nothing elsewhere:
        # xgrammar lets such a token stand anywhere in the text of a request that has others.
        info = xgrammar.TokenizerInfo(
            list(vocabulary),
            xgrammar.VocabType.RAW,
            vocab_size=len(vocabulary),
            stop_token_ids=[],
        )
        self._silent = frozenset(token for token, text in enumerate(vocabulary) if not text)
        self._compiler = xgrammar.GrammarCompiler(
            info, max_threads=threads, cache_limit_bytes=cache_bytes
        )

    def compile(
        self, kind: str, text: str, *, any_whitespace: bool = True
    ) -> xgrammar.CompiledGrammar:
        """Compile a constraint, or find it among those that were.

        Args:
            kind: a field of vLLM's ``StructuredOutputsParams``.
            text: what it holds, as JSON where it is no text.
            any_whitespace: between the parts of JSON values; else none.

        Raises:
            ConstraintError: the text is no constraint of this kind, or xgrammar cannot follow it,
                or no token of the vocabulary can begin it.
        """
        return self.compile_rules(rules_of(kind, text, any_whitespace=any_whitespace))

    def compile_rules(self, rules: xgrammar.Grammar) -> xgrammar.CompiledGrammar:
        """The same of what ``rules_of`` gives.

        Raises:
            ConstraintError: xgrammar cannot follow them, or no token of the vocabulary can begin.
        """
        try:
            compiled = self._compiler.compile_grammar(rules)
        except (RuntimeError, ValueError) as error:
            raise ConstraintError(
                f"The grammar of the constraint cannot be followed: {reason(error)}"
            ) from error
        mask = xgrammar.allocate_token_bitmask(1, compiled.tokenizer_info.vocab_size)
        matcher = xgrammar.GrammarMatcher(compiled)
        matcher.fill_next_token_bitmask(mask)
        if not mask.any() and not matcher.is_completed():
            raise ConstraintError("No token of the vocabulary can begin what the grammar asks for.")
        return compiled

    def guard(
        self,
        compiled: xgrammar.CompiledGrammar,
        *,
        end_tokens: Sequence[int],
        tokens_left: int | None = None,
        written: Sequence[int] = (),
        thinking: Thinking | None = None,
    ) -> Guard:
        """The guard of a request.

        Args:
            compiled: by this compiler.
            end_tokens: ids that end the request's text, at least one.
            tokens_left: that it may write yet; None for any number.
            written: the tokens it has written, where it comes back.
            thinking: that comes before the text.
        """
        return Guard(
            xgrammar.GrammarMatcher(compiled, override_stop_tokens=list(end_tokens)),
            end_tokens=end_tokens,
            silent=self._silent,
            vocab_size=compiled.tokenizer_info.vocab_size,
            tokens_left=tokens_left,
            written=written,
            thinking=thinking,
        )


def rules_of(
    kind: str, text: str, *, any_whitespace: bool = True, grammar: Grammar | None = None
) -> xgrammar.Grammar:
    """A constraint as xgrammar takes it.

    Args:
        kind: a field of vLLM's ``StructuredOutputsParams``.
        text: what it holds, as JSON where it is no text.
        any_whitespace: between the parts of JSON values; else none.
        grammar: the translation of both, where there is one: xgrammar reads all kinds too, but not
            all that a schema says.

    Raises:
        ConstraintError: the text is no constraint of this kind, or xgrammar cannot read it.
    """
    try:
        if grammar is None and kind == "grammar":
            return parsed(text)
        if grammar is None and kind == "structural_tag":
            return xgrammar.Grammar.from_structural_tag(text)
        grammar = grammar or grammar_of(kind, text, any_whitespace=any_whitespace)
        return xgrammar.Grammar.from_ebnf(written(grammar))
    # What xgrammar raises is as various as what it reads.
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ConstraintError(f"The constraint {kind} cannot be read: {reason(error)}") from error


@lru_cache(maxsize=2)
def compiler_of(vocabulary: Vocabulary, *, threads: int = 4) -> GrammarCompiler:
    """The compiler of a vocabulary, made once."""
    return GrammarCompiler(
        [vocabulary.text(token) for token in range(len(vocabulary))], threads=threads
    )
