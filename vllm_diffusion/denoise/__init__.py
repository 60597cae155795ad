"""The parts that decoding rules are made of: pure functions on tensors, batch first.

schedule    temperature of a step
accept      positions that keep their token
score       how sure an open position is of its token; reveal chooses among them
noise       what a new canvas holds, and what rejected positions become; renoise draws it
draft       a canvas that begins from given tokens instead of noise
stop        whether a canvas is finished
rng         counter-based random numbers; philox is the same for Triton kernels
constants   a rule's constants, each declared once
presets     named sets of constants
"""
