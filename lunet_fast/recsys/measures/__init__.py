"""What is measured of any recommender: metrics, rankings, and the parts of the data they are measured on."""
