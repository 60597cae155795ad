"""LLaDA, LLaDA-1.5, iLLaDA and LLaDA-MoE: every row sees every row, masks ahead included."""
