"""``kava bench``: how long things take and what they need, compared with other tools."""
