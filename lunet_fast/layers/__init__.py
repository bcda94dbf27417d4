"""What people import: the layers, nets and flows made of them, and their activations."""
