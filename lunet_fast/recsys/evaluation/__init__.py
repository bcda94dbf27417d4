"""How good a recommender is: beside other methods, by other settings, and what its inversion is good for."""
