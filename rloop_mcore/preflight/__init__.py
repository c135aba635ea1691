"""Is every node of a job fit for a run? Asked once, in seconds, before anything is started (docs/preflight.md)."""
