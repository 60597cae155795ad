"""Find the best decoding rule for a user's own task by paired runs: `vllm-diffusion tune`.

items      the task's items, from a file, and the verifier that scores answers
arms       the rules to try: presets, constants, and the neighbours of a rule
compare    scores and forwards of an arm, its paired difference, and which arm to recommend
answers    an engine that answers the items under one arm
screen     the user's output, apart from the engine's log
refusal    why an engine did not start, and the remedy
command    the command line
"""
