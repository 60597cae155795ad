"""How Gemma 4 writes tool calls, as a grammar; imports no vLLM, since constraints compile without.

calls       what stands around the names and arguments of calls
layout      how the arguments are written

``tool_parser``, beside this folder, is vLLM's side of it.
"""
