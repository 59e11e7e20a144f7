"""Models that ship with bakeout."""
