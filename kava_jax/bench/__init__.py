"""``kava bench``: how long things take and what they need, beside what else one could use."""
