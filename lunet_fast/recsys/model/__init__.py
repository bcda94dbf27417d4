"""The recommender: its configuration, network, losses, training and files."""
