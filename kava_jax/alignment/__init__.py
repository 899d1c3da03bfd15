"""Layer maps and projectors between two caches."""
