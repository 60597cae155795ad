"""What a canvas may say as a whole, as an automaton over classes of tokens.

    constraint -> EBNF text     source      xgrammar writes it
    -> rules                    rules       what the text says
    -> byte automaton           expand, dfa bounded nesting, deterministic, minimal
    -> token automaton          classes     beside a vocabulary as a trie

`compile.compile_constraint` does all of it into a `record.TokenAutomaton`, once per constraint.
"""
