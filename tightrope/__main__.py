"""`python -m tightrope` is the `tightrope` command."""

from tightrope.server.cli.main import main

raise SystemExit(main())
