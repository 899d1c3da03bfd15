"""What a run is made from: frozen models, YAML and overrides, recipes."""
