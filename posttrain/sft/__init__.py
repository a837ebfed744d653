"""The SFT family."""
