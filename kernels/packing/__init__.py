"""First-fit packing and prefix trees."""
