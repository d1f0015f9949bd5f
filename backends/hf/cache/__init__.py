"""The paged cache's bookkeeping: no tensor in sight."""
