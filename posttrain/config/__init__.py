"""What a config may say, and every mistake in it at once. Never imports torch."""
