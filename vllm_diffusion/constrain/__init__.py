"""What a canvas may say, as a rewrite of its logits. Pure tensors, sparse at every border.

tokens -> allowed ids, bias, ids forbidden at some rows; penalties -> what the text so far costs an
id; words -> sequences that must not stand; pins -> positions with one id; slack -> what a text with
holes has too much; truncate -> min_p, top_k, top_p; rewrite -> all of them as one record; logits ->
on dense logits, in order; window, dense -> on one tile of the vocabulary; constraints -> what one
request asks; stacking, table -> what the slots of a batch ask, as a ``Rewrite``; transfer -> copies
between host and device.

A text that must obey: language -> a constraint as a grammar; automaton -> as an automaton that
canvases are conditioned on; grammar, guard -> as a parser on the host; corrections, masked -> what
that parser changes in a canvas; outcomes -> automaton, parser or neither; compile_pool,
compile_process -> where and when that is found out.
"""
