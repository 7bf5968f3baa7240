"""``python -m supir_batch`` is the ``supir-batch`` command."""

from supir_batch.cli import main

main()
