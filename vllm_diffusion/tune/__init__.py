"""The best decoding rule for a user's own task, by paired runs: `vllm-diffusion tune`.

items      what is asked, from a file, and who judges the answers
arms       the rules that are tried: presets, constants, and the neighbours of a rule
compare    scores and forwards of an arm, its paired difference, and which arm to recommend
answers    an engine answers the items under one arm
screen     what the user sees of a run
refusal    why an engine did not start, and the way out
command    the command line
"""
