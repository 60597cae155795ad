"""A constraint as an automaton over classes of tokens, and canvases conditioned on one.

network, dfa            a grammar (``constrain.language``) -> a minimal automaton over bytes
vocabulary, classes     a vocabulary as a trie; with it the automaton becomes a TokenAutomaton
compile                 all of these steps, once for each constraint
allowed, thinking       an automaton limited to some tokens; one behind a block of free thinking
walk, slots             the state that a text leads to, on the host; by slot, on the device
edges, posterior, rows  the distribution of a canvas given that it is accepted, its statistics
record, class_stats     the records of this folder
"""
