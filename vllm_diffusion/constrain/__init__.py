"""What a canvas may say, as a rewrite of its logits. Pure tensors, sparse at every border.

tokens -> allowed ids, bias, ids forbidden at some rows; penalties -> what the text so far costs an
id; pins -> positions with one id; truncate -> min_p, top_k, top_p; rewrite -> all of them on dense
logits, in order; request -> one request's wishes; table -> every slot's wishes, as a batch's
``records.Rewrite``. Beside them, on the host: grammar -> a constraint compiled; guard -> the parser
that a canvas obeys.
"""
