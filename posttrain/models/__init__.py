"""Models and tokenizers: the small one built in code, checkpoints, adapters."""
