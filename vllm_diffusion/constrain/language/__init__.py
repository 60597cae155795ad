"""What a constraint says, whatever it was written in, as one grammar of characters (``syntax``).

    kinds        a kind and a text, as a request gives them
    schema       JSON schemas, from json_text, strings, numeric, arrays, objects and formats;
                 compose, negation and addresses bring them to a form without parts before, loose
                 to one that asks less
    regex        regular expressions; regular, what several of them ask for together
    ebnf         EBNF and Lark
    tags         structural tags
    calls        tool calls in the form of a family: schema once more, with the family's layout for
                 json_text; typed reads what comes of them

`literals` is the smallest automaton of a list of texts, `room` what a text of limited length cannot
reach. `written` gives a grammar back as EBNF, for a parser. docs/structured_output.md says what is
followed and what is refused.
"""
