"""``python -m posttrain``, also under ``accelerate launch -m posttrain`` and ``torchrun -m posttrain``."""

from posttrain.cli import main

main()
