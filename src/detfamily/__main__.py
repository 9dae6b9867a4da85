"""``python -m detfamily`` and ``torchrun -m detfamily``: the same as the console command."""

from detfamily.cli import main

raise SystemExit(main())
