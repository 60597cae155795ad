"""A constraint as an automaton over classes of tokens, and canvases conditioned on one.

network, dfa            a grammar (``constrain.language``) -> a minimal automaton over bytes
vocabulary, classes     -> beside a vocabulary, as a trie: a record.TokenAutomaton
compile                 all of it, once a constraint
allowed, thinking       the same with some tokens only; behind a block of free thinking
walk, slots             which state text leads to, on the host; of every slot, on the device
edges, posterior, rows  a canvas given that it is accepted, and its statistics
"""
