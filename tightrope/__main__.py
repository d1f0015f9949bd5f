"""`python -m tightrope` is the `tightrope` command."""

from tightrope.server.cli import main

raise SystemExit(main())
