"""A trained recommender at work: scores, top-N lists, people it has not seen, export."""
