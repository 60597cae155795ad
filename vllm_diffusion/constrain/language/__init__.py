"""What a constraint says, whatever it was written in, as one grammar of characters (``syntax``).

    kinds        a kind and a text, as a request gives them
    schema       JSON schemas, from json_text, numeric, formats and compose
    regex        regular expressions
    ebnf         EBNF and Lark
    tags         structural tags
    gemma_calls  tool calls in Gemma's own form, as EBNF

`written` gives a grammar back as EBNF, for a parser. docs/constraints.md says what is followed and
what is refused.
"""
