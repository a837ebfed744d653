"""What PEFT lacks, and guards for what it gets wrong."""
