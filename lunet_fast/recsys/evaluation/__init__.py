"""How good a recommender is: metrics, protocols, other methods, what inversion is good for."""
