"""``posttrain doctor``: what is wrong with a machine, and what went wrong in a run."""
