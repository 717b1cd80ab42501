"""The laboratory: the paper's claims tested in the scene world, what scoring costs, and the results page."""
