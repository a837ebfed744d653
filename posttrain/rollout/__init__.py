"""Rollouts by vLLM: which weights an engine has to get after a step, and how it takes them."""
