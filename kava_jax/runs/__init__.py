"""From a config to a run and back: where the rooms below meet."""
