"""What a client asks for: options, text on a canvas, and the record that the engine gets of both.

options     what a request may set, and whether a value is well formed
text        template, suffix and draft as rows of token ids
parse       a request's options, or one error that names every problem
sampling    sampling parameters as constraints on a canvas

Takes vLLM's ``SamplingParams`` by its attributes, gives frozen records, and imports no vLLM.
"""
