"""What a canvas may say as a whole, as an automaton over classes of tokens.

    schema, compose,        a JSON schema, a regular expression, EBNF, structural tags
    regex, ebnf, tags       -> one grammar of characters (syntax)
    network, dfa            -> a minimal automaton over bytes, recursion followed to a depth
    classes                 -> beside a vocabulary, as a trie: a record.TokenAutomaton

`compile.compile_constraint` does all of it, once a constraint. docs/constraints.md says what is
followed and what is refused.
"""
