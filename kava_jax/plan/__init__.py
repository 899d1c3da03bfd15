"""``kava plan``: what a run will need and cost, compiled for its devices without having them."""
